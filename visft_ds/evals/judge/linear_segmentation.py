"""Linear segmentation: a linear head on a frozen feature map.

As facebookresearch/dinov3 judges it on ADE20k:
dinov3/eval/segmentation/{train,eval,inference,transforms,schedulers, loss}.py with
configs/config-ade20k-linear-training.yaml. 40,000 steps of 16 crops of 512 pixels teach; windows of 512
pixels, 341 apart, judge.

Differs from the source in: pixels are normalised as the model was trained; a patch of 14 pixels makes the
square 504 pixels and its windows 336 apart; judged is the last iterate (there the best of eight evaluations
on the test images).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.crops import NO_CLASS, View, short_side
from visft_ds.evals.judge.heads import Recipe, sampled

RECIPE = Recipe(steps=40_000, warm_up=1500, rate=1e-3, decay=1e-3, dropout=0.1)
_START = 1e-6  # of the rate, at the first step
_SPARSE = 8  # least stride of the loss of resamples
_RATIO = (0.5, 2.0)  # of the shorter side of a training image, in sides
_MOST_OF_ONE = 0.75  # of the pixels of a crop that have a class
_REDRAWN = 10  # times
_DELTA = 32  # of brightness, of 255
_RANGE = (0.5, 1.5)  # of contrast and saturation
_HUE = (-0.5, 0.5)


def crop(image: Image.Image, label: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """A square of an enlarged or reduced image, in half of the cases mirrored, with other colours; and its
    label.

    What is outside of the image, below it or on its right, is 0 and has no class.
    """
    ratio = _RATIO[0] + (_RATIO[1] - _RATIO[0]) * torch.rand(()).item()
    height, width = short_side(label.shape, int(view.side * ratio))
    pixels = pixels_of.pil_to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
    nearest = transforms.InterpolationMode.NEAREST
    numbers = pixels_of.resize(label[None], [height, width], interpolation=nearest)[0]
    rows, columns = _square(numbers, view.side)
    pixels, numbers = pixels[:, rows, columns], numbers[rows, columns]
    if torch.rand(()) < 0.5:
        pixels, numbers = pixels.flip(-1), numbers.flip(-1)
    pixels = view.normalised(distorted(pixels))
    missing = [0, view.side - pixels.shape[2], 0, view.side - pixels.shape[1]]
    return F.pad(pixels, missing), F.pad(numbers, missing, value=NO_CLASS)


def _square(numbers: Tensor, side: int) -> tuple[slice, slice]:
    """Rows and columns of a random square, drawn again while one class has too much of it."""

    def drawn() -> tuple[slice, slice]:
        spare = [max(length - side, 0) for length in numbers.shape]
        top, left = (int(torch.randint(most + 1, ())) for most in spare)
        return slice(top, top + side), slice(left, left + side)

    square = drawn()
    for _ in range(_REDRAWN):
        inside = numbers[square]
        counts = inside[inside != NO_CLASS].unique(return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < _MOST_OF_ONE:
            break
        square = drawn()
    return square


def distorted(pixels: Tensor) -> Tensor:
    """(3, H, W) bytes with other brightness, contrast, saturation and hue, each in half of the cases."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(()).item()

    def changed(pixels: Tensor, factor: float, term: float) -> Tensor:
        return (pixels.float() * factor + term).clamp(0, 255).to(torch.uint8)

    def contrast(pixels: Tensor) -> Tensor:
        return changed(pixels, uniform(*_RANGE), 0) if torch.rand(()) < 0.5 else pixels

    if torch.rand(()) < 0.5:
        pixels = changed(pixels, 1, uniform(-_DELTA, _DELTA))
    contrast_first = bool(torch.rand(()) < 0.5)
    if contrast_first:
        pixels = contrast(pixels)
    if torch.rand(()) < 0.5:
        pixels = pixels_of.adjust_saturation(pixels, uniform(*_RANGE))
    if torch.rand(()) < 0.5:
        pixels = pixels_of.adjust_hue(pixels, uniform(*_HUE))
    return pixels if contrast_first else contrast(pixels)


def schedule(recipe: Recipe, step: int) -> tuple[float, float]:
    """(learning rate, beta1). The rate is one step late, and falls by a cosine over all steps, also in the
    warm-up.
    """
    late = max(step - 1, 0)
    if late < recipe.warm_up:
        begun = 1 - (1 - late / recipe.warm_up) * (1 - _START)
        return recipe.rate * begun * (1 - late / recipe.steps), recipe.betas[0]
    return recipe.rate * (1 + math.cos(math.pi * (late + 1) / recipe.steps)) / 2, recipe.betas[0]


def cross_entropy(
    outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator, stride: int, _: int
) -> Tensor:
    """The mean over all pixels, of which those without a class count 0; resamples count fewer pixels."""
    total = outputs.new_zeros(())
    for heads, step in ((slice(0, 1), stride), (slice(1, None), max(_SPARSE, 2 * stride))):
        part = outputs[:, heads]
        if part.shape[1]:
            large, seen = sampled(part, truth, step, generator)
            several = seen.long().unsqueeze(1).expand(-1, part.shape[1], -1, -1).flatten(0, 1)
            losses = F.cross_entropy(large.flatten(0, 1), several, ignore_index=NO_CLASS, reduction="none")
            total = (
                total
                + (losses.unflatten(0, part.shape[:2]).mean(dim=(2, 3)) * weights[heads].T).mean(dim=0).sum()
            )
    return total


def windows(see: Callable[[Tensor], Tensor], image: Tensor, side: int) -> Tensor:
    """(..., C, H, W), the mean over squares, two thirds of a side apart, of what is seen in each of an image
    (3, H, W).

    Args:
        see: (1, 3, side, side) -> (1, ..., C, side, side).
        image: its shorter side is `side` pixels.
    """
    height, width = image.shape[-2:]
    rows, columns = ([*range(0, size - side, side * 2 // 3), size - side] for size in (height, width))
    total: Tensor | None = None
    times = torch.zeros(height, width)
    for top, left in product(rows, columns):
        square = ..., slice(top, top + side), slice(left, left + side)
        seen = see(image[square].unsqueeze(0))[0]
        if total is None:
            total = seen.new_zeros(*seen.shape[:-2], height, width)
        total[square] += seen  # in place: with all classes of all heads this is more than a gigabyte
        times[square] += 1
    assert total is not None
    return total.div_(times.to(total))
