"""Dense probes as published, or quick ones: their settings, and where their feature maps come from.

Published are https://github.com/vpariza/open-hummingbird-eval (in-context) and
https://github.com/facebookresearch/dinov3 (linear heads): random crops of all images teach, and heads judge windows,
or images and their mirror images. Quick probes read the features of whole images, each encoded once; their numbers are
not comparable with published ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.dense_sets import DenseSet, every
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, RESAMPLES, Heads, Loss, Recipe, enlarged, fit, windows
from visft_ds.evals.judge.probes import Rows, remember
from visft_ds.evals.judge.protocol import Benchmark, Features, Score, fifth
from visft_ds.evals.judge.scoring import Settings, forward, pictures
from visft_ds.monitor.console import gauge

SIDE = 224  #: of the labels that heads learn from whose features are kept, pixels
_PASSES = 2  # over the training images, for a memory of crops
_UNITS = (32, 16, 14, 1)  # pixels of a patch's side: one of these divides the encoder's side
_STRIDE = 2 / 3  # of windows, in their sides


@dataclass(frozen=True)
class Protocol:
    """Sizes and recipes."""

    name: str
    images: Mapping[str, int]  #: that are read of "train" and "test"; of more every k-th
    memory: int  #: patches
    segmentation: Recipe
    depth: Recipe
    resampled: bool = True  #: probes are retrained on resamples of the training images


PUBLISHED = Protocol(
    "published",
    {"train": 10**9, "test": 10**9},
    10_240_000,
    Recipe(steps=40_000, warm_up=1500, rate=1e-3, decay=1e-3, dropout=0.1),
    Recipe(steps=38_400, warm_up=12_800, rate=3e-4, decay=1e-4, betas=(0.9, 0.99), clip=35.0),
)


def _quick(name: str, memory: int, steps: int, resampled: bool) -> Protocol:
    """The same heads after so many steps."""
    segmentation, depth = (
        replace(one, steps=steps, warm_up=round(one.warm_up * steps / one.steps), stride=4)
        for one in (PUBLISHED.segmentation, PUBLISHED.depth)
    )
    return Protocol(name, {"train": 1000, "test": 2000}, memory, segmentation, depth, resampled)


QUICK = _quick("quick", 102_400, 2000, resampled=True)
BRIEF = _quick("brief", 6_400, 500, resampled=False)  #: by which a fifth of the training images chooses a layer
#: Makes a crop of an image and its label, for the encoder's side.
Change = Callable[[int, Any, Any], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kept:
    """Features (images, D, h, w) of whole images in memory."""

    protocol: Protocol
    train: DenseSet
    learnt: Tensor
    test: DenseSet
    judged: Tensor

    def memory(self, _: Change) -> Rows:
        """Patches of the training images."""
        images = ((place, one, self.train.label(place)) for place, one in enumerate(self.learnt))
        return remember(images, len(self.train.classes), max(1, self.protocol.memory // len(self.learnt)))

    def examples(self, order: Tensor, _: Change) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of numbers, features and labels, which are brought to SIDE x SIDE."""
        labels = (Image.fromarray(self.train.label(place)) for place in range(len(self.learnt)))
        squares = [np.asarray(label.resize((SIDE, SIDE), Image.Resampling.NEAREST)) for label in labels]
        truth = torch.from_numpy(np.stack(squares))
        return ((drawn, self.learnt[drawn], truth[drawn]) for drawn in order.split(BATCH))

    def whole(self, part: DenseSet) -> Iterator[Tensor]:
        """Batches of features of the training or of the test images."""
        return iter((self.learnt if part is self.train else self.judged).split(BATCH))

    def said(self, head: Callable[[Tensor], Tensor], in_windows: bool) -> Iterator[Tensor]:
        """Outputs of a head for each test image."""
        return (said for maps in self.judged.split(BATCH) for said in head(maps))


@dataclass(frozen=True)
class Sight:
    """The same of crops and windows, by an encoder of the published size, on its device."""

    protocol: Protocol
    train: DenseSet
    test: DenseSet
    encoder: Encoder
    settings: Settings

    def memory(self, change: Change) -> Rows:
        """Patches of random crops. Raises ValueError if a GPU has no room for them."""
        order = torch.arange(len(self.train.images)).repeat(_PASSES)
        if (device := self.settings.device).type == "cuda":
            _, channels, *grid = next(self.whole(self.train)).shape
            patches = min(self.protocol.memory, len(order) * math.prod(grid))
            needed = 4 * patches * (channels + len(self.train.classes))  # in 16 bit, twice while they are gathered
            free = torch.cuda.mem_get_info(device)[0]
            if needed > free:
                told = f"{needed / 2**30:.0f} GiB, and {device} has {free / 2**30:.0f} GiB free"
                raise ValueError(f"a memory of {patches:,} patches needs {told}: take a larger GPU, or give --quick")
        images = (
            image
            for drawn, maps, labels in self.examples(order, change, self.settings.batch_size)
            for image in zip(drawn.tolist(), maps.half() if maps.is_cuda else maps, labels.cpu().numpy(), strict=True)
        )
        told = gauge("in-context memory", len(order), "images", images)
        return remember(told, len(self.train.classes), max(1, self.protocol.memory // len(order)))

    def examples(self, order: Tensor, change: Change, size: int = BATCH) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of numbers, features and labels of random crops; the n-th crop is the same for every model."""

        def crops(numbered: Sequence[tuple[int, int]]) -> Any:
            found = []
            for number, place in numbered:
                image = tv_tensors.Image(pixels_of.pil_to_tensor(self.train.images.read(place)))
                label = tv_tensors.Mask(torch.from_numpy(np.array(self.train.label(place))))
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(number)
                    found.append((place, *change(self.encoder.side, image, label)))
            return default_collate(found)

        numbered: Any = list(enumerate(order.tolist()))
        workers = self.settings.threads  # are forked: readers of images are closures, which no pipe takes
        context = "fork" if workers else None
        loader = DataLoader(numbered, size, num_workers=workers, collate_fn=crops, multiprocessing_context=context)
        return ((drawn, self._see(pixels), label.to(self.settings.device)) for drawn, pixels, label in loader)

    def whole(self, part: DenseSet) -> Iterator[Tensor]:
        """Batches of features of images, stretched to squares."""
        return map(self._forward, pictures(self.encoder, part.images, self.settings))

    def said(self, head: Callable[[Tensor], Tensor], in_windows: bool) -> Iterator[Tensor]:
        """Outputs of a head for each test image: the mean of its probabilities in windows, of which the shorter side of
        the image is one; or the mean over a whole image and its mirror image.
        """
        side = self.encoder.side
        for place in range(len(self.test.images)):
            pixels = pixels_of.pil_to_tensor(self.test.images.read(place))
            if in_windows:
                yield windows(
                    lambda part: enlarged(head(self._see(part)), (side, side)).softmax(dim=2),
                    pixels_of.resize(pixels, [side]),
                    side,
                    int(_STRIDE * side),
                )
            else:
                one, mirrored = head(self._see(torch.stack([pixels, pixels.flip(2)])))
                yield (one + mirrored.flip(-1)) / 2

    def _see(self, pixels: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) of bytes, whose sides are brought to multiples of the patch."""
        unit = next(unit for unit in _UNITS if self.encoder.side % unit == 0)
        size = [max(1, round(side / unit)) * unit for side in pixels.shape[-2:]]
        scaled = pixels_of.to_dtype(pixels_of.resize(pixels, size), torch.float32, scale=True)
        mean, std = map(list, self.encoder.normalisation)
        return self._forward(pixels_of.normalize(scaled, mean, std))

    def _forward(self, pixels: Tensor) -> Tensor:
        self.encoder.module.to(self.settings.device)
        found = forward(self.encoder, pixels, ("patches",), self.settings)["patches"]
        if not torch.isfinite(found.sum()):
            raise ValueError(f"features are NaN or infinite in {self.settings.precision}: try --precision fp32")
        return found


Source = Kept | Sight


def trained(source: Source, outputs: int, loss: Loss, recipe: Recipe, change: Change) -> Heads:
    """Heads that learnt the labels of the training images, in rounds over all of them."""
    places, first = range(len(source.train.images)), next(source.whole(source.train))
    order = RandomSampler(places, num_samples=recipe.steps * BATCH, generator=torch.Generator().manual_seed(0))
    heads = Heads(1 + RESAMPLES * source.protocol.resampled, first.shape[1], outputs).to(first.device)
    return fit(heads, len(places), source.examples(torch.tensor(list(order)), change), loss, recipe)


def at_labels(seen: Iterable[Tensor], test: DenseSet) -> Iterator[tuple[Tensor, Tensor]]:
    """(what is seen in it (..., h, w), enlarged, its label (H, W)) of each test image."""
    for place, one in enumerate(seen):
        label = torch.from_numpy(test.label(place)).to(one.device)
        yield enlarged(one, label.shape), label


def probe(
    label: str,
    version: str,
    numbers: Sequence[str],
    train: DenseSet,
    test: DenseSet,
    protocol: Protocol,
    of: Callable[[Source, Collection[str]], Iterator[Score]],
) -> Benchmark:
    """The benchmark of a probe of feature maps, which gives the wanted ones of its numbers."""
    few = train.part(every(len(train.images), QUICK.images["train"]))

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        return of(Kept(protocol, train, features["train"]["patches"], test, features["test"]["patches"]), wanted)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        maps, (rest, held) = features["patches"], fifth(len(few.images))
        (score,) = of(Kept(BRIEF, few.part(rest), maps[rest], few.part(held), maps[held]), [number])
        return -score.value if score.lower else score.value

    def published(encoder: Encoder, settings: Settings, wanted: Collection[str]) -> Iterator[Score]:
        return of(Sight(protocol, train, test, encoder, settings), wanted)

    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("patches",),
        numbers,
        {"benchmark": version, "protocol": asdict(protocol), "classes": test.classes},
        scores,
        held_out=held_out,
        choosing=few.images,
        published=published if protocol.name == PUBLISHED.name else None,
    )
