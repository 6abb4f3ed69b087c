"""Interface of benchmarks: features of images and texts go in, scores of single items come out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visft_ds.tasks.pictures import Picture

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
PLAIN: tuple[str, ...] = ("a photo of a {}.",)  #: sentences about a class, unless a data set brings others
#: (H, W), the class of each pixel of an image; the largest number of the type where it has none.
Label = npt.NDArray[np.uint8 | np.uint16]
_ROWS = 4096  # images that are compared with all classes at once
#: Set of images -> kind -> (images, ...) float32 on the CPU; "texts" -> "clip" -> (texts, E) of length 1, if
#: the model has a text side.
Features = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class ImageSet:
    """Images to be encoded, in a fixed order."""

    names: Sequence[str]  #: of the images, for people
    read: Callable[[int], Image.Image]  #: RGB; ValueError with the name if there is no whole image
    fingerprint: str  #: other images, other fingerprint
    stretched: bool = False  #: to squares; otherwise the middle square is seen
    #: Of each image the file, or the (bytes, crc32) that shards have of it; empty: not known.
    stored: Sequence[Path | tuple[int, int]] = ()
    groups: IntArray | None = (
        None  #: (images,), numbers of what images come from together, such as patients or videos
    )

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Score:
    """A number with all that it is the mean of."""

    name: str
    #: (n,), one of each item, the number is their mean; or (n, 2, C), such as intersections and unions of C
    #: classes: the number is the mean over classes of (sum of the first) / (sum of the second), where the
    #: second is not 0.
    values: FloatArray
    groups: IntArray | None = (
        None  #: (n,); items of one group are no independent evidence (captions of an image)
    )
    maps: npt.NDArray[np.int16] | None = None  #: (images, h, w), the class that the model sees in each place
    #: (R,), the number by probes that learnt from R resamples of the training images, the same ones for every
    #: model.
    retrained: FloatArray | None = None
    lower: bool = False  #: is better, as of an error

    @property
    def value(self) -> float:
        """The number."""
        return float(self.values.mean() if self.values.ndim == 1 else mean_ratio(self.values.sum(axis=0)))


@dataclass(frozen=True)
class Benchmark:
    """Benchmark on a data set, independent of any model."""

    label: str  #: beginning of the names of its scores
    sets: Mapping[str, ImageSet]  #: image sets to be encoded, by name
    #: Kinds of features it reads, of `encoders.KINDS`, if a model has them; "columns" for `patches`.
    kinds: Sequence[str]
    numbers: Sequence[str]  #: names of its scores; a model may lack some
    settings: Mapping[str, Any]  #: all that scores depend on beside the features, in JSON's types
    #: The numbers of one model, of those that are wanted (where that saves time). Probes run where features
    #: lie.
    scores: Callable[[Features, Collection[str]], Iterator[Score]]
    left_out: Sequence[str] = ()  #: numbers that it could give, and that nobody asks for
    notes: Sequence[str] = ()  #: what a reader of its numbers has to know about the data
    texts: Sequence[str] = ()  #: to be encoded
    needs_text: bool = False  #: it gives no score without a text side
    nearby: bool = False  #: its probes run on a GPU if features lie there
    agrees: bool = False  #: it asks a classifier, and counts predictions that agree with the first model's
    #: (model -> its first score, number of images) -> what each model sees in them.
    sheet: Callable[[Mapping[str, Score], int], Picture] | None = None
    #: (features of "train", name of a number) -> the number on the fifth of the training images that is held
    #: out, by a probe of the other four; more is better: it chooses the layer.
    held_out: Callable[[Mapping[str, Tensor], str], float] | None = None
    choosing: ImageSet | None = None  #: what `held_out` sees in place of "train"
    #: (encoder at the published size, `scoring.Settings`, wanted numbers) -> scores by the published
    #: protocol, in place of `scores`; None: that is what `scores` does.
    published: Callable[[Any, Any, Collection[str]], Iterator[Score]] | None = None

    @property
    def names(self) -> list[str]:
        """Full names of its scores."""
        return [f"{self.label} {number}" for number in self.numbers]


def resamples(images: int, count: int, groups: IntArray | None = None) -> IntArray:
    """(1 + count, images), how often each training image counts: once, and as often as it is drawn. The same
    draws for every model and number.

    Args:
        groups: (images,) numbers; whole groups are drawn.
    """
    units = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    each = int(units.max()) + 1
    even = np.full(each, 1 / each)
    drawn = [np.random.default_rng([1, draw]).multinomial(each, even)[units] for draw in range(count)]
    return np.stack([np.ones(images, dtype=np.int64), *drawn])


def fifth(images: int, groups: IntArray | None = None) -> tuple[list[int], list[int]]:
    """(four fifths of the training images, the fifth that chooses a layer).

    Args:
        groups: (images,) numbers; whole groups are held out, since probes know the others of an image's
        group.
    """
    units = np.arange(images) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = len(np.unique(units))
    if count < 5:
        what = "images" if groups is None else "groups of images"
        remedy = "give --layers last"
        raise ValueError(
            f"a fifth of the training {what} chooses the layer, but there are only {count}: {remedy}"
        )
    held = units % 5 == 4
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def mean_ratio(sums: FloatArray) -> FloatArray:
    """Mean over the classes of (..., 2, C) sums, first by second; those whose second is 0 do not count."""
    above, below = sums[..., 0, :], sums[..., 1, :]
    ratios: FloatArray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    mean: FloatArray = ratios.sum(axis=-1) / np.maximum((below > 0).sum(axis=-1), 1)
    return mean


def rank_of(similarity: Tensor, right: Tensor) -> Tensor:
    """Place of the right column (rows,) in each row of (rows, columns), 0 the best, (rows,) int64.

    Whatever is as similar as the right one counts as before it: a model that says the same to all images is
    last, not first.
    """
    true = similarity.gather(1, right[:, None])
    return (similarity >= true).sum(dim=1) - 1


def hits(ranks: Tensor, k: int) -> FloatArray:
    """1.0 where the right answer is among the first k."""
    found: FloatArray = (ranks < k).numpy().astype(np.float64)
    return found


def class_embeddings(texts: Tensor, templates: int) -> Tensor:
    """(classes, E) of length 1: the mean over a class's sentences, which come one after the other."""
    return F.normalize(texts.reshape(-1, templates, texts.shape[1]).mean(dim=1), dim=-1)


def sentences(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template, as `class_embeddings` expects them."""
    return [template.replace("{}", name) for name in classes for template in templates]


def rank_by_text(images: Tensor, texts: Tensor, templates: int, labels: IntArray) -> Tensor:
    """Place of the right class of each image (n, E) by the similarity to the sentences of all classes."""
    classes = class_embeddings(texts, templates)
    parts = zip(images.split(_ROWS), torch.from_numpy(labels).split(_ROWS), strict=True)
    return torch.cat([rank_of(part @ classes.T, right) for part, right in parts])
