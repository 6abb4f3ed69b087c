"""A tower out of a weight file: opened under our names whatever its own, its sizes completed, a model of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from visft_ds.interop.files import WeightFile, open_weights
from visft_ds.interop.layouts import Layout, Tower, find_layout
from visft_ds.models.eva_vit import PRESETS, EvaViT, build_backbone


def open_tower(path: str | Path) -> tuple[WeightFile, Layout]:
    """Open a file that holds a vision tower; inside the tower its tensors have our names.

    Raises ValueError as `open_weights` and `find_layout` do.
    """
    file = open_weights(path)
    return file, find_layout(file)


def resolve_tower(found: Tower, model: str | None = None, given: Mapping[str, float | bool] | None = None) -> Tower:
    """Complete the sizes read from a file with what follows from no tensor: number of heads and norm placement.

    Sources, first one wins: `given` (num_heads, post_norm), the preset `model`, the file's metadata, the preset of the
    same sizes. Raises ValueError where they stay unknown, where `model` or `given` contradict the file, and for unknown
    names.
    """
    given = dict(given or {})
    allowed = ("width", "depth", "mlp_ratio", "patch_size", "image_size", "num_heads", "post_norm")
    if unknown := [name for name in given if name not in allowed]:
        raise ValueError(f"unknown setting {', '.join(unknown)}; allowed: {', '.join(allowed)}")
    if model is not None and model not in PRESETS:
        raise ValueError(f"unknown model {model!r}; allowed: {', '.join(PRESETS)}")
    name = model or (found.preset() if found.num_heads is None else None)
    if name is not None:
        config = PRESETS[name]
        preset = {field: getattr(config, field) for field in allowed}
        given = {**preset, **given}
    sizes = {
        "width": found.width,
        "depth": found.depth,
        "mlp_ratio": found.mlp_ratio,
        "patch_size": found.patch_size,
        "image_size": found.image_size,
        "num_heads": found.num_heads,
        "post_norm": found.post_norm,
    }
    for key, value in given.items():
        # mlp_ratio is written with few digits in published configurations (4.3637); the hidden width decides.
        same = int(found.width * value) == found.hidden if key == "mlp_ratio" else value == sizes[key]
        if sizes[key] is not None and not same:
            raise ValueError(f"{key}={value} contradicts the file, which has {sizes[key]} ({found.describe()})")
        sizes[key] = value
    heads, post_norm = sizes["num_heads"], sizes["post_norm"]
    if heads is None or post_norm is None:
        raise ValueError(f"the file does not tell num_heads and post_norm, and no preset has {found.describe()}")
    if found.width % int(heads):
        raise ValueError(f"num_heads={heads} does not divide the width {found.width}")
    return replace(found, num_heads=int(heads), post_norm=bool(post_norm))


def build_tower(tower: Tower, dtype: torch.dtype = torch.float32, layers: Sequence[int] = ()) -> EvaViT:
    """A model of these sizes, up to a block, with unset weights, to be loaded next."""
    assert tower.num_heads is not None and tower.post_norm is not None
    return build_backbone(
        "debug",  # every field of it is replaced
        dtype=dtype,
        width=tower.width,
        depth=tower.depth,
        num_heads=tower.num_heads,
        mlp_ratio=tower.mlp_ratio,
        patch_size=tower.patch_size,
        image_size=tower.image_size,
        post_norm=tower.post_norm,
        class_token=tower.class_token,
        layers=layers,
        seed=None,
    )
