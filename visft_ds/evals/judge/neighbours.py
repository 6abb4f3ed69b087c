"""Nearest neighbours: patches, images and objects take the class of the most similar ones of the training
images.

A vote of the k nearest by cosine, each with exp(cosine / temperature). Resamples of the training images need
no search of their own: in a bootstrap a row counts as often as its image is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import Score, resamples
from visft_ds.evals.judge.ranking import hits, rank_of

KNN = (20, 0.07)  #: neighbours, temperature of kNN: facebookresearch/dinov2, dinov2/eval/knn.py
RESAMPLES = 10  #: of the training images
ROWS = 1024  #: queries that are compared at once
_BANK = 2**20  # that they are compared with at once
_SEARCHED = 4  # times as many neighbours: so many remain when some images are not drawn


@dataclass(frozen=True)
class Rows:
    """Features with labels."""

    features: Tensor  #: (n, D)
    labels: Tensor  #: (n,), numbers of classes; or (n, C), shares of them
    owners: Tensor  #: (n,), numbers of the images that they are of

    def part(self, chosen: Tensor) -> Rows:
        """Some of them, by number or by a mask."""
        return Rows(self.features[chosen], self.labels[chosen], self.owners[chosen])

    def to(self, device: torch.device) -> Rows:
        """The same on a device."""
        return Rows(self.features.to(device), self.labels.to(device), self.owners.to(device))


def vote(
    memory: Rows, queries: Tensor, neighbours: int, temperature: float, draws: int = RESAMPLES
) -> Tensor:
    """(1 + draws, n, C): mean labels of the rows nearest to (n, D), each by exp(cosine / temperature), and
    the same by bootstraps of the training images.

    Args:
        memory: rows of length 1.
    """
    copies = torch.from_numpy(resamples(int(memory.owners.max()) + 1, draws))
    directions = F.normalize(queries.to(memory.features), dim=1)
    searched = _SEARCHED * neighbours if draws else neighbours
    parts = []
    for start in range(0, len(memory.features), _BANK):
        bank = memory.features[start : start + _BANK]
        near, numbers = (directions @ bank.T).topk(min(searched, len(bank)), dim=1)
        parts.append((near, numbers + start))
    similarity, numbers = (torch.cat(several, dim=1) for several in zip(*parts, strict=True))
    similarity, order = similarity.topk(min(searched, len(memory.features)), dim=1)
    numbers = numbers.gather(1, order)
    # Copies of a row are equally near: as many count as there is room for.
    counted = copies.to(numbers.device)[:, memory.owners[numbers]].cumsum(dim=2).clamp(max=neighbours)
    taken = counted.diff(dim=2, prepend=torch.zeros_like(counted[..., :1]))
    weights = taken * ((similarity - similarity[:, :1]) / temperature).exp()
    weights = weights / weights.sum(dim=2, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    if memory.labels.ndim == 2:
        return torch.einsum("rnk,nkc->rnc", weights, memory.labels[numbers])
    votes = weights.new_zeros(*weights.shape[:2], int(memory.labels.max()) + 1)
    return votes.scatter_add(2, memory.labels[numbers].expand_as(weights), weights)


def by_neighbours(name: str, train: Rows, test: Rows, draws: int = RESAMPLES) -> Score:
    """1.0 for each row whose neighbours vote for its class alone."""
    memory = replace(train, features=F.normalize(train.features, dim=1))
    right = []
    for queries, labels in zip(test.features.split(ROWS), test.labels.split(ROWS), strict=True):
        votes = vote(memory, queries, *KNN, draws)
        untaught = max(0, int(test.labels.max()) + 1 - votes.shape[2])  # classes
        votes = F.pad(votes, (0, untaught))
        right.append(np.stack([hits(rank_of(of_draw, labels).cpu(), 1) for of_draw in votes]))
    each = np.concatenate(right, axis=1)
    return Score(name, each[0], test.owners.cpu().numpy(), retrained=each[1:].mean(axis=1))
