"""Pictures of masks: what is tinted, what is not, at any size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from visft_ds.tasks.pictures import Picture, split_panels
from visft_ds.tasks.segmentation.pictures import MaskArray, decode_mask, draw_masks

COLOURS = {"cat": (255, 0, 0), "dog": (0, 0, 255)}
TITLE = 26  # pixels


def _gray(height: int, width: int) -> Picture:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def _block(size: tuple[int, int], top: int, left: int, bottom: int, right: int) -> MaskArray:
    mask = np.zeros(size, dtype=np.bool_)
    mask[top:bottom, left:right] = True
    return mask


def _has(picture: Picture, colour: tuple[int, int, int]) -> bool:
    return bool((picture == colour).all(axis=-1).any())


def test_tinted_inside_unchanged_outside() -> None:
    """A 100 x 50 image at four times its size; half gray and half red inside, all red on the line, gray elsewhere."""
    mask = _block((100, 50), 40, 10, 80, 40)
    left, right = split_panels(draw_masks(_gray(100, 50), [mask], ["cat"], [], [], [], colours=COLOURS, side=400))
    left, right = left[TITLE:, :200].astype(int), right[TITLE:, :200]
    # below the tag, which is in the middle (row 240) of an area from row 160 to 320 and column 40 to 160
    assert (np.abs(left[270:310, 50:150] - (191, 64, 64)) <= 1).all()  # 128 and 255 or 0: rounding
    assert (left[260:310, [40, 159]] == COLOURS["cat"]).all()
    outside = np.ones((400, 200), dtype=bool)
    outside[156:324, 36:164] = False
    assert (left[outside] == 128).all() and (right == 128).all()


def test_truth_left_prediction_right_above_the_threshold() -> None:
    masks = [_block((112, 112), 10, 10, 50, 50), _block((112, 112), 60, 60, 100, 100)]
    left, right = split_panels(
        draw_masks(_gray(112, 112), masks[:1], ["cat"], masks, ["dog", "cat"], [0.5, 0.49], colours=COLOURS)
    )
    assert left.shape == right.shape
    assert _has(left, COLOURS["cat"]) and not _has(left, COLOURS["dog"])
    assert _has(right, COLOURS["dog"]) and not _has(right, COLOURS["cat"])


def test_instances_of_one_category_differ() -> None:
    """Overlapping masks of one category: another tint, and a line between them where they overlap."""
    masks = [_block((100, 100), 0, 0, 100, 60), _block((100, 100), 20, 30, 90, 100)]
    left, _ = split_panels(draw_masks(_gray(100, 100), masks, ["cat"] * 2, [], [], [], colours=COLOURS, side=400))
    left = left[TITLE:]
    first, line, overlap, second = (left[300, column].astype(int) for column in (60, 120, 180, 300))
    assert np.abs(first - second).max() >= 25
    # the second mask has columns from 120 on and is drawn on top, the first ends at 240
    assert np.abs(line - first).max() >= 25 and np.abs(line - second).max() >= 25
    assert np.array_equal(overlap, second)


def test_small_object_is_seen_on_a_large_one() -> None:
    """Whatever the order: detections of the background would otherwise hide all others."""
    masks = [_block((100, 100), 40, 40, 60, 60), _block((100, 100), 0, 0, 100, 100)]
    for order in ([0, 1], [1, 0]):
        names = [["dog", "cat"][place] for place in order]
        _, right = split_panels(
            draw_masks(_gray(100, 100), [], [], [masks[i] for i in order], names, [0.9, 0.8], colours=COLOURS)
        )
        # inside of both, below the tag in the middle; and inside of the large one only
        assert (np.abs(right[TITLE + 255, 224].astype(int) - (64, 64, 191)) <= 1).all()
        assert (np.abs(right[TITLE + 400, 224].astype(int) - (191, 64, 64)) <= 1).all()


def test_tags_do_not_hide_a_crowd() -> None:
    """Of eleven objects smaller than their tags only one has a tag, so that the objects can be seen."""

    def coloured(count: int) -> int:
        masks = [
            _block((112, 112), 30 * (n // 4) + 10, 28 * (n % 4), 30 * (n // 4) + 14, 28 * (n % 4) + 4)
            for n in range(count)
        ]
        picture = draw_masks(_gray(112, 112), masks, ["cat"] * count, [], [], [])[TITLE:, :448]
        return int((picture != 128).any(axis=-1).sum())

    # a tag has over 500 pixels
    assert coloured(10) - coloured(9) > 500 and coloured(10) - coloured(11) > 9 * 500 - 1000


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (16, 112), (700, 300), (4000, 6000)])
@pytest.mark.parametrize("corner", [(0, 0), (-1, -1)])
def test_one_pixel_is_seen_at_every_size(size: tuple[int, int], corner: tuple[int, int]) -> None:
    mask = np.zeros(size, dtype=np.bool_)
    mask[corner] = True
    picture = draw_masks(_gray(*size), [mask], ["cat"], [], [], [], colours=COLOURS, side=300)
    left, _ = split_panels(picture)
    canvas = left[TITLE:]
    y, x = (0 if end == 0 else -1 for end in corner)
    height = max(1, round(size[0] * 300 / max(size)))
    width = max(1, round(size[1] * 300 / max(size)))
    assert picture.dtype == np.uint8 and canvas.shape[0] == height
    red, blue = canvas[y, :width][x][[0, 2]].astype(int)
    assert red > blue + 60


def test_crowds_and_empty_masks_do_no_harm() -> None:
    size = (112, 112)
    masks = [_block(size, n, n, n + 12, n + 12) for n in range(100)]
    masks += [np.zeros(size, dtype=np.bool_), np.ones(size, dtype=np.bool_)]
    names = ["cat", "dog"] * 51
    picture = draw_masks(_gray(*size), masks, names, masks, names, [1.0] * 102)
    left, right = split_panels(picture)
    assert left.shape == right.shape
    empty = draw_masks(_gray(*size), [], [], masks[100:101], ["cat"], [0.9])
    assert (empty[TITLE:, :448] == 128).all() and (empty[TITLE:, 460:] == 128).all()


def test_titles_fit_beside_narrow_images() -> None:
    left, right = split_panels(draw_masks(_gray(300, 30), [], [], [], [], []))
    assert left.shape == right.shape and right.shape[1] > 150
    assert (right[:TITLE, -1] == right[-1, -1]).all()


EXPECTED = np.zeros((5, 7), dtype=np.uint8, order="F")
EXPECTED[1:3, 2:4] = 1
CODE = coco_mask.encode(EXPECTED)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[2, 1, 4, 1, 4, 3, 2, 3]],
        [[2, 1, 3, 1, 3, 3, 2, 3], [3, 1, 4, 1, 4, 3, 3, 3]],
        CODE,
        {**CODE, "counts": CODE["counts"].decode("ascii")},
        {"size": [5, 7], "counts": [11, 2, 3, 2, 17]},
    ],
    ids=["polygon", "two polygons", "bytes", "str", "plain counts"],
)
def test_every_form_of_segmentation(segmentation: Any) -> None:
    mask = decode_mask(segmentation, 5, 7)
    assert mask.dtype == np.bool_ and np.array_equal(mask, EXPECTED > 0)


def test_segmentations_without_area_and_broken_ones() -> None:
    for nothing in ([], [[1, 1, 2, 2]], {"size": [5, 7], "counts": [35]}):
        assert decode_mask(nothing, 5, 7).shape == (5, 7) and not decode_mask(nothing, 5, 7).any()
    for broken in ({**CODE, "size": [7, 5]}, {"size": [5, 7], "counts": [11, 2]}, "text", [["a"]]):
        with pytest.raises(ValueError):  # noqa: PT011  each says something else
            decode_mask(broken, 5, 7)
