"""Sources of feature maps for probes: kept features of whole images, or a model that sees crops and windows.

Both are used alike; `change` gives for the side of crops what makes one of an image and its label, and concerns `Sight`
alone. Features are (images, D, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.dense_sets import DenseSet
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, RESAMPLES, Heads, Loss, Recipe, enlarged, fit, order_of, windows
from visft_ds.evals.judge.in_context import Memory, remember
from visft_ds.evals.judge.protocol import Label
from visft_ds.evals.judge.scoring import Settings, forward, pictures
from visft_ds.monitor.console import gauge

SIDE = 224  #: of the labels that heads learn from whose features are kept, pixels
_PASSES = 2  # over the training images, for a memory of crops
_UNITS = (32, 16, 14, 1)  # pixels of a patch's side: one of these divides the encoder's side
_STRIDE = 2 / 3  # of windows, in their sides

Change = Callable[[int], Callable[[Any, Any], tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Kept:
    """Features of whole images in memory."""

    train: DenseSet
    learnt: Tensor
    test: DenseSet
    judged: Tensor
    resampled: bool = True  #: probes are retrained on resamples of the training images

    def memory(self, most: int, change: Change) -> Memory:
        """At most so many patches of the training images."""
        images = ((place, one, self.train.label(place)) for place, one in enumerate(self.learnt))
        return remember(images, len(self.train.classes), max(1, most // len(self.learnt)))

    def heads(self, outputs: int, loss: Loss, recipe: Recipe, change: Change) -> Heads:
        """Heads that learn the labels, which are brought to SIDE x SIDE."""
        labels = (Image.fromarray(self.train.label(place)) for place in range(len(self.learnt)))
        squares = [np.asarray(label.resize((SIDE, SIDE), Image.Resampling.NEAREST)) for label in labels]
        truth = torch.from_numpy(np.stack(squares))
        untrained = Heads(1 + RESAMPLES * self.resampled, self.learnt.shape[1], outputs, recipe.dropout)
        return fit(untrained, len(truth), lambda drawn: (self.learnt[drawn], truth[drawn]), loss, recipe)

    def whole(self, part: DenseSet) -> Iterator[Tensor]:
        """Batches of features of the training or of the test images."""
        yield from (self.learnt if part is self.train else self.judged).split(BATCH)

    def said(self, head: Callable[[Tensor], Tensor], in_windows: bool) -> Iterator[Tensor]:
        """Outputs of a head for each test image."""
        for maps in self.judged.split(BATCH):
            yield from head(maps)


@dataclass(frozen=True)
class _Crops(Dataset[tuple[Tensor, Tensor]]):
    data: DenseSet
    order: Sequence[int]
    change: Callable[[Any, Any], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """The n-th crop is the same for every model."""
        image = tv_tensors.Image(pixels_of.pil_to_tensor(self.data.images.read(self.order[number])))
        label = tv_tensors.Mask(torch.from_numpy(np.array(self.data.label(self.order[number]))))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return self.change(image, label)


@dataclass(frozen=True)
class Sight:
    """Features of crops and windows by an encoder of the published size, on its device."""

    train: DenseSet
    test: DenseSet
    encoder: Encoder
    settings: Settings
    resampled: bool = True

    def memory(self, most: int, change: Change) -> Memory:
        """At most so many patches of random crops. Raises ValueError if a GPU has no room for them."""
        order, side = list(range(len(self.train.images))) * _PASSES, self.encoder.side
        _, channels, *grid = self._see(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape
        if (device := self.settings.device).type == "cuda":
            patches = min(most, len(order) * math.prod(grid))
            needed = 4 * patches * (channels + len(self.train.classes))  # in 16 bit, twice while they are gathered
            free = torch.cuda.mem_get_info(device)[0]
            if needed > free:
                told = f"{needed / 2**30:.0f} GiB, and {device} has {free / 2**30:.0f} GiB free"
                raise ValueError(f"a memory of {patches:,} patches needs {told}: take a larger GPU, or give --quick")

        def taught() -> Iterator[tuple[int, Tensor, Label]]:
            places = iter(gauge("in-context memory", len(order), "images", order))
            for maps, labels in self._crops(order, self.settings.batch_size, change):
                for one, label in zip(maps.half() if maps.is_cuda else maps, labels.cpu().numpy(), strict=True):
                    yield next(places), one, label

        return remember(taught(), len(self.train.classes), max(1, most // len(order)))

    def heads(self, outputs: int, loss: Loss, recipe: Recipe, change: Change) -> Heads:
        """Heads that learn from random crops."""
        crops = self._crops(order_of(len(self.train.images), recipe.steps).tolist(), BATCH, change)
        first = next(crops)  # which tells the number of channels
        untrained = Heads(1 + RESAMPLES, first[0].shape[1], outputs, recipe.dropout).to(self.settings.device)
        batches = chain([first], crops)
        return fit(untrained, len(self.train.images), lambda drawn: next(batches), loss, recipe)

    def whole(self, part: DenseSet) -> Iterator[Tensor]:
        """Batches of features of images, stretched to squares."""
        for pixels in pictures(self.encoder, part.images, self.settings):
            yield self._forward(pixels)

    def said(self, head: Callable[[Tensor], Tensor], in_windows: bool) -> Iterator[Tensor]:
        """Outputs of a head for each test image: the mean of its probabilities in windows, of which the shorter side of
        the image is one; or the mean over a whole image and its mirror image.
        """
        side = self.encoder.side
        for place in range(len(self.test.images)):
            pixels = pixels_of.pil_to_tensor(self.test.images.read(place))
            if in_windows:
                pixels = pixels_of.resize(pixels, [side])
                yield windows(
                    lambda part: enlarged(head(self._see(part)), (side, side)).softmax(dim=2),
                    pixels,
                    side,
                    int(_STRIDE * side),
                )
            else:
                one, mirrored = head(self._see(torch.stack([pixels, pixels.flip(2)])))
                yield (one + mirrored.flip(-1)) / 2

    def _crops(self, order: Sequence[int], size: int, change: Change) -> Iterator[tuple[Tensor, Tensor]]:
        workers = self.settings.threads
        loader = DataLoader(
            _Crops(self.train, order, change(self.encoder.side)),
            size,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # readers of images are closures, which no pipe takes
        )
        return ((self._see(pixels), label.to(self.settings.device)) for pixels, label in loader)

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
