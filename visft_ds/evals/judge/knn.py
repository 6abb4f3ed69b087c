"""k nearest neighbours: patches, images and objects take the class of the most similar ones of the training
images.

A vote of the k nearest by cosine, each with exp(cosine / temperature). Resamples of the training images need
no search of their own: in a bootstrap a row counts as often as its image is drawn.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import Score
from visft_ds.evals.judge.ranking import hits, rank_of
from visft_ds.evals.judge.rows import Rows, accuracy

NEIGHBOURS = 20  #: facebookresearch/dinov2, dinov2/eval/knn.py
TEMPERATURE = 0.07  #: likewise
RESAMPLES = 10  #: of the training images
QUERIES = 1024  #: that are compared at once
_BANK = 2**20  # rows that they are compared with at once
_SEARCHED = 4  # times as many neighbours: so many remain when some images are not drawn


def knn(name: str, train: Rows, test: Rows, draws: int = RESAMPLES) -> Score:
    """Share of rows whose neighbours vote for their class, and for no other as much."""
    directions = F.normalize(train.features, dim=1)
    memory = replace(train, features=directions)
    labels = torch.cat([train.labels, test.labels])
    classes = int(labels.max()) + 1
    correct = []
    for batch in test.batches(QUERIES):
        votes = vote(memory, batch.features, NEIGHBOURS, TEMPERATURE, draws)
        votes = F.pad(votes, (0, classes - votes.shape[2]))  # a class that nothing teaches
        labels = batch.labels.repeat(len(votes))
        ranks = rank_of(votes.flatten(0, 1), labels).cpu()
        is_first = hits(ranks, 1)
        correct.append(is_first.reshape(len(votes), -1))
    return accuracy(name, np.concatenate(correct, axis=1), test)


def vote(
    memory: Rows, queries: Tensor, neighbours: int, temperature: float, draws: int = RESAMPLES
) -> Tensor:
    """(1 + draws, n, C): mean labels of the rows nearest to queries (n, D), each by exp(cosine /
    temperature), and the same by bootstraps of the training images.

    Args:
        memory: rows of length 1.
    """
    directions = F.normalize(queries.to(memory.features), dim=1)
    searched = _SEARCHED * neighbours if draws else neighbours
    similarity, rows = _nearest(memory.features, directions, searched)
    copies = memory.copies(draws)[:, memory.owners[rows]]  # (1 + draws, n, searched)
    # Copies of a row are equally near: as many count as there is room for.
    counted = copies.cumsum(dim=2).clamp(max=neighbours)
    counted_before = F.pad(counted[..., :-1], (1, 0))
    times = counted - counted_before
    exponent = (similarity - similarity[:, :1]) / temperature
    weights = times * exponent.exp()
    total = weights.sum(dim=2, keepdim=True)
    tiny = torch.finfo(weights.dtype).tiny
    weights = weights / total.clamp(min=tiny)
    labels = memory.labels[rows]
    if labels.ndim == 3:
        return torch.einsum("rnk,nkc->rnc", weights, labels)
    classes = int(memory.labels.max()) + 1
    votes = weights.new_zeros(*weights.shape[:2], classes)
    return votes.scatter_add(2, labels.expand_as(weights), weights)


def _nearest(features: Tensor, directions: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(cosines, numbers) of the rows that are nearest to each direction (n, D), both (n, count), the nearest
    first."""
    similarities = []
    numbers = []
    for part, bank in enumerate(features.split(_BANK)):
        cosines = directions @ bank.T
        nearest = cosines.topk(min(count, len(bank)), dim=1)
        similarities.append(nearest.values)
        numbers.append(nearest.indices + part * _BANK)
    candidates = torch.cat(similarities, dim=1)
    best = candidates.topk(min(count, len(features)), dim=1)
    rows = torch.cat(numbers, dim=1).gather(1, best.indices)
    return best.values, rows
