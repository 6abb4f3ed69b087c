"""An encoder at the size of published protocols: features of whole images, of augmented crops, and of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import BATCH, RESAMPLES, Heads, Loss, Recipe, fit, order_of, windows
from visft_ds.evals.judge.protocol import ImageSet
from visft_ds.evals.judge.scoring import Settings, forward, pictures

_UNITS = (32, 16, 14, 1)  # pixels of a patch's side: one of these divides the encoder's side
_STRIDE = 2 / 3  # of windows, in their sides

Truth = Callable[[int], npt.NDArray[Any]]  #: of an image, (H, W)


@dataclass(frozen=True)
class _Crops(Dataset[tuple[Tensor, Tensor]]):
    images: ImageSet
    truth: Truth
    order: Sequence[int]
    change: Callable[[Any, Any], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        """The n-th crop is the same for every model."""
        image = tv_tensors.Image(pixels_of.pil_to_tensor(self.images.read(self.order[number])))
        truth = tv_tensors.Mask(torch.from_numpy(np.array(self.truth(self.order[number]))))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            return self.change(image, truth)


@dataclass(frozen=True)
class Sight:
    """What a model sees; features are (B, D, h, w) on its device."""

    encoder: Encoder
    settings: Settings

    @property
    def side(self) -> int:
        """Pixels of a side of what it sees."""
        return self.encoder.side

    def check_room(self, numbers: int, what: str) -> None:
        """Raise ValueError if a GPU has no room for so many numbers in 16 bit, while they are gathered twice."""
        if self.settings.device.type == "cuda":
            needed, free = 4 * numbers, torch.cuda.mem_get_info(self.settings.device)[0]
            if needed > free:
                raise ValueError(
                    f"{what} as published needs {needed / 2**30:.0f} GiB and {self.settings.device} has "
                    f"{free / 2**30:.0f} GiB free: take a larger GPU, or give --quick"
                )

    def see(self, pixels: Tensor) -> Tensor:
        """Features of images (B, 3, H, W) of bytes, whose sides are brought to multiples of the patch."""
        unit = next(unit for unit in _UNITS if self.side % unit == 0)
        size = [max(1, round(side / unit)) * unit for side in pixels.shape[-2:]]
        scaled = pixels_of.to_dtype(pixels_of.resize(pixels, size), torch.float32, scale=True)
        mean, std = map(list, self.encoder.normalisation)
        return self._forward(pixels_of.normalize(scaled, mean, std))

    def whole(self, images: ImageSet) -> Iterator[Tensor]:
        """Batches of features of the images, stretched to squares."""
        size = self.settings.batch_size
        batches = [range(start, min(start + size, len(images))) for start in range(0, len(images), size)]
        for pixels in pictures(self.encoder, images, batches, self.settings.threads):
            yield self._forward(pixels)

    def crops(
        self, images: ImageSet, truth: Truth, order: Sequence[int], size: int, change: Callable[[Any, Any], Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of (features, truth) of the images of an order after a random change of both."""
        workers = self.settings.threads
        loader = DataLoader(
            _Crops(images, truth, order, change),
            size,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # readers of images are closures, which no pipe takes
        )
        for pixels, there in loader:
            yield self.see(pixels), there.to(self.settings.device)

    def fitted(
        self,
        images: ImageSet,
        truth: Truth,
        change: Callable[[Any, Any], Any],
        outputs: int,
        loss: Loss,
        recipe: Recipe,
    ) -> Heads:
        """Heads that are trained on random crops."""
        order = order_of(len(images), recipe.steps).tolist()
        crops = self.crops(images, truth, order, BATCH, change)
        first = next(crops)  # which tells the number of channels
        untrained = Heads(1 + RESAMPLES, first[0].shape[1], outputs, recipe.dropout).to(self.settings.device)
        batches = chain([first], crops)
        return fit(untrained, len(images), lambda drawn: next(batches), loss, recipe)

    def in_windows(self, images: ImageSet, head: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """For each image, its shorter side as long as the encoder's, the mean of what a head says in windows.

        Args:
            head: features -> (B, ..., C, side, side).
        """
        side = self.side
        for place in range(len(images)):
            pixels = pixels_of.resize(pixels_of.pil_to_tensor(images.read(place)), [side])
            yield windows(lambda part: head(self.see(part)), pixels, side, int(_STRIDE * side))

    def _forward(self, pixels: Tensor) -> Tensor:
        self.encoder.module.to(self.settings.device)
        found = forward(self.encoder, pixels, ("patches",), self.settings)["patches"]
        if not torch.isfinite(found.sum()):
            raise ValueError(f"features are NaN or infinite in {self.settings.precision}: try --precision fp32")
        return found
