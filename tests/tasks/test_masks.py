"""Soft masks: right place, right amount, from every form of segmentation, at a cost that follows the object."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from faster_coco_eval import mask as coco_mask

from visft_ds.tasks.segmentation.masks import MaskPlacement, grid_size, rasterise, rasterise_all

SIZE = (40, 60)
GRID = (10, 15)
STAY = MaskPlacement()


def _box(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def _mask(segmentation: Any, placement: MaskPlacement = STAY, size: tuple[int, int] = SIZE) -> npt.NDArray[np.uint8]:
    return rasterise(segmentation, SIZE, placement, size, grid_size(size, 4))


def test_coverage_of_cells() -> None:
    """Whole cells, half cells and a quarter: 8..22 x 12..18 in cells of 4."""
    mask = _mask([_box(8, 12, 22, 18)])
    expected = np.zeros(GRID)
    expected[3, 2:5], expected[3, 5] = 255, 127.5
    expected[4, 2:5], expected[4, 5] = 127.5, 63.75
    np.testing.assert_allclose(mask, expected, atol=0.5)  # rounding to whole numbers


def test_parts_are_united() -> None:
    """Overlapping polygons of an object are neither added nor cancelled out."""
    whole = _mask([_box(8, 8, 32, 24)])
    np.testing.assert_array_equal(_mask([_box(8, 8, 24, 24), _box(12, 8, 32, 24)]), whole)


@pytest.mark.parametrize(
    "placement",
    [STAY, MaskPlacement(-1.0, 60.0), MaskPlacement(1.5, -20.0, 1.5, -10.0), MaskPlacement(-0.4, 30.0, 0.3, 5.0)],
    ids=["as it is", "mirrored", "enlarged and cropped", "mirrored, shrunk and moved"],
)
def test_near_the_full_size_mask(placement: MaskPlacement) -> None:
    """Against the same polygon filled 16 times finer over the whole image; edges at other angles than 0 and 90."""
    points = np.array([[5.3, 7.1], [50.2, 3.4], [58.0, 36.6], [30.7, 20.2], [9.9, 38.0]])
    fine = placement.points(points) * 16
    # the filler leaves out what lies left of its canvas only if it has one: shift everything into a larger one
    canvas = coco_mask.frPyObjects([(fine + 2000).ravel().tolist()], 4000, 4000)
    full = coco_mask.decode(canvas)[2000 : 2000 + 640, 2000 : 2000 + 960, 0]
    expected = 255.0 * full.reshape(10, 64, 15, 64).mean(axis=(1, 3))
    mask = _mask([points.ravel().tolist()], placement)
    assert expected.max() == 255 and mask.max() > 250
    # 16 subsamples a cell: an edge may be misplaced by half a subsample, an eighth of a cell
    assert np.abs(mask - expected).max() <= 255 / 8
    assert abs(mask.mean() - expected.mean()) < 1.5


@pytest.mark.parametrize("corners", [(8, 12, 24, 30), (0, 0, 60, 40)], ids=["inside", "whole image"])
def test_run_length_codes(corners: tuple[int, int, int, int]) -> None:
    """Both forms give the polygon's mask, wherever the transforms put it; nothing is seen beyond the image's edge."""
    polygon = [_box(*corners)]
    compressed = coco_mask.frPyObjects(polygon, *SIZE)[0]
    text = {"size": list(SIZE), "counts": compressed["counts"].decode()}
    column = coco_mask.decode(compressed).T.ravel()
    ends = np.flatnonzero(np.diff(column)) + 1
    runs = np.diff([0, *([0] if column[0] else []), *ends, len(column)])  # the first run is one of zeros
    plain = {"size": list(SIZE), "counts": runs.tolist()}
    for placement in (
        STAY,
        MaskPlacement(-1.0, 60.0),
        MaskPlacement(2.0, -20.0, 2.0, -16.0),
        MaskPlacement(0.5, 8.0, 0.5, 0.0),
    ):
        expected = _mask(polygon, placement)
        assert expected.any()
        for code in (text, plain):
            np.testing.assert_array_equal(_mask(code, placement), expected)
    assert not _mask(text, MaskPlacement(offset_x=-70.0)).any()


@pytest.mark.parametrize("segmentation", [[], [[1, 2, 30, 20]], [[5, 5]], [[]], [[3, 3, 9, 9, 15, 15]]])
def test_nothing_to_fill(segmentation: list[list[float]]) -> None:
    """Two points are no box and a line has no area."""
    assert not _mask(segmentation).any()


def test_objects_of_an_image_are_drawn_as_each_alone() -> None:
    """Polygons of several parts, without any, outside, odd, and run-length codes between them."""
    objects: list[Any] = [
        [_box(8, 8, 24, 24), [30.5, 2, 40, 9, 35, 20, 31, 31.25]],
        [],
        {"size": list(SIZE), "counts": [400, 9, 31, 9, 1951]},
        [_box(200, 200, 230, 230)],
        [[1, 2, 30, 20], [3, 3, 20, 4, 9, 30, 7]],
        [_box(-20, -9, 70, 50)],
    ]
    for placement in (STAY, MaskPlacement(-1.3, 70.0, 0.7, 3.0)):
        together = rasterise_all(objects, SIZE, placement, SIZE, GRID)
        assert together.shape == (6, *GRID) and together[[0, 2, 4, 5]].any(axis=(1, 2)).all()
        for mask, segmentation in zip(together, objects, strict=True):
            np.testing.assert_array_equal(mask, _mask(segmentation, placement))
    assert rasterise_all([], SIZE, STAY, SIZE, GRID).shape == (0, *GRID)


@pytest.mark.parametrize("subsamples", [1, 3, 4, 15])
def test_cells_are_means_of_their_subsamples(subsamples: int) -> None:
    """Every cell against the plain mean of the finely drawn polygon; the fastest way to add is not the plainest."""
    polygon = [5.0, 3.0, 52.0, 6.5, 57.0, 31.0, 30.0, 37.0, 7.0, 33.0]
    height, width = GRID[0] * subsamples, GRID[1] * subsamples
    scale = subsamples / 4
    code = coco_mask.frPyObjects([[value * scale for value in polygon]], height, width)
    fine = coco_mask.decode(code)[..., 0].reshape(GRID[0], subsamples, GRID[1], subsamples)
    mask = rasterise([polygon], SIZE, STAY, SIZE, GRID, subsamples)
    assert mask.any() and abs(mask.astype(float) - 255 * fine.mean(axis=(1, 3))).max() <= 0.5


def test_two_point_parts_do_not_spoil_the_rest() -> None:
    np.testing.assert_array_equal(_mask([[1, 2, 30, 20], _box(8, 8, 16, 16)]), _mask([_box(8, 8, 16, 16)]))


def test_one_pixel() -> None:
    mask = _mask([_box(9, 13, 10, 14)])
    assert mask[3, 2] == 16 and mask.sum() == 16  # a sixteenth of one cell


def test_outside() -> None:
    assert not _mask([_box(8, 8, 16, 16)], MaskPlacement(offset_x=60.0)).any()
    assert not _mask([_box(8, 8, 16, 16)], MaskPlacement(offset_y=-16.0)).any()


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([[1, 2, 3, float("nan"), 5, 6]], "finite numbers"),
        ([[[1, 2], [3, 4], [5, 6]]], "flat list"),
        (["123456"], "flat list"),
        ([8, 8, 16, 8, 16, 16], "flat list"),
        ("polygons", "neither a list of polygons nor"),
        (7, "neither a list of polygons nor"),
        ({"size": [41, 60], "counts": [2460]}, r"size \[41, 60\].* image's size \[40, 60\]"),
        ({"size": [40, 60]}, "must have counts"),
    ],
)
def test_unreadable(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _mask(segmentation)


def test_cost_follows_the_object() -> None:
    """A small object in 6000 x 4000 pixels; and a filler that walks to a wild coordinate would not return."""
    size = (6000, 4000)
    grid = grid_size(size, 4)
    tracemalloc.start()
    mask = rasterise([_box(1000, 1000, 1100, 1100)], size, STAY, size, grid)
    rasterise([[*_box(8, 12, 20, 18), 1e12, 3.0]], SIZE, STAY, SIZE, GRID)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.sum() == 25 * 25 * 255
    assert peak < 2 * grid[0] * grid[1]  # the mask itself and little else; the full size would be 16 times as much


def test_grid_covers_the_image() -> None:
    assert grid_size((1024, 1024), 4) == (256, 256)
    assert grid_size((1, 13), 4) == (1, 4)
    whole = rasterise([_box(0, 0, 13, 1)], (1, 13), STAY, (1, 13), (1, 4))
    np.testing.assert_array_equal(whole, [[255, 255, 255, 255]])
