"""The largest micro-batches of a run: the largest squares, with the most objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.coco_tree import write_shards
from tests.opened import open_run
from visft_ds.config import Batches, derive_batches, resolve
from visft_ds.parallel.pipeline import sample_checksum
from visft_ds.prepare.data import RunData
from visft_ds.resilience.memory import largest_batches, largest_shape


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("coco"), train=32)


def opened(shards: Path) -> tuple[RunData, Batches]:
    """Stage 2 of the debug model on four ranks."""
    settings = [f"visft.data.root={shards}", "visft.run.eval_every=0"]
    config, data = open_run(resolve(stage=2, model="debug", settings=settings))
    return data, derive_batches(config, 4)


def test_the_pictures_with_most_objects_come_together(shards: Path) -> None:
    data, batches = opened(shards)
    found = dict(largest_batches(data, batches.micro, "both"))
    assert set(found) == {"detection", "segmentation", "captioning"}
    most = np.sort(data.sets["train"].manifest.index["num_annotations"])[::-1].tolist()
    assert most[0] > most[7]
    for task, batch in found.items():
        assert tuple(batch.targets) == (task,) and len(batch.sizes) == batches.micro[task] == 8
    masks = found["segmentation"].targets["segmentation"]
    assert found["detection"].targets["detection"].counts.tolist() == masks.counts.tolist() == most[:8]
    assert masks.masks.shape[1:] == (28, 28) and bool((masks.masks == 255).all())
    assert (
        largest_shape([found["detection"]]) == f"8 images of 112 x 112, {sum(most[:8])} objects (detection)"
    )
    assert largest_shape([found["captioning"]]) == "8 images of 112 x 112, 52 tokens per caption"


def test_stages_of_a_pipeline_make_the_same(shards: Path) -> None:
    data, batches = opened(shards)
    parts = (largest_batches(data, batches.micro, role) for role in ("images", "labels"))
    for (_, pixels), (_, labels) in zip(*parts, strict=True):
        assert torch.equal(sample_checksum(pixels), sample_checksum(labels)) and torch.equal(
            pixels.sizes, labels.sizes
        )
        assert pixels.images.any() == 0 and not pixels.targets and labels.images.numel() == 0
