"""Work of an operator on a device: arithmetic and bytes to move, from the shapes of arguments and results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from visft_ds.costs.counting import NOT_COUNTED_BY_TORCH

#: "product": matrix products and convolutions. "attention": fused kernels. "curve": one transcendental function or
#: more for each value. "sampling": bilinear reads. "plain": everything else, which only moves bytes.
Kind = Literal["product", "attention", "curve", "sampling", "plain"]


class Work(NamedTuple):
    """Of one call of an operator."""

    kind: Kind
    dtype: torch.dtype  #: of the first tensor
    operations: int  #: two for each multiplication with its addition; 0 where only bytes count
    bytes: int  #: read and written


Total = Counter[Work]  #: work -> number of calls

_FORMULAS: dict[Any, Any] = {**flop_registry, **NOT_COUNTED_BY_TORCH}
_FREE = ("empty", "empty_strided", "empty_like", "new_empty", "detach", "lift_fresh", "_unsafe_view")
_CURVES = ("gelu", "softmax", "sigmoid", "tanh", "exp", "log", "softplus", "native_layer_norm", "binary_cross_entropy")


def work_of(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> Work | None:
    """None for operators that only look at a tensor in another way, and for those on the host."""
    kind = _kind(func)
    if kind is None:
        return None
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    made = list(_tensors(result if isinstance(result, (tuple, list)) else (result,)))
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (*tensors, *made))
    if not all(tensor.is_meta for tensor in made):
        return None  # done by the host
    first = (tensors or made or [torch.empty(0, device="meta")])[0]
    formula = _FORMULAS.get(func._overloadpacket)
    operations = int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
    return Work(kind, first.dtype, operations, moved)


@cache
def _kind(func: Any) -> Kind | None:
    name = func._overloadpacket.__name__
    if func.is_view or name in _FREE:
        return None
    if "scaled_dot_product" in name:
        return "attention"
    if func._overloadpacket in _FORMULAS:
        return "product"
    if "grid_sampler" in name:
        return "sampling"
    return "curve" if any(curve in name for curve in _CURVES) else "plain"


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
