"""Backbones (image -> feature maps) and the adapters that go into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from visft_ds.models.eva_vit import PRESETS, EvaViT
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.pretrained import TIMM

#: Both give (B, 3, H, W) -> a map (B, D, h, w) for each of `shapes`, (D, pixels to a cell), and with
#: `prefixes` also the tokens that a plain ViT has in front of its patches. They normalise images by
#: `pixel_mean` and `pixel_std`, recompute as `recompute` says, and read the blocks `layers_read` (none: the
#: last); `width` and `patch_size` are of the last map. With the sizes of images that differ (`frames`),
#: features are those of each image alone.
Backbone = EvaViT | TimmBackbone


def build_empty(
    preset: str, dtype: torch.dtype, options: Mapping[str, Any], device: str = "meta"
) -> Backbone:
    """A backbone for weights that are loaded next: one of `PRESETS`, or TIMM and the name of a model of timm.

    `options` are fields that replace the preset's, with timm image_size alone; and `layers`, the blocks that
    are read.
    """
    if preset.startswith(TIMM):
        return build_timm(preset.removeprefix(TIMM), device=device, dtype=dtype, **options)
    if preset not in PRESETS:
        raise ValueError(f"unknown backbone {preset!r}; known: {', '.join(PRESETS)}")
    sizes = dict(options)
    layers = sizes.pop("layers", ())
    with torch.device("meta"):
        backbone = EvaViT(replace(PRESETS[preset], **sizes)).to(dtype)
    if layers:
        backbone.read_after(layers)
    return backbone.to_empty(device=device)
