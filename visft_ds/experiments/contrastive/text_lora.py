"""LoRA (https://arxiv.org/abs/2106.09685) on q and v of a text tower's attention, inside PyTorch's own module.

open_clip's text towers use `nn.MultiheadAttention`, which hands its fused weight to one function and calls no linear
layer: an adapter around a layer would do nothing. So the weight itself is made of the frozen one and the update.

Letters: W width, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from visft_ds.models.eva_vit import generator_for

_WEIGHT = "in_proj_weight"


class QVUpdate(nn.Module):
    """(3W, W) -> the same with low-rank updates of the rows of q and v; nothing at the start, since B is zero."""

    def __init__(self, width: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.lora_A = nn.Parameter(torch.empty(2 * rank, width).uniform_(-1, 1, generator=generator) / width**0.5)
        self.lora_B = nn.Parameter(torch.zeros(2 * width, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that attention computes with."""
        q, k, v = weight.chunk(3)
        (a_q, a_v), (b_q, b_v) = self.lora_A.split(self.rank), self.lora_B.chunk(2)
        return torch.cat([q + self.scale * (b_q @ a_q), k, v + self.scale * (b_v @ a_v)])


def check(rank: int, alpha: float) -> None:
    """Raise ValueError for a rank or alpha that is not positive."""
    if rank < 1 or not alpha > 0:
        raise ValueError(f"LoRA rank {rank} and alpha {alpha:g} must be positive")


def inject(module: nn.Module, parameters: Mapping[str, nn.Parameter], rank: int, alpha: float, seed: int) -> list[str]:
    """Put updates onto every fused attention weight among `parameters`; returns their names there.

    Args:
        module: whatever holds the parameters; what else it holds stays as it is.
        rank, alpha: the update is scaled by alpha / rank.

    Raises:
        ValueError: rank or alpha not positive, or a tower without such attention.
    """
    check(rank, alpha)
    names = {id(value): name for name, value in parameters.items()}
    owners = {layer: names.get(id(weight)) for layer in module.modules() if (weight := _fused(layer)) is not None}
    chosen = {layer: name for layer, name in owners.items() if name is not None}
    if not chosen:
        raise ValueError(
            "the text tower has no attention with a fused weight (in_proj_weight) to put LoRA on: train all of it, or "
            "the projection"
        )
    for layer, name in chosen.items():
        weight = parameters[name]
        update = QVUpdate(weight.shape[1], rank, alpha / rank, generator_for(seed, name)).to(weight.device)
        parametrize.register_parametrization(layer, _WEIGHT, update)
    return list(chosen.values())


def updates(module: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> what trains."""
    return {name: value for name, value in module.named_parameters() if name.endswith(("lora_A", "lora_B"))}


def merge(module: nn.Module) -> None:
    """Make the updates part of the weights, in place, and take them out."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer, _WEIGHT):
            parametrize.remove_parametrizations(layer, _WEIGHT, leave_parametrized=True)


def _fused(layer: nn.Module) -> Tensor | None:
    weight = layer._parameters.get(_WEIGHT)
    return weight if weight is not None and weight.shape[0] == 3 * weight.shape[1] else None
