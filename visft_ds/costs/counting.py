"""Counting a step's operations while it runs, by part, with the formulas of torch.utils.flop_counter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


def _attention(query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **named: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(
    grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_val: Any = None, **named: Any
) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _product_added(added: Any, left: Any, right: Any, *, out_val: Any = None, **named: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


_product_added._get_raw = True  # type: ignore[attr-defined]
_attention._get_raw = True  # type: ignore[attr-defined]  # the counter then passes tensors, not shapes
_attention_backward._get_raw = True  # type: ignore[attr-defined]

#: What torch 2.13 does not count, without a word: the fused attention kernel of CPUs, and products added in place.
NOT_COUNTED_BY_TORCH = {
    torch.ops.aten.addmm_: _product_added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _NoModules:
    """Module tracker of a counter that is asked for totals alone.

    Torch's own hangs hooks on modules that fail inside `torch.autograd.grad`, which computes blocks again.
    """

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        """Track nothing."""

    def __exit__(self, *_: object) -> None:
        """Track nothing."""


class FlopMeter:
    """Operations by part of a step; a meter for `timing.metered`."""

    def __init__(self) -> None:
        self.parts: dict[str, int] = {}
        self._counter = FlopCounterMode(display=False, custom_mapping=NOT_COUNTED_BY_TORCH)
        self._counter.mod_tracker = _NoModules()  # type: ignore[assignment]
        self._began: dict[str, int] = {}

    def start(self, part: str) -> None:
        self._began[part] = self._counter.get_total_flops()

    def stop(self, part: str) -> None:
        done = self._counter.get_total_flops() - self._began.pop(part)
        self.parts[part] = self.parts.get(part, 0) + done

    @property
    def total(self) -> int:
        """Operations counted so far, inside and outside of parts."""
        return int(self._counter.get_total_flops())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count everything that runs inside, backward passes included."""
        with self._counter:
            yield
