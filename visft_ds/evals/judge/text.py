"""The text side of a CLIP: texts -> unit vectors in the space of its image embeddings.

EVA-CLIP's flat files and open_clip's hold it under `text.`, with the names of open_clip's `TextTransformer`
(https://github.com/mlfoundations/open_clip/blob/main/src/open_clip/transformer.py), so that a backbone of
ours takes it from the file that its base came from. n texts, E width of the embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.files import reading
from visft_ds.interop.layouts import prefix_of
from visft_ds.interop.weights import open_weights

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

PREFIX = "text."
#: Width of a head in every text tower of CLIP, which follows from no tensor: 768 / 12, 1024 / 16, 1280 / 20.
HEAD_WIDTH = 64
_BATCH = 256  # texts


@dataclass(frozen=True)
class TextTower:
    """A text encoder with its tokenizer."""

    module: nn.Module
    tokenize: Callable[[Sequence[str]], Tensor]
    embed: Callable[[Tensor], Tensor]  #: of the module: tokens (n, length) -> (n, E)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """(n, E) float32, each of length 1, on the CPU. A text longer than the tower reads is cut at its
        end.
        """
        self.module.to(device)
        parts = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
        embeddings = [self.embed(self.tokenize(part).to(device)) for part in parts]
        return F.normalize(torch.cat(embeddings).float(), dim=-1).cpu()


def text_tower_in(path: str | Path) -> TextTower | None:
    """The text tower of an EVA-CLIP or open_clip file, in float32; None where the file has none.

    Raises:
        ValueError: half a tower, one of another architecture, or a vocabulary that is not CLIP's.
    """
    file = open_weights(path)
    tensors = {name.removeprefix(PREFIX): file[name] for name in file if name.startswith(PREFIX)}
    if not tensors:
        return None
    from open_clip.transformer import TextTransformer

    with reading(path, "a file with CLIP's text tower"):
        length, width = tensors["positional_embedding"].shape
        tokens = tensors["token_embedding.weight"].shape[0]
        tokenizer = _tokenizer(length)
        if tokens != tokenizer.vocab_size:
            raise ValueError(f"it has {tokens} tokens, not CLIP's vocabulary")
        module: nn.Module = TextTransformer(
            context_length=length,
            vocab_size=tokens,
            width=width,
            heads=max(1, width // HEAD_WIDTH),
            layers=sum(name.endswith(".attn.in_proj_weight") for name in tensors),
            output_dim=tensors["text_projection"].shape[1],
        )
        tensors.pop("attn_mask", None)  # a causal mask, which some files carry: a function of the length
        module.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    return TextTower(module.requires_grad_(False).eval(), tokenizer, module)


@functools.cache
def _tokenizer(length: int) -> SimpleTokenizer:
    """CLIP's, for so many tokens; to read its vocabulary takes longer than a small tower."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=length)


def projection_of(path: str | Path, width: int) -> nn.Linear | None:
    """The CLIP projection of a tower of a width; None where the file has none."""
    file = open_weights(path)
    names = {name: f"{prefix_of(file)}head.{name}" for name in ("weight", "bias")}
    if names["weight"] not in file:
        return None
    with reading(path, f"a tower of width {width} with CLIP's projection"):
        tensors = {name: file.tensor(full, torch.float32) for name, full in names.items()}
        projection = nn.Linear(width, len(tensors["weight"]))
        projection.load_state_dict(tensors)
    return projection
