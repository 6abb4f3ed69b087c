"""The backbone: random weights, memory, precision, checkpointing, its parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.random_tower import build_backbone
from visft_ds.models.eva_vit import EvaViT

TINY = {"width": 32, "depth": 3, "num_heads": 4, "image_size": 56}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 61, 84, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("post_norm", [False, True])
def test_partial_patches_are_dropped(images: Tensor, post_norm: bool) -> None:
    backbone = build_backbone("debug", **TINY, post_norm=post_norm)
    features = backbone(images)[0]
    assert features.shape == (2, 32, 61 // 14, 84 // 14)
    assert torch.equal(features, backbone(images[:, :, :56])[0])


def test_weights_are_a_function_of_seed_and_name_alone() -> None:
    state = torch.get_rng_state()
    first = build_backbone("debug", **TINY).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again = build_backbone("debug", **{**TINY, "depth": 2}, class_token=True).state_dict()
    other = build_backbone("debug", **TINY, seed=1).state_dict()
    half = build_backbone("debug", **TINY, dtype=torch.bfloat16).state_dict()
    for name, value in first.items():
        if not name.startswith("blocks.2."):
            assert torch.equal(value, again[name]), name
        assert torch.equal(value.bfloat16(), half[name]), name
        drawn = value.unique().numel() > 1 and name != "pos_embed"  # positions are fixed sines
        assert torch.equal(value, other[name]) != drawn, name
    assert first["patch_embed.proj.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])
    positions = first["pos_embed"][0, 1:]
    distances = torch.cdist(positions, positions) + torch.eye(len(positions)) * 1e9
    assert distances.min() > 0.1  # every place has its own


def _gradients(backbone: EvaViT, images: Tensor) -> dict[str, Tensor]:
    backbone.zero_grad()
    backbone(images)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("recompute", ["block", "mlp"])
def test_whatever_is_recomputed_the_gradients_are_the_same(
    images: Tensor, recompute: str, post_norm: bool
) -> None:
    """Modules run twice where they are recomputed."""
    backbone = build_backbone("debug", **TINY, post_norm=post_norm).train()
    plain = _gradients(backbone, images)
    kernels = _KernelCount()
    calls = {"attn": 0, "mlp.fc1": 0}
    for name in calls:
        for block in backbone.blocks:
            block.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
            )
    backbone.recompute = recompute
    with kernels:
        found = _gradients(backbone, images)
    depth = len(backbone.blocks)
    assert calls == {"attn": depth if recompute == "mlp" else 2 * depth, "mlp.fc1": 2 * depth}
    assert kernels.attention == (2 * depth if recompute == "block" else depth)
    assert all(torch.equal(found[name], value) for name, value in plain.items())
    calls.update({"attn": 0, "mlp.fc1": 0})
    _gradients(backbone.eval(), images)
    assert calls == {"attn": depth, "mlp.fc1": depth}, "not in training"


@pytest.mark.parametrize(("post_norm", "class_token"), [(False, True), (True, False)])
def test_packed_images_are_processed_as_if_alone(post_norm: bool, class_token: bool) -> None:
    """Of other sizes and of the same, with gradients; the packed rows differ from each alone by rounding."""
    options: dict[str, Any] = {**TINY, "post_norm": post_norm, "class_token": class_token}
    backbone = build_backbone("debug", **options, dtype=torch.float64).train()
    frames = ((56, 84), (61, 30), (14, 14), (61, 30))
    batch = torch.randn(4, 3, 61, 84, dtype=torch.float64)  # what lies beyond a frame must not matter

    def packed() -> list[Tensor]:
        maps = backbone(batch, frames)[0]
        assert maps.shape == (4, 32, 4, 6)
        grids = [(height // 14, width // 14) for height, width in frames]
        assert all(
            not feature_map[:, h:].any() and not feature_map[:, :, w:].any()
            for feature_map, (h, w) in zip(maps, grids, strict=True)
        )
        return [feature_map[:, :h, :w] for feature_map, (h, w) in zip(maps, grids, strict=True)]

    def alone() -> list[Tensor]:
        return [backbone(one[None, :, :h, :w])[0][0] for one, (h, w) in zip(batch, frames, strict=True)]

    for recompute in ("none", "block", "mlp"):
        backbone.recompute = recompute
        results = []
        for run in (packed, alone):
            backbone.zero_grad()
            maps = run()
            torch.stack([feature_map.square().mean() for feature_map in maps]).sum().backward()
            results.append((maps, {name: p.grad.clone() for name, p in backbone.named_parameters()}))
        torch.testing.assert_close(*results, rtol=0, atol=1e-10)
    # A gradient that one image alone has must not reach the other's pixels.
    pixels = batch.clone().requires_grad_()
    backbone(pixels, frames)[0][0].sum().backward()
    assert pixels.grad is not None and pixels.grad[0].abs().sum() > 0 and pixels.grad[1:].abs().sum() == 0


class _KernelCount(TorchDispatchMode):
    """Counts forward attention kernels that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.attention += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("post_norm", [False, True])
def test_16_bit_matrices_keep_an_fp32_residual_stream(images: Tensor, post_norm: bool) -> None:
    exact = build_backbone("debug", **TINY, post_norm=post_norm)
    mixed = build_backbone("debug", **TINY, post_norm=post_norm, dtype=torch.bfloat16)
    for name, parameter in mixed.named_parameters():
        if parameter.ndim < 2 or name == "pos_embed":
            parameter.data = exact.get_parameter(name).data
    expected = exact(images)[0]
    results = {"stored": mixed(images)[0]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results |= {"autocast": exact(images)[0], "both": mixed(images)[0]}
        assert build_backbone("debug", **TINY, dtype=torch.bfloat16).embed(images).dtype == torch.float32
    for kind, actual in results.items():
        assert actual.dtype == torch.float32, kind
        # bf16 products (8 bits) inside a few blocks.
        assert (actual - expected).norm() / expected.norm() < 2e-2, kind


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frozen_bf16_tower_keeps_16_bit_branches_in_the_backward_pass(images: Tensor, device: str) -> None:
    """A norm that returned fp32 under autocast, as torch's does on CUDA, would double what each block
    keeps.
    """
    backbone = build_backbone("debug", **TINY, post_norm=True, dtype=torch.bfloat16, device=device)
    kept: list[Tensor] = []
    with torch.autocast(device, dtype=torch.bfloat16):
        stream = backbone.embed(images.to(device))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            (out,) = backbone.run_blocks(backbone.blocks[:1], stream)
    assert stream.dtype == out.dtype == torch.float32
    wide = [t.dtype for t in kept if t.numel() >= stream.numel()]
    assert len(wide) > 4 and set(wide) == {torch.bfloat16}


def test_bad_names_and_shapes_are_refused() -> None:
    for name, options in (("eva_x", {}), ("debug", {"width": 190}), ("debug", {"image_size": 100})):
        with pytest.raises(ValueError, match=r"eva_x|divide"):
            build_backbone(name, device="meta", **options)


def test_tokens_lie_one_after_another() -> None:
    """The convolution's order would go through all sums, and each product would need a second wide tensor."""
    backbone = build_backbone("debug", width=32, depth=1, num_heads=2, image_size=28)
    for images in (
        torch.randn(2, 3, 28, 28),
        torch.randn(2, 3, 28, 28).to(memory_format=torch.channels_last),
    ):
        assert backbone.embed(images).is_contiguous()
