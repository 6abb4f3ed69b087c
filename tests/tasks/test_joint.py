"""One picture for several heads: every target belongs to the same geometry, and no task moves another's."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tests.options import alone, drawn, together
from tests.tasks.cases import corners
from tests.tiny import THREE
from visft_ds.data.samples import RawSample, Sample
from visft_ds.data.transforms import Op, final_size
from visft_ds.randomness import generator
from visft_ds.tasks.transform import ImageTransform, collate_joint
from visft_ds.tasks.vocabulary import Vocabulary

VOCABULARY = Vocabulary(tuple("abcdef"))  # <unk> 7, <start> 8, <end> 9
SMALL: dict[str, Any] = {
    "min_size_train": (40, 48, 56),
    "max_size_train": 90,
    "min_size_test": 48,
    "max_size_test": 90,
}
CAPTIONS = ("a b", "c", "d e f", "b b b b", "f")
SUBSETS = [tasks for count in (1, 2, 3) for tasks in combinations(THREE, count)]


def _joint(train: bool = True, tasks: Any = tuple(THREE), **options: Any) -> ImageTransform:
    return together(train, tasks, vocabulary=VOCABULARY, **{**SMALL, **options})


def _annotation(
    x0: float, y0: float, x1: float, y1: float, category: int = 7, crowd: int = 0
) -> dict[str, Any]:
    places = {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": [corners(x0, y0, x1, y1)]}
    return {"id": 31, "category_id": category, "iscrowd": crowd, **places}


OBJECTS = (_annotation(20, 10, 55, 60), _annotation(60, 5, 88, 40, 90), _annotation(1, 1, 80, 60, crowd=1))


def _raw(
    size: tuple[int, int] = (70, 90),
    objects: tuple[dict[str, Any], ...] = OBJECTS,
    captions: tuple[str, ...] = CAPTIONS,
    *,
    pixels: bool = True,
) -> RawSample:
    image = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8) if pixels else None
    return RawSample(4, 5, size, image, objects, captions)


def _assert_same(one: Any, other: Any) -> None:
    """The same names with the same values and types."""
    assert dict(one).keys() == dict(other).keys()
    for name, values in dict(one).items():
        assert values.dtype == other[name].dtype, name
        np.testing.assert_array_equal(values, other[name], err_msg=name)


def _assert_same_targets(one: Sample, other: Sample) -> None:
    assert one.size == other.size and one.targets.keys() == other.targets.keys()
    for task in one.targets:
        _assert_same(one.targets[task], other.targets[task])


# ---- one geometry ----


class _Given:
    """Takes the place of a transform's drawn geometry."""

    def __init__(self, ops: list[Op]) -> None:
        self.ops = ops

    def draw(self, size: tuple[int, int], train: bool, random: np.random.Generator) -> list[Op]:
        return self.ops


@pytest.mark.parametrize("train", [True, False])
def test_the_transform_of_one_task_gives_the_same_for_the_same_operations(train: bool) -> None:
    joint = _joint(train)
    detection, segmentation = alone("detection", train), alone("segmentation", train)
    seen = set()
    for key in range(20):
        random = generator(key)
        ops = drawn(joint, (70, 90), random)
        seen.add(tuple(ops))
        sample = joint(_raw(), generator(key))
        for task, single in (("detection", detection), ("segmentation", segmentation)):
            own = replace(single, geometry=_Given(ops))(_raw(), generator(0))
            assert torch.equal(sample.image, own.image) and sample.size == own.size == final_size(
                (70, 90), ops
            )
            _assert_same(sample.targets[task], own.targets[task])
        # the caption is drawn from what geometry left of the random numbers
        own = alone("captioning", train, vocabulary=VOCABULARY)(_raw(), random)
        _assert_same(sample.targets["captioning"], own.targets["captioning"])
    assert len(seen) == (6 if train else 1)


@given(
    st.integers(0, 2**63 - 1),
    st.tuples(st.integers(8, 300), st.integers(8, 300)),
    st.tuples(*[st.floats(0, 1)] * 4),
    st.sampled_from([None, 36, 50]),
)
# What is left out of them are boxes of a few cells.
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_masks_of_rectangles_lie_on_their_boxes(
    key: int, size: tuple[int, int], shares: tuple[float, float, float, float], fixed_size: int | None
) -> None:
    (left, right), (top, bottom) = sorted(shares[:2]), sorted(shares[2:])
    x0, y0, x1, y1 = left * size[1], top * size[0], right * size[1], bottom * size[0]
    assume(x1 - x0 > 0.1 and y1 - y0 > 0.1)
    sample = _joint(fixed_size=fixed_size)(
        _raw(size, (_annotation(x0, y0, x1, y1),), pixels=False), generator(key)
    )
    (box,) = sample.targets["detection"]["boxes"]
    cells = [-(-side // 4) for side in sample.size]
    centre, extent = box[[1, 0]] * cells, box[[3, 2]] * cells
    # Only where an object covers some cell wholly along each axis does the other axis show its profile
    # unweakened.
    assume(min(extent) >= 2.5)
    (mask,) = sample.targets["segmentation"]["masks"]
    assert mask.shape == tuple(cells)
    for axis in (0, 1):
        profile = mask.max(axis=1 - axis) / 255
        middle = (profile * (np.arange(cells[axis]) + 0.5)).sum() / profile.sum()
        # Filling rounds an edge to the nearest subsample (a quarter of a cell), after rounding to a fifth of
        # one: 0.15.
        assert abs(profile.sum() - extent[axis]) <= 2 * 0.15 + 1e-2
        # The weight of a partly covered cell is taken at its middle: at most 0.125 cells off, shared by 2.5
        # cells.
        assert abs(middle - centre[axis]) <= 0.15 + 0.125 / 2.5 + 1e-2


# ---- tasks do not move one another ----


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("tasks", SUBSETS, ids="+".join)
def test_a_task_more_changes_nothing_of_the_others(tasks: tuple[str, ...], train: bool) -> None:
    whole, part = _joint(train), _joint(train, tasks[::-1])
    for key in range(12):
        full, sample = whole(_raw(), generator(key)), part(_raw(), generator(key))
        assert set(sample.targets) == set(tasks)
        assert torch.equal(full.image, sample.image)
        _assert_same_targets(replace(full, targets={task: full.targets[task] for task in tasks}), sample)


@given(
    st.integers(0, 2**63 - 1),
    st.tuples(st.integers(1, 120), st.integers(1, 120)),
    st.sampled_from([(), CAPTIONS, ("?!",)]),
)
@settings(max_examples=50, deadline=None)
def test_pixels_and_labels_can_be_read_apart(
    key: int, size: tuple[int, int], captions: tuple[str, ...]
) -> None:
    """Who reads labels only, or pixels only, has the same part of the same sample."""
    raw = _raw(size, captions=captions)
    transform = _joint()
    full = transform(raw, generator(key))
    labels = transform(replace(raw, image=None), generator(key))
    pixels = transform(replace(raw, annotations=(), captions=()), generator(key))
    assert labels.image is None and full.image is not None and tuple(full.image.shape[1:]) == full.size
    _assert_same_targets(full, labels)
    assert torch.equal(full.image, pixels.image) and full.size == pixels.size


# ---- batches ----


def _samples() -> list[Sample]:
    """48 x 61, 61 x 48 and 48 x 48; the second without objects and captions."""
    raws = [_raw(), _raw((90, 70), (), ()), _raw((60, 60), (_annotation(0, 0, 60, 60),), ("c d",))]
    return [
        replace(_joint(False)(raw, generator(0)), random_key=70 + index) for index, raw in enumerate(raws)
    ]


def test_ragged_images_and_the_frames_of_their_targets() -> None:
    samples = _samples()
    batch = collate_joint(samples)
    assert batch.images.shape == (3, 3, 61, 61) and tuple(batch.targets) == tuple(THREE)
    assert batch.sizes.tolist() == [[48, 61], [61, 48], [48, 48]] and batch.random_keys.tolist() == [
        70,
        71,
        72,
    ]
    for padded, sample in zip(batch.images, samples, strict=True):
        height, width = sample.size
        assert torch.equal(padded[:, :height, :width], sample.image)
        assert padded.sum() == sample.image.sum(), "padding must be 0"
    masks = batch.targets["segmentation"]
    assert masks.grids.tolist() == [[12, 16], [16, 12], [12, 12]]
    assert masks.masks.shape == (3, 16, 16) and masks.keys.tolist() == [70, 71, 72]
    boxes = batch.targets["detection"]
    # relative to the image, not to the padded batch
    torch.testing.assert_close(boxes.boxes[2], torch.tensor([0.5, 0.5, 1.0, 1.0]))
    assert (masks.masks[2, :12, :12] == 255).all() and masks.masks[2].sum() == 144 * 255
    # the first image's boxes, in cells of its own part of the grid, hold their masks
    for (x, y, w, h), mask in zip(
        boxes.boxes[:2] * torch.tensor([16, 12, 16, 12]), masks.masks[:2], strict=True
    ):
        top, left, bottom, right = (
            int(v) for v in ((y - h / 2), (x - w / 2), (y + h / 2).ceil(), (x + w / 2).ceil())
        )
        assert mask.sum() == mask[top:bottom, left:right].sum() > 0
    assert batch.targets["captioning"].tokens.tolist() == [[8, 1, 2, 9], [8, 0, 0, 0], [8, 3, 4, 9]]
    assert batch.targets["captioning"].references == (CAPTIONS, (), ("c d",))
    moved = batch.to(torch.device("meta"))
    assert moved.images.is_meta and moved.targets["detection"].counts.is_meta
    assert moved.targets["segmentation"].masks.is_meta and not moved.targets["segmentation"].keys.is_meta
