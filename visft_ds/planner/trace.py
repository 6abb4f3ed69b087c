"""Operations and memory of code that runs on the meta device, as if it ran on another one."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from visft_ds.ops import autocast_dtype

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
        forward_peak: most bytes of what was made inside, before a gradient had arrived.
        peak: the same since then.
        peak_apart: the same at any time, without gradients that had arrived.
    """

    def __init__(
        self, stands_for: torch.device, autocast: torch.dtype | None = None, weights: Iterable[Tensor] = ()
    ) -> None:
        super().__init__()
        self.stands_for, self.autocast = stands_for, autocast
        self.work: Counter[Work] = Counter()
        self.now = self.forward_peak = self.peak = self.apart = self.peak_apart = 0
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._live: dict[int, int] = {}

    @property
    def operations(self) -> int:
        """Operations of all work."""
        return sum(count * work.operations for work, count in self.work.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        for tensor in made:
            self._note(tensor.untyped_storage())
        kind = _kind(func)
        if made and kind is not None:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            formula = _FORMULAS.get(func._overloadpacket)
            operations = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
            self.work[Work(kind, (read or made)[0].dtype, operations, moved)] += 1
        return result

    def arrived(self, parameter: Tensor) -> None:
        """Count the gradient that has arrived at a parameter apart from now on. The first one ends the
        forward pass.
        """
        assert parameter.grad is not None
        if not self.apart:
            self.forward_peak, self.peak = self.peak, self.now
        self.apart += self._live.get(parameter.grad.untyped_storage()._cdata, 0)

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


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any) -> int:
    """Operations of a convolution's gradients, each as many as forward; torch counts a depthwise one as if
    dense.
    """
    cells = x if rest[4] else gradient  # of a transposed one, each cell of its input meets the weights
    return 2 * weight.numel() * len(cells) * math.prod(cells.shape[2:]) * sum(rest[7][:2])


#: Operations by operator, as torch counts them; it leaves out products that are added in place.
_FORMULAS: dict[Any, Any] = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
_FORMULAS[torch.ops.aten.convolution_backward] = _convolution_backward


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


@contextmanager
def operators_of(device: torch.device, *, zero3: bool = False) -> Iterator[None]:
    """Let attention, linear layers and convolutions on the meta device cost and keep what they do on a
    device.

    Autocast rounds factors. Attention is a fused kernel: FlashAttention in 16 bit on a GPU, elsewhere the
    memory-efficient one, which keeps as much as that of CPUs. Under ZeRO-3, DeepSpeed's linear layer keeps
    its input, frozen or not. Functions are replaced: torch's function modes are off when a backward pass
    recomputes.
    """
    attend, multiply, aten = F.scaled_dot_product_attention, F.linear, torch.ops.aten

    def rounding(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            if dtype := autocast_dtype(META):
                given, named = tree_map_only(Tensor, lambda factor: factor.to(dtype), (given, named))
            return function(*given, **named)

        return call

    def attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        *rest: Any,
        **named: Any,
    ) -> Any:
        if not q.is_meta:
            return attend(q, k, v, attn_mask, dropout_p, *rest, **named)
        if device.type == "cuda" and attn_mask is None and q.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, *rest, **named)[0]
        bias = attn_mask  # which torch makes of a mask
        if bias is not None:
            bias = torch.zeros_like(bias, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p, *rest, **named)[0]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not x.is_meta:
            return multiply(x, weight, bias)
        out = x.matmul(weight.t())
        if out.grad_fn is not None:
            kept = [x]
            out.grad_fn.register_hook(lambda *_: kept.clear())
        return out if bias is None else out.add_(bias)

    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(F, "linear", rounding(linear if zero3 else multiply)),
        patch.object(F, "conv2d", rounding(F.conv2d)),
        patch.object(F, "conv_transpose2d", rounding(F.conv_transpose2d)),
    ):
        yield
