"""Fixed means and spreads of the channels that a head reads, in place of a batch norm's, which are of a
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-5  #: of a variance, as batch norms add it


class Channels(nn.Module):
    """Channels less their means and over their spreads; a run measures both once, before its first step."""

    mean: Tensor
    spread: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return (x - self.mean) / self.spread


def measured(heads: nn.Module) -> dict[str, Tensor]:
    """Means and spreads of heads that train, by qualified name; the same in every process."""
    trained = {name.split(".")[0] for name, parameter in heads.named_parameters() if parameter.requires_grad}
    return {f"heads.{name}": value for name, value in heads.named_buffers() if name.split(".")[0] in trained}


@torch.no_grad()
def measure_channels(
    heads: Iterable[nn.Module],
    predict: Callable[[Any], object],
    images: Iterable[Any],
    agree: Callable[[Any], Any],
) -> None:
    """Set the means and spreads of some heads to those of what they read of some images.

    Args:
        predict: the model that they are part of; is called with each of `images`, which are unpadded.
        agree: one process's value for all.
    """
    parts = [part for head in heads for part in head.modules() if isinstance(part, Channels)]
    if not parts:
        return
    sums = [torch.zeros(3, len(part.mean), dtype=torch.float64) for part in parts]

    def add(total: Tensor, part: nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].double().flatten(end_dim=-2)
        total += torch.stack((torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0))).cpu()

    hooks = [
        part.register_forward_pre_hook(partial(add, total)) for part, total in zip(parts, sums, strict=True)
    ]
    for image in images:
        predict(image)
    for part, hook, (count, total, squares) in zip(parts, hooks, agree(sums), strict=True):
        hook.remove()
        mean = total / count
        part.mean.copy_(mean)
        part.spread.copy_((squares / count - mean.square()).clamp(min=0).add(EPS).sqrt())
