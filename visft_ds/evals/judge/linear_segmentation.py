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

from collections.abc import Callable
from itertools import product

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as pixels_of

from visft_ds.evals.judge.crops import NO_CLASS, coin, filled_up, random_part, short_side
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import Recipe, half_cosine, sampled

RECIPE = Recipe(steps=40_000, warm_up=1500, rate=1e-3, decay=1e-3, dropout=0.1)
_START = 1e-6  # of the rate, at the first step
_SPARSE = 8  # least stride of the loss of resamples
_RATIO = (0.5, 2.0)  # of the shorter side of a training image, in sides
_MOST_OF_ONE = 0.75  # of the pixels of a crop that have a class
_DRAWS = 11  # at most
_DELTA = 32  # of brightness, of 255
_RANGE = (0.5, 1.5)  # of contrast and saturation
_HUE = (-0.5, 0.5)


def crop(image: Image.Image, label: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """A square of an enlarged or reduced image, in half of the cases mirrored, with other colours; and its
    label.

    What is outside of the image, below it or on its right, is 0 and has no class.
    """
    shorter = int(encoder.side * _uniform(*_RATIO))
    height, width = short_side(label.shape, shorter)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    pixels = pixels_of.pil_to_tensor(resized)
    nearest = transforms.InterpolationMode.NEAREST
    numbers = pixels_of.resize(label[None], [height, width], interpolation=nearest)[0]
    rows, columns = _square(numbers, encoder.side)
    pixels = pixels[:, rows, columns]
    numbers = numbers[rows, columns]
    if coin():
        pixels = pixels.flip(-1)
        numbers = numbers.flip(-1)
    pixels = encoder.normalised(distorted(pixels))
    square = (encoder.side, encoder.side)
    return filled_up(pixels, square), filled_up(numbers, square, NO_CLASS)


def _square(numbers: Tensor, side: int) -> tuple[slice, slice]:
    """Rows and columns of a random square, drawn again while one class has too much of it."""
    for _ in range(_DRAWS):
        square = random_part(numbers.shape, (side, side))
        inside = numbers[square]
        pixels = inside[inside != NO_CLASS].unique(return_counts=True)[1]
        if len(pixels) > 1 and pixels.max() < _MOST_OF_ONE * pixels.sum():
            break
    return square


def distorted(pixels: Tensor) -> Tensor:
    """(3, H, W) bytes with other brightness, contrast, saturation and hue, each in half of the cases."""
    if coin():
        pixels = _as_bytes(pixels.float() + _uniform(-_DELTA, _DELTA))
    contrast_first = coin()
    if contrast_first:
        pixels = _contrast(pixels)
    if coin():
        pixels = pixels_of.adjust_saturation(pixels, _uniform(*_RANGE))
    if coin():
        pixels = pixels_of.adjust_hue(pixels, _uniform(*_HUE))
    if not contrast_first:
        pixels = _contrast(pixels)
    return pixels


def _contrast(pixels: Tensor) -> Tensor:
    return _as_bytes(pixels.float() * _uniform(*_RANGE)) if coin() else pixels


def _as_bytes(pixels: Tensor) -> Tensor:
    return pixels.clamp(0, 255).to(torch.uint8)


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def schedule(recipe: Recipe, step: int) -> tuple[float, float]:
    """(learning rate, beta1). The rate is one step late, and falls by a cosine over all steps, also in the
    warm-up.
    """
    late = max(step - 1, 0)
    if late < recipe.warm_up:
        missing = (1 - late / recipe.warm_up) * (1 - _START)
        factor = (1 - missing) * (1 - late / recipe.steps)
    else:
        factor = half_cosine((late + 1) / recipe.steps)
    return recipe.rate * factor, recipe.betas[0]


def cross_entropy(
    outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator, stride: int, _: int
) -> Tensor:
    """The mean over all pixels, of which those without a class count 0; resamples count fewer pixels."""
    loss = _cross_entropy(outputs[:, :1], truth, weights[:1], generator, stride)
    if outputs.shape[1] > 1:
        sparse = max(_SPARSE, 2 * stride)
        loss = loss + _cross_entropy(outputs[:, 1:], truth, weights[1:], generator, sparse)
    return loss


def _cross_entropy(
    outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator, stride: int
) -> Tensor:
    logits, numbers = sampled(outputs, truth, stride, generator)  # (B, heads, C, h, w), (B, h, w)
    total = outputs.new_zeros(())
    for head, weights_of_images in enumerate(weights):
        losses = F.cross_entropy(logits[:, head], numbers.long(), ignore_index=NO_CLASS, reduction="none")
        of_images = losses.mean(dim=(1, 2))
        total = total + (of_images * weights_of_images).mean()
    return total


def windows(see: Callable[[Tensor], Tensor], image: Tensor, side: int) -> Tensor:
    """(..., C, H, W), the mean over squares, two thirds of a side apart, of what is seen in each of an image
    (3, H, W).

    Args:
        see: (1, 3, side, side) -> (1, ..., C, side, side).
        image: its shorter side is `side` pixels.
    """
    height, width = image.shape[-2:]
    total: Tensor | None = None
    times = torch.zeros(height, width)
    for top, left in product(_starts(height, side), _starts(width, side)):
        rows = slice(top, top + side)
        columns = slice(left, left + side)
        outputs = see(image[None, :, rows, columns])[0]
        if total is None:
            total = outputs.new_zeros(*outputs.shape[:-2], height, width)
        # In place: with all classes of all heads this is more than a gigabyte.
        total[..., rows, columns] += outputs
        times[rows, columns] += 1
    assert total is not None
    return total.div_(times.to(total))


def _starts(size: int, side: int) -> list[int]:
    """Beginnings of windows; the last one ends with the image."""
    step = side * 2 // 3
    return [*range(0, size - side, step), size - side]
