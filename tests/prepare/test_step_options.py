"""What changes the step as a whole: packing, content alone and compiled blocks, as configured, planned and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from visft_ds.config import ResolvedConfig, derive_batches, resolve
from visft_ds.models.compiled import check_compiler, compilations, compile_blocks
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.planner.memory import PlannedRun
from visft_ds.prepare.model import plan_groups
from visft_ds.prepare.streams import fixed_sizes
from visft_ds.tasks.spec import Content

CPU = torch.device("cpu")
#: Torch's own modules for compiling use what torch has deprecated.
TORCH_WARNS = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
PACKED, BLOCKS = (f"visft.model.{key}" for key in ("packed=true", "compile=blocks"))
CONTENT = "visft.tasks.segmentation.image.content_only=true"
MIXED = "visft.tasks.detection.image.fixed_size=null"


def configured(*settings: str, **layers: Any) -> ResolvedConfig:
    return resolve(**{"stage": 2, "model": "eva_e", **layers}, settings=settings)


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ((PACKED, "visft.features.views=1"), {"stage": 1}, "visft.model.packed = true .*one by one, without padding"),
        ((PACKED,), {"engine": "pipeline"}, "packed"),
        ((BLOCKS,), {"engine": "zero3"}, "compile = .blocks.* must be none with ZeRO-3.*use --engine zero1 or zero2"),
        ((BLOCKS, "visft.model.kernels=triton"), {}, "must be none with visft.model.kernels = triton"),
        ((BLOCKS, "visft.run.rehearsal=false"), {}, "must be none without visft.run.rehearsal"),
        (("visft.model.compile=block",), {}, "did you mean blocks"),
        ((CONTENT, "visft.tasks.segmentation.image.fixed_size=56"), {}, "nothing is left away"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: tuple[str, ...], layers: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configured(*settings, **layers)


def test_content_ends_where_a_patch_does() -> None:
    config = configured(CONTENT, "visft.model.overrides.patch_size=16", "visft.model.overrides.image_size=224")
    with pytest.raises(ValueError, match="multiples of 14 pixels, and the patches of this backbone have 16"):
        plan_groups(config.visft, config.optimizer.params)


def test_packing_is_part_of_what_a_run_is_and_compiling_is_not() -> None:
    plain = configured()
    assert configured(PACKED).fingerprint() != plain.fingerprint()
    assert configured(BLOCKS).fingerprint() == plain.fingerprint()


def test_plans_know_how_large_an_average_image_is() -> None:
    """Of content alone 64 % are left, more where several are padded to the largest; memory takes the largest."""
    streams = configured(CONTENT).visft.streams()
    assert streams["detection"].typical_side(1) == streams["detection"].largest_side() == 672
    side = streams["segmentation"].typical_side(1)
    assert 0.62 < (side / 1024) ** 2 < 0.65 and side < streams["segmentation"].typical_side(2) < 1024
    assert streams["segmentation"].largest_side() == 1024
    small = ("visft.tasks.segmentation.image.fixed_size=null", "visft.tasks.segmentation.image.size=112")
    config = configured(*small, CONTENT, PACKED, model="debug")
    run = PlannedRun(config, derive_batches(config, 1), "fp32", 20, CPU, Content())
    stream = config.visft.streams()["segmentation"]
    assert run.typical(config.visft.streams()["captioning"]) is run
    height, width = run.typical(stream).content.size or (0, 0)
    assert 0.62 < (height / 112) * (width / 112) < 0.65 and run.content.size is None


def test_a_compiler_that_is_missing_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_compiler("none", CPU)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match=r"C\+\+"):
        check_compiler("blocks", CPU)


def adapted(device: str = "cpu", dtype: torch.dtype = torch.float32) -> EvaViT:
    """A frozen tower with adapters that have an effect."""
    backbone = build_backbone(
        "debug", width=32, depth=3, num_heads=2, image_size=56, post_norm=True, device=device, dtype=dtype
    )
    inject_lora(backbone, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if name.endswith("lora_B"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone.train()


def learnt(backbone: EvaViT, images: Tensor, frames: Any = None, autocast: bool = False) -> list[Tensor]:
    """Features, and the gradients of the adapters."""
    backbone.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=autocast):
        features = backbone(images) if frames is None else backbone(images, frames)
    # Not their mean square: behind a norm that is nearly constant, and its gradient nothing but rounding.
    (features * torch.arange(features.numel(), device=features.device).view_as(features).sin()).mean().backward()
    return [features.detach(), *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)]


def apart(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest relative difference of two tensors that correspond."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def check_alike(how: str, backend: str, recompute: str, bound: float, *, autocast: bool, packed: bool) -> None:
    """Images of many shapes: what is compiled gives what eager code gives, and no shape is compiled for itself."""
    torch._dynamo.reset()
    eager, compiled = adapted(), adapted()
    compile_blocks(compiled, how, backend=backend)
    for backbone in (eager, compiled):
        backbone.recompute = recompute
    made = [compilations()]
    for height, width in ((56, 84), (42, 98), (70, 56), (84, 112)):
        images = torch.randn(2, 3, height, width)
        frames = ((height, 28), (14, width)) if packed else None
        theirs, ours = (learnt(one, images, frames, autocast) for one in (eager, compiled))
        allowed = bound
        if bound and autocast:  # both are rounded to 16 bit, at other places: what counts is how far from fp32
            exact = learnt(eager, images, frames)
            allowed, theirs = bound * apart(theirs, exact), exact
        assert apart(ours, theirs) <= allowed
        made.append(compilations())
    assert made[0] != made[1] == made[-1], made
    # An input with a gradient and one without: the first block's. Around packed attention there are two pieces.
    assert made[1][0] - made[0][0] <= (6 if packed else 2) and (packed or made[1][1] == made[0][1])


@pytest.mark.slow
@TORCH_WARNS
def test_compiled_blocks_learn_what_eager_ones_do_at_any_size() -> None:
    """With torch's tracing and its graph of the backward pass, the kernels are eager's: the same to the last bit."""
    check_alike("blocks", "aot_eager", "block", 0.0, autocast=False, packed=False)


@pytest.mark.slow
@TORCH_WARNS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("recompute", ["none", "block", "mlp"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_every_policy_is_compiled(backend: str, recompute: str, packed: bool) -> None:
    """Kernels of inductor add and round in another order: a few units of the last place, through three blocks.

    Under autocast eager code rounds to 16 bit after each operator, fused kernels once at their end: neither may be
    much further from fp32 than the other.
    """
    exact = backend == "aot_eager"
    check_alike("blocks", backend, recompute, 0.0 if exact else 1e-5, autocast=False, packed=packed)
    check_alike("blocks", backend, recompute, 0.0 if exact else 3.0, autocast=True, packed=packed)


@pytest.mark.gpu
@TORCH_WARNS
@pytest.mark.parametrize("recompute", ["none", "block", "mlp"])
def test_on_a_gpu(recompute: str) -> None:
    torch._dynamo.reset()
    eager, compiled = adapted("cuda"), adapted("cuda")
    compile_blocks(compiled, "blocks")
    for backbone in (eager, compiled):
        backbone.recompute = recompute
    for _ in range(2):
        images = torch.randn(2, 3, 56, 84, device="cuda")
        for ours, theirs in zip(*(learnt(one, images, None, True) for one in (compiled, eager)), strict=True):
            assert float((ours - theirs).norm()) <= 3e-2 * float(theirs.norm())


@pytest.mark.parametrize(
    ("setting", "sizes"),
    [
        ("visft.seed=1", [(1024, 1024), (256, 256)]),
        ("visft.tasks.segmentation.image.content_only=true", [(256, 256)]),
        ("visft.tasks.detection.image.fixed_size=448", [(448, 448), (1024, 1024), (256, 256)]),
        ("visft.mode=shared", []),
    ],
)
def test_sizes_of_images_are_fixed_where_all_pictures_get_one(setting: str, sizes: list[tuple[int, int]]) -> None:
    assert fixed_sizes(resolve(stage=2, model="eva_e", settings=[setting]).visft) == sizes
