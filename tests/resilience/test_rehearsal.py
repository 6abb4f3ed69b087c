"""The largest micro-batches of a run: the largest squares, with the most objects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.coco_tree import write_tree
from visft_ds.config import Batches, derive_batches, resolve
from visft_ds.parallel.pipeline import sample_checksum
from visft_ds.prepare.data import RunData, open_data
from visft_ds.resilience.memory import largest_batches
from visft_ds.shards.build import Options, build


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    tree = write_tree(folder, 32)
    build(Options(tree.images, tree.instances, tree.captions, folder / "shards", "train"))
    return folder / "shards"


def opened(shards: Path) -> tuple[RunData, Batches]:
    """Stage 2 of the debug model on four ranks."""
    settings = [f"visft.data.root={shards}", "visft.run.eval_every=0"]
    config, data = open_data(resolve(stage=2, model="debug", settings=settings))
    return data, derive_batches(config, 4)


def test_the_pictures_with_most_objects_come_together(shards: Path) -> None:
    data, batches = opened(shards)
    found = {one.stream.name: (one, pipeline) for one, pipeline in largest_batches(data, batches.micro)}
    assert set(found) == {"detection", "segmentation", "captioning"}
    counts = np.sort(data.sets["train"].manifest.index["num_annotations"])[::-1]
    for task, (one, pipeline) in found.items():
        assert len(one.objects) == batches.micro[task] == 8
        assert one.objects == tuple(counts[:8]) and counts[0] > counts[7]
        batch = one.batch(pipeline, "both")
        assert batch.tasks == (task,) and batch.images.shape == (8, 3, *one.frame)
    labels = {task: one.batch(pipeline, "labels") for task, (one, pipeline) in found.items()}
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
    data, batches = opened(shards)
    for one, pipeline in largest_batches(data, batches.micro):
        pixels, labels = (one.batch(pipeline, role) for role in ("images", "labels"))
        assert torch.equal(sample_checksum(pixels), sample_checksum(labels)) and torch.equal(pixels.sizes, labels.sizes)
        assert pixels.images.any() == 0 and not pixels.targets and labels.images.numel() == 0
