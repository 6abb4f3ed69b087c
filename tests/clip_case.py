"""A CLIP small enough for a test, as open_clip builds it around EVA's tower, and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
from safetensors.torch import save_file

from tests.random_tower import build_backbone, header_of
from visft_ds.interop.export import timm as timm_form
from visft_ds.interop.layouts import base_parameters
from visft_ds.interop.weights import Lazy, Weights

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
    **{"preset": "eva_e", "width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0, "image_size": SIDE},
    "class_token": True,
}
FILE = "open_clip_model.safetensors"


def make_clip(seed: int = 0) -> Any:
    """A random open_clip model whose outputs depend on every parameter."""
    build = timm.create_model
    sizes = {"img_size": SIDE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2.0}
    torch.manual_seed(seed)
    # open_clip takes the name of timm's model and nothing of its sizes.
    with mock.patch("timm.create_model", lambda name, **options: build(name, **{**options, **sizes})):
        model = open_clip.model.CustomTextCLIP(**CONFIG)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Larger in texts: all end in the same token, and what comes before must reach it.
            matrix = 0.6 if name.startswith("text.") else 0.1
            parameter.normal_(std=matrix if parameter.ndim > 1 else 0.3)
    return model.eval()


def write_folder(folder: Path, *, context: int = 40, embedding: int = 24, text_width: int = 64, **sizes: Any) -> Path:
    """A folder that open_clip loads by `local-dir:`: a random tower of the preset `debug` and a text tower."""
    backbone = build_backbone("debug", seed=0, class_token=True, **sizes)
    rows = torch.randn(embedding, backbone.width, generator=torch.Generator().manual_seed(0)) * backbone.width**-0.5
    torch.manual_seed(0)
    texts = open_clip.transformer.TextTransformer(
        context_length=context, width=text_width, heads=max(1, text_width // 64), layers=1, output_dim=embedding
    )
    vision = {**base_parameters(backbone), "head.weight": rows, "head.bias": torch.zeros(embedding)}
    tensors = {
        **{f"visual.trunk.{name}": value for name, value in vision.items()},
        **{f"text.{name}": value for name, value in texts.named_parameters()},
        "logit_scale": torch.tensor(2.0),
    }
    folder.mkdir(exist_ok=True)
    found = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(found, folder / FILE, metadata={"format": "pt", **header_of(backbone)})
    tower = Weights({name: Lazy.of(value) for name, value in vision.items()}, folder)
    (folder / "config.json").write_text(json.dumps(timm_form(tower, tower, backbone).files["config.json"]))
    vision_cfg = {**CONFIG["vision_cfg"], "image_size": backbone.image_size}
    vision_cfg["timm_model_name"] = f"local-dir:{folder.resolve()}"
    text_cfg = {"context_length": context, "vocab_size": 49408, "width": text_width, "layers": 1}
    text_cfg["heads"] = max(1, text_width // 64)
    model = {"embed_dim": embedding, "vision_cfg": vision_cfg, "text_cfg": text_cfg, "custom_text": True}
    normalised = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    config = {"model_cfg": model, "preprocess_cfg": normalised}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def save_clip(model: Any, path: Path, *, layout: str = "open_clip") -> Path:
    """Write it as open_clip or EVA-CLIP would (prefix `visual.trunk.` or `visual.`), with what no tensor tells."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    if layout == "eva_clip":
        tensors = {name.replace("visual.trunk.", "visual."): value for name, value in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt", "model": json.dumps(MODEL)})
    return path
