"""A tower small enough for a test whose outputs depend on every value, and adapters that matter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.interop.layouts import LAYOUTS, base_parameters, tower_metadata
from visft_ds.interop.writing import save_tensors
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import AdaptedLayer, dense_update, lora_layers, lora_parameters

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28}


def random_tower(seed: int | None = None, *, class_token: bool = True, post_norm: bool = True, **sizes: int) -> EvaViT:
    """No bias is zero and no scale one, as they are at the start; `seed` None: the global generator's next numbers."""
    kind = {"class_token": class_token, "post_norm": post_norm}
    model = build_backbone("debug", seed=None, **kind, **{**SIZES, **sizes})
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.eval()


def move_adapters(model: nn.Module, *, spread: float = 0.3) -> None:
    """Give adapters an effect, which they have not at the start: their B."""
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            if name.endswith("lora_B"):
                parameter.normal_(std=spread)


def save_backbone(
    model: EvaViT,
    path: Path,
    layout: str = "timm",
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tower without its adapters in one of `LAYOUTS`, cast to `dtype`, with its sizes in the header."""
    tensors = {name: parameter.detach() for name, parameter in base_parameters(model).items()}
    tensors = {LAYOUTS[layout].prefix + name: value.to(dtype or value.dtype) for name, value in tensors.items()}
    save_tensors(path, tensors, {**tower_metadata(model), "lora_merged": "false", **(metadata or {})})


@torch.no_grad()
def change_of(layer: AdaptedLayer) -> Tensor:
    """The dense change of its weight."""
    rows = len(layer.weight)
    return dense_update(rows, layer.lora_A, layer.lora_B, layer.slices, layer.scale).view_as(layer.weight)


@torch.no_grad()
def fold_adapters(model: nn.Module) -> None:
    """Add what adapters do to the weights, and leave them without an effect."""
    for layer in lora_layers(model).values():
        layer.weight += change_of(layer)
        layer.lora_B.zero_()


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()
