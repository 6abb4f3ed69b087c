"""What a model says of an image does not depend on the images beside it, for every kind of backbone and
head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tests.small_timm  # noqa: F401  registers its models
from tests.options import head_of
from tests.random_tower import build_backbone
from visft_ds.data.samples import Map, Sample, valid_region
from visft_ds.model import MultiTaskModel, TaskModule, whole_cells
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import build_timm
from visft_ds.tasks import TASKS
from visft_ds.tasks.semantic.results import Windows, cut_windows, semantic_results
from visft_ds.tasks.transform import collate_joint

#: (height, width): none is a multiple of a patch, two are alike, one is a strip, and none is as high and wide
#: as all.
SIZES = ((100, 131), (180, 90), (100, 131), (7, 150))
TIMM = {
    "vit": "test_vit3",
    "dinov3": "vit_test_patch8_dinov3",  # of tests.small_timm
    "convnext": "test_convnext",
    "efficientnet": "test_efficientnet",
}
#: Kinds of backbones, and the blocks that are read; of nets with tokens in front of their patches and
#: without.
TOWERS: list[tuple[str, tuple[int, ...]]] = [
    *(("eva", ()), ("eva+cls", ()), ("vit", ()), ("vit", (0, 2)), ("dinov3", ())),
    *(("convnext", ()), ("convnext", (1, 2)), ("efficientnet", ())),
]


def tower(kind: str, layers: tuple[int, ...] = ()) -> Backbone:
    if kind.startswith("eva"):
        options = {
            "width": 32,
            "depth": 2,
            "num_heads": 2,
            "image_size": 56,
            "class_token": kind.endswith("cls"),
        }
        return build_backbone("debug", seed=3, **options)
    return build_timm(TIMM[kind], layers=layers)


def model(backbone: Backbone, heads: dict[str, Any] | None = None) -> MultiTaskModel:
    """A model that only predicts."""
    tasks = {name: TaskModule(head, None) for name, head in (heads or {}).items()}  # type: ignore[arg-type]
    return MultiTaskModel(backbone, tasks, train_backbone=False, heads_active=False).eval()


def samples() -> list[Sample]:
    drawn = torch.Generator().manual_seed(1)
    found = []
    for number, size in enumerate(SIZES):
        image = torch.randint(0, 256, (3, *size), generator=drawn, dtype=torch.uint8)
        found.append(Sample(number, number, size, size, image, random_key=number, targets={}))
    return found


def close(ours: Tensor, theirs: Tensor) -> None:
    """In fp32 a kernel for another shape rounds otherwise; with padding, the difference was 14 to 50 %."""
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize(("kind", "layers"), TOWERS)
@torch.no_grad()
def test_features_are_those_of_each_image_alone(kind: str, layers: tuple[int, ...]) -> None:
    module = model(tower(kind, layers))
    together = module.features(collate_joint(samples()))
    for index, sample in enumerate(samples()):
        for many, one in zip(together, module.features(collate_joint([sample])), strict=True):
            height, width = one.features.shape[2:]
            close(many.features[index, :, :height, :width], one.features[0])
            assert torch.equal(many.valid[index, :height, :width], one.valid[0])
            assert many.valid[index].sum() == one.valid.sum()
            assert many.cells is not None and one.cells is not None
            assert torch.equal(many.cells[index], one.cells[0])
            assert (many.prefix is None) == (one.prefix is None)
            if many.prefix is not None and one.prefix is not None:
                close(many.prefix[index], one.prefix[0])


@pytest.mark.parametrize(
    ("kind", "layers"), [("eva", ()), ("vit", (0, 2)), ("convnext", (1, 2)), ("convnext", (2, 3))]
)
@torch.no_grad()
def test_heads_say_the_same_of_an_image_alone(kind: str, layers: tuple[int, ...]) -> None:
    """The last maps of the last case are of 16 and 32 pixels: an image that fills its batch may leave cells
    empty.
    """
    backbone = tower(kind, layers)
    options: dict[str, dict[str, Any]] = {
        "segmentation": {
            "type": "plain",
            "num_queries": 4,
            "hidden_dim": 32,
            "num_heads": 2,
            "num_classes": 3,
        },
        "semantic": {"num_classes": 3},
    }
    heads: dict[str, Any] = {"detection": head_of("detection", backbone.width, num_queries=6, encoder_dim=16)}
    for task, given in options.items():
        heads[task] = TASKS[task].build_head(backbone.shapes, TASKS[task].settings("head", given), None)
    for head in heads.values():
        for parameter in head.parameters():
            drawn = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=drawn))
    module = model(backbone, heads)
    together = module(collate_joint(samples()))
    for index, sample in enumerate(samples()):
        alone = module(collate_joint([sample]))
        for name in ("logits", "boxes"):
            close(getattr(together["detection"], name)[:, index], getattr(alone["detection"], name)[:, 0])
        close(together["segmentation"].logits[:, index], alone["segmentation"].logits[:, 0])
        for ours, theirs in (
            (together["segmentation"].masks[-1, index], alone["segmentation"].masks[-1, 0]),
            (together["semantic"].logits[index], alone["semantic"].logits[0]),
        ):
            close(ours[:, : theirs.shape[1], : theirs.shape[2]], theirs)


def test_no_pixel_is_lost() -> None:
    """Sides are whole cells: the last rows and columns of an image change what is seen."""
    assert whole_cells((28, 29), 14) == (28, 42) and whole_cells((1, 7), 14) == (14, 14)
    module = model(tower("eva"))
    sample = samples()[0]
    assert sample.image is not None
    changed = sample.image.clone()
    changed[:, -1], changed[:, :, -1] = 255 - changed[:, -1], 255 - changed[:, :, -1]
    (before,), (after,) = (
        module.features(collate_joint([replace(sample, image=i)])) for i in (sample.image, changed)
    )
    moved = (before.features - after.features).abs().sum(1)[0]
    assert moved[-1].min() > 0 and moved[:, -1].min() > 0
    assert before.cells is not None and before.cells[0].tolist() == pytest.approx([100 / 14, 131 / 14])


def test_calls_of_a_timm_tower() -> None:
    """One for each size, or under ZeRO-3 one for each image, also where all are alike: as many on every
    rank.
    """
    backbone = tower("vit")
    module, batch = model(backbone), collate_joint(samples())
    same = collate_joint(samples()[::2])
    for one_by_one, some, calls in ((False, batch, 3), (True, batch, 4), (False, same, 1), (True, same, 2)):
        backbone.one_by_one = one_by_one
        with patch.object(type(backbone), "forward_features", autospec=True, side_effect=_narrow) as called:
            module.features(some)
        assert called.call_count == calls
    backbone.one_by_one = True
    assert module.frames(replace(same, mixed=False)) is None, (
        "crops of one size are a batch under ZeRO-3, too"
    )


def _narrow(tower: Any, images: Tensor) -> Tensor:
    """In place of a ViT: its tokens, all 0."""
    tokens = tower.num_prefix_tokens + images.shape[2] // 16 * (images.shape[3] // 16)
    return images.new_zeros(len(images), tokens, tower.width)


@pytest.mark.parametrize("cell", [14, 16, 32])
def test_a_cell_is_empty_where_the_valid_region_says_so(cell: int) -> None:
    """To the pixel: a count that is off by rounding would let attention see empty cells."""
    features = torch.zeros(1, 1, 9, 7)
    for height in range(1, 9 * cell + 1):
        sizes = torch.tensor([[height, 7 * cell]])
        found = Map.of(features, sizes, (9 * cell, 7 * cell))
        assert torch.equal(found.valid, valid_region(sizes, (9 * cell, 7 * cell), (9, 7)))
        assert found.has_empty_cells() == (not found.valid.all())


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("grid", [(16, 24), (4, 6), (3, 5)])
def test_a_map_is_resized_within_each_image(grid: tuple[int, int], antialias: bool) -> None:
    """As torch resizes its own part alone, wherever that part ends in whole cells of the other grid."""
    features = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    sizes = torch.tensor([[64, 96], [32, 48]])
    features[1, :, 4:], features[1, :, :, 6:] = 7.0, -7.0  # what lies beyond has no meaning
    found = Map.of(features, sizes, (64, 96)).resized(grid, antialias=antialias)
    given: dict[str, Any] = {"mode": "bilinear", "antialias": antialias}
    torch.testing.assert_close(found[:1], F.interpolate(features[:1], grid, **given))
    if grid != (3, 5):
        half = grid[0] // 2, grid[1] // 2
        own = F.interpolate(features[1:, :, :4, :6], half, **given)
        torch.testing.assert_close(found[1:, :, : half[0], : half[1]], own)


@torch.no_grad()
def test_windows_are_those_of_each_image_alone() -> None:
    """Semantic segmentation, of an upright and a lying image that the windows are larger than, and of a
    strip.
    """
    backbone = tower("eva")
    head = TASKS["semantic"].build_head(
        backbone.shapes, TASKS["semantic"].settings("head", {"num_classes": 3}), None
    )
    torch.nn.init.normal_(
        head.get_parameter("classifiers.0.weight"), generator=torch.Generator().manual_seed(0)
    )
    module = model(backbone, {"semantic": head})

    def maps(chosen: list[Sample]) -> list[Any]:
        batch = collate_joint(chosen)
        cut, starts = cut_windows(batch, 112)
        output = module(cut)["semantic"]
        codes = semantic_results(Windows(output, starts, cut.images.shape[-2:]), batch)
        return [[code for code in codes if code["image_id"] == sample.image_id] for sample in chosen]

    together = maps(samples())
    assert together == [maps([sample])[0] for sample in samples()]
    assert min(map(len, together)) > 1, "maps of one class would prove nothing"
