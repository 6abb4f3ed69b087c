"""Adapters of one form on one base: the base is loaded once, and what comes before them computed once a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.models.lora import AdaptedLayer, lora_layers, lora_parameters


class Scales:
    """A module whose adapter is set to one of several: another scale, another training.

    The modules that run before the first adapted layer give the same for all of them: what they give a batch is kept
    while the first one computes, and taken by the others. Nothing is kept where an adapted layer was not called as a
    module, since it could not be known when that was.

    Args:
        module: of an encoder, whose one child has an adapter on the layers of all of them.
        adapters: tensors of each, equal in names and shapes.
    """

    def __init__(self, module: nn.Module, adapters: Sequence[Mapping[str, Tensor]]) -> None:
        self._tensors = list(adapters)
        self._parameters = {name.partition(".")[2]: value for name, value in lora_parameters(module).items()}
        self._kept: dict[nn.Module, list[Tensor]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._layers, self._called = set(lora_layers(module).values()), set[nn.Module]()
        self._first = True
        for layer in self._layers:
            layer.register_forward_pre_hook(lambda layer, _: self._called.add(layer))
        for part in _unadapted(module):
            part.forward = partial(self._run, part, part.forward)

    def add(self, tensors: Mapping[str, Tensor]) -> int:
        """Take one more adapter; returns its number."""
        self._tensors.append(tensors)
        return len(self._tensors) - 1

    def use(self, number: int) -> None:
        """Set one of the adapters, before a forward; the first one before the others of the same images."""
        self._first = number == 0
        if self._first or self._called != self._layers:
            self._kept.clear()
        self._called.clear()
        self._calls.clear()
        with torch.no_grad():
            for name, value in self._tensors[number].items():
                if name in self._parameters:  # a tower may be cut behind some
                    self._parameters[name].copy_(value)

    def _run(self, part: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
        """Run a module without adapter, or take what it gave. Copies, since what follows may compute in place."""
        call = self._calls[part] = self._calls.get(part, -1) + 1
        kept = self._kept.get(part, [])
        if not self._first and call < len(kept):
            return kept[call].clone()
        output = forward(*inputs, **options)
        if self._first and not self._called and isinstance(output, Tensor):
            self._kept.setdefault(part, []).append(output.clone())
        return output


def _unadapted(module: nn.Module) -> Iterator[nn.Module]:
    """The largest parts of a module that have no adapted layer in them."""
    for child in module.children():
        if lora_layers(child) or isinstance(child, nn.ModuleList):
            yield from () if isinstance(child, AdaptedLayer) else _unadapted(child)
        else:
            yield child
