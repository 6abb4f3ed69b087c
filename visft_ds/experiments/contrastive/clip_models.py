"""A CLIP of our own tower and open_clip's text transformer: built, and written as one file that both sides read.

The names are open_clip's (`visual.trunk.`, `text.`, `logit_scale`), so that a training of ours takes the tower out of
it, evaluation both towers, and open_clip the folder as a whole.

Letters: B pairs, E width of the embedding, T text length in tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.evals.benchmarks.encoders import EvaEncoder
from visft_ds.evals.benchmarks.text_towers import HEAD_WIDTH, PREFIX, TextTower
from visft_ds.interop import open_clip
from visft_ds.interop.files import WeightFile, open_weights
from visft_ds.interop.layouts import base_parameters, tower_in, tower_of
from visft_ds.interop.open_clip import FILE, LAYOUT
from visft_ds.interop.writing import save_tensors, write_text
from visft_ds.models.eva_vit import build_backbone, generator_for


@dataclass(frozen=True)
class TextShape:
    """Sizes of a text tower.

    Raises ValueError for a width from which no file's number of heads follows.
    """

    width: int = 64
    layers: int = 2
    context_length: int = 40  #: tokens, with those of start and end
    embedding: int = 64  #: of images and texts

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.embedding) < 1 or self.context_length < 3:
            raise ValueError(
                f"text width {self.width}, layers {self.layers} and embedding {self.embedding} must be at least 1, "
                f"context length {self.context_length} at least 3"
            )
        if self.width % HEAD_WIDTH and self.width > HEAD_WIDTH:
            raise ValueError(
                f"a text tower of width {self.width} is not allowed: give at most {HEAD_WIDTH}, or a multiple of it, "
                f"since heads of CLIP's text towers are {HEAD_WIDTH} wide and no tensor tells another width"
            )

    @property
    def heads(self) -> int:
        """Number of attention heads."""
        return max(1, self.width // HEAD_WIDTH)


class Clip(nn.Module):
    """Both towers and the logarithm of the inverse temperature."""

    def __init__(self, images: EvaEncoder, texts: nn.Module, log_scale: float) -> None:
        super().__init__()
        self.images = images
        self.texts = texts
        self.logit_scale = nn.Parameter(torch.tensor(log_scale))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised, (B, T) int64 -> two times (B, E), each row of length 1."""
        return self.images(images, ("clip",))["clip"], F.normalize(self.texts(tokens).float(), dim=-1)


def build_clip(preset: str, text: TextShape, *, log_scale: float, seed: int, **overrides: Any) -> Clip:
    """Random towers in fp32 on the CPU, a function of the seed alone.

    Args:
        preset: of the vision tower, which gets a class token.
        log_scale: logarithm of the inverse temperature.
        overrides: fields that replace the preset's, see `build_backbone`.

    Raises:
        ValueError: as `build_backbone` does.
    """
    from open_clip.transformer import TextTransformer

    backbone = build_backbone(preset, seed=seed, class_token=True, **overrides)
    rows = torch.empty(text.embedding, backbone.width)
    rows.normal_(std=backbone.width**-0.5, generator=generator_for(seed, "head.weight"))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        texts = TextTransformer(
            context_length=text.context_length,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            output_dim=text.embedding,
        )
    return Clip(EvaEncoder(backbone, (rows, torch.zeros(text.embedding))), texts, log_scale)


def text_tower_of(clip: Clip) -> TextTower:
    """The text side with CLIP's own tokenizer."""
    from open_clip.tokenizer import SimpleTokenizer

    length: Any = clip.texts.context_length
    return TextTower(clip.texts, SimpleTokenizer(context_length=length), "in training")


def clip_tensors(clip: Clip) -> dict[str, Tensor]:
    """Name in open_clip's file -> tensor."""
    backbone, head = clip.images.backbone, clip.images.head
    assert head is not None
    vision = {**base_parameters(backbone), "head.weight": head.weight, "head.bias": head.bias}
    named = {
        **{LAYOUT.prefix + name: value for name, value in vision.items()},
        **{PREFIX + name: value for name, value in clip.texts.named_parameters()},
        "logit_scale": clip.logit_scale,
    }
    return {name: value.detach().cpu() for name, value in named.items()}


def save_clip(clip: Clip, folder: Path, *, named: Path | None = None) -> tuple[str, ...]:
    """Write weights (`FILE`) and configurations into a folder; returns the names of the latter.

    Args:
        named: the folder's name once it is finished, where it is written under another one.

    Raises:
        ValueError: a file of that name is there.
    """
    metadata = {"tower": tower_of(clip.images.backbone).to_json(), "lora_merged": "false"}
    save_tensors(folder / FILE, clip_tensors(clip), metadata)
    return write_configs(open_weights(folder / FILE), folder, named or folder)


def write_configs(weights: WeightFile, folder: Path, named: Path) -> tuple[str, ...]:
    """Beside the weights of an open_clip model, what open_clip needs to build it; returns the names of the files."""
    written = open_clip.settings(weights, tower_in(weights, LAYOUT), named)
    for name, value in written.items():
        write_text(folder / name, json.dumps(value, indent=2) + "\n")
    return tuple(written)
