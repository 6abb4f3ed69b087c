"""Linear heads of a frozen feature map: BatchNorm and a 1 x 1 convolution, trained with AdamW.

The head of facebookresearch/dinov3, dinov3/eval/segmentation/models/heads/linear_head.py: channels dropped,
BatchNorm, a convolution that begins with weights of N(0, 0.01) and no bias. Judged is the last iterate.

Beside a head, RESAMPLES others learn from the same batches with the same start, in which an image counts as
often as a bootstrap of the training images drew it: their spread is what the choice of these images does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import IntArray, resamples
from visft_ds.monitor.console import gauge

RESAMPLES = 5
BATCH = 16

#: Outputs (B, heads, C, h, w), what is there (B, H, W), weights of images (heads, B), generator, stride
#: between pixels that count, number of the step -> loss: the sum over heads.
Loss = Callable[[Tensor, Tensor, Tensor, torch.Generator, int, int], Tensor]


@dataclass(frozen=True)
class Recipe:
    """Settings that heads are trained with."""

    steps: int
    warm_up: int  #: steps
    rate: float  #: the highest of the schedule's formula
    decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    dropout: float = 0.0  #: of whole channels
    clip: float = math.inf  #: length of a head's gradient
    stride: int = 1  #: between the pixels that the loss counts


#: Recipe, number of a step from 0 on -> (learning rate, beta1 of AdamW).
Schedule = Callable[[Recipe, int], tuple[float, float]]


class Heads(nn.Module):
    """(B, D, h, w) -> (B, heads, C, h, w). Statistics of channels are shared, all else is of each head."""

    def __init__(self, heads: int, channels: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(outputs, channels, generator=generator) * 0.01
        self.weight = nn.Parameter(start.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))
        self.scale = nn.Parameter(torch.ones(heads, channels))
        self.shift = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, maps: Tensor) -> Tensor:
        count, _, height, width = maps.shape
        patches = maps.flatten(2).mT.flatten(0, 1)  # (B * h * w, D)
        normed = self.norm(patches)
        # All heads in one product, which their BatchNorms' scales and shifts have become a part of.
        weight = self.weight * self.scale[:, None]
        bias = self.bias + torch.einsum("hcd,hd->hc", self.weight, self.shift)
        outputs = F.linear(normed, weight.flatten(0, 1), bias.flatten())
        of_images = outputs.unflatten(0, (count, height * width)).mT
        return of_images.reshape(count, *self.bias.shape, height, width)


def half_cosine(share: float) -> float:
    """Factor of a learning rate after a share of all steps: it falls from 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2


def fit(
    heads: Heads,
    images: int,
    examples: Iterable[tuple[Tensor, Tensor, Tensor]],
    loss_of: Loss,
    recipe: Recipe,
    schedule: Schedule,
    groups: IntArray | None = None,
) -> Heads:
    """Train heads: the first one on all images alike, each further one on a resample.

    Args:
        images: number of the training images.
        examples: for each step numbers of the images in its batch, their maps (B, D, h, w), what is there.
        groups: (images,) numbers of what images come from together.
    """
    copies = resamples(images, len(heads.bias) - 1, groups)
    weights = torch.from_numpy(copies).float()
    drop_generator = torch.Generator().manual_seed(1)
    pixel_generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(
        heads.parameters(), lr=recipe.rate, betas=recipe.betas, weight_decay=recipe.decay
    )
    shown = gauge("linear head", recipe.steps, "steps", examples)
    for step, (drawn, maps, truth) in enumerate(shown):
        rate, beta1 = schedule(recipe, step)
        optimizer.param_groups[0].update(lr=rate, betas=(beta1, recipe.betas[1]))
        random = torch.rand(maps.shape[:2], generator=drop_generator)
        remains = random >= recipe.dropout
        factors = (remains / (1 - recipe.dropout)).to(maps)
        outputs = heads(maps * factors[:, :, None, None])
        weights_of_images = weights[:, drawn].to(maps)
        loss = loss_of(outputs, truth, weights_of_images, pixel_generator, recipe.stride, step)
        optimizer.zero_grad()
        loss.backward()
        _clip(heads, recipe.clip)
        optimizer.step()
    return heads.eval().requires_grad_(False)


def _clip(heads: Heads, most: float) -> None:
    """Shorten the gradient of each head, for itself, to a length."""
    if not math.isfinite(most):
        return
    gradients = [parameter.grad for parameter in heads.parameters() if parameter.grad is not None]
    lengths = [gradient.flatten(1).norm(dim=1) for gradient in gradients]
    length = torch.stack(lengths).norm(dim=0)
    factors = most / length.clamp(min=1e-12)
    for gradient in gradients:
        gradient.copy_(torch.einsum("h...,h->h...", gradient, factors.clamp(max=1)))


def enlarged(maps: Tensor, size: Sequence[int], stride: int = 1, first: Sequence[int] = (0, 0)) -> Tensor:
    """(..., h, w) at every `stride`-th pixel, from `first` on, of its bilinear enlargement to a size."""
    old_height, old_width = maps.shape[-2:]
    height, width = size
    row, column = first
    rows = _interpolation(old_height, height)[:, row::stride].to(maps)
    columns = _interpolation(old_width, width)[:, column::stride].to(maps)
    # Two products of large matrices: a batch of small ones takes three times as long on a CPU.
    taller = (maps.mT.contiguous() @ rows).mT
    return taller.contiguous() @ columns


def _interpolation(old: int, new: int) -> Tensor:
    """(old, new), the weight of each old place in each new one."""
    unit_vectors = torch.eye(old)
    return F.interpolate(unit_vectors[None], new, mode="linear")[0]


def sampled(maps: Tensor, truth: Tensor, stride: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (..., h, w) enlarged to labels (..., H, W), and these, at every `stride`-th pixel of every
    `stride`-th row, from a random one on.
    """
    size = truth.shape[-2:]
    step = min(stride, *size)
    first = torch.randint(step, (2,), generator=generator)
    row, column = first.tolist()
    maps = enlarged(maps, size, step, (row, column))
    return maps, truth[..., row::step, column::step]
