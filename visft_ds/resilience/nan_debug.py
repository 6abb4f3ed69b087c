"""Where numbers that are none come from: what modules compute in a step, and what flows back into them.

Shape letters: B images of a micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.data.samples import Batch
from visft_ds.model import LossDenominators, MultiTaskModel

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Note = Callable[[str, Tensor], None]  #: is told what a tensor is, and the tensor


@dataclass(frozen=True)
class NonFinite:
    """A tensor with numbers that are none."""

    what: str  #: e.g. "output of heads.detection.decoder.layers.0"
    count: int  #: how many
    of: int
    images: tuple[int, ...] = ()  #: ids of the images whose rows they are in; empty where the rows are not images

    def text(self) -> str:
        """One line."""
        where = f", images {', '.join(map(str, self.images))}" if self.images else ""
        return f"{self.what}: {self.count} of {self.of} values are not finite{where}"


def examine_batch(
    module: MultiTaskModel, batch: Batch, loss_denominators: LossDenominators, autocast: str, scale: float = 1.0
) -> list[NonFinite]:
    """Forward and backward of a micro-batch. What is not finite, in the order in which it came to be.

    Parameters and targets come first, then outputs of modules, losses, and gradients from the loss down.

    Args:
        scale: what the loss is multiplied by before it goes backward.
    """
    found: list[NonFinite] = []

    def note(what: str, tensor: Tensor) -> None:
        if (one := not_finite(what, tensor, batch)) is not None:
            found.append(one)

    for name, parameter in module.named_parameters():
        note(f"parameter {name}", parameter)
    for task, targets in batch.targets.items():
        for tensor in tensors_of(targets):
            note(f"targets of {task}", tensor)
    module.faults = []
    device = batch.images.device.type
    with watched(module, note):
        with torch.autocast(device, _AUTOCAST.get(autocast, torch.bfloat16), enabled=autocast in _AUTOCAST):
            losses = module(batch, loss_denominators)
        found += [NonFinite(f"criterion: {text}", 1, 1) for text in module.faults]
        for name, value in losses.items():
            note(f"loss {name}", value)
        if losses["loss"].requires_grad:
            (losses["loss"] * scale).backward()
    return found


def not_finite(what: str, tensor: Tensor, batch: Batch | None = None) -> NonFinite | None:
    """What is wrong with a tensor, None if nothing is.

    Args:
        batch: tells rows from images.
    """
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return None
    bad = ~tensor.detach().isfinite()
    images: tuple[int, ...] = ()
    if batch is not None and tensor.ndim > 1 and tensor.shape[0] == len(batch.image_ids):
        images = tuple(batch.image_ids[bad.flatten(1).any(1).cpu()].tolist())
    return NonFinite(what, int(bad.sum()), bad.numel(), images)


@contextlib.contextmanager
def watched(module: nn.Module, note: Note) -> Iterator[None]:
    """Let `note` see outputs of modules, their gradients and those of parameters, as they come to be."""
    hooks: list[Any] = [
        child.register_forward_hook(_hook(name, note))
        for name, child in module.named_modules()
        if name and not isinstance(child, nn.ModuleList | nn.ModuleDict)
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hooks.append(parameter.register_hook(_gradient_hook(f"parameter {name}", note)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a module's output, or in targets."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for one in value.values() for tensor in tensors_of(one))
    elif isinstance(value, tuple | list):
        yield from (tensor for one in value for tensor in tensors_of(one))
    elif is_dataclass(value):
        yield from (tensor for entry in fields(value) for tensor in tensors_of(getattr(value, entry.name)))


def _gradient_hook(what: str, note: Note) -> Callable[[Tensor], None]:
    return lambda gradient: note(f"gradient of {what}", gradient)


def _hook(name: str, note: Note) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tensors_of(output):
            note(f"output of {name}", tensor)
            if tensor.requires_grad:
                tensor.register_hook(_gradient_hook(f"the output of {name}", note))

    return hook
