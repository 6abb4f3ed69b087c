"""A CLIP small enough for a test, as open_clip builds it around EVA's tower, and its file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from safetensors.torch import save_file

SIDE, WIDTH, DEPTH, HEADS, EMBEDDING = 28, 48, 2, 4, 24
#: As EVA02-E-14-plus is configured, but for the sizes.
CONFIG: dict[str, Any] = {
    "embed_dim": EMBEDDING,
    "vision_cfg": {
        "image_size": SIDE,
        "timm_model_name": "eva02_enormous_patch14_clip_224",
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": None,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 2},
}
MODEL: dict[str, Any] = {
    **{
        "preset": "eva_e",
        "width": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
        "image_size": SIDE,
    },
    "class_token": True,
}


@contextmanager
def small_towers() -> Iterator[None]:
    """open_clip takes the name of timm's model and nothing of its sizes: here they are those of `MODEL`."""
    build = timm.create_model
    sizes = {"img_size": SIDE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0}
    with mock.patch("timm.create_model", lambda name, **options: build(name, **{**options, **sizes})):
        yield


def make_clip(seed: int = 0) -> Any:
    """A random open_clip model whose outputs depend on every parameter."""
    torch.manual_seed(seed)
    with small_towers():
        model = open_clip.model.CustomTextCLIP(**CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger in texts: all end in the same token, and what comes before must reach it.
            matrix = 0.6 if name.startswith("text.") else 0.1
            parameter.normal_(std=matrix if parameter.ndim > 1 else 0.3)
    return model.eval()


def save_clip(model: Any, path: Path, *, layout: str = "open_clip") -> Path:
    """Write it as open_clip or EVA-CLIP would (prefix `visual.trunk.` or `visual.`), with what no tensor
    tells.
    """
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if layout == "eva_clip":
        tensors = {name.replace("visual.trunk.", "visual."): value for name, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", "model": json.dumps(MODEL)})
    return path
