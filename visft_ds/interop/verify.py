"""An export as its library loads it: a function of normalised images, to compare with base + adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.interop.export import FEATURES, IMAGES
from visft_ds.models import Backbone
from visft_ds.models.timm_backbone import TimmBackbone, as_backbone

Features = Callable[[Tensor], Tensor]
#: Format -> module that loads it.
LIBRARIES = {"timm": "timm", "open_clip": "open_clip", "transformers": "transformers", "onnx": "onnxruntime"}


def by_library(form: str, folder: Path, backbone: Backbone) -> Features:
    """(B, 3, H, W) -> (B, D, h, w), by the library that a format is for; `backbone`: the same model of ours."""
    if form == "onnx":
        import onnxruntime

        session: Any = onnxruntime.InferenceSession(next(folder.glob("*.onnx")), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run([FEATURES], {IMAGES: images.numpy()})[0])
    if form == "transformers":
        from transformers import AutoModel

        model = AutoModel.from_pretrained(folder, dtype=torch.float32)
        # CLIP's last hidden state is in front of its last norm, which others have behind them.
        norm = model.post_layernorm if model.config.model_type == "clip_vision_model" else nn.Identity()
        return lambda images: _map(norm(model.eval()(pixel_values=images).last_hidden_state), images, backbone)
    if form == "open_clip":
        import open_clip

        trunk = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).visual.trunk.eval()
    else:
        import timm

        trunk = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        if isinstance(backbone, TimmBackbone):
            return as_backbone(trunk, backbone.name, backbone.options, backbone.layers_read).eval()
    if backbone.layers_read:
        trunk.prune_intermediate_layers([max(backbone.layers_read)])
    return lambda images: _map(trunk.forward_features(images), images, backbone)


@torch.no_grad()
def difference(got: Features, wanted: Backbone) -> float:
    """|got - wanted| / |wanted| on two images of seeded noise."""
    images = torch.randn(2, 3, wanted.image_size, wanted.image_size, generator=torch.Generator().manual_seed(0))
    want: Tensor = wanted.eval()(images)
    return float((got(images).float() - want).norm() / want.norm())


def tolerance(dtype: torch.dtype) -> float:
    """Difference that rounding of the weights explains: 8 half-steps (0.4 to 3 were measured for 2 to 64 blocks).

    In fp32 the order of sums, B(Ax) against (BA)x, costs 1e-5.
    """
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def _map(tokens: Tensor, images: Tensor, backbone: Backbone) -> Tensor:
    """(B, N, D) -> (B, D, h, w), without what stands in front of the patches."""
    grid = images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
