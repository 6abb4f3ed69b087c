"""Soft masks: right place, right amount, from polygons as from run-length codes, at a cost that follows the
object.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from faster_coco_eval import mask as coco_mask

from tests.tasks.cases import corners
from visft_ds.data.transforms import Crop, Flip, Op, Resize
from visft_ds.tasks.masks.rasters import decode_mask, draw_masks, placement

SIZE = (40, 60)
GRID = (10, 15)
WAYS: dict[str, list[Op]] = {
    "as it is": [],
    "mirrored": [Flip()],
    "enlarged and cropped": [Resize(60, 90), Crop(10, 20, 40, 60)],
    "mirrored, shrunk and moved": [Flip(), Resize(20, 30), Crop(-5, -8, 40, 60)],
}


def _mask(segmentation: Any, ops: list[Op] = WAYS["as it is"]) -> npt.NDArray[np.uint8]:
    mask: npt.NDArray[np.uint8] = draw_masks([segmentation], SIZE, ops, 4)[0]
    return mask


def test_coverage_of_cells() -> None:
    """Whole cells, half cells and a quarter: 8..22 x 12..18 in cells of 4; and a sixteenth of one cell."""
    expected = np.zeros(GRID)
    expected[3, 2:5], expected[3, 5] = 255, 127.5
    expected[4, 2:5], expected[4, 5] = 127.5, 63.75
    np.testing.assert_allclose(
        _mask([corners(8, 12, 22, 18)]), expected, atol=0.5
    )  # rounding to whole numbers
    pixel = _mask([corners(9, 13, 10, 14)])
    assert pixel[3, 2] == 16 and pixel.sum() == 16


@pytest.mark.parametrize("ops", WAYS.values(), ids=WAYS.keys())
def test_near_the_full_size_mask(ops: list[Op]) -> None:
    """Against the same polygon filled 16 times finer over the whole image; edges at other angles than 0 and
    90.
    """
    points = np.array([[5.3, 7.1], [50.2, 3.4], [58.0, 36.6], [30.7, 20.2], [9.9, 38.0]])
    scale, offset = placement(SIZE, ops)
    fine = (points * scale + offset) * 16
    # the filler leaves out what lies left of its canvas only if it has one: shift everything into a larger
    # one
    canvas = coco_mask.frPyObjects([(fine + 2000).ravel().tolist()], 4000, 4000)
    full = coco_mask.decode(canvas)[2000 : 2000 + 640, 2000 : 2000 + 960, 0]
    expected = 255.0 * full.reshape(10, 64, 15, 64).mean(axis=(1, 3))
    mask = _mask([points.ravel().tolist()], ops)
    assert expected.max() == 255 and mask.max() > 250
    # 16 subsamples a cell: an edge may be misplaced by half a subsample, an eighth of a cell
    assert np.abs(mask - expected).max() <= 255 / 8
    assert abs(mask.mean() - expected.mean()) < 1.5


@pytest.mark.parametrize("ops", [*WAYS.values(), [Crop(0, 60, 40, 60)]])
def test_run_length_codes_give_the_polygons_masks(ops: list[Op]) -> None:
    """Wherever the transforms put them; nothing is seen beyond the image's edge."""
    for box in ((8, 12, 24, 30), (0, 0, 60, 40)):
        polygon = [corners(*box)]
        code = coco_mask.frPyObjects(polygon, *SIZE)[0]
        text = {"size": list(SIZE), "counts": code["counts"].decode()}
        np.testing.assert_array_equal(_mask(text, ops), _mask(polygon, ops))
        np.testing.assert_array_equal(decode_mask(text, SIZE), decode_mask(polygon, SIZE))
        assert decode_mask(text, SIZE).sum() == (box[2] - box[0]) * (box[3] - box[1])


@pytest.mark.parametrize("factor", [0.5, 1.25, 2])
def test_run_length_codes_scale_without_a_shift(factor: float) -> None:
    """A cell has the area of the code's pixels in it; so a code's centre is where its polygon's is."""
    size = (64, 96)
    ops: list[Op] = [Resize(round(64 * factor), round(96 * factor))]
    outline = [20.3, 9.1, 78.2, 6.4, 90.0, 58.6, 50.7, 33.2, 9.9, 60.0]
    code = coco_mask.frPyObjects([outline], *size)[0]
    of_polygon, of_code = draw_masks([[outline], code], size, ops, 4)
    # a fifth of a pixel is the finest part of one that cells of these three factors cut off
    pixels = coco_mask.decode(code).repeat(5, axis=0).repeat(5, axis=1)
    side = len(pixels) // len(of_code)
    areas = pixels.reshape(len(of_code), side, -1, side).mean(axis=(1, 3))
    np.testing.assert_allclose(of_code, 255 * areas, atol=0.5)  # rounding to whole numbers
    shift = np.subtract(_centre(of_code), _centre(of_polygon)) * 4 / factor
    # COCO's filler itself moves outlines, by a tenth of what it takes for pixels: here up to two of these
    assert np.abs(shift).max() < 0.2
    assert of_code.sum() == pytest.approx(of_polygon.sum(), rel=0.01)


def _centre(mask: npt.NDArray[np.uint8]) -> tuple[float, float]:
    """The centre of gravity, in cells."""
    rows, columns = np.indices(mask.shape)
    return float((rows * mask).sum() / mask.sum()), float((columns * mask).sum() / mask.sum())


def test_objects_of_an_image_are_drawn_as_each_alone() -> None:
    objects: list[Any] = [
        [corners(8, 8, 24, 24), corners(12, 8, 32, 24)],
        [corners(200, 200, 230, 230)],
        [corners(-20, -9, 70, 50)],
    ]
    masks = draw_masks(objects, SIZE, [], 4)
    np.testing.assert_array_equal(masks[0], _mask([corners(8, 8, 32, 24)]), "parts are united")
    assert not masks[1].any() and (masks[2] == 255).all() and draw_masks([], SIZE, [], 4).shape == (0, *GRID)
