"""Device memory during a step of an engine, by kind of tensor, exact to the byte of a storage (see `ledger`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.costs.ledger import (
    ACTIVATIONS,
    BUCKETS,
    FROZEN,
    GRADIENTS,
    OPTIMIZER,
    OTHER,
    TRAINED,
    TRANSIENT,
    Allocations,
    Ledger,
    saved_tensors_counted,
)
from visft_ds.parallel.engine import Engine


@contextmanager
def step_watched(ledger: Ledger, module: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """Watch everything a step makes: activations as autograd saves them, gradients as they arrive at parameters.

    `optimizer` is DeepSpeed's, whose own buffers are found when it has made them: with the gradients.
    """

    def arrived(parameter: Tensor) -> None:
        note_gradients(ledger, optimizer)
        if parameter.grad is not None:
            ledger.add(parameter.grad, GRADIENTS, instead_of=(TRANSIENT, ACTIVATIONS))

    with ExitStack() as stack:
        for parameter in module.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(arrived).remove)
        stack.enter_context(saved_tensors_counted(ledger, module))
        stack.enter_context(Allocations(ledger))
        yield


def note_residents(ledger: Ledger, engine: Engine) -> None:
    """Note tensors that live between steps: weights, optimizer state, DeepSpeed's gradient buffers, all others."""
    for parameter in engine.module.parameters():
        kind = TRAINED if parameter.requires_grad else FROZEN
        # Under ZeRO-3 a rank holds its share in `ds_tensor`, and the parameter itself is empty.
        ledger.add_all([parameter, *(t for t in (getattr(parameter, "ds_tensor", None),) if t is not None)], kind)
        if parameter.grad is not None:
            ledger.add(parameter.grad, GRADIENTS)
    note_gradients(ledger, engine.deepspeed.optimizer)
    ledger.add_all(optimizer_tensors(engine.deepspeed.optimizer), OPTIMIZER)
    ledger.add_all(live_tensors(), OTHER)


def note_gradients(ledger: Ledger, optimizer: Any) -> None:
    """Note DeepSpeed's gradients and buckets outside of the parameters, as far as they exist by now."""
    ledger.add_all(reduce_buckets(optimizer), BUCKETS, instead_of=(TRANSIENT,))
    ledger.add_all(gradient_buffers(optimizer), GRADIENTS, instead_of=(TRANSIENT,))


def optimizer_tensors(optimizer: Any) -> list[Tensor]:
    """Moments and fp32 masters of an optimiser in DeepSpeed's wrapper, or without one (ZeRO-0)."""
    base = getattr(optimizer, "optimizer", optimizer)
    found = [value for state in base.state.values() for value in state.values() if isinstance(value, Tensor)]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        found += list(getattr(optimizer, name, ()))
    return found


def gradient_buffers(optimizer: Any) -> list[Tensor]:
    """Gradients that DeepSpeed keeps outside of the parameters."""
    buffer = getattr(optimizer, "grad_partitions_flat_buffer", None)
    found = [] if buffer is None else [buffer]
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        found += [flat.grad for flat in getattr(optimizer, name, ()) if flat.grad is not None]
    averaged = getattr(optimizer, "averaged_gradients", {})
    for gradients in averaged.values() if isinstance(averaged, Mapping) else averaged:
        found += [gradient for gradient in gradients or () if isinstance(gradient, Tensor)]
    return found


def reduce_buckets(optimizer: Any) -> list[Tensor]:
    """Buffers of `reduce_bucket_size` elements in which ZeRO collects gradients before it averages them."""
    buffers = [bucket.buffer for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
    nested = [buffer if isinstance(buffer, list) else [buffer] for buffer in buffers if buffer is not None]
    return [tensor for buffer in nested for tensor in buffer]


def live_tensors() -> Iterator[Tensor]:
    """Every tensor Python knows of. By type, since isinstance wakes lazy modules that answer with warnings."""
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and thing.layout == torch.strided and thing.device.type != "meta":
            yield thing
