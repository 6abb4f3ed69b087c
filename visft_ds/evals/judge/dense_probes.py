"""Probes of frozen feature maps: where maps come from, how heads learn from them, and a benchmark of both.

Maps are cached (of whole images, each encoded once) or live (of random crops, windows and mirror images, as
published protocols see them); probes of `segmentation` and `depth` are written for either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, default_collate

from visft_ds.evals.judge.benchmark import Benchmark, Features, LayerChoice, Number, Score, fifth
from visft_ds.evals.judge.crops import View, label_of, short_side
from visft_ds.evals.judge.dense_sets import DenseSet, every
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, RESAMPLES, Heads, Loss, Recipe, Schedule, enlarged, fit
from visft_ds.evals.judge.linear_segmentation import windows
from visft_ds.evals.judge.protocol import BRIEF, QUICK, Protocol
from visft_ds.evals.judge.scoring import Settings, forward, pictures

SIDE = 224  #: of the labels that heads learn from whose features are kept, pixels
_UNITS = (32, 16, 14, 1)  # pixels of a patch's side: one of these divides the encoder's side


#: Makes a crop of an image and its label as a model takes it.
Crop = Callable[[Image.Image, Tensor, View], tuple[Tensor, Tensor]]
#: (B, D, h, w) -> (B, heads, ..., h, w)
Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CachedFeatures:
    """Features (images, D, h, w) of whole images in memory, on any device. There are no crops."""

    protocol: Protocol
    train: DenseSet
    taught: Tensor  #: features of the training images
    test: DenseSet
    asked: Tensor  #: features of the test images

    def remembered(self, _: Crop, passes: int) -> tuple[int, Iterator[tuple[int, Tensor, Tensor]]]:
        """(how many come, numbers, maps and labels of images for a memory)."""
        return len(self.taught), ((n, maps, label_of(self.train, n)) for n, maps in enumerate(self.taught))

    def examples(self, order: Tensor, _: Crop) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of numbers, features and labels, which are brought to SIDE x SIDE."""
        squares = []
        for number in range(len(self.taught)):
            label = label_of(self.train, number).to(torch.float32)  # exact: there are fewer classes than 2^24
            square = F.interpolate(label[None, None], (SIDE, SIDE), mode="nearest-exact")[0, 0]
            squares.append(square.to(torch.int16) if self.train.classes else square)
        labels = torch.stack(squares).to(self.taught.device)
        for drawn in order.split(BATCH):
            yield drawn, self.taught[drawn.to(self.taught.device)], labels[drawn.to(labels.device)]

    def whole(self, part: DenseSet) -> Iterator[Tensor]:
        """Batches of features of the training or of the test images."""
        return iter((self.taught if part is self.train else self.asked).split(BATCH))

    def in_windows(self, head: Head) -> Iterator[Tensor]:
        """Outputs of a head for each test image."""
        return (outputs for maps in self.asked.split(BATCH) for outputs in head(maps))

    flipped = in_windows


@dataclass(frozen=True)
class LiveFeatures:
    """The same of crops and windows, by an encoder of the published size, on its device."""

    protocol: Protocol
    train: DenseSet
    test: DenseSet
    encoder: Encoder
    settings: Settings

    def remembered(self, crop: Crop, passes: int) -> tuple[int, Iterator[tuple[int, Tensor, Tensor]]]:
        """As above, of random crops. Raises ValueError if a GPU has no room for them."""
        order = torch.arange(len(self.train.images)).repeat(passes)
        device = self.settings.device
        if device.type == "cuda":
            _, channels, *grid = next(self.whole(self.train)).shape
            patches = min(self.protocol.memory, len(order) * math.prod(grid))
            needed = 4 * patches * (channels + len(self.train.classes))
            free = torch.cuda.mem_get_info(device)[0]
            if needed > free:
                room = f"{needed / 2**30:.0f} GiB, and {device} has {free / 2**30:.0f} GiB free"
                raise ValueError(
                    f"a memory of {patches:,} patches needs {room}: take a larger GPU, or give --quick"
                )
        batches = self.examples(order, crop, self.settings.batch_size)
        return len(order), (
            image
            for drawn, maps, labels in batches
            for image in zip(drawn.tolist(), maps, labels, strict=True)
        )

    def examples(
        self, order: Tensor, crop: Crop, size: int = BATCH
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of numbers, features and labels of random crops; the n-th crop is the same for every
        model.
        """

        def crops(numbers: Sequence[int]) -> Any:
            made = []
            for number in numbers:
                place = int(order[number])
                image, label = self.train.images.read(place), label_of(self.train, place)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(number)
                    made.append((place, *crop(image, label, self._view)))
            return default_collate(made)

        for drawn, pixels, labels in loaded(len(order), size, crops, self.settings):
            yield drawn, self._forward(pixels), labels.to(self.settings.device)

    def whole(self, part: DenseSet) -> Iterator[Tensor]:
        """Batches of features of images, stretched to squares."""
        return map(self._forward, pictures(self.encoder, part.images, self.settings, resample=_BILINEAR))

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
            yield windows(see, self._view.normalised(image.resize((width, height), _BILINEAR)), side)

    def flipped(self, head: Head) -> Iterator[Tensor]:
        """For each test image, the mean of what a head says of it and, turned back, of its mirror image."""
        for number in range(len(self.test.images)):
            pixels = self._view.normalised(self.test.images.read(number))
            straight, mirrored = head(self._forward(torch.stack([pixels, pixels.flip(2)])))
            yield (straight + mirrored.flip(-1)) / 2

    @property
    def _view(self) -> View:
        return View(self.encoder.side, *self.encoder.normalisation)

    def _forward(self, pixels: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) as the model takes them, filled up with 0 on all sides to whole
        patches.
        """
        unit = next(unit for unit in _UNITS if self.encoder.side % unit == 0)
        missing = [-length % unit for length in pixels.shape[-2:]]
        before = [length // 2 for length in missing]
        padded = F.pad(pixels, (before[1], missing[1] - before[1], before[0], missing[0] - before[0]))
        self.encoder.module.to(self.settings.device)
        maps = forward(self.encoder, padded, ("patches",), self.settings)["patches"]
        if not torch.isfinite(maps.sum()):
            raise ValueError(
                f"features are NaN or infinite in {self.settings.precision}: try --precision fp32"
            )
        return maps


Source = CachedFeatures | LiveFeatures
Scores = Callable[[Source, Collection[str]], Iterator[Score]]  #: of the wanted numbers
_BILINEAR = Image.Resampling.BILINEAR


def loaded(count: int, size: int, make: Callable[[Sequence[int]], Any], settings: Settings) -> Iterable[Any]:
    """Batches that worker processes make, ahead, of the numbers from 0 to `count`."""
    workers = settings.threads  # are forked: readers of images are closures, which no pipe takes
    context = "fork" if workers else None
    numbers: Any = range(count)
    return DataLoader(numbers, size, num_workers=workers, collate_fn=make, multiprocessing_context=context)


def trained(
    source: Source, outputs: int, loss: Loss, recipe: Recipe, crop: Crop, schedule: Schedule
) -> Heads:
    """Heads that learnt the labels of the training images, in rounds over all of them."""
    images = range(len(source.train.images))
    first = next(source.whole(source.train))
    order = RandomSampler(
        images, num_samples=recipe.steps * BATCH, generator=torch.Generator().manual_seed(0)
    )
    heads = Heads(1 + RESAMPLES * source.protocol.resampled, first.shape[1], outputs).to(first.device)
    examples = source.examples(torch.tensor(list(order)), crop)
    return fit(heads, len(images), examples, loss, recipe, schedule, source.train.images.groups)


def at_labels(seen: Iterable[Tensor], test: DenseSet) -> Iterator[tuple[Tensor, Tensor]]:
    """(what is seen in it (..., h, w), enlarged, its label (H, W)) of each test image."""
    for number, outputs in enumerate(seen):
        label = label_of(test, number).to(outputs.device)
        yield enlarged(outputs, label.shape), label


def probe(
    label: str,
    version: str,
    numbers: Sequence[Number],
    train: DenseSet,
    test: DenseSet,
    protocol: Protocol,
    score: Scores,
) -> Benchmark:
    """The benchmark of a probe of feature maps."""
    few = train.part(every(len(train.images), QUICK.images["train"]))

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        cached = CachedFeatures(
            protocol, train, features["train"]["patches"], test, features["test"]["patches"]
        )
        return score(cached, wanted)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        maps = features["patches"]
        rest, held = fifth(len(few.images), few.images.groups)
        (result,) = score(
            CachedFeatures(BRIEF, few.part(rest), maps[rest], few.part(held), maps[held]), [number]
        )
        return result.value

    def published(encoder: Encoder, settings: Settings, wanted: Collection[str]) -> Iterator[Score]:
        return score(LiveFeatures(protocol, train, test, encoder, settings), wanted)

    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("patches",),
        numbers,
        {"benchmark": version, "protocol": asdict(protocol), "classes": test.classes},
        scores,
        layer_choice=LayerChoice(few.images, held_out),
        published=published if protocol.published else None,
    )
