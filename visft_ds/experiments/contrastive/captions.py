"""Captions: made into tokens, which is done once, and compared with their images by the benchmarks' own rules.

Letters: n images, E width of the embedding, T text length in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visft_ds.evals.benchmarks.protocol import IntArray, hits
from visft_ds.evals.benchmarks.retrieval import image_to_text, text_to_image
from visft_ds.evals.benchmarks.text_towers import TextTower

RECALLS = (1, 5)
_AT_ONCE = 4096  # captions made into tokens
_ROWS = 256  # texts encoded at once


@dataclass(frozen=True)
class Tokens:
    """All captions of a set."""

    table: Tensor  #: (captions, T) int32
    cut: int  #: captions that are as long as the tower reads, or longer: their end is lost

    def rows(self, places: Tensor) -> Tensor:
        """(B,) places -> (B, T) int64."""
        return self.table[places].long()


def tokens_of(tower: TextTower, captions: Sequence[str]) -> Tokens:
    """Tokenise all captions.

    Raises:
        ValueError: no caption, or a token beyond the vocabulary of the tower.
    """
    if not captions:
        raise ValueError("there are no captions to learn from")
    parts = [
        torch.as_tensor(tower.tokenize(list(captions[start : start + _AT_ONCE]))).int()
        for start in range(0, len(captions), _AT_ONCE)
    ]
    table = torch.cat(parts)
    rows = _vocabulary(tower)
    if rows is not None and int(table.max()) >= rows:
        raise ValueError(
            f"{tower.source}: its tokenizer says {int(table.max())}, and the tower embeds {rows} tokens: tokenizer and "
            f"text tower do not belong together"
        )
    # What ends an empty text is filled up with; the last column is in use where a text was cut, or just fits.
    padding = torch.as_tensor(tower.tokenize([""]))[0, -1]
    return Tokens(table, int((table[:, -1] != padding).sum()))


def _vocabulary(tower: TextTower) -> int | None:
    """Rows of the largest embedding of tokens; None where there is none."""
    found = [module.num_embeddings for module in tower.module.modules() if isinstance(module, torch.nn.Embedding)]
    return max(found, default=None)


def recall(images: Tensor, texts: Tensor, owners: IntArray) -> dict[str, float]:
    """R@k from image to text and from text to image, as shares.

    Args:
        images: (n, E) of length 1.
        texts: (captions, E) of length 1.
        owners: (captions,) place of the image of each, ascending.
    """
    places = torch.from_numpy(owners)
    ranks = {
        "image to text": image_to_text(images, texts, places)[0],
        "text to image": text_to_image(images, texts, places),
    }
    return {f"{way} R@{k}": float(hits(found, k).mean()) for way, found in ranks.items() for k in RECALLS}


def encode_captions(tower: TextTower, captions: Sequence[str]) -> Tensor:
    """(captions, E) of length 1 on the CPU."""
    parts = [captions[start : start + _ROWS] for start in range(0, len(captions), _ROWS)]
    return torch.cat([tower.encode(part).cpu() for part in parts])
