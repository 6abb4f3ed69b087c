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
        first = torch.randn(outputs, channels, generator=torch.Generator().manual_seed(0)) * 0.01
        self.weight = nn.Parameter(first.repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, outputs))
        self.scale = nn.Parameter(torch.ones(heads, channels))
        self.shift = nn.Parameter(torch.zeros(heads, channels))

    def forward(self, maps: Tensor) -> Tensor:
        patches = self.norm(maps.flatten(2).transpose(1, 2).flatten(0, 1))
        # All heads in one product, which their BatchNorms' scales and shifts have become a part of.
        weight = (self.weight * self.scale[:, None]).flatten(0, 1)
        bias = self.bias + torch.einsum("hcd,hd->hc", self.weight, self.shift)
        outputs = F.linear(patches, weight, bias.flatten()).unflatten(0, (len(maps), -1)).transpose(1, 2)
        return outputs.reshape(len(maps), *self.bias.shape, *maps.shape[-2:])


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
    weights = torch.from_numpy(resamples(images, len(heads.bias) - 1, groups)).float()
    drops = torch.Generator().manual_seed(1)
    pixels = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(heads.parameters(), recipe.rate, recipe.betas, weight_decay=recipe.decay)
    for step, (drawn, maps, truth) in enumerate(gauge("linear head", recipe.steps, "steps", examples)):
        rate, beta1 = schedule(recipe, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
            group["betas"] = (beta1, recipe.betas[1])
        kept = torch.rand(maps.shape[:2], generator=drops) >= recipe.dropout
        outputs = heads(maps * (kept / (1 - recipe.dropout)).to(maps)[..., None, None])
        loss = loss_of(outputs, truth, weights[:, drawn].to(maps), pixels, recipe.stride, step)
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
    lengths = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    factors = (most / lengths.clamp(min=1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def enlarged(maps: Tensor, size: Sequence[int], stride: int = 1, first: Sequence[int] = (0, 0)) -> Tensor:
    """(..., h, w) at every `stride`-th pixel, from `first` on, of its bilinear enlargement to a size."""
    rows, columns = (
        F.interpolate(torch.eye(old).unsqueeze(0), new, mode="linear")[0, :, begin::stride].to(maps)
        for old, new, begin in zip(maps.shape[-2:], size, first, strict=True)
    )
    # Two products of large matrices: a batch of small ones takes three times as long on a CPU.
    return (maps.mT.contiguous() @ rows).mT.contiguous() @ columns


def sampled(maps: Tensor, truth: Tensor, stride: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Maps (..., h, w) enlarged to labels (..., H, W), and these, at every `stride`-th pixel of every
    `stride`-th row, from a random one on.
    """
    step = min(stride, *truth.shape[-2:])
    row, column = torch.randint(step, (2,), generator=generator).tolist()
    return enlarged(maps, truth.shape[-2:], step, (row, column)), truth[..., row::step, column::step]
