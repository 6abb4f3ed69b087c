"""Memory of ZeRO 0-3 without a model's activations: shares of weights, optimizer state, gradients, buckets.

Followed from deepspeed/runtime/zero/{stage_1_and_2,stage3,partitioned_param_coordinator}.py of the tested release.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.costs.ledger import ACTIVATIONS, BUCKETS, GRADIENTS, TRANSIENT, Ledger

_FP32 = 4
#: Elements that a rank's share under ZeRO-1 and 2 is a multiple of (nccl_start_alignment_factor).
_ALIGNMENT = 2

Groups = Sequence[Sequence[nn.Parameter]]  #: the trained parameters of each optimiser group


@dataclass(frozen=True)
class Zero:
    """Keys of a DeepSpeed configuration that decide about memory, with DeepSpeed's defaults."""

    stage: int
    ranks: int  #: over which tensors are divided
    accumulation: int
    reduce_bucket: int  #: elements
    bucket_count: int  #: two where reduction overlaps with computation
    persist_below: int  #: ZeRO-3: parameters of at most so many elements stay undivided
    prefetch: int  #: ZeRO-3: elements gathered ahead whenever a module begins
    max_live: int  #: ZeRO-3: elements that may be gathered at a time
    max_reuse: int  #: ZeRO-3: a parameter needed again within so many elements stays gathered
    linear_keeps_input: bool  #: ZeRO-3: DeepSpeed's own linear layer
    optimizer_here: bool  #: on the device, not offloaded
    weights_here: bool

    @classmethod
    def of(
        cls,
        deepspeed: Mapping[str, Any],
        ranks: int,
        accumulation: int,
        device: torch.device,
    ) -> Zero:
        """From the keys of a DeepSpeed configuration; on a CPU nothing is offloaded to elsewhere."""
        zero = deepspeed["zero_optimization"]
        stage = int(zero["stage"])

        def here(key: str) -> bool:
            return device.type == "cpu" or (zero.get(key) or {}).get("device", "none") == "none"

        overlap = zero.get("overlap_comm")
        return cls(
            stage=stage,
            ranks=ranks,
            accumulation=accumulation,
            reduce_bucket=int(zero.get("reduce_bucket_size", 5e8)),
            bucket_count=1 + bool(overlap and stage < 3),
            persist_below=int(zero.get("stage3_param_persistence_threshold", 1e5)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            max_live=int(zero.get("stage3_max_live_parameters", 1e9)),
            max_reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            linear_keeps_input=stage == 3 and bool(zero.get("memory_efficient_linear", True)),
            optimizer_here=here("offload_optimizer"),
            weights_here=here("offload_param"),
        )

    def weights(self, parameters: Sequence[nn.Parameter]) -> int:
        """Bytes of a rank's weights between steps."""
        if self.stage < 3:
            return sum(p.numel() * p.element_size() for p in parameters)
        total = 0
        for parameter in parameters:
            elements = -(-parameter.numel() // self.ranks) if self.weights_here else 0
            if parameter.numel() <= self.persist_below:
                elements += parameter.numel()
            total += elements * parameter.element_size()
        return total

    def shares(self, groups: Groups) -> list[int]:
        """Elements of each tensor that a rank's optimiser steps."""
        if self.stage == 0:
            return [p.numel() for group in groups for p in group]
        if self.stage == 3:
            return [sum(-(-p.numel() // self.ranks) for p in group) for group in groups]
        unit = self.ranks * _ALIGNMENT
        return [-(-sum(p.numel() for p in group) // unit) * _ALIGNMENT for group in groups]

    def optimizer(self, groups: Groups) -> int:
        """Bytes of both moments and, where the engine divides, fp32 masters."""
        copies = 2 + (self.stage > 0)
        return copies * _FP32 * sum(self.shares(groups)) if self.optimizer_here else 0

    def standing_gradients(self, groups: Groups) -> int:
        """Bytes that hold gradients between steps, too."""
        return _FP32 * sum(self.shares(groups)) if self.stage == 3 and self.optimizer_here else 0

    def standing_buckets(self) -> int:
        """Bytes of buckets that stay from step to step."""
        return _FP32 * self.reduce_bucket if self.stage == 3 else 0

    def update(self, groups: Groups, device: torch.device) -> dict[str, int]:
        """Bytes by kind at the fullest moment of the optimiser's update."""
        shares, total = self.shares(groups), sum(p.numel() for group in groups for p in group)
        if not self.optimizer_here or not shares:
            return {}
        # AdamW goes tensor by tensor on a CPU, with two temporaries; on a GPU through all of a call, with one.
        temporary = 2 * max(shares) if device.type == "cpu" else max(shares)
        if self.stage == 0:
            return {GRADIENTS: _FP32 * sum(shares), TRANSIENT: _FP32 * (temporary if device.type == "cpu" else total)}
        # The gradients of the group that is stepped are copied into one flat tensor first.
        return {GRADIENTS: _FP32 * (sum(shares) + max(shares)), TRANSIENT: _FP32 * temporary}

    def gathered(self, parameters: Sequence[nn.Parameter], used_again: Callable[[nn.Parameter], bool]) -> int:
        """ZeRO-3: bytes of gathered weights when the forward ends, where they are most.

        A weight stays whole if its next use, in the backward pass, comes within `max_reuse` elements. This is
        DeepSpeed's plan once it has seen a step like this one.

        Args:
            parameters: in the order of the forward.
            used_again: whether the backward pass needs it.
        """
        left, kept = self.max_reuse / 2, 0  # there and back again
        again = [p for p in reversed(parameters) if p.numel() > self.persist_below and used_again(p)]
        for parameter in again:
            if left <= 0:
                break
            left -= parameter.numel()
            kept += parameter.numel() * parameter.element_size()
        return max(kept, self.ahead(again))

    def ahead(self, parameters: Iterable[nn.Parameter]) -> int:
        """ZeRO-3: bytes of gathered weights during a forward through these, at most.

        Each module that begins, with parameters or without, has `prefetch` more elements gathered, however many of
        those before it are still unused. So they soon are as many as may be: gathering goes on below `max_live`.
        """
        window, elements, size, most = deque[nn.Parameter](), 0, 0, 0
        for parameter in parameters:
            if not self.prefetch or parameter.numel() <= self.persist_below:
                continue
            while elements >= self.max_live:
                first = window.popleft()
                elements, size = elements - first.numel(), size - first.numel() * first.element_size()
            window.append(parameter)
            elements, size = elements + parameter.numel(), size + parameter.numel() * parameter.element_size()
            most = max(most, size)
        return most


@contextmanager
def gradients_reduced(ledger: Ledger, module: nn.Module, groups: Groups, zero: Zero) -> Iterator[None]:
    """Do with the gradients of a backward pass what the engine does as they arrive."""
    group_of = {id(p): number for number, group in enumerate(groups) for p in group}
    shares, kept, buckets = zero.shares(groups), dict[int, Tensor](), list[Tensor]()

    def note(size: int, kind: str) -> Tensor:
        tensor = torch.empty(size, device="meta")
        ledger.add(tensor, kind, instead_of=(TRANSIENT,))
        return tensor

    def arrived(parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        if zero.stage in (1, 2) and not buckets:
            buckets.extend(note(zero.reduce_bucket, BUCKETS) for _ in range(zero.bucket_count))
        if zero.stage < 2:
            ledger.add(parameter.grad, GRADIENTS, instead_of=(TRANSIENT, ACTIVATIONS))
            return
        parameter.grad = None  # it is in the bucket now
        if zero.stage == 2:  # a rank keeps the sum of its share
            group = group_of[id(parameter)]
            if group not in kept:
                kept[group] = note(shares[group], GRADIENTS)

    if zero.stage == 1 and zero.accumulation > 1:  # there since the step's first micro-batch
        buckets.extend(note(zero.reduce_bucket, BUCKETS) for _ in range(zero.bucket_count))
    handles = [p.register_post_accumulate_grad_hook(arrived) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
