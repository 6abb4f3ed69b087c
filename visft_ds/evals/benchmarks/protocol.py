"""Interface of benchmarks: features of images and texts go in, scores of single items come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ImageSet:
    """Images to be encoded, in a fixed order."""

    names: Sequence[str]  #: of the images, for people
    read: Callable[[int], Image.Image]  #: RGB; ValueError with the name where there is no whole image
    fingerprint: str  #: other images, other fingerprint
    stretched: bool = False  #: to squares; otherwise the middle square is seen

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Score:
    """A number with all that it is the mean of."""

    name: str
    #: (n,), one of each item, the number is their mean; or (n, 2, C), such as intersections and unions of C classes:
    #: the number is the mean over classes of (sum of the first) / (sum of the second), where the second is not 0.
    values: FloatArray
    groups: IntArray | None = None  #: (n,); items of one group are no independent evidence (captions of an image)
    said: Sequence[str] = ()  #: what the model answered to each image of the set `shows`, where that can be shown
    shows: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  #: what was chosen on the way, for the record
    maps: npt.NDArray[np.int16] | None = None  #: (images, h, w), the class that the model sees in each place

    @property
    def value(self) -> float:
        """The number."""
        return float(self.values.mean() if self.values.ndim == 1 else mean_ratio(self.values.sum(axis=0)))


@dataclass(frozen=True)
class Features:
    """Features of a benchmark's images and texts by a model."""

    images: Mapping[str, Mapping[str, Tensor]]  #: set -> kind -> (images, ...) float32 on the CPU
    texts: Tensor | None  #: (texts, E) float32, each of length 1; None: the model has no text side


class Benchmark(Protocol):
    """Benchmark on a data set, independent of any model."""

    @property
    def label(self) -> str:
        """Beginning of the names of its scores."""

    @property
    def sets(self) -> Mapping[str, ImageSet]:
        """Image sets to be encoded, by name."""

    @property
    def kinds(self) -> Sequence[str]:
        """Kinds of features it reads, of `encoders.KINDS`, where a model has them; "columns" for `patches`."""

    @property
    def texts(self) -> Sequence[str]:
        """Texts to be encoded."""

    @property
    def needs_text(self) -> bool:
        """Return True if it gives no score without a text side."""

    @property
    def truths(self) -> Mapping[str, Sequence[str]]:
        """Set -> the right answer to each of its images, for pictures."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that scores depend on beside the features, in JSON's types."""

    def scores(self, features: Features) -> Iterator[Score]:
        """The numbers of one model; higher is better."""


def check_apart(source: str, train: str, test: str | None) -> None:
    """Raise ValueError where a probe would be judged on what it learnt."""
    if train == test:
        raise ValueError(f"{source}: probes would learn from {train} and be judged on it: name two parts")


def mean_ratio(sums: FloatArray) -> FloatArray:
    """Mean over the classes of (..., 2, C) sums, first by second; those whose second is 0 do not count."""
    above, below = sums[..., 0, :], sums[..., 1, :]
    ratios: FloatArray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    mean: FloatArray = ratios.sum(axis=-1) / np.maximum((below > 0).sum(axis=-1), 1)
    return mean


def rank_of(similarity: Tensor, right: Tensor) -> Tensor:
    """Place of the right column in each row, 0 the best, (rows,) int64.

    Whatever is as similar as the right one counts as before it: a model that says the same to all images is last, not
    first.

    Args:
        similarity: (rows, columns).
        right: (rows,) int64.
    """
    true = similarity.gather(1, right[:, None])
    return (similarity >= true).sum(dim=1) - 1


def hits(ranks: Tensor, k: int) -> FloatArray:
    """1.0 where the right answer is among the first k."""
    found: FloatArray = (ranks < k).numpy().astype(np.float64)
    return found


def class_embeddings(texts: Tensor, templates: int) -> Tensor:
    """(classes, E) of length 1: the mean over a class's sentences, which come one after the other."""
    return torch.nn.functional.normalize(texts.reshape(-1, templates, texts.shape[1]).mean(dim=1), dim=-1)


def sentences(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template, as `class_embeddings` expects them."""
    return [template.replace("{}", name) for name in classes for template in templates]
