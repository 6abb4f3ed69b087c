"""Interface of benchmarks: features of images and texts go in, scores of single items come out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from visft_ds.settings.bands import Bands
from visft_ds.tasks.pictures import Picture

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
#: (H, W), the class of each pixel of an image; the largest number of the type where it has none.
Label = npt.NDArray[np.uint8 | np.uint16]
#: Set of images -> kind -> (images, ...) float32 on the CPU; "texts" -> "clip" -> (texts, E) of length 1, if
#: the model has a text side.
Features = Mapping[str, Mapping[str, Tensor]]
Names = Collection[str]  #: of numbers
PUBLISHED_SIDE = 512  #: pixels of images in published protocols, unless a number has its own
FOLDS = 5  #: equal parts of the training images, one of which chooses the layer


@dataclass(frozen=True)
class ImageSet:
    """Images to be encoded, in a fixed order."""

    names: Sequence[str]  #: of the images, for people
    read: Callable[[int], Image.Image]  #: RGB; ValueError with the name if there is no whole image
    fingerprint: str  #: other images, other fingerprint
    stretched: bool = False  #: to squares; otherwise the middle square is seen
    #: Of each image the file, or the (bytes, crc32) that shards have of it; empty: not known.
    stored: Sequence[Path | tuple[int, int]] = ()
    #: (images,), numbers of what images come from together, such as patients or videos.
    groups: IntArray | None = None
    bands: Bands | None = None  #: that the images have in place of three colours
    #: (n, H, W) float32, bands as shares of their range; `read` is for colours
    read_bands: Callable[[int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Number:
    """Number that a benchmark gives, and all that is said of it: here and nowhere else."""

    name: str
    how: str  #: it is measured, in sentences
    published: str = ""  #: what the published protocol adds
    quick: str = ""  #: what --quick does in its place
    source: str = "ours"  #: of the published protocol
    differs: str = ""  #: what the published protocol here does otherwise than its source
    lower: bool = False  #: is better, as of an error
    side: int = PUBLISHED_SIDE  #: pixels of images in the published protocol, as many as are whole patches
    crops: int = 0  #: that its published head learns from
    #: Held-out training images choose by it the layer that a data set is read at.
    chooses_layer: bool = False
    #: By a head that is trained: it is asked of few layers, not of all.
    trained: bool = False
    #: Its items are answers of BASE's classifier; those count that BASE gives, too.
    agreement: bool = False

    def described(self, *, quick: bool) -> dict[str, str]:
        """Its description for a page, measured by the published protocol or by the quick one."""
        text = f"{self.how} {self.quick if quick else self.published}".strip()
        return {"number": self.name, "how": text, "source": self.source, "differs": self.differs}


@dataclass(frozen=True)
class Score:
    """Value of a number, with all that it is the mean of."""

    name: str
    #: (n,), one of each item, the number is their mean; or (n, 2, C), such as intersections and unions of C
    #: classes: the number is the mean over classes of (sum of the first) / (sum of the second), where the
    #: second is not 0.
    values: FloatArray
    #: (n,); items of one group are no independent evidence (captions of an image).
    groups: IntArray | None = None
    maps: npt.NDArray[np.int16] | None = None  #: (images, h, w), the class that the model sees in each place
    #: (R,), the number by probes that learnt from R resamples of the training images, the same ones for every
    #: model.
    retrained: FloatArray | None = None

    @property
    def value(self) -> float:
        """The number."""
        if self.values.ndim == 1:
            return float(self.values.mean())
        return float(mean_ratio(self.values.sum(axis=0)))


Scores = Iterator[Score]


@dataclass(frozen=True)
class LayerChoice:
    """Choice of the layer that a model is read at, by training images alone."""

    images: ImageSet  #: that are encoded for it
    #: (their features, name of a number) -> the number on a fifth of them, by a probe of the other four.
    held_out: Callable[[Mapping[str, Tensor], str], float]


@dataclass(frozen=True)
class Benchmark:
    """Benchmark on a data set, independent of any model."""

    label: str  #: beginning of the names of its scores
    sets: Mapping[str, ImageSet]  #: image sets to be encoded, by name; "test" is judged, "train" may teach
    #: Kinds of features it reads, of `encoders.KINDS`, if a model has them; "columns" for `patches`.
    kinds: Sequence[str]
    numbers: Sequence[Number]  #: that it gives; a model may lack some
    settings: Mapping[str, Any]  #: all that scores depend on beside the features, in JSON's types
    #: (features, names of numbers) -> scores of one model, of these numbers at least.
    scores: Callable[[Features, Names], Scores]
    left_out: Sequence[Number] = ()  #: that it could give, and that nobody asks for
    notes: Sequence[str] = ()  #: what a reader of its numbers has to know about the data
    texts: Sequence[str] = ()  #: to be encoded
    #: Sets of images that are compared with texts alone: models without a text side do not see them.
    text_sets: Collection[str] = ()
    #: None: it is read at the last layer. With a choice, its probes run on a GPU if features lie there.
    layer_choice: LayerChoice | None = None
    #: (encoder at the published size, `scoring.Settings`, names of numbers) -> scores by the published
    #: protocol, in place of `scores`; None: that is what `scores` does.
    published: Callable[[Any, Any, Names], Scores] | None = None
    #: (encoder of BASE): raises ValueError if it cannot be judged by this.
    check_base: Callable[[Any], None] | None = None
    #: (model -> its first score, number of images) -> what each model sees in them.
    sheet: Callable[[Mapping[str, Score], int], Picture] | None = None

    def full_name(self, number: Number) -> str:
        """Name of a number with that of the data set."""
        return f"{self.label} {number.name}"

    @property
    def names(self) -> list[str]:
        """Names of its numbers."""
        return [number.name for number in self.numbers]

    @property
    def full_names(self) -> list[str]:
        """Names of its numbers with that of the data set."""
        return [self.full_name(number) for number in self.numbers]

    @property
    def needs_text(self) -> bool:
        """Return True if it compares images with texts and does nothing else."""
        return set(self.kinds) == {"clip"}

    def sets_for(self, *, has_text: bool) -> dict[str, ImageSet]:
        """The sets of images that a model sees that has a text side, or none."""
        return {name: images for name, images in self.sets.items() if has_text or name not in self.text_sets}

    @property
    def asks_classifier(self) -> bool:
        """Return True if features are answers of BASE's classifier."""
        return any(number.agreement for number in self.numbers)

    @property
    def training_images(self) -> ImageSet:
        """Images that probes learn from; where nothing learns, those that are judged."""
        return self.sets.get("train") or self.sets["test"]


def resamples(images: int, count: int, groups: IntArray | None = None) -> IntArray:
    """(1 + count, images), how often each training image counts: once, and as often as it is drawn. The same
    draws for every model and number.

    Args:
        groups: (images,) numbers; whole groups are drawn.
    """
    unit_of_image = units(images, groups)
    count_of_units = int(unit_of_image.max()) + 1
    even = np.full(count_of_units, 1 / count_of_units)
    copies = [np.ones(images, dtype=np.int64)]
    for draw in range(count):
        drawn = np.random.default_rng([1, draw]).multinomial(count_of_units, even)
        copies.append(drawn[unit_of_image])
    return np.stack(copies)


def fifth(images: int, groups: IntArray | None = None) -> tuple[list[int], list[int]]:
    """(four fifths of the training images, the fifth that chooses a layer).

    Args:
        groups: (images,) numbers; whole groups are held out, since probes know the others of an image's
            group.

    Raises:
        ValueError: fewer than five images or groups.
    """
    unit_of_image = units(images, groups)
    count = len(np.unique(unit_of_image))
    if count < FOLDS:
        what = "images" if groups is None else "groups of images"
        raise ValueError(
            f"a fifth of the training {what} chooses the layer, but there are only {count}: "
            "give --layers last"
        )
    held_out = unit_of_image % FOLDS == FOLDS - 1
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


def units(images: int, groups: IntArray | None) -> IntArray:
    """(images,), numbers from 0 on of what is drawn whole: each image by itself, or its group."""
    if groups is None:
        return np.arange(images)
    unit_of_image: IntArray = np.unique(groups, return_inverse=True)[1]
    return unit_of_image


def mean_ratio(sums: FloatArray) -> FloatArray:
    """Mean over the classes of (..., 2, C) sums, first by second; those whose second is 0 do not count."""
    above = sums[..., 0, :]
    below = sums[..., 1, :]
    counts = below > 0
    ratios: FloatArray = np.divide(above, below, out=np.zeros_like(above), where=counts)
    mean: FloatArray = ratios.sum(axis=-1) / np.maximum(counts.sum(axis=-1), 1)
    return mean
