"""LoRA in a backbone: shapes, start values, forward = dense merge, precision, the start-up check."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_tower import build_backbone
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import (
    TARGETS,
    LoRALinear,
    dense_update,
    inject_lora,
    lora_layers,
    lora_parameters,
)
from visft_ds.prepare.model import check_reached

TINY = {"width": 32, "depth": 2, "num_heads": 4, "image_size": 56}
EVERYTHING = tuple(TARGETS)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def _adapted(
    *,
    targets: Iterable[str] = ("q", "v"),
    spread: float = 0.3,
    dtype: torch.dtype = torch.float32,
    rank: int = 4,
) -> EvaViT:
    backbone = build_backbone("debug", **TINY, dtype=dtype)
    inject_lora(backbone, rank=rank, alpha=2.0, targets=targets)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            elif name.endswith("bias"):  # zero at the start, which would hide a dropped bias
                parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.1)
    return backbone


def _difference(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("name", "count"), [("eva_e", 29_360_128), ("eva_g", 14_417_920)])
def test_the_papers_adapter_has_its_published_size(name: str, count: int) -> None:
    backbone = build_backbone(name, device="meta")
    inject_lora(backbone)
    parameters = lora_parameters(backbone)
    width = backbone.width
    assert sum(p.numel() for p in parameters.values()) == count
    assert parameters["blocks.0.attn.qkv.lora_A"].shape == (128, width)
    assert parameters["blocks.0.attn.qkv.lora_B"].shape == (2 * width, 64)
    assert lora_layers(backbone)["blocks.0.attn.qkv"].scale == 1 / 64


def test_injection_adds_names_and_keeps_the_old_parameters_and_the_output(images: Tensor) -> None:
    backbone = build_backbone("debug", **TINY)
    old = dict(backbone.named_parameters())
    plain = backbone(images)[0]
    inject_lora(backbone, rank=4, targets=EVERYTHING)
    new = dict(backbone.named_parameters())
    assert all(new[name] is parameter for name, parameter in old.items())
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    added = {f"blocks.{n}.{layer}.lora_{kind}" for n in range(2) for layer in layers for kind in "AB"}
    assert set(new) - set(old) == added == set(lora_parameters(backbone))
    # B = 0: the same sums, up to the split of one product into two.
    assert _difference(backbone(images)[0], plain) < 1e-6


def test_start_values_are_loralibs_and_depend_on_the_seed_alone() -> None:
    def a_of(seed: int, targets: tuple[str, ...] = ("q", "v")) -> dict[str, Tensor]:
        torch.rand(3)
        backbone = build_backbone("debug", **{**TINY, "width": 128})
        inject_lora(backbone, rank=64, targets=targets, seed=seed)
        assert not any(p.any() for name, p in lora_parameters(backbone).items() if name.endswith("lora_B"))
        return {name: p.detach() for name, p in lora_parameters(backbone).items() if name.endswith("lora_A")}

    state = torch.get_rng_state()
    first = a_of(0)
    torch.set_rng_state(state)
    again, other = a_of(0), a_of(1)
    first_a, second_a = first.values()
    bound = 1 / math.sqrt(128)
    assert first_a.abs().max() <= bound
    # Uniform: standard deviation bound / sqrt(3); 16,384 draws are good to about one percent.
    assert float(first_a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not torch.equal(first_a, second_a)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])


@pytest.mark.parametrize(
    "targets", [("q", "v"), ("v", "q"), ("k",), ("q", "k", "v"), ("proj", "fc1", "fc2"), EVERYTHING]
)
def test_forward_equals_the_dense_merge(images: Tensor, targets: tuple[str, ...]) -> None:
    backbone = _adapted(targets=targets, dtype=torch.float64)
    plain = build_backbone("debug", **TINY, dtype=torch.float64)
    weights = {name: value for name, value in backbone.state_dict().items() if "lora_" not in name}
    # Written out from the definition of each target, independently of slices.
    for index in range(2):
        for target, (path, part, _) in TARGETS.items():
            if target not in targets:
                continue
            layer = lora_layers(backbone)[f"blocks.{index}.{path}"]
            group = [name for name in TARGETS if TARGETS[name][0] == path and name in targets].index(target)
            height = 32 if path == "attn.qkv" else layer.out_features
            b = layer.lora_B[group * height : (group + 1) * height]
            update = 2.0 / 4 * b @ layer.lora_A[group * 4 : (group + 1) * 4]
            rows = slice(part * height, (part + 1) * height)
            weight = weights[f"blocks.{index}.{path}.weight"].clone()
            weight[rows] += update.detach()
            weights[f"blocks.{index}.{path}.weight"] = weight
    plain.load_state_dict(weights, strict=True)
    unchanged = build_backbone("debug", **TINY, dtype=torch.float64)
    images = images.double()
    assert _difference(backbone(images)[0], plain(images)[0]) < 1e-12
    assert _difference(plain(images)[0], unchanged(images)[0]) > 1e-3


def test_evaluation_mode_changes_nothing(images: Tensor) -> None:
    """loralib merges on eval(), and the reference then adds the update a second time."""
    backbone = _adapted()
    trained = backbone.train()(images)[0]
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert torch.equal(backbone.eval()(images)[0], trained)
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def test_adapters_stay_fp32_over_16_bit_weights_and_train_under_autocast(images: Tensor) -> None:
    exact, mixed = _adapted(), _adapted(dtype=torch.bfloat16)
    for backbone in (exact, mixed):
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
    exact(images)[0].square().mean().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed(images)[0].square().mean().backward()
    expected = lora_parameters(exact)
    for name, parameter in lora_parameters(mixed).items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        # bf16 keeps 8 bits; weights and activations are both rounded, over two blocks and back.
        assert _difference(parameter.grad, expected[name].grad) < 5e-2, name
    assert all(p.grad is None for name, p in mixed.named_parameters() if "lora_" not in name)


def test_checkpointing_gives_the_same_gradients(images: Tensor) -> None:
    backbone = _adapted(targets=EVERYTHING).train()
    found = []
    for recompute in ("none", "block", "mlp"):
        backbone.recompute = recompute
        backbone.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            backbone(images)[0].square().mean().backward()
        found.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert {len(one) for one in found} == {len(list(backbone.parameters()))}
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_a_recomputed_block_leaves_out_its_last_product(images: Tensor) -> None:
    """Only the norm behind it reads it, and that has what it needs."""
    calls: list[int] = []
    for post_norm in (False, True):
        backbone = _adapted().train()
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in name)
        for block in backbone.blocks:
            block.post_norm = post_norm
            block.mlp["fc2"].register_forward_hook(lambda *_: calls.append(1))
        gradients = []
        for recompute in ("none", "block"):
            backbone.recompute = recompute
            backbone.zero_grad()
            calls.clear()
            backbone(images)[0].square().mean().backward()
            assert len(calls) == len(backbone.blocks)
            gradients.append([p.grad for p in lora_parameters(backbone).values()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


class _GoesAround(nn.Module):
    """What timm's EVA attention does to an adapter: it reads the weight and never runs the layer."""

    def __init__(self, qkv: LoRALinear) -> None:
        super().__init__()
        self.inner = qkv

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight, bias)


def test_adapters_that_are_gone_around_are_refused(images: Tensor) -> None:
    backbone = _adapted()
    attention = backbone.blocks[1].attn
    check_reached(backbone, images)
    attention.qkv = _GoesAround(attention.qkv)
    with pytest.raises(ValueError, match=r"bypasses blocks\.1\.attn\.qkv"):
        check_reached(backbone, images)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_a_convolution_pads_as_before(mode: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode, dtype=torch.float64))
    images = torch.randn(1, 3, 6, 7, dtype=torch.float64)
    before = model(images)
    inject_lora(model, rank=2, alpha=2.0, targets=("0",))
    assert torch.equal(model(images), before)
    layer: Any = model[0]
    layer.lora_B.data.normal_()
    merged = nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode=mode, dtype=torch.float64)
    update = dense_update(4, layer.lora_A.detach(), layer.lora_B.detach(), layer.slices, layer.scale)
    merged.load_state_dict({"weight": layer.weight + update.view_as(layer.weight), "bias": layer.bias})
    torch.testing.assert_close(model(images), merged(images))
