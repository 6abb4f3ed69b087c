"""Probes of frozen feature maps: where maps come from, how heads learn from them, and a benchmark of both.

Maps are cached (of whole images, each encoded once) or live (of random crops, windows and mirror images, as
published protocols see them); probes of `segmentation` and `depth` are written for either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import (
    Benchmark,
    Features,
    LayerChoice,
    Names,
    Number,
    Scores,
    fifth,
)
from visft_ds.evals.judge.crops import label_of, random_crops, rounds, short_side
from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings, forward, pictures
from visft_ds.evals.judge.heads import BATCH, RESAMPLES, Heads, Loss, Recipe, Schedule, enlarged, fit
from visft_ds.evals.judge.images import every
from visft_ds.evals.judge.linear_segmentation import windows
from visft_ds.evals.judge.protocol import BRIEF, QUICK, Protocol

SIDE = 224  #: of the labels that heads learn from whose features are kept, pixels
_UNITS = (32, 16, 14, 1)  # pixels of a patch's side: one of these divides the encoder's side
_BILINEAR = Image.Resampling.BILINEAR

#: Makes a crop of an image and its label as a model takes it.
Crop = Callable[[Image.Image, Tensor, Encoder], tuple[Tensor, Tensor]]
#: (B, D, h, w) -> (B, heads, ..., h, w)
Head = Callable[[Tensor], Tensor]
#: (number of an image, its features (D, h, w), its label (H, W)).
Example = tuple[int, Tensor, Tensor]
#: (numbers of images (B,), their features (B, D, h, w), their labels (B, H, W)).
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CachedFeatures:
    """Features (images, D, h, w) of whole images in memory, on any device. There are no crops."""

    protocol: Protocol
    train: DenseSet
    taught: Tensor  #: features of the training images
    test: DenseSet
    asked: Tensor  #: features of the test images

    def remembered(self, _: Crop, passes: int) -> tuple[int, Iterator[Example]]:
        """(how many images come, they) for a memory."""
        images = enumerate(self.taught)
        return len(self.taught), ((number, maps, label_of(self.train, number)) for number, maps in images)

    def examples(self, order: Tensor, _: Crop) -> Iterator[Batch]:
        """Batches of training images in an order of their numbers, with labels of SIDE x SIDE."""
        device = self.taught.device
        squares = []
        for number in range(len(self.taught)):
            label = label_of(self.train, number).to(torch.float32)  # exact: there are fewer classes than 2^24
            square = F.interpolate(label[None, None], (SIDE, SIDE), mode="nearest-exact")[0, 0]
            squares.append(square.to(torch.int16) if self.train.classes else square)
        labels = torch.stack(squares).to(device)
        for numbers in order.split(BATCH):
            near = numbers.to(device)
            yield numbers, self.taught[near], labels[near]

    def whole(self, data: DenseSet) -> Iterator[Tensor]:
        """Batches of features of the training or of the test images."""
        features = self.taught if data is self.train else self.asked
        return iter(features.split(BATCH))

    def in_windows(self, head: Head) -> Iterator[Tensor]:
        """Outputs of a head for each test image."""
        for maps in self.asked.split(BATCH):
            yield from head(maps)

    flipped = in_windows


@dataclass(frozen=True)
class LiveFeatures:
    """The same of crops and windows, by an encoder of the published size, on its device."""

    protocol: Protocol
    train: DenseSet
    test: DenseSet
    encoder: Encoder
    settings: Settings

    def remembered(self, crop: Crop, passes: int) -> tuple[int, Iterator[Example]]:
        """As above, of random crops."""
        order = torch.arange(len(self.train.images)).repeat(passes)
        batches = self.examples(order, crop, self.settings.batch_size)
        return len(order), (
            example
            for numbers, maps, labels in batches
            for example in zip(numbers.tolist(), maps, labels, strict=True)
        )

    def examples(self, order: Tensor, crop: Crop, size: int = BATCH) -> Iterator[Batch]:
        """Batches of random crops; the n-th crop is the same for every model."""

        def example(number: int) -> tuple[Tensor, Tensor]:
            return crop(self.train.images.read(number), label_of(self.train, number), self.encoder)

        for numbers, pixels, labels in random_crops(order, size, example, self.settings):
            yield numbers, self._forward(pixels), labels.to(self.settings.device)

    def whole(self, data: DenseSet) -> Iterator[Tensor]:
        """Batches of features of images, stretched to squares."""
        return map(self._forward, pictures(self.encoder, data.images, self.settings, resample=_BILINEAR))

    def in_windows(self, head: Head) -> Iterator[Tensor]:
        """For each test image, the mean of what a head says in windows, of which the shorter side of it is
        one.
        """
        side = self.encoder.side

        def see(window: Tensor) -> Tensor:
            return enlarged(head(self._forward(window)), (side, side))

        for number in range(len(self.test.images)):
            image = self.test.images.read(number)
            height, width = short_side((image.height, image.width), side)
            pixels = self.encoder.normalised(image.resize((width, height), _BILINEAR))
            yield windows(see, pixels, side)

    def flipped(self, head: Head) -> Iterator[Tensor]:
        """For each test image, the mean of what a head says of it and, turned back, of its mirror image."""
        for number in range(len(self.test.images)):
            pixels = self.encoder.normalised(self.test.images.read(number))
            both = torch.stack([pixels, pixels.flip(2)])
            straight, mirrored = head(self._forward(both))
            yield (straight + mirrored.flip(-1)) / 2

    def _forward(self, pixels: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) as the model takes them, filled up with 0 on all sides to whole
        patches.
        """
        unit = next(unit for unit in _UNITS if self.encoder.side % unit == 0)
        missing_rows = -pixels.shape[-2] % unit
        missing_columns = -pixels.shape[-1] % unit
        left = missing_columns // 2
        top = missing_rows // 2
        padded = F.pad(pixels, (left, missing_columns - left, top, missing_rows - top))
        self.encoder.module.to(self.settings.device)
        maps = forward(self.encoder, padded, ("patches",), self.settings)["patches"]
        if not torch.isfinite(maps.sum()):
            raise ValueError(
                f"features are NaN or infinite in {self.settings.precision}: try --precision fp32"
            )
        return maps


Source = CachedFeatures | LiveFeatures
ScoreSource = Callable[[Source, Names], Scores]


def trained(
    source: Source, outputs: int, loss: Loss, recipe: Recipe, crop: Crop, schedule: Schedule
) -> Heads:
    """Heads that learnt the labels of the training images, in rounds over all of them."""
    images = source.train.images
    examples = source.examples(rounds(len(images), recipe.steps * BATCH), crop)
    first = next(source.whole(source.train))
    resamples = RESAMPLES if source.protocol.resampled else 0
    heads = Heads(1 + resamples, first.shape[1], outputs).to(first.device)
    return fit(heads, len(images), examples, loss, recipe, schedule, images.groups)


def probe(
    label: str,
    version: str,
    numbers: Sequence[Number],
    train: DenseSet,
    test: DenseSet,
    protocol: Protocol,
    score: ScoreSource,
) -> Benchmark:
    """The benchmark of a probe of feature maps."""
    most = QUICK.images["train"]
    few = train.subset(every(len(train.images), most))

    def scores(features: Features, names: Names) -> Scores:
        taught = features["train"]["patches"]
        asked = features["test"]["patches"]
        return score(CachedFeatures(protocol, train, taught, test, asked), names)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        maps = features["patches"]
        rest, held = fifth(len(few.images), few.images.groups)
        cached = CachedFeatures(BRIEF, few.subset(rest), maps[rest], few.subset(held), maps[held])
        return next(result.value for result in score(cached, [number]) if result.name == number)

    def published(encoder: Encoder, settings: Settings, names: Names) -> Scores:
        return score(LiveFeatures(protocol, train, test, encoder, settings), names)

    return Benchmark(
        label,
        sets={"train": train.images, "test": test.images},
        kinds=("patches",),
        numbers=numbers,
        settings={"benchmark": version, "protocol": asdict(protocol), "classes": test.classes},
        scores=scores,
        layer_choice=LayerChoice(few.images, held_out),
        published=published if protocol.published else None,
    )
