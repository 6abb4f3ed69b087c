"""Recall between images and texts, measured beside a training by the benchmarks' own rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from visft_ds.evals.benchmarks.protocol import IntArray, hits
from visft_ds.evals.benchmarks.retrieval import image_to_text, text_to_image
from visft_ds.evals.benchmarks.text_towers import TextTower

RECALLS = (1, 5)
_ROWS = 256  # texts encoded at once


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


def table(measured: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Rows of a table of several measurements, name -> numbers; the first row names the columns."""
    names = list(next(iter(measured.values()), {}))
    return [["", *measured], *([name, *(f"{100 * one[name]:.1f} %" for one in measured.values())] for name in names)]
