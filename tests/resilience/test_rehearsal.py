"""The largest micro-batches of a run: nothing that training makes is larger, and they are what it could make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.coco_tree import write_tree
from tests.options import alone, drawn, together
from visft_ds.config import Batches, derive_batches, resolve
from visft_ds.data.plan import generator
from visft_ds.data.transforms import final_size
from visft_ds.parallel.pipeline import sample_checksum
from visft_ds.prepare.data import RunData, open_data
from visft_ds.resilience.memory import largest_batches
from visft_ds.shards.build import Options, build

SIZES = [(480, 640), (640, 480), (427, 640), (500, 500), (333, 1000), (900, 300), (20, 700)]
#: What a long side may exceed its bound by, because the short side is rounded first: half of long / short pixels of the
#: narrowest picture (see `short_side_size`).
ROUNDING = 18


@pytest.mark.parametrize(
    "transform",
    [
        alone("detection", True),
        alone("detection", True, short_sides=(200, 300), max_long=500),
        alone("detection", True, short_sides=(300,), max_long=310, crop_range=(100, 600)),
        alone("detection", True, fixed_size=112),
        alone("segmentation", True, size=256),
        together(True, ["detection"], short_sides=(200, 300), max_long=500),
    ],
    ids=["paper", "long", "free crops", "square", "jitter", "joint"],
)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_no_draw_is_larger_than_the_extremes(transform: Any, size: tuple[int, int]) -> None:
    sizes = [final_size(size, drawn(transform, size, generator(key))) for key in range(300)]
    extremes = transform.geometry.extremes(size)
    for measure in (lambda one: one[0], lambda one: one[1]):
        largest = max(map(measure, extremes))
        assert max(map(measure, sizes)) <= largest + ROUNDING
    most = max(height * width for height, width in extremes)
    assert max(height * width for height, width in sizes) <= 1.01 * most


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    tree = write_tree(folder, 32)
    build(Options(tree.images, tree.instances, tree.captions, folder / "shards", "train"))
    return folder / "shards"


def opened(shards: Path) -> tuple[RunData, Batches]:
    """Stage 2 of the debug model on four ranks."""
    settings = [f"visft.data.root={shards}", "visft.run.eval_every=0"]
    config, data = open_data(resolve(stage=2, model="debug", settings=settings), 1)
    return data, derive_batches(config, 4)


def test_the_pictures_with_most_objects_come_together(shards: Path) -> None:
    data, batches = opened(shards)
    found = {one.stream.name: (one, pipeline) for one, pipeline in largest_batches(data, batches.micro, packed=False)}
    assert set(found) == {"detection", "segmentation", "captioning"}
    counts = np.sort(data.sets["train"].manifest.index["num_annotations"])[::-1]
    for task, (one, pipeline) in found.items():
        assert len(one.sizes) == batches.micro[task] == 8
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
    square = largest_batches(data, batches.micro, packed=True)[0][0]
    assert len(set(square.sizes)) == 1
    assert "8 images of 112 x 112" in found["detection"][0].describe()
    assert f"{sum(counts[:8])} objects" in found["detection"][0].describe()
    assert found["captioning"][0].describe() == "8 images of 112 x 112, 52 ids to a caption"


def test_stages_of_a_pipeline_make_the_same(shards: Path) -> None:
    data, batches = opened(shards)
    for one, pipeline in largest_batches(data, batches.micro, packed=False):
        pixels, labels = (one.batch(pipeline, role) for role in ("images", "labels"))
        assert torch.equal(sample_checksum(pixels), sample_checksum(labels)) and torch.equal(pixels.sizes, labels.sizes)
        assert pixels.images.any() == 0 and not pixels.targets and labels.images.numel() == 0
