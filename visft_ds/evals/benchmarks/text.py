"""The text side of a CLIP: texts -> unit vectors in the space of its image embeddings.

EVA-CLIP's flat files and open_clip's hold it under `text.`, with the names of open_clip's `TextTransformer`
(https://github.com/mlfoundations/open_clip/blob/main/src/open_clip/transformer.py), so that a backbone of ours takes
it from the file that its base came from. n texts, E width of the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.files import reading
from visft_ds.interop.layouts import prefix_of
from visft_ds.interop.weights import open_weights

PREFIX = "text."
#: Width of a head in every text tower of CLIP, which follows from no tensor: 768 / 12, 1024 / 16, 1280 / 20.
HEAD_WIDTH = 64
_BATCH = 256  # texts
_LAYER = re.compile(r"text\.transformer\.resblocks\.(\d+)\.")


@dataclass(frozen=True)
class TextTower:
    """A text encoder with its tokenizer."""

    module: nn.Module  #: tokens (n, length) -> (n, E)
    tokenize: Callable[[Sequence[str]], Tensor]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """(n, E) float32, each of length 1, on the CPU. A text longer than the tower reads is cut at its end."""
        module, starts = self.module.to(device), range(0, len(texts), _BATCH)
        parts = [module(self.tokenize(list(texts[start : start + _BATCH])).to(device)) for start in starts]
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def text_tower_in(path: str | Path) -> TextTower | None:
    """The text tower of an EVA-CLIP or open_clip file, in float32; None where the file has none.

    Raises:
        ValueError: half a tower, one of another architecture, or a vocabulary that is not CLIP's.
    """
    file = open_weights(path)
    names = [name for name in file if name.startswith(PREFIX)]
    if not names:
        return None
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import TextTransformer

    needed = [f"{PREFIX}{name}" for name in ("positional_embedding", "token_embedding.weight", "text_projection")]
    if lacking := [name for name in needed if name not in file]:
        raise ValueError(f"{file.path}: its text tower lacks {', '.join(lacking)}; take the whole file")
    length, width = file[needed[0]].shape
    if width % HEAD_WIDTH and width > HEAD_WIDTH:
        raise ValueError(f"{file.path}: a text tower of width {width} has no heads of {HEAD_WIDTH}: not a CLIP")
    settings = {
        "context_length": length,
        "vocab_size": file[needed[1]].shape[0],
        "width": width,
        "heads": max(1, width // HEAD_WIDTH),
        "layers": 1 + max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=-1),
        "output_dim": file[needed[2]].shape[1],
    }
    tokenizer = SimpleTokenizer(context_length=length)
    if settings["vocab_size"] != tokenizer.vocab_size:
        raise ValueError(f"{file.path}: its text tower has {settings['vocab_size']} tokens, not CLIP's vocabulary")
    module: nn.Module = TextTransformer(**settings)
    # A causal mask, which some files carry along, is a function of the length.
    tensors = {name.removeprefix(PREFIX): file[name].read() for name in names if not name.endswith("attn_mask")}
    with reading(path, "a file with CLIP's text tower"):
        masks = {name: one for name, one in module.state_dict().items() if name.endswith("attn_mask")}
        module.load_state_dict({**masks, **tensors})
    return TextTower(module.requires_grad_(False).eval(), tokenizer)


def projection_of(path: str | Path) -> tuple[Tensor, Tensor] | None:
    """(weight (E, D), bias (E)) of a tower's CLIP projection; None where the file has none.

    Raises:
        ValueError: one of the two is missing.
    """
    file = open_weights(path)
    names = [f"{prefix_of(file)}head.{name}" for name in ("weight", "bias")]
    found = [name for name in names if name in file]
    if not found:
        return None
    if len(found) < len(names):
        raise ValueError(f"{file.path}: the CLIP projection is half there: {found[0]} without the other of {names}")
    return file.tensor(names[0], torch.float32), file.tensor(names[1], torch.float32)


class TextOf(nn.Module):
    """The text side of a model that has both: older open_clip models keep its parts at the top."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        encoded: Tensor = self.model.encode_text(tokens)  # type: ignore[operator]
        return encoded
