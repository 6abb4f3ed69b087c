"""Linear heads of a frozen feature map: BatchNorm and a 1 x 1 convolution, as DINOv2 and DINOv3 judge by.

https://github.com/facebookresearch/dinov3 (eval/segmentation, eval/depth): channels dropped, BatchNorm, convolution
with weights of N(0, 0.01), AdamW, linear warm-up, cosine to 0. Judged is the last iterate.

Beside a head, RESAMPLES others learn from the same batches with the same start, in which an image counts as often as a
bootstrap of the training images drew it: their spread is what the choice of these images does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.evals.judge.protocol import resamples
from visft_ds.monitor.console import gauge
from visft_ds.tasks.classes import VOID

RESAMPLES = 5
BATCH = 16
SPARSE = 8
_START = 1e-6  # of the rate, at the first step

#: Outputs (B, heads, C, h, w), what is there, (heads, B) weights of images, generator -> loss, a mean over the batch.
Loss = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]
#: Numbers of BATCH images, those of `order_of` -> (their maps (B, D, h, w), what is there).
Batches = Callable[[Tensor], tuple[Tensor, Tensor]]


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
    stride: int = 1  #: between the pixels that the loss counts, which begin anywhere


class Heads(nn.Module):
    """(B, D, h, w) -> (B, heads, C, h, w). Statistics of channels are shared, all else is of each head."""

    def __init__(self, heads: int, channels: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.dropout = dropout
        first = torch.randn(outputs, channels, generator=torch.Generator().manual_seed(0)) * 0.01
        self.weight = nn.Parameter(first.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))
        self.scale = nn.Parameter(torch.ones(heads, channels))
        self.shift = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, maps: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """With a generator channels are dropped."""
        places = maps.flatten(2).transpose(1, 2)
        if generator is not None and self.dropout:
            kept = torch.rand(len(maps), 1, maps.shape[1], generator=generator) >= self.dropout
            places = places * (kept / (1 - self.dropout)).to(places)
        places = self.norm(places.flatten(0, 1))
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


def order_of(images: int, steps: int) -> Tensor:
    """(steps * BATCH,) numbers of images, in rounds over all of them."""
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(images, generator=generator) for _ in range(-(-steps * BATCH // images))]
    return torch.cat(rounds)[: steps * BATCH]


def fit(heads: Heads, images: int, batches: Batches, loss_of: Loss, recipe: Recipe) -> Heads:
    """Train heads: the first one on all images alike, each further one on a resample; batches are any model's."""
    weights = torch.from_numpy(np.stack([np.ones(images), *resamples(images, len(heads.bias) - 1)])).float()
    drops, places = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    optimizer = torch.optim.AdamW(heads.parameters(), recipe.rate, recipe.betas, weight_decay=recipe.decay)
    order = order_of(images, recipe.steps).split(BATCH)
    for step, drawn in enumerate(gauge("linear head", recipe.steps, "steps", order)):
        maps, truth = batches(drawn)
        loss = loss_of(heads(maps, drops), truth, weights[:, drawn].to(maps), places)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip < math.inf:
            _clip(heads, recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(recipe, step)
        optimizer.step()
    return heads.eval()


def _clip(heads: Heads, most: float) -> None:
    """Shorten the gradient of each head for itself."""
    gradients = [parameter.grad for parameter in heads.parameters() if parameter.grad is not None]
    lengths = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (most / lengths.clamp(min=1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def enlarged(maps: Tensor, size: tuple[int, int], stride: int = 1, first: tuple[int, int] = (0, 0)) -> Tensor:
    """(..., h, w) at every `stride`-th pixel, from `first` on, of its bilinear enlargement to a size."""
    rows, columns = (
        F.interpolate(torch.eye(old).unsqueeze(0), new, mode="linear")[0, :, begin::stride].to(maps)
        for old, new, begin in zip(maps.shape[-2:], size, first, strict=True)
    )
    # Two products of large matrices: a batch of small ones takes three times as long on a CPU.
    return (maps.mT.contiguous() @ rows).mT.contiguous() @ columns


def cross_entropy(stride: int) -> Loss:
    """Of labels (B, H, W), the mean over their pixels that have a class; outputs are enlarged to the labels' size.

    Every `stride`-th pixel of every `stride`-th row counts, from a random one on; for resamples every SPARSE-th.
    """

    def loss(outputs: Tensor, truth: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        total = outputs.new_zeros(())
        for heads, wanted in ((slice(0, 1), stride), (slice(1, None), SPARSE)):
            step = min(wanted, *truth.shape[1:])
            row, column = torch.randint(step, (2,), generator=generator).tolist()
            seen = truth[:, row::step, column::step]
            right = torch.stack([seen == number for number in range(outputs.shape[2])], dim=1).to(outputs)
            large = enlarged(outputs[:, heads], (truth.shape[1], truth.shape[2]), step, (row, column))
            said = (large.log_softmax(dim=2) * right.unsqueeze(1)).sum(dim=(2, 3, 4))
            total = total - (said * weights[heads].T).sum() / (seen != VOID).sum().clamp(min=1)
        return total

    return loss


@torch.no_grad()
def windows(see: Callable[[Tensor], Tensor], image: Tensor, side: int, stride: int) -> Tensor:
    """(..., C, H, W), the mean over the squares of an image (3, H, W) that cover it of what is seen in each.

    Args:
        see: (1, 3, side, side) -> (1, ..., C, side, side). A shorter side of the image is filled up with 0.
    """
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, max(0, side - width), 0, max(0, side - height)))
    starts = [
        sorted({min(start, size - side) for start in range(0, size - side + stride, stride)})
        for size in padded.shape[-2:]
    ]
    total, times = torch.zeros(()), torch.zeros(padded.shape[-2:])
    for top in starts[0]:
        for left in starts[1]:
            seen = see(padded[None, :, top : top + side, left : left + side])[0]
            if not total.ndim:
                total = seen.new_zeros(*seen.shape[:-2], *padded.shape[-2:])
            total[..., top : top + side, left : left + side] += seen
            times[top : top + side, left : left + side] += 1
    return (total / times.to(total))[..., :height, :width]
