"""In-context segmentation, with nothing trained: a patch takes its classes from the most similar patches in memory.

Hummingbird's dense retrieval (https://arxiv.org/abs/2306.01667), as https://github.com/vpariza/open-hummingbird-eval
runs it: a patch in memory has the shares of the classes among its pixels; the 30 nearest by cosine count by
softmax(similarity / 0.02). Pixels without a class have a share in none, and patches without any other are not kept.

A bootstrap of the training images needs no second search: a nearest patch counts as often as its image was drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.protocol import FloatArray, Label, resamples
from visft_ds.tasks.classes import VOID

NEIGHBOURS, TEMPERATURE = 30, 0.02
RESAMPLES = 10  #: of the training images
_SEARCHED = 4  # times as many neighbours: so many remain when some images are not drawn
ROWS = 1024  #: queries that are compared at once
_BANK = 2**20  # that they are compared with at once


@dataclass(frozen=True)
class Memory:
    """Labelled patches that queries are compared with."""

    features: Tensor  #: (m, D) of length 1
    labels: Tensor  #: (m, C), shares of the classes; or (m,), numbers of them
    owners: Tensor  #: (m,), numbers of the images


def remember(images: Iterable[tuple[int, Tensor, Label]], classes: int, each: int) -> Memory:
    """Keep at most `each` patches of every image: those of classes that are rare in it, at random among equals.

    Args:
        images: (number of the image, its map (D, h, w), its label of any size).
    """
    features, labels, owners = [], [], []
    for number, patches, label in images:
        shares = shares_of(label, patches.shape[-2:], classes)
        frequency = (shares > 0) @ (shares > 0).sum(axis=0)
        order = np.argsort(frequency * np.random.default_rng([0, number]).random(len(shares)), kind="stable")
        kept = torch.from_numpy(order[frequency[order] > 0][:each])
        features.append(F.normalize(patches.flatten(1).T[kept.to(patches.device)], dim=1))
        labels.append(torch.from_numpy(shares)[kept].to(features[-1]))
        owners.append(torch.full((len(kept),), number))
    return Memory(torch.cat(features), torch.cat(labels), torch.cat(owners).to(features[0].device))


def shares_of(label: Label, grid: Sequence[int], classes: int) -> FloatArray:
    """(h * w, classes), the share of each class among the pixels of each patch; a pixel belongs to one patch."""
    rows, columns = (np.arange(size) * cells // size for size, cells in zip(label.shape, grid, strict=True))
    places = (rows[:, None] * grid[1] + columns) * (VOID + 1) + label
    counts = np.bincount(places.ravel(), minlength=grid[0] * grid[1] * (VOID + 1)).reshape(-1, VOID + 1)
    shares: FloatArray = counts[:, :classes] / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def recall(memory: Memory, maps: Tensor, draws: int = RESAMPLES) -> Iterator[Tensor]:
    """For each image of (n, D, h, w): (1 + draws, C, h, w), what its patches are by the memory and by resamples."""
    for images in maps.split(max(1, ROWS // maps[0, 0].numel())):
        queries = images.flatten(2).transpose(1, 2).flatten(0, 1)
        votes = vote(memory, queries, NEIGHBOURS, TEMPERATURE, draws)
        yield from votes.unflatten(1, (len(images), *maps.shape[-2:])).permute(1, 0, 4, 2, 3)


def vote(memory: Memory, queries: Tensor, neighbours: int, temperature: float, draws: int = RESAMPLES) -> Tensor:
    """(1 + draws, n, C): mean labels of the patches nearest to (n, D), each by exp(cosine / temperature)."""
    copies = torch.from_numpy(resamples(int(memory.owners.max()) + 1, draws))
    part = F.normalize(queries.to(memory.features), dim=1)
    similarity, places = _nearest(memory.features, part, _SEARCHED * neighbours if draws else neighbours)
    # Copies of a patch are equally near: as many count as there is room for.
    room = copies.to(places.device)[:, memory.owners[places]].cumsum(dim=2).clamp(max=neighbours)
    taken = room.diff(dim=2, prepend=torch.zeros_like(room[..., :1]))
    weights = taken * ((similarity - similarity[:, :1]) / temperature).exp()
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    if memory.labels.ndim == 2:
        return torch.einsum("rnk,nkc->rnc", weights, memory.labels[places])
    votes = weights.new_zeros(*weights.shape[:2], int(memory.labels.max()) + 1)
    return votes.scatter_add(2, memory.labels[places].expand_as(weights), weights)


def _nearest(bank: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(similarity, places), each (n, count), of the rows of a bank that are nearest to (n, D), the nearest first."""
    found = []
    for start in range(0, len(bank), _BANK):
        part = bank[start : start + _BANK]
        near, places = (queries @ part.T).topk(min(count, len(part)), dim=1)
        found.append((near, places + start))
    similarity, places = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    similarity, order = similarity.topk(min(count, len(bank)), dim=1)
    return similarity, places.gather(1, order)
