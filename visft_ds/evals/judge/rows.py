"""Features with labels: what probes learn from and are judged on, and the accuracy that they reach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from visft_ds.evals.judge.benchmark import FOLDS, FloatArray, IntArray, Score, resamples
from visft_ds.evals.judge.dense_sets import Thing


@dataclass(frozen=True)
class Rows:
    """Features of patches, objects or images, with labels."""

    features: Tensor  #: (n, D)
    labels: Tensor  #: (n,), numbers of classes; or (n, C), shares of them
    owners: Tensor  #: (n,), numbers of the images that they are of, or of the groups of these

    def subset(self, chosen: Tensor | slice) -> Rows:
        """Some of them, by number or by a mask."""
        return Rows(
            features=self.features[chosen],
            labels=self.labels[chosen],
            owners=self.owners[chosen],
        )

    def batches(self, size: int) -> Iterator[Rows]:
        """All of them in order, at most so many at once."""
        for start in range(0, len(self.labels), size):
            yield self.subset(slice(start, start + size))

    def copies(self, draws: int) -> Tensor:
        """(1 + draws, owners), how often an owner's rows count: once, and as often as a bootstrap drew it."""
        owners = int(self.owners.max()) + 1
        return torch.from_numpy(resamples(owners, draws)).to(self.owners.device)

    def in_groups(self, groups: IntArray | None) -> Rows:
        """The same rows, which belong to the groups (images,) of their images, if there are such."""
        if groups is None:
            return self
        group_of_image = torch.from_numpy(groups).to(self.owners)
        return replace(self, owners=group_of_image[self.owners])


def rows_of_objects(features: Tensor, objects: Sequence[Thing]) -> Rows:
    """Objects as rows, of features (n, D)."""
    device = features.device
    labels = torch.tensor([thing.label for thing in objects], device=device)
    owners = torch.tensor([thing.owner for thing in objects], device=device)
    return Rows(features, labels, owners)


def accuracy(name: str, correct: FloatArray, test: Rows) -> Score:
    """Score of (1 + R, n), 1.0 where a row is classified correctly: by a probe of all training images, and by
    those of R resamples."""
    owners = test.owners.cpu().numpy()
    return Score(name, correct[0], owners, retrained=correct[1:].mean(axis=1))


def held_out(labels: Tensor, owners: Tensor, nth: int = FOLDS) -> Tensor:
    """Mask (n,) of the rows that choose a setting: every nth of a class, or where several rows have an owner
    (an image, a patient) every nth owner whole. Of fewer than `nth` every fifth, of fewer than five none.
    """
    units = owners.unique()
    if len(units) < len(owners):
        return torch.isin(owners, _every(units, nth))
    chosen = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        rows_of_class = (labels == label).nonzero()[:, 0]
        chosen[_every(rows_of_class, nth)] = True
    return chosen


def _every(units: Tensor, nth: int) -> Tensor:
    step = nth if len(units) >= nth else FOLDS
    return units[step - 1 :: step]
