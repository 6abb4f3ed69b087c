"""Pictures: what is drawn where, at any size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visft_ds.tasks.pictures import Picture, draw_detections, grid, palette, save_png

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}


def _gray(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def _has(picture: Picture, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def _halves(picture: Picture) -> tuple[Picture, Picture]:
    middle = picture.shape[1] // 2
    return picture[:, :middle], picture[:, middle:]


def test_truth_left_prediction_right_above_the_threshold() -> None:
    picture = draw_detections(
        _gray(112, 112),
        [[10, 40, 30, 30]],
        ["cat"],
        [[20, 50, 30, 30], [60, 60, 20, 20]],
        ["dog", "cat"],
        [0.9, 0.4],
        colours=COLOURS,
    )
    left, right = _halves(picture)
    assert _has(left, COLOURS["cat"]) and not _has(left, COLOURS["dog"])
    assert _has(right, COLOURS["dog"]) and not _has(right, COLOURS["cat"])


def test_box_lies_where_the_object_is() -> None:
    """A 50 x 100 image at four times its size: the frame of (10, 20, 30, 40) runs from (40, 80) to (160, 240)."""
    picture = draw_detections(_gray(100, 50), [[10, 20, 30, 40]], ["cat"], [], [], [], colours=COLOURS, side=400)
    left, _ = _halves(picture)
    red = (left[-400:] == COLOURS["cat"]).all(axis=-1)
    assert red[100:].any(axis=1).nonzero()[0].max() == 140  # below the tag: rows 80..240
    columns = red[100:].any(axis=0).nonzero()[0]
    assert (columns.min(), columns.max()) == (40, 160)


@pytest.mark.parametrize("size", [(16, 112), (112, 112), (700, 300), (1, 1)])
def test_every_size_is_readable(size: tuple[int, int]) -> None:
    """Small and large images come out with the longer side at the wanted length."""
    picture = draw_detections(_gray(*size), [], [], [], [], [], side=300)
    title = draw_detections(_gray(300, 300), [], [], [], [], [], side=300).shape[0] - 300
    height, width = picture.shape[0] - title, (picture.shape[1] - 12) // 2
    assert max(height, width) == 300 and picture.dtype == np.uint8


def test_odd_boxes_do_no_harm() -> None:
    """Predictions are not clipped to the image and may have no area; crowded tags find no free place."""
    boxes = [[-50, -50, 20, 20], [90, 90, 500, 500], [5, 5, 0, 0], [150, 3, 4, 4], *[[5, 5, 3, 3]] * 60]
    picture = draw_detections(_gray(112, 112), [], [], boxes, ["cat"] * 64, [1.0] * 64)
    left, right = _halves(picture)
    assert (left[60:] == 128).all(axis=-1).any(axis=1).all() and not np.array_equal(left, right)


def test_palette() -> None:
    names = [f"category {number}" for number in range(91)]
    colours = palette(names)
    assert list(colours) == names
    assert len(set(colours.values())) == 91
    # the first dozen, a small data set, must be told apart at a glance: at least 60 steps in some channel
    dozen = np.array([colours[name] for name in names[:12]])
    distance = np.abs(dozen[:, None] - dozen).max(axis=-1)
    assert distance[~np.eye(12, dtype=bool)].min() >= 60


def test_grid_keeps_every_picture() -> None:
    shades = [np.full((10 + 5 * n, 20, 3), 10 * n, dtype=np.uint8) for n in range(5)]
    sheet = grid(shades, columns=2)
    for shade in shades:
        assert (sheet == shade[0, 0]).all(axis=-1).sum() == shade.shape[0] * shade.shape[1]
    assert sheet.shape[1] == 2 * 20 + 3 * 12
    with pytest.raises(ValueError, match="0 pictures in 2 columns"):
        grid([])


def test_png_round_trip(tmp_path: Path) -> None:
    picture = draw_detections(_gray(40, 40), [[5, 5, 20, 20]], ["cat"], [], [], [])
    path = tmp_path / "new" / "picture.png"
    save_png(picture, path)
    assert np.array_equal(np.asarray(Image.open(path)), picture)
