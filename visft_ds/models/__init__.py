"""Backbones (image -> feature maps) and the adapters that go into them.

* `eva_vit`: EVA-CLIP's towers, the paper's backbones, with images of different sizes packed in one row.
* `timm_backbone`: any model of timm whose map follows the size of its image, given the same interface.
* `lora`: adapters in place of layers of either. The product itself is `ops.lora`.

To add a backbone, give it the attributes that `Backbone` lists. May be touched: how features are computed, as
long as tests/models and the golden losses hold. May not: names and shapes of parameters, which stand in every
file; and a parameter is used in the forward of the module that owns it alone, where ZeRO-3 gathers it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from visft_ds.models.eva_vit import PRESETS, EvaViT
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.pretrained import TIMM
from visft_ds.settings.bands import Bands

#: Called with images (B, 3, H, W), a backbone gives a map (B, D, h, w) for each of its `shapes`, (D, pixels
#: to a cell); with `prefixes` then the tokens that a plain ViT has in front of its patches; with `frames`,
#: the sizes of images that differ, features are those of each image alone. `pixel_mean` and `pixel_std`
#: normalise images, `recompute` says what the backward pass computes again, `layers_read` which blocks are
#: read (none: the last); `width` and `patch_size` are of the last map. `bands` are those that it has in place
#: of three colours, `first_weight` is the name of the weights that see them.
Backbone = EvaViT | TimmBackbone


def build_empty(
    preset: str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
    device: str = "meta",
) -> Backbone:
    """A backbone for weights that are loaded next: one of `PRESETS`, or TIMM and the name of a model of timm.

    `options` are fields that replace the preset's, with timm image_size alone; `layers`, the blocks that are
    read; and `bands`, as JSON has them. Raises ValueError for a model of timm whose stem takes no bands.
    """
    fields = dict(options)
    bands = Bands.of(fields.pop("bands", None))
    if preset.startswith(TIMM):
        name = preset.removeprefix(TIMM)
        return build_timm(name, device=device, dtype=dtype, bands=bands, **fields)
    if preset not in PRESETS:
        raise ValueError(f"unknown backbone {preset!r}; known: {', '.join(PRESETS)}")
    layers = fields.pop("layers", ())
    with torch.device("meta"):
        backbone = EvaViT(replace(PRESETS[preset], **fields), bands).to(dtype)
    if layers:
        backbone.read_after(layers)
    return backbone if device == "meta" else backbone.to_empty(device=device)
