"""The largest micro-batches of a run: nothing that training makes is larger, and they are what it could make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visft_ds.config import Batches, derive_batches, resolve
from visft_ds.config.schema import VisftConfig
from visft_ds.data.plan import generator
from visft_ds.data.roles import sample_checksum
from visft_ds.data.transforms import final_size
from visft_ds.prepare.datasets import TrainingSet, open_training_data
from visft_ds.prepare.streams import vocabulary_of
from visft_ds.resilience.memory import Largest, _gathered, largest_batches
from visft_ds.tasks.detection.data import DetectionTransform
from visft_ds.tasks.segmentation.data import SegmentationTransform
from visft_ds.tasks.segmentation.data import final_size as final_frame
from visft_ds.tasks.transform import JointTransform
from visft_ds.tasks.vocabulary import Vocabulary

SIZES = [(480, 640), (640, 480), (427, 640), (500, 500), (333, 1000), (900, 300), (20, 700)]
#: What a long side may exceed its bound by, because the short side is rounded first: half of long / short pixels of the
#: narrowest picture (see `short_side_size`).
ROUNDING = 18


@pytest.mark.parametrize(
    "transform",
    [
        DetectionTransform(True),
        DetectionTransform(True, short_sides=(200, 300), max_long=500),
        DetectionTransform(True, short_sides=(300,), max_long=310, crop_range=(100, 600)),
        DetectionTransform(True, fixed_size=112),
        SegmentationTransform(True, size=256),
        SegmentationTransform(True, size=256, content_only=True),
        SegmentationTransform(True, size=256, content_only=True, scale=(0.1, 0.7)),
        JointTransform(True, ["detection"], short_sides=(200, 300), max_long=500),
    ],
    ids=["paper", "long", "free crops", "square", "jitter", "content", "small content", "joint"],
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_draw_is_larger_than_the_extremes(transform: Any, size: tuple[int, int]) -> None:
    last = final_frame if isinstance(transform, SegmentationTransform) else final_size
    drawn = [last(size, transform.geometry(size, generator(key))) for key in range(300)]
    extremes = transform.extremes(size)
    for measure in (lambda one: one[0], lambda one: one[1]):
        largest = max(map(measure, extremes))
        assert max(map(measure, drawn)) <= largest + ROUNDING * (min(size) < 100)
        assert max(map(measure, drawn)) >= 0.85 * largest  # what cannot happen would refuse runs that fit
    most = max(height * width for height, width in extremes)
    assert 0.75 * most <= max(height * width for height, width in drawn) <= 1.01 * most


def test_what_comes_together() -> None:
    """A batch is padded to the highest and the widest picture: two of 480 x 640 and 640 x 480 need 640 x 640."""
    assert _gathered({(480, 640), (640, 480), (500, 500)}, 3, packed=False) == [((640, 480), (480, 640), (480, 640))]
    # Nobody stands: no frame of 640 x 640.
    assert _gathered({(480, 640)}, 2, packed=False) == [((480, 640), (480, 640))]
    assert _gathered({(480, 640), (640, 480), (500, 500)}, 1, packed=False) == [((480, 640),), ((640, 480),)]
    assert _gathered({(56, 56)}, 1, packed=True) == [((56, 56),)]
    # Two of most pixels are more for the backbone than the highest and the widest: 2 x 307,200 against 360,000.
    narrow = _gathered({(600, 300), (300, 600), (480, 640)}, 2, packed=True)
    assert narrow == [((600, 300), (480, 640)), ((480, 640), (480, 640))]


def opened(shards: Path) -> tuple[VisftConfig, dict[str, TrainingSet], Vocabulary | None, Batches]:
    """Stage 2 of the debug model on four ranks."""
    config = resolve(stage=2, model="debug", settings=[f"visft.data.root={shards}"])
    data = open_training_data(config.visft)
    vocabulary = vocabulary_of(config.visft, *(one.manifest for one in data.values()))
    return config.visft, data, vocabulary, derive_batches(config, 4)


def test_the_pictures_with_most_objects_come_together(shards: Path) -> None:
    settings, sets, vocabulary, batches = opened(shards)
    found = {one.stream.name: (one, pipeline) for one, pipeline in largest_batches(settings, sets, vocabulary, batches)}
    assert set(found) == {"detection", "segmentation", "captioning"}
    counts = np.sort(sets["train"].manifest.index["num_annotations"])[::-1]
    for task, (one, pipeline) in found.items():
        assert len(one.sizes) == batches.micro[task] == 8
        assert one.objects == tuple(counts[:8]) and counts[0] > counts[7]
        batch = one.batch(pipeline, vocabulary, "both")
        assert batch.tasks == (task,) and batch.images.shape == (8, 3, *one.frame)
    labels = {task: one.batch(pipeline, vocabulary, "labels") for task, (one, pipeline) in found.items()}
    assert labels["detection"].targets["detection"].counts.tolist() == list(counts[:8])
    masks = labels["segmentation"].targets["segmentation"]
    assert (
        masks.counts.tolist() == list(counts[:8])
        and masks.masks.shape[1:] == (28, 28)
        and bool((masks.masks == 255).all())
    )
    assert labels["captioning"].targets["captioning"].lengths.tolist() == [52] * 8
    assert "8 images of 112 x 112" in found["detection"][0].describe()
    assert f"{sum(counts[:8])} objects" in found["detection"][0].describe()
    assert found["captioning"][0].describe() == "8 images of 112 x 112, 52 ids to a caption"


def test_stages_of_a_pipeline_make_the_same(shards: Path) -> None:
    settings, sets, vocabulary, batches = opened(shards)
    for one, pipeline in largest_batches(settings, sets, vocabulary, batches):
        pixels, labels = (one.batch(pipeline, vocabulary, role) for role in ("images", "labels"))
        assert torch.equal(sample_checksum(pixels), sample_checksum(labels)) and torch.equal(pixels.sizes, labels.sizes)
        assert pixels.images.any() == 0 and not pixels.targets and labels.images.numel() == 0


def test_a_batch_that_another_covers_is_not_tried(shards: Path) -> None:
    """Ten data sets of one kind need no ten rehearsals; another task, another shape do."""
    settings, sets, vocabulary, batches = opened(shards)
    one = largest_batches(settings, sets, vocabulary, batches)[0][0]
    assert one.covers(replace(one, objects=(0,) * 8)) and not replace(one, objects=(0,) * 8).covers(one)
    assert not replace(one, sizes=((1, 500),)).covers(one) and one.covers(one)
    twice = {**sets, "again": replace(sets["train"], weight=2.0)}
    assert len(largest_batches(settings, twice, vocabulary, batches)) == 3
    assert isinstance(one, Largest)
