"""Objects of other pictures in a training picture: pixels and labels agree, whoever makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from visft_ds.data.samples import RawSample
from visft_ds.randomness import generator
from visft_ds.settings.tiles import Window
from visft_ds.tasks.detection.data import instance_targets
from visft_ds.tasks.paste import pasted

GREY, RED, GREEN = (40, 40, 40), (250, 10, 10), (10, 250, 10)
#: Rows below a diagonal of a square of 16 pixels, whose box is a little larger.
TRIANGLE = [[20.0, 10.0, 36.0, 26.0, 20.0, 26.0]]


def _object(category: int, box: list[float], segmentation: Any = None, iscrowd: int = 0) -> dict[str, Any]:
    annotation = {"id": 1, "bbox": box, "category_id": category, "iscrowd": iscrowd, "area": 1.0}
    return annotation | ({"segmentation": segmentation} if segmentation else {})


def _donor(size: tuple[int, int] = (40, 60)) -> RawSample:
    image = np.full((*size, 3), GREEN, np.uint8)
    image[10:26, 20:36][np.tri(16, dtype=bool)] = RED
    objects = [
        _object(3, [19.5, 9.5, 17, 17], TRIANGLE),
        _object(8, [0, 0, 9, 9]),
        _object(3, [0, 0, 60, 40], [[0, 0, 60, 0, 60, 40]], iscrowd=1),
    ]
    return RawSample(1, 1, size, image, objects, ())


def _picture(size: tuple[int, int] = (40, 60), *objects: dict[str, Any]) -> RawSample:
    return RawSample(0, 0, size, np.full((*size, 3), GREY, np.uint8), objects, ())


def _mask(annotation: Any) -> Any:
    return coco_mask.decode(annotation["segmentation"]) > 0


def _inner(mask: Any) -> Any:
    """The pixels of a mask whose neighbours are in it, too: those at its border are mixed."""
    padded = np.pad(mask, 1)
    upright = padded[:-2, 1:-1] & padded[2:, 1:-1]
    return mask & upright & padded[1:-1, :-2] & padded[1:-1, 2:]


@pytest.mark.parametrize("size", [(40, 60), (90, 50)])
def test_pixels_and_labels_of_what_is_pasted_agree(size: tuple[int, int]) -> None:
    below = _object(5, [0, 0, size[1], size[0]], [[0, 0, size[1], 0, size[1], size[0], 0, size[0]]])
    picture = _picture(size, below)
    places = set()
    for key in range(40):
        changed = pasted(picture, _donor(), generator(key), most=4)
        assert changed.image is not None and picture.image is not None
        assert (picture.image == GREY).all(), "the picture may be read again"
        without_pixels = [replace(sample, image=None) for sample in (picture, _donor())]
        from_labels = pasted(*without_pixels, generator(key), most=4)
        assert from_labels.annotations == changed.annotations
        if (changed.image == GREY).all():
            assert changed.annotations == [below]
            continue
        lower, upper = changed.annotations
        masks = [_mask(lower), _mask(upper)]
        assert (masks[0] ^ masks[1]).all() and upper["category_id"] == 3
        is_red = (changed.image.astype(int) - GREY)[..., 0] > 105
        assert is_red[_inner(masks[1])].all() and not is_red[_inner(masks[0])].any()
        for annotation, mask in zip(changed.annotations, masks, strict=True):
            rows, columns = np.nonzero(mask)
            x, y, width, height = annotation["bbox"]
            assert (x, x + width) == (columns.min(), columns.max() + 1)
            assert (y, y + height) == (rows.min(), rows.max() + 1)
            assert annotation["area"] == mask.sum()
        places.add(tuple(upper["bbox"]))
        targets = instance_targets({3: 0, 5: 1}, changed, [], generator(0))
        assert targets["masks"].shape[0] == 2 and targets["labels"].tolist() == [1, 0]
    assert len(places) > 20


def test_what_is_covered_loses_its_label_and_the_rest_keeps_it() -> None:
    small = _object(7, [30, 20, 2, 2], [[30, 20, 32, 20, 32, 22, 30, 22]])
    box_alone = _object(9, [10, 0, 40, 40])
    far = _object(4, [0, 0, 1, 1], [[0, 0, 1, 0, 1, 1, 0, 1]])
    crowd = _object(4, [0, 0, 60, 40], [[0, 0, 60, 0, 60, 40, 0, 40]], iscrowd=1)
    shown = {True: 0, False: 0}
    for key in range(200):
        changed = pasted(_picture((40, 60), small, box_alone, far, crowd), _donor(), generator(key), most=1)
        if len(changed.annotations) == 4 and changed.annotations[0] == small:
            continue
        covered = _mask(changed.annotations[-1])[20:22, 30:32].sum()
        categories = [annotation["category_id"] for annotation in changed.annotations]
        assert (7 in categories) == (covered < 3), "40 % of four pixels are two"
        assert crowd in changed.annotations and 9 in categories
        shown[7 in categories] += 1
    assert min(shown.values()) > 0


def test_nothing_is_pasted_beyond_a_tile_or_where_it_does_not_fit() -> None:
    window = Window(10, 30, 24, 24)
    count = 0
    for key in range(40):
        changed = pasted(replace(_picture(), window=window), _donor(), generator(key), most=1)
        for x, y, width, height in (annotation["bbox"] for annotation in changed.annotations):
            assert x >= 30 and x + width <= 54 and y >= 10 and y + height <= 34
            count += 1
        narrow = pasted(replace(_picture(), window=Window(0, 0, 9, 60)), _donor(), generator(key), most=4)
        assert not narrow.annotations
    assert count > 5


def test_levels_of_bands_are_not_rounded() -> None:
    donor = _donor()
    picture = _picture()
    assert donor.image is not None and picture.image is not None
    levels = [sample.image.astype(np.float32)[..., :2] + 0.25 for sample in (picture, donor)]  # type: ignore[union-attr]
    changed = pasted(replace(picture, image=levels[0]), replace(donor, image=levels[1]), generator(3), most=4)
    assert changed.image is not None and changed.image.dtype == np.float32
    assert changed.annotations
    values = np.unique(changed.image)
    assert {np.float32(40.25), np.float32(250.25)} <= set(values.tolist())
