"""Large-scale jitter and mask targets: masks stay on what they show, and pixels are never needed for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch.nn.functional as F
from faster_coco_eval import mask as coco_mask

from tests.options import alone, drawn
from tests.tasks.cases import corners
from visft_ds.data.samples import RawSample
from visft_ds.data.transforms import Crop, Flip
from visft_ds.randomness import generator
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.masks.data import mask_targets

SMALL: dict[str, Any] = {"size": 64, "min_size_test": 48, "max_size_test": 90}


def _annotation(
    polygons: Any, *, category: int = 7, crowd: int = 0, bbox: list[float] | None = None
) -> dict[str, Any]:
    if bbox is None:
        points = np.concatenate([np.array(polygon, dtype=float).reshape(-1, 2) for polygon in polygons])
        low, high = points.min(axis=0), points.max(axis=0)
        bbox = [*low, *(high - low)]
    return {
        "id": 31,
        "bbox": bbox,
        "category_id": category,
        "iscrowd": crowd,
        "area": 1.0,
        "segmentation": polygons,
    }


def _raw(size: tuple[int, int], *annotations: dict[str, Any]) -> RawSample:
    return RawSample(4, 5, size, np.zeros((*size, 3), dtype=np.uint8), annotations, ())


OBJECTS = (_annotation([corners(20, 10, 55, 60)]), _annotation([corners(60, 5, 88, 40)], category=90))


def test_masks_follow_the_pixels() -> None:
    """Bright objects on black lie under their masks after any flip, scaling, padding and crop."""
    transform = alone("semantic", True, **SMALL)  # the same jitter, extended by black
    points = np.array([[12.0, 8.0], [70.0, 20.0], [50.0, 64.0]])
    polygon = [points.ravel().tolist()]
    image = np.repeat(255 * coco_mask.decode(coco_mask.frPyObjects(polygon, 70, 90)), 3, axis=2)
    seen, flips = 0, set()
    for key in range(60):
        sample = transform(replace(_raw((70, 90), _annotation(polygon)), image=image), generator(key))
        masks = sample.targets["semantic"]["masks"]
        bright = F.avg_pool2d(sample.image[:1].float(), 4)[0].numpy()
        flips.add(isinstance(drawn(transform, (70, 90), generator(key))[0], Flip))
        if not len(masks):
            assert bright.mean() < 1
            continue
        seen += 1
        # both are averages over 4 x 4 pixels; the resized picture is smoothed by a pixel or two along the
        # edges
        difference = np.abs(bright - masks[0])
        assert difference.mean() < 6, key
        assert np.abs((bright > 127).mean() - (masks[0] > 127).mean()) < 0.02, key
    assert seen > 40 and flips == {True, False}


def test_scale_padding_and_crop() -> None:
    """At scale 1 the picture fits the square and is padded with grey; at 2 it is cut; size follows the longer
    side.
    """
    raw = _raw((50, 100), _annotation([corners(0, 0, 100, 50)]))
    fits = alone("segmentation", True, scale=(1.0, 1.0), flip=0.0, **SMALL)(raw, generator(1))
    assert (fits.image[:, :32] == 0).all() and (fits.image[:, 32:] == 128).all()
    masks = fits.targets["segmentation"]["masks"]
    assert masks.shape == (1, 16, 16) and (masks[0, :8] == 255).all() and not masks[0, 8:].any()
    assert fits.size == (64, 64), "the grey belongs to the image"
    cut = alone("segmentation", True, scale=(2.0, 2.0), flip=0.0, **SMALL)(raw, generator(1))
    assert (cut.image == 0).all() and (cut.targets["segmentation"]["masks"] == 255).all()
    tops = {
        drawn(alone("segmentation", True, scale=(2.0, 2.0), **SMALL), (90, 45), generator(key))[-1].top
        for key in range(40)
    }
    assert min(tops) < 8 and max(tops) > 56, "crops reach both ends of the 128 rows"


def test_what_gives_no_target() -> None:
    """Crowds, objects without mask or area; labels are positions among COCO's 80 categories."""
    annotations = [
        _annotation([corners(0, 0, 20, 20)], crowd=1),
        _annotation({"size": [70, 90], "counts": [70 * 90]}, crowd=1, bbox=[0, 0, 90, 70]),
        {key: value for key, value in OBJECTS[0].items() if key != "segmentation"},
        _annotation([], bbox=[1, 1, 5, 5]),
        _annotation([corners(5, 5, 5, 30)]),
        _annotation([corners(10, 10, 30, 30)], bbox=[10, 10, 0, 20]),
        _annotation([corners(95, 5, 120, 30)]),
        _annotation([corners(30, 30, 31, 31)], category=1),
        OBJECTS[1],
    ]
    raw, labels = _raw((70, 90), *annotations), {id_: index for index, id_ in enumerate(COCO_CATEGORY_IDS)}
    targets = mask_targets(labels, raw, [], generator(0))
    assert targets["labels"].tolist() == [0, 79]
    assert targets["masks"].shape == (2, 18, 23) and targets["masks"].dtype == np.uint8
    left = mask_targets(labels, raw, [Crop(0, 0, 70, 58)], generator(0))
    assert left["labels"].tolist() == [0], "what the crop cut away entirely is gone"
    assert len(COCO_CATEGORY_IDS) == 80 and COCO_CATEGORY_IDS[11] == 13


def test_fixed_size() -> None:
    for train in (True, False):
        sample = alone("segmentation", train, fixed_size=28, flip=1.0)(_raw((70, 90), *OBJECTS), generator(0))
        assert sample.size == tuple(sample.image.shape[1:]) == (28, 28)
        middle = sample.targets["segmentation"]["masks"][1, 1]  # the object at the right
        assert (middle[:3] > 0).any() == train and (middle[4:] > 0).any() != train
