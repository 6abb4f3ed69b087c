"""Linear heads of a frozen feature map: BatchNorm and a 1 x 1 convolution, as DINOv2 and DINOv3 judge by.

https://github.com/facebookresearch/dinov3 (eval/segmentation, eval/depth): channels dropped, BatchNorm, convolution
with weights of N(0, 0.01), AdamW, linear warm-up, cosine to 0. Judged is the last iterate.

Beside a head, RESAMPLES others learn from the same batches with the same start, in which an image counts as often as a
bootstrap of the training images drew it: their spread is what the choice of these images does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.evals.judge.protocol import resamples
from visft_ds.monitor.console import gauge
from visft_ds.tasks.classes import VOID

RESAMPLES = 5
BATCH = 16
_SPARSE = 8  # stride of the loss of resamples
_START = 1e-6  # of the rate, at the first step

#: Outputs (B, heads, C, h, w), what is there (B, H, W), weights of images (heads, B), generator, stride between pixels
#: that count, number of the step -> loss, a mean over the batch.
Loss = Callable[[Tensor, Tensor, Tensor, torch.Generator, int, int], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Settings that heads are trained with."""

    steps: int
    warm_up: int
    rate: float
    decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    dropout: float = 0.0  #: of whole channels
    clip: float = math.inf  #: length of a head's gradient
    stride: int = 1  #: between the pixels that the loss counts


class Heads(nn.Module):
    """(B, D, h, w) -> (B, heads, C, h, w). Statistics of channels are shared, all else is of each head."""

    def __init__(self, heads: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        first = torch.randn(outputs, channels, generator=torch.Generator().manual_seed(0)) * 0.01
        self.weight = nn.Parameter(first.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))
        self.scale = nn.Parameter(torch.ones(heads, channels))
        self.shift = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, maps: Tensor) -> Tensor:
        places = self.norm(maps.flatten(2).transpose(1, 2).flatten(0, 1))
        # All heads in one product, which their BatchNorms' scales and shifts have become a part of.
        weight = (self.weight * self.scale[:, None]).flatten(0, 1)
        bias = self.bias + torch.einsum("hcd,hd->hc", self.weight, self.shift)
        found = F.linear(places, weight, bias.flatten()).unflatten(0, (len(maps), -1)).transpose(1, 2)
        return found.reshape(len(maps), *self.bias.shape, *maps.shape[-2:])


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of a step: linear up to the end of the warm-up, then half a cosine to 0."""
    if step < recipe.warm_up:
        return recipe.rate * (_START + (1 - _START) * step / recipe.warm_up)
    return recipe.rate * (1 + math.cos(math.pi * (step - recipe.warm_up) / (recipe.steps - recipe.warm_up))) / 2


def fit(
    heads: Heads, images: int, examples: Iterable[tuple[Tensor, Tensor, Tensor]], loss_of: Loss, recipe: Recipe
) -> Heads:
    """Train heads: the first one on all images alike, each further one on a resample.

    Args:
        images: number of the training images.
        examples: for each step numbers of the images in its batch, their maps (B, D, h, w), what is there.
    """
    weights = torch.from_numpy(resamples(images, len(heads.bias) - 1)).float()
    drops, places = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    optimizer = torch.optim.AdamW(heads.parameters(), recipe.rate, recipe.betas, weight_decay=recipe.decay)
    for step, (drawn, maps, truth) in enumerate(gauge("linear head", recipe.steps, "steps", examples)):
        kept = torch.rand(maps.shape[:2], generator=drops) >= recipe.dropout
        outputs = heads(maps * (kept / (1 - recipe.dropout)).to(maps)[..., None, None])
        loss = loss_of(outputs, truth, weights[:, drawn].to(maps), places, recipe.stride, step)
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in heads.parameters() if parameter.grad is not None]
        lengths = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        factors = (recipe.clip / lengths.clamp(min=1e-12)).clamp(max=1)  # each head's for itself
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, step)
        optimizer.step()
    return heads.eval().requires_grad_(False)


def enlarged(maps: Tensor, size: Sequence[int], stride: int = 1, first: Sequence[int] = (0, 0)) -> Tensor:
    """(..., h, w) at every `stride`-th pixel, from `first` on, of its bilinear enlargement to a size."""
    rows, columns = (
        F.interpolate(torch.eye(old).unsqueeze(0), new, mode="linear")[0, :, begin::stride].to(maps)
        for old, new, begin in zip(maps.shape[-2:], size, first, strict=True)
    )
    # Two products of large matrices: a batch of small ones takes three times as long on a CPU.
    return (maps.mT.contiguous() @ rows).mT.contiguous() @ columns


def sampled(maps: Tensor, truth: Tensor, stride: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (..., h, w) enlarged to labels (..., H, W), and these, at every `stride`-th pixel of every `stride`-th row,
    from a random one on.
    """
    step = min(stride, *truth.shape[-2:])
    row, column = torch.randint(step, (2,), generator=generator).tolist()
    return enlarged(maps, truth.shape[-2:], step, (row, column)), truth[..., row::step, column::step]


def cross_entropy(
    outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator, stride: int, _: int
) -> Tensor:
    """The mean over the pixels that have a class; for resamples every _SPARSE-th counts."""
    total = outputs.new_zeros(())
    for heads, step in ((slice(0, 1), stride), (slice(1, None), _SPARSE)):
        large, seen = sampled(outputs[:, heads], truth, step, generator)
        right = torch.stack([seen == number for number in range(outputs.shape[2])], dim=1).to(outputs)
        said = (large.log_softmax(dim=2) * right.unsqueeze(1)).sum(dim=(2, 3, 4))
        total = total - (said * weights[heads].T).sum() / (seen != VOID).sum().clamp(min=1)
    return total


def windows(see: Callable[[Tensor], Tensor], image: Tensor, side: int, stride: int) -> Tensor:
    """(..., C, H, W), the mean over the squares of an image (3, H, W) that cover it of what is seen in each.

    Args:
        see: (1, 3, side, side) -> (1, ..., C, side, side). A shorter side of the image is filled up with 0.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(0, side - width), 0, max(0, side - height)))
    rows, columns = ([*range(0, size - side, stride), size - side] for size in padded.shape[-2:])
    total, times = torch.zeros(()), torch.zeros(padded.shape[-2:])
    for top, left in product(rows, columns):
        place = ..., slice(top, top + side), slice(left, left + side)
        seen = see(padded[place].unsqueeze(0))[0]
        total = total if total.ndim else seen.new_zeros(*seen.shape[:-2], *padded.shape[-2:])
        total[place] += seen  # in place: with all classes of all heads this is more than a gigabyte
        times[place] += 1
    return (total / times.to(total))[..., :height, :width]
