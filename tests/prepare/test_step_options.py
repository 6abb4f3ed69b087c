"""Storage of small weights in 16 bit, which changes no bit of a step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.random_tower import build_backbone
from visft_ds.config import resolve
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import inject_lora
from visft_ds.prepare.model import plan_model


def adapted(post_norm: bool) -> EvaViT:
    """A frozen tower with adapters that have an effect."""
    shape: dict[str, Any] = {
        "width": 32,
        "depth": 3,
        "num_heads": 2,
        "image_size": 56,
        "post_norm": post_norm,
    }
    backbone = build_backbone("debug", **shape)
    inject_lora(backbone, rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if name.endswith("lora_B"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return backbone.train()


def learnt(backbone: EvaViT, images: Tensor) -> list[Tensor]:
    """Features under autocast, and the gradients of the adapters."""
    with torch.autocast(images.device.type, torch.bfloat16):
        features = backbone(images)[0]
    # Not their mean square: behind a norm that is nearly constant, and its gradient nothing but rounding.
    (
        features * torch.arange(features.numel(), device=features.device).view_as(features).sin()
    ).mean().backward()
    return [features.detach(), *(p.grad.clone() for p in backbone.parameters() if p.grad is not None)]


@pytest.mark.parametrize("recompute", ["none", "block", "mlp"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_vectors_that_are_stored_in_16_bit_are_rounded_there_in_any_case(
    post_norm: bool, recompute: str
) -> None:
    """No bit of features and gradients depends on it; norms in front of branches stay in float32."""
    shape = f'visft.model.overrides={{"width": 32, "depth": 3, "num_heads": 2, "post_norm": {str(post_norm).lower()}}}'
    config = resolve(stage=2, model="debug", settings=[shape, "visft.heads.start=random"])
    planned, _ = plan_model(config, storage=torch.bfloat16)
    exact = adapted(post_norm=post_norm)
    for name, parameter in exact.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data + 0.05 * torch.randn_like(parameter)
            parameter.data = parameter.data.bfloat16() if parameter.ndim == 2 else parameter.data
    rounded, dtypes = copy.deepcopy(exact), {n: p.dtype for n, p in planned.backbone.named_parameters()}
    stored = [
        (name, p) for name, p in rounded.named_parameters() if p.ndim == 1 and dtypes[name] == torch.bfloat16
    ]
    assert len(stored) == 3 * (9 if post_norm else 5)
    for _, parameter in stored:
        parameter.data = parameter.data.bfloat16()
    images, found = torch.randn(2, 3, 56, 84), []
    for backbone in (exact, rounded):
        backbone.recompute = recompute
        found.append(learnt(backbone, images))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
