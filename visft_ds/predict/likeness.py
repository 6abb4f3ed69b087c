"""Pictures that are nearly the same, by the features of a backbone.

Letters: N pictures, D width of the backbone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from visft_ds.data.dataset import labels_of_split, read_raw
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.files import shown_name
from visft_ds.monitor.console import Section, gauge
from visft_ds.predict.model import ImageFeatures

Floats = npt.NDArray[np.float32]
_SIDE = 224  # pixels of the squares that pictures are scaled to
_GRID = 4  # cells along a side of them, over which features are averaged: more would miss a crop
#: Likeness from which two pictures are nearly the same (docs/labels.md has what others reach).
NEARLY_THE_SAME = 0.7
_PRINTED = 10  # pairs


@dataclass(frozen=True)
class Pair:
    """Two pictures that are nearly the same, by their positions in two lists."""

    first: int
    second: int
    likeness: float  #: up to 1


def compare_splits(
    backbone: ImageFeatures, train: Manifest, validation: Manifest, limit: int | None = None
) -> Section:
    """Pictures of validation that are nearly one of the training's, in printed form: metrics say nothing of
    these.

    Args:
        limit: look at the first pictures of each split only, this many.
    """
    features = []
    names = []
    for manifest in (train, validation):
        indices = range(min(limit or len(manifest), len(manifest)))
        with ShardReader(manifest) as reader:
            features.append(picture_features(backbone, _pictures(reader, indices)))
            names.append([shown_name(label["file_name"]) for label in labels_of_split(reader, indices)])
    pairs = near_duplicates(*features)
    rows = []
    for number, pair in enumerate(pairs[:_PRINTED], start=1):
        first = f"{train.split}/{names[0][pair.first]}"
        second = f"{validation.split}/{names[1][pair.second]}"
        rows.append((f"{number}. likeness {pair.likeness:.2f}", f"{second} and {first}"))
    counted = f"{len(pairs)} of {len(names[1])} pictures of {validation.split}"
    if pairs:
        counted += ": look at them; copies make its metrics too good, and belong on one side"
    rows.append(("in all", counted))
    return Section(f"near duplicates of {train.split} in {validation.split}, by features", rows)


def _pictures(reader: ShardReader, indices: Sequence[int]) -> Iterator[Any]:
    """Pixels of pictures of a split."""
    for index in gauge(f"looking at {reader.manifest.split}", len(indices), "images", indices):
        yield read_raw(reader, index, "images").image


@torch.no_grad()
def picture_features(backbone: ImageFeatures, pictures: Iterable[npt.NDArray[Any]]) -> Floats:
    """(N, D, 4, 4) features of pictures (H, W, n), averaged over cells of a grid; values from 0 to 255."""
    averages = [np.zeros((0, backbone.width, _GRID, _GRID), dtype=np.float32)]
    for picture in pictures:
        values = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255
        square = F.interpolate(values, (_SIDE, _SIDE), mode="bilinear", antialias=True)
        map_ = backbone(square.clamp(0, 1).to(next(backbone.parameters()).device))
        averages.append(F.adaptive_avg_pool2d(map_, _GRID).cpu().numpy())
    return np.concatenate(averages)


def near_duplicates(first: Floats, second: Floats) -> list[Pair]:
    """Pictures of the second list that are nearly one of the first, mirrored or not, the most alike first.

    Args:
        first, second: of `picture_features`. Likeness is the cosine of features without their mean over both
            lists: drawings of one kind have much in common.
    """
    if not len(first) or not len(second):
        return []
    mean = np.concatenate([first, second]).mean(axis=0)
    known = _directions(first - mean)
    likeness = np.maximum(
        _directions(second - mean) @ known.T, _directions(second[..., ::-1] - mean) @ known.T
    )
    pairs = []
    for number, nearest in enumerate(likeness.argmax(axis=1).tolist()):
        value = float(likeness[number, nearest])
        if value >= NEARLY_THE_SAME:
            pairs.append(Pair(nearest, number, value))
    return sorted(pairs, key=lambda pair: -pair.likeness)


def _directions(features: Floats) -> Floats:
    """(N, D * 16) vectors of length 1."""
    flat = features.reshape(len(features), -1)
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    return flat / np.maximum(lengths, 1e-12)
