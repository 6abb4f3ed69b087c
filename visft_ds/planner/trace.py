"""Operations and memory of code that runs on the meta device, as if it ran on another one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

META = torch.device("meta")
_FREE = ("empty", "empty_strided", "empty_like", "new_empty", "detach", "lift_fresh", "_unsafe_view")


class Work(NamedTuple):
    """Cost of a call of an operator."""

    kind: str  #: "product", "attention", "sampling" (bilinear reads), or "plain", which only moves bytes
    dtype: torch.dtype  #: of the first tensor
    operations: int  #: two for each multiplication with its addition
    bytes: int  #: read and written


class Tracer(TorchDispatchMode):
    """Sums up the work of operators, and the bytes of storages that live at the fullest moment.

    Inside, `visft_ds.ops` chooses as on the device it stands for.

    Attributes:
        work: cost -> number of calls.
        peak: most bytes of what was made inside.
        peak_apart: the same without what was `set_apart` by then.
    """

    def __init__(
        self, stands_for: torch.device, autocast: torch.dtype | None = None, weights: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self.stands_for, self.autocast = stands_for, autocast
        self.work: Counter[Work] = Counter()
        self.now = self.peak = self.apart = self.peak_apart = 0
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._live: dict[int, int] = {}

    @contextmanager
    def no_autocast(self) -> Iterator[None]:
        """Autocast off inside."""
        before, self.autocast = self.autocast, None
        try:
            yield
        finally:
            self.autocast = before

    @property
    def operations(self) -> int:
        """Operations of all work."""
        return sum(count * work.operations for work, count in self.work.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        for tensor in made:
            self._note(tensor.untyped_storage())
        kind = _kind(func)
        if made and kind is not None:
            self.work[work_of(func, kind, args, kwargs or {}, result, made)] += 1
        return result

    def set_apart(self, tensor: Tensor) -> None:
        """Count a tensor that stays, such as a gradient that has arrived at its parameter, apart from now on."""
        self.apart += self._live.get(tensor.untyped_storage()._cdata, 0)

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self._live and key not in self._weights:
            self._live[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            self.peak_apart = max(self.peak_apart, self.now - self.apart)
            weakref.finalize(storage, partial(self._gone, key))

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key, 0)


def _attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _product_added(added: Any, left: Any, right: Any, **named: Any) -> int:
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


#: With what torch does not count: the fused attention kernel of CPUs, and products added in place.
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten.addmm_: _product_added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@cache
def _kind(func: Any) -> str | None:
    """Kind of an operator's work; None for those that only look at a tensor in another way."""
    name = func._overloadpacket.__name__
    if func.is_view or name in _FREE:
        return None
    if "scaled_dot_product" in name:
        return "attention"
    if "grid_sampler" in name:
        return "sampling"
    return "product" if func._overloadpacket in _FORMULAS else "plain"


def work_of(func: Any, kind: str, args: Any, kwargs: dict[str, Any], result: Any, made: list[Tensor]) -> Work:
    """Operations by the formulas of torch.utils.flop_counter, and bytes read and written."""
    read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
    formula = _FORMULAS.get(func._overloadpacket)
    operations = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
    return Work(kind, (read or made)[0].dtype, operations, moved)


@contextmanager
def fused_attention(device: torch.device, *, keeping_linear: bool = False) -> Iterator[None]:
    """Let attention on the meta device cost and keep what the kernel that torch takes on a device does.

    Functions are replaced, since torch's function modes are off while a backward pass computes a forward again.

    Args:
        keeping_linear: linear layers keep their input whether or not their weight trains, as DeepSpeed's do under
            ZeRO-3 (deepspeed/runtime/zero/linear.py).
    """
    attend, multiply = F.scaled_dot_product_attention, F.linear

    def linear(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        out: Tensor = _KeepingLinear.apply(x, *rest, **named) if x.is_meta else multiply(x, *rest, **named)
        return out

    def attention(query: Tensor, *rest: Any, **named: Any) -> Tensor:
        return _attend(device, query, *rest, **named) if query.is_meta else attend(query, *rest, **named)

    F.scaled_dot_product_attention = attention
    F.linear = linear if keeping_linear else multiply  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.linear = attend, multiply


class _KeepingLinear(torch.autograd.Function):
    """A linear layer that keeps its input whatever of it trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        out = x.matmul(weight.t())
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        to_input = grad.matmul(weight) if ctx.needs_input_grad[0] else None
        to_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
        return to_input, to_weight, rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None


def _attend(
    device: torch.device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    aten = torch.ops.aten
    if attn_mask is not None:  # torch makes a bias of it
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).expand(*query.shape[:3], key.shape[2])
    if device.type == "cuda" and attn_mask is None and query.dtype != torch.float32:
        flash = aten._scaled_dot_product_flash_attention
        out = flash(query, key, value, dropout_p, is_causal, scale=scale)
    elif device.type == "cuda":
        efficient = aten._scaled_dot_product_efficient_attention
        out = efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)
    elif dropout_p:  # which the fused kernel of CPUs does not know
        plain = aten._scaled_dot_product_attention_math
        out = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    else:
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        out = fused(query, key, value, is_causal=is_causal, attn_mask=attn_mask, scale=scale)
    return out[0]
