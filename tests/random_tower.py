"""A tower small enough for a test whose outputs depend on every value, and adapters that matter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.cli import main
from visft_ds.config.schema import LoraConfig
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import MODEL, base_parameters, model_of
from visft_ds.interop.peft_folder import write_folder
from visft_ds.interop.weights import save_tensors
from visft_ds.models import Backbone, build_empty
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import TARGETS, AdaptedLayer, dense_update, lora_layers, lora_parameters
from visft_ds.prepare.materialize import random_weight

SIZES: dict[str, Any] = {"width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28}


def build_backbone(
    name: str,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int | None = 0,
    **options: Any,
) -> EvaViT:
    """A tower of PRESETS with the random weights of a run. `seed` None leaves its memory unset."""
    backbone = build_empty(name, dtype, options, device)
    assert isinstance(backbone, EvaViT)
    if seed is not None and device != "meta":
        with torch.no_grad():
            for key, parameter in backbone.named_parameters():
                parameter.copy_(random_weight(key, parameter.shape, seed))
    return backbone


def random_tower(
    seed: int | None = None, *, class_token: bool = True, post_norm: bool = True, **sizes: int
) -> EvaViT:
    """No bias is zero and no scale one, as they are at the start; `seed` None: the global generator's next
    numbers.
    """
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
    prefix: str = "",
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a tower without its adapters under a prefix, cast to `dtype`, with its sizes in the header."""
    tensors = {name: parameter.detach() for name, parameter in base_parameters(model).items()}
    tensors = {prefix + name: value.to(dtype or value.dtype) for name, value in tensors.items()}
    save_tensors(path, tensors, {**header_of(model), **(metadata or {})})


def header_of(model: Backbone) -> dict[str, str]:
    """What a weight file says of its model."""
    return {MODEL: json.dumps(model_of(model))}


def adapter_of(model: Backbone, base: str | None = None, targets: tuple[str, ...] = ()) -> Adapter:
    """A copy of the adapter in a model; `targets` have to be given where they are globs."""
    layers = lora_layers(model)
    first = next(iter(layers.values()))
    roles = tuple(
        role
        for role, (path, part, parts) in TARGETS.items()
        if (layer := layers.get(f"blocks.0.{path}")) is not None
        and len(layer.weight) // parts * part in [lo for lo, _ in layer.slices]
    )
    lora = LoraConfig(rank=first.rank, alpha=first.alpha, targets=targets or roles)
    values = {name: value.detach().clone() for name, value in lora_parameters(model).items()}
    return Adapter.of(model, lora, values, base)


def save_adapter(adapter: Adapter, folder: Path) -> Path:
    """Write it as a run exports it; returns the folder."""
    write_folder(adapter, folder)
    return folder


def merge(base: Path, adapter: Adapter | None, out: Path, *words: str, verify: bool = False) -> Path:
    """Run `visft merge` for a file, or `visft export` for a folder in timm's or another form, which have to
    succeed; returns `out`.
    """
    flags = ["--backbone", str(base), "--out", str(out), *words]
    if adapter is not None:
        flags += ["--adapter", str(save_adapter(adapter, out.with_name(f"{out.name}-adapter")))]
    if out.suffix:
        assert not verify and main(["merge", *flags]) == 0
        return out
    if "--format" not in words:
        flags += ["--format", "timm"]
    if not verify:
        flags += ["--verify", "none"]
    assert main(["export", *flags]) == 0
    return out


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
