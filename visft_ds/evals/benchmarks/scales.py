"""A model at several scales of its adapter: loaded once, and what comes before the adapter computed once a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.evals.benchmarks.models import ModelSpec
from visft_ds.evals.model import adapter_for
from visft_ds.models.lora import AdaptedLayer, lora_layers, lora_parameters


class Scales:
    """A module whose adapter is set to one of several scales.

    The modules that run before the first adapted layer give the same for every scale: what they give a batch is kept
    while the first scale computes, and taken by the others. Nothing is kept where an adapted layer was not called as a
    module, since it could not be known when that was.

    Args:
        module: of an encoder, whose one child has the adapter of all specs.
        specs: models that differ by their scale alone.
    """

    def __init__(self, module: nn.Module, specs: Sequence[ModelSpec]) -> None:
        assert specs[0].adapter is not None
        adapter = adapter_for(Path(specs[0].name), specs[0].adapter)
        self._tensors = [adapter.scaled(spec.scale).tensors for spec in specs]
        self._parameters = {name.partition(".")[2]: value for name, value in lora_parameters(module).items()}
        self._kept: dict[nn.Module, list[Tensor]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._layers, self._called = set(lora_layers(module).values()), set[nn.Module]()
        self._first = True
        for layer in self._layers:
            layer.register_forward_pre_hook(lambda layer, _: self._called.add(layer))
        for part in _unadapted(module):
            part.forward = partial(self._run, part, part.forward)

    def use(self, number: int) -> None:
        """Set the scale of one of the specs, before a forward; the first one before the others of the same images."""
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
