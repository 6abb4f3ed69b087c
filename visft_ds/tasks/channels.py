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
    modules = [module for head in heads for module in head.modules() if isinstance(module, Channels)]
    if not modules:
        return
    sums = []
    hooks = []
    for module in modules:
        sums.append(torch.zeros(3, len(module.mean), dtype=torch.float64))
        hooks.append(module.register_forward_pre_hook(partial(_add, sums[-1])))
    for image in images:
        predict(image)
    for hook in hooks:
        hook.remove()
    for module, (count, total, squares) in zip(modules, agree(sums), strict=True):
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        module.mean.copy_(mean)
        module.spread.copy_((variance + EPS).sqrt())


def _add(sums: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add number, sum and sum of squares (3, D) of the inputs (..., D) of a module."""
    x = inputs[0].double().flatten(end_dim=-2)
    number = torch.full_like(x[0], len(x))
    sums += torch.stack((number, x.sum(0), x.square().sum(0))).cpu()
