"""Operations and memory of code that runs on the meta device, as if it ran on another one."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from visft_ds.ops import autocast_dtype, replaced

META = torch.device("meta")
#: Operators that neither compute nor move bytes.
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
        self.stands_for = stands_for
        self.autocast = autocast
        self.work: Counter[Work] = Counter()
        self.forward_peak = 0
        self.peak = 0
        self.peak_apart = 0
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._live: dict[int, int] = {}  # storage -> bytes, of those made inside
        self._live_bytes = 0
        self._arrived_bytes = 0  # of them, gradients that have arrived

    @property
    def operations(self) -> int:
        """Operations of all work."""
        return sum(calls * cost.operations for cost, calls in self.work.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _result_of(func, args, kwargs)
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_meta]
        for tensor in written:
            self._note(tensor.untyped_storage())
        kind = _kind(func)
        if written and kind is not None:
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            tensors = [*read, *written]
            formula = _FORMULAS.get(func._overloadpacket)
            operations = 0 if formula is None else int(formula(*args, **kwargs, out_val=result))
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.work[Work(kind, tensors[0].dtype, operations, moved)] += 1
        return result

    def arrived(self, parameter: Tensor) -> None:
        """Count the gradient that has arrived at a parameter apart from now on. The first one ends the
        forward pass.
        """
        assert parameter.grad is not None
        if self._arrived_bytes == 0:
            self.forward_peak = self.peak
            self.peak = self._live_bytes
        self._arrived_bytes += self._live.get(parameter.grad.untyped_storage()._cdata, 0)

    def _note(self, storage: Any) -> None:
        """Count a storage from now until it is freed, unless it is known or a parameter's."""
        key = storage._cdata
        size = storage.nbytes()
        if size == 0 or key in self._live or key in self._weights:
            return
        self._live[key] = size
        self._live_bytes += size
        self.peak = max(self.peak, self._live_bytes)
        self.peak_apart = max(self.peak_apart, self._live_bytes - self._arrived_bytes)
        weakref.finalize(storage, partial(self._freed, key))

    def _freed(self, key: int) -> None:
        self._live_bytes -= self._live.pop(key, 0)


#: Operator, structure and leaves of its arguments -> its result, with the call that makes a tensor in place
#: of each. Blocks of a model repeat each other, and torch takes a millisecond for a shape.
_MADE: dict[Any, Any] = {}


def _result_of(func: Any, args: Any, kwargs: Any) -> Any:
    """Result of an operator; the tensors of a call that was made before come without it."""
    leaves, structure = tree_flatten((args, kwargs))
    # The type, because 1 equals True and 1.0, of which other dtypes come.
    facts = [_layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf) for leaf in leaves]
    key = (func, repr(structure), *facts)
    if key in _MADE:
        return tree_map_only(partial, lambda make: make(), _MADE[key])
    result = func(*args, **kwargs)
    if _is_new(result, [leaf for leaf in leaves if isinstance(leaf, Tensor)]):
        _MADE[key] = tree_map_only(Tensor, _maker, result)
    return result


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """All that results of operators on the meta device depend on."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _maker(tensor: Tensor) -> partial[Tensor]:
    """The call that makes a tensor of the same layout."""
    shape, stride, dtype, device = _layout(tensor)
    return partial(torch.empty_strided, shape, stride, dtype=dtype, device=device)


def _is_new(result: Any, read: list[Tensor]) -> bool:
    """Return True for tensors on the meta device, each in a storage of its own, or None, for a gradient that
    nobody asked for.
    """
    made = [leaf for leaf in tree_leaves(result) if leaf is not None]
    if not read or not made or not all(isinstance(leaf, Tensor) and leaf.is_meta for leaf in made):
        return False
    of_read = {tensor.untyped_storage()._cdata for tensor in read}
    of_made = {tensor.untyped_storage()._cdata for tensor in made}
    return len(of_made) == len(made) and of_made.isdisjoint(of_read)


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor, *rest: Any, out_val: Any) -> int:
    """Operations of a convolution's gradients, each as many as forward; torch counts a depthwise one as if
    dense.
    """
    transposed = rest[4]
    gradients = sum(rest[7][:2])  # of the input, of the weights: those that are asked for
    cells = x if transposed else gradient  # of a transposed one, each cell of its input meets the weights
    return 2 * weight.numel() * len(cells) * math.prod(cells.shape[2:]) * gradients


#: Operations by operator, as torch counts them; it leaves out products that are added in place.
_FORMULAS: dict[Any, Any] = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],
    torch.ops.aten.convolution_backward: _convolution_backward,
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


@contextmanager
def operators_of(device: torch.device, *, zero3: bool = False) -> Iterator[None]:
    """Let attention, linear layers and convolutions on the meta device cost and keep what they do on a
    device.

    Autocast rounds factors. Attention is a fused kernel: FlashAttention in 16 bit on a GPU, elsewhere the
    memory-efficient one, which keeps as much as that of CPUs. Under ZeRO-3, DeepSpeed's linear layer keeps
    its input, frozen or not. Functions are replaced: torch's function modes are off when a backward pass
    recomputes.
    """
    linear = _keeping_linear(F.linear) if zero3 else F.linear
    with (
        replaced(F, "scaled_dot_product_attention", _fused(F.scaled_dot_product_attention, device)),
        replaced(F, "linear", _rounding(linear)),
        replaced(F, "conv2d", _rounding(F.conv2d)),
        replaced(F, "conv_transpose2d", _rounding(F.conv_transpose2d)),
    ):
        yield


def _rounding(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, its tensors rounded as autocast on the meta device says."""

    def call(*positional: Any, **named: Any) -> Tensor:
        dtype = autocast_dtype(META)
        if dtype is not None:
            positional, named = tree_map_only(Tensor, lambda tensor: tensor.to(dtype), (positional, named))
        return function(*positional, **named)

    return call


def _fused(attention: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Torch's attention; on the meta device the kernel that it takes on `device`."""
    aten = torch.ops.aten

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        *rest: Any,
        **named: Any,
    ) -> Tensor:
        if not q.is_meta:
            return attention(q, k, v, attn_mask, dropout_p, *rest, **named)
        if device.type == "cuda" and attn_mask is None and q.dtype != torch.float32:
            kernel = partial(aten._scaled_dot_product_flash_attention, q, k, v)
        else:
            bias = attn_mask
            if bias is not None:  # torch makes one of a mask
                bias = torch.zeros_like(bias, dtype=q.dtype).expand(*q.shape[:3], k.shape[2])
            kernel = partial(aten._scaled_dot_product_efficient_attention, q, k, v, bias, True)
        out, *_ = kernel(dropout_p, *rest, **named)
        return out

    return call


def _keeping_linear(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch's linear layer; on the meta device DeepSpeed's, which keeps its input until its backward pass."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not x.is_meta:
            return linear(x, weight, bias)
        out = x.matmul(weight.t())
        if out.grad_fn is not None:
            inputs = [x]
            out.grad_fn.register_hook(lambda *_: inputs.clear())
        return out if bias is None else out.add_(bias)

    return call
