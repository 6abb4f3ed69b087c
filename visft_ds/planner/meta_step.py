"""Training step without values: the model's own code on the meta device, as if it were another device.

Modules, criteria, matchers up to the assignment, and autograd run as in a real step. So what is allocated at its peak
is known to the byte before anything is. The kernel of an attention is the one that torch chooses on the other device.
Letters: B images, H W pixels, N objects packed over the batch, T ids of a caption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import Stream
from visft_ds.costs.counting import NOT_COUNTED_BY_TORCH
from visft_ds.costs.hardware import DTYPES
from visft_ds.data.samples import Batch
from visft_ds.tasks import TASKS
from visft_ds.tasks.spec import Content

META = torch.device("meta")

#: "product": matrix products and convolutions. "attention": fused kernels. "curve": one transcendental function or
#: more for each value. "sampling": bilinear reads. "plain": everything else, which only moves bytes.
Kind = Literal["product", "attention", "curve", "sampling", "plain"]


class Work(NamedTuple):
    """Cost of a call of an operator."""

    kind: Kind
    dtype: torch.dtype  #: of the first tensor
    operations: int  #: two for each multiplication with its addition; 0 where only bytes count
    bytes: int  #: read and written


Total = Counter[Work]  #: cost -> number of calls that have it


def blank_batch(stream: Stream, images: int, content: Content) -> Batch:
    """A micro-batch of a stream on the meta device; what criteria read on the host is there, as zeros."""
    side = stream.largest_side()
    height, width = content.size or (side, side)
    targets = {task: TASKS[task].blank(images, (height, width), content, stream.image, META) for task in stream.tasks}
    ids = torch.arange(images)
    pixels = torch.empty(images, 3, height, width, dtype=torch.uint8, device=META)
    sizes = torch.tensor([[height, width]] * images)
    return Batch(pixels, sizes, sizes, ids, ids, ids, torch.ones(images, dtype=torch.bool), targets)


@contextmanager
def traced_as(device: torch.device, precision: Precision, *, linear_keeps_input: bool = False) -> Iterator[Tracer]:
    """Make code on the meta device run as on `device` under DeepSpeed; the tracer sums up its cost.

    Args:
        device: which need not exist here.
        precision: of the run.
        linear_keeps_input: DeepSpeed's linear layer, which replaces torch's under ZeRO-3.
    """
    tracer = Tracer(device, None if precision == "fp32" else DTYPES[precision])
    with tracer, chosen_kernels(device, linear_keeps_input=linear_keeps_input):
        yield tracer


@contextmanager
def chosen_kernels(device: torch.device, *, linear_keeps_input: bool) -> Iterator[None]:
    """Choose kernels for tensors on the meta device as torch chooses them on another one.

    Functions are replaced, as DeepSpeed replaces them, since torch's function modes are off while a backward pass
    computes a forward again.
    """
    attend, multiply = F.scaled_dot_product_attention, F.linear

    def attention(query: Tensor, *rest: Any, **named: Any) -> Tensor:
        return _attention(device, query, *rest, **named) if query.is_meta else attend(query, *rest, **named)

    def linear(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        out: Tensor = _KeepingLinear.apply(x, *rest, **named) if x.is_meta else multiply(x, *rest, **named)
        return out

    F.scaled_dot_product_attention = attention
    F.linear = linear if linear_keeps_input else multiply  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention, F.linear = attend, multiply


class Tracer(TorchDispatchMode):
    """Dispatch mode that sums up the cost of operators on the meta device, and caches the shapes of their results.

    Torch computes most shapes in Python, slowly; they depend on the arguments' shapes, strides and dtypes, and on the
    plain arguments alone. Inside, ops choose kernels as on the device it stands for (`visft_ds.ops.StandIn`).

    Attributes:
        work: of every operator so far.
    """

    known: ClassVar[dict[Any, tuple[_Result, Work | None]]] = {}

    def __init__(self, stands_for: torch.device, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.stands_for, self.autocast = stands_for, autocast
        self.work: Total = Counter()

    @contextmanager
    def no_autocast(self) -> Iterator[None]:
        """Autocast off inside."""
        before, self.autocast = self.autocast, None
        try:
            yield
        finally:
            self.autocast = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key = None
        if _is_functional(func):
            key = (func, _signature(args), _signature(tuple(kwargs.items())))
            found = self.known.get(key)
            if found is not None:
                self._count(found[1])
                return found[0].make()
        result = _sampled_shapes(func, args) if func in _SAMPLERS else func(*args, **kwargs)
        work = work_of(func, args, kwargs, result)
        self._count(work)
        if key is not None and (shapes := _Result.of(result)) is not None:
            self.known[key] = shapes, work
        return result

    def _count(self, work: Work | None) -> None:
        if work is not None:
            self.work[work] += 1


@dataclass(frozen=True)
class _Result:
    """Shapes, strides and dtypes of what an operator returns."""

    tensors: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None, ...]
    single: bool

    @classmethod
    def of(cls, result: Any) -> _Result | None:
        """None where a result is more than its shape."""
        single = isinstance(result, Tensor)
        found = (result,) if single else result
        alike = isinstance(found, tuple) and all(
            value is None or (isinstance(value, Tensor) and value.is_meta) for value in found
        )
        if not alike:
            return None
        shapes = [None if value is None else (tuple(value.shape), value.stride(), value.dtype) for value in found]
        return cls(tuple(shapes), single)

    def make(self) -> Any:
        """New tensors like those."""
        made = [
            None if shape is None else torch.empty_strided(*shape[:2], dtype=shape[2], device=META)
            for shape in self.tensors
        ]
        return made[0] if self.single else tuple(made)


@cache
def _is_functional(func: Any) -> bool:
    """Return True if an operator mutates nothing and returns no view of its arguments."""
    schema = func._schema
    return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)


def _signature(value: Any) -> Any:
    """Key that is equal for arguments that give equal shapes; for a tensor that holds numbers, unequal to all else."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype) if value.is_meta else object()
    if isinstance(value, (list, tuple)):
        return tuple(_signature(item) for item in value)
    return type(value), value


_SAMPLERS = (torch.ops.aten.grid_sampler_2d.default, torch.ops.aten.grid_sampler_2d_backward.default)


def _sampled_shapes(func: Any, args: Sequence[Any]) -> Any:
    """Empty results of sampling a map. Torch computes these shapes through dozens of operators."""
    if func is torch.ops.aten.grid_sampler_2d.default:
        maps, grid = args[:2]
        return maps.new_empty(*maps.shape[:2], *grid.shape[1:3])
    _, maps, grid = args[:3]
    to_maps, to_grid = args[6]
    return torch.empty_like(maps) if to_maps else None, torch.empty_like(grid) if to_grid else None


def _attention(
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
    """`F.scaled_dot_product_attention` by the kernel that torch takes on a device."""
    aten, out = torch.ops.aten, tuple[Tensor, ...]()
    if device.type == "cuda":
        if attn_mask is None and query.dtype != torch.float32:
            flash = aten._scaled_dot_product_flash_attention
            out = flash(query, key, value, dropout_p, is_causal, scale=scale)
            return out[0]
        if attn_mask is not None:  # a bias, whose rows are aligned before it is expanded (preprocess_mask of torch)
            length = attn_mask.shape[-1]
            bias = query.new_zeros(*attn_mask.shape[:-1], -(-length // 8) * 8)
            attn_mask = bias[..., :length].expand(*query.shape[:3], key.shape[2])
        efficient, keeps = aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled() and query.requires_grad
        out = efficient(query, key, value, attn_mask, keeps, dropout_p, is_causal, scale=scale)
        return out[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)  # torch makes a bias of it
    if dropout_p:  # which the fused kernel of CPUs does not know
        plain = aten._scaled_dot_product_attention_math
        out = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    else:
        fused = aten._scaled_dot_product_flash_attention_for_cpu
        out = fused(query, key, value, is_causal=is_causal, attn_mask=attn_mask, scale=scale)
    return out[0]


class _KeepingLinear(torch.autograd.Function):
    """A linear layer that keeps its input whether or not its weight trains (deepspeed/runtime/zero/linear.py)."""

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


# ---------------------------------------------------------------------------------------- work of an operator

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
