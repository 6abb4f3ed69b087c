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
from visft_ds.resilience.memory import largest_batches, largest_shape
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
    config, data = open_data(resolve(stage=2, model="debug", settings=settings))
    return data, derive_batches(config, 4)


def test_the_pictures_with_most_objects_come_together(shards: Path) -> None:
    data, batches = opened(shards)
    found = dict(largest_batches(data, batches.micro, "both", packed=False))
    assert set(found) == {"detection", "segmentation", "captioning"}
    most = np.sort(data.sets["train"].manifest.index["num_annotations"])[::-1].tolist()
    assert most[0] > most[7]
    for task, batch in found.items():
        assert batch.tasks == (task,) and len(batch.sizes) == batches.micro[task] == 8
    masks = found["segmentation"].targets["segmentation"]
    assert found["detection"].targets["detection"].counts.tolist() == masks.counts.tolist() == most[:8]
    assert masks.masks.shape[1:] == (28, 28) and bool((masks.masks == 255).all())
    assert largest_shape([found["detection"]]) == f"8 images of 112 x 112, {sum(most[:8])} objects"
    assert largest_shape([found["captioning"]]) == "8 images of 112 x 112, 52 ids to a caption"
    _, square = next(largest_batches(data, batches.micro, "both", packed=True))
    assert len(square.sizes.unique(dim=0)) == 1


def test_stages_of_a_pipeline_make_the_same(shards: Path) -> None:
    data, batches = opened(shards)
    parts = (largest_batches(data, batches.micro, role, packed=False) for role in ("images", "labels"))
    for (_, pixels), (_, labels) in zip(*parts, strict=True):
        assert torch.equal(sample_checksum(pixels), sample_checksum(labels)) and torch.equal(pixels.sizes, labels.sizes)
        assert pixels.images.any() == 0 and not pixels.targets and labels.images.numel() == 0
