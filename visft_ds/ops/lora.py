"""A frozen linear layer with low-rank updates on slices of its output, as one autograd function.

LoRA, https://arxiv.org/abs/2106.09685: y = x W^T + b, then y[..., lo:hi] += scale * (x A_g^T) B_g^T for each slice g
of the output, from lo to hi.

Kept for the backward pass: x, u = scale * x A^T (G*r numbers a token) and the parameters by reference. Never kept or
built: the dense update B A, the layer's output, copies of a parameter in another precision. Three implementations,
called backends:

- eager: small products into slices of the output, to which the wide one is added. The specification; CPUs and fp32.
- augmented: one product of [x | u] with [W | B], so that 16-bit results are rounded once, in any library's product.
- triton: the same rounding without the copies of x and W that the augmented product is made of (sm_80 and later).

docs/memory-and-speed.md#kernels says why small updates need a single rounding.
Letters: K inputs, F outputs, G slices, r rank, M tokens (all leading dimensions of x).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import kernels, matmul_dtype, movable, no_autocast, placed
from visft_ds.ops.triton import DTYPES, interpreted, why_not

Slices = tuple[tuple[int, int], ...]  #: (lo, hi) ranges of output features, ascending and disjoint

BACKENDS = ("eager", "augmented", "triton")
#: Dtypes of 16 bit.
_SHORT = (torch.bfloat16, torch.float16)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    slices: Sequence[tuple[int, int]],
    *,
    backend: str = "auto",
    wide: WideWeight | None = None,
) -> Tensor:
    """Linear layer plus low-rank updates of some output slices.

    Computes in autocast's dtype, without autocast in the weight's; every argument is cast to it. Gradients arrive in
    the dtype of their tensor, so fp32 adapters over 16-bit weights get fp32 gradients.

    Args:
        x: (..., K).
        weight: (F, K). It gets a gradient only if it requires one.
        bias: (F,) or None.
        lora_a: (G*r, K), stacked slice by slice.
        lora_b: (sum of the slices' widths, r), stacked slice by slice.
        scale: factor of the update, alpha / r.
        slices: ascending, disjoint (lo, hi) output ranges. `slices` and shapes that disagree raise ValueError.
        backend: "auto" or one of BACKENDS. One that is unknown or cannot run here raises ValueError.
        wide: kept beside this weight, for the augmented product; None: [W | B] is made in every pass.

    Returns:
        (..., F) in the dtype computed in.
    """
    dtype = matmul_dtype(weight)
    if backend == "auto":
        backend, _ = choose_backend(placed(weight.device), dtype)
    elif backend not in BACKENDS:
        raise ValueError(f"lora_linear: backend {backend!r} is unknown; use auto, {' or '.join(BACKENDS)}")
    out: Tensor
    if backend == "augmented" and wide is not None and wide.takes(weight, dtype, slices, lora_b):
        out = _KeptAugmented.apply(x, bias, lora_a, lora_b, wide, scale)
        return out
    _check_shapes(weight, lora_a, lora_b, slices)
    if backend == "triton" and (reason := why_not_triton(weight.device, dtype)) is not None:
        raise ValueError(f"lora_linear: backend 'triton' cannot run here: {reason}; use auto")
    # x is cast outside of the function: it keeps x for the backward pass, and a 16-bit copy is smaller than fp32.
    out = _LoraLinear.apply(x.to(dtype), weight, bias, lora_a, lora_b, scale, tuple(slices), backend)
    return out


def choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name and reason of the implementation for this device and dtype of computation.

    "augmented" is one product of [x | u] with [W | B]: the update meets the rest in the fp32 accumulator. "eager"
    rounds it together with the bias first, which loses most of an update below the 16-bit resolution of the bias.
    "triton" keeps it too; it is taken where `visft_ds.ops.use_kernels` says so.
    """
    if device.type == "cuda" and dtype in _SHORT:
        if kernels(device) == "triton":
            return "triton", "Triton kernels were asked for; small updates are added before rounding"
        return "augmented", "16 bit on a GPU: small updates must be added before rounding"
    if dtype in _SHORT:
        return "eager", f"{device.type}: fastest here; updates below the 16-bit resolution of the bias are rounded off"
    return "eager", f"{dtype}: rounding is no concern"


class _LoraLinear(torch.autograd.Function):
    """Arguments of `lora_linear` -> output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        slices: Slices,
        backend: str,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        u = _product(rows, _cast(lora_a, x).t(), scale)
        run = _FORWARD[backend]
        y = run(rows, u, _cast(weight, x), None if bias is None else _cast(bias, x), _cast(lora_b, x), slices)
        ctx.scale, ctx.slices, ctx.backend = scale, slices, backend
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        # ZeRO-3 swaps the storage behind a parameter: keep the parameters themselves, never a view or a cast of them.
        ctx.save_for_backward(x if need_weight or need_a else None, u if need_b else None, weight, lora_a, lora_b)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.x_shape = x.shape
        ctx.set_materialize_grads(False)
        return _shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        x, u, weight, lora_a, lora_b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = dw = db = da = dlb = None  # gradients of x, weight, bias, lora_a, lora_b
        # The backward pass may run under another state of autocast than the forward did.
        with no_autocast(grad.device):
            dy = grad.reshape(-1, grad.shape[-1])
            groups = list(parts_of(ctx.slices, lora_b.shape[1]))
            if need_x or need_a:
                b = _cast(lora_b, dy)
                du = dy.new_empty(len(dy), len(groups) * b.shape[1])
                for lo, hi, cols, part in groups:
                    du[:, cols] = _product(dy[:, lo:hi], b[part], ctx.scale)
            if need_x:
                run = _backward_triton if ctx.backend == "triton" else _backward_library
                dx = run(dy, du, _cast(weight, dy), _cast(lora_a, dy)).view(ctx.x_shape)
            # Sums over tokens. On CPUs it is faster to leave the wider tensor as it lies, and to transpose the small
            # result in the copy that casts it.
            if need_a:
                da = dy.new_empty(lora_a.shape, dtype=lora_a.dtype)
                da.copy_((x.reshape(-1, x.shape[-1]).t() @ du).t())
            if need_b:
                dlb = dy.new_empty(lora_b.shape, dtype=lora_b.dtype)
                for lo, hi, cols, part in groups:
                    dlb[part] = (u[:, cols].t() @ dy[:, lo:hi]).t()
            if need_weight:
                dw = (dy.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
            if need_bias:
                db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, da, dlb, None, None, None


class WideWeight:
    """[W | B] of a layer in the dtype of computation, kept from pass to pass, with the frozen W as a view into it.

    So there is no second W: `takes` moves the values of the parameter and lets it look at them there; its name, shape
    and values stay. Each forward writes B, and A in this dtype: whoever changed them (an optimiser, a checkpoint, an
    average), and however, no stale value is ever multiplied. Not for a W that trains or that ZeRO-3 divides: their
    storage belongs to the engine. Nor without a graph: before DeepSpeed starts, it broadcasts weights, which have to be
    contiguous for that, and only checks run until then.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __deepcopy__(self, memo: object) -> WideWeight:
        return WideWeight()

    def __reduce__(self) -> tuple[type[WideWeight], tuple[()]]:
        return WideWeight, ()

    def holds(self, weight: Tensor) -> bool:
        """Return True if a weight is still a view into the buffer: `.to()`, a merge and the like replace it."""
        buffer = self._buffer
        return buffer is not None and weight.untyped_storage()._cdata == buffer.untyped_storage()._cdata

    def takes(self, weight: Tensor, dtype: torch.dtype, slices: Sequence[tuple[int, int]], lora_b: Tensor) -> bool:
        """Return True if the buffer holds this weight, which it takes in where it may."""
        if weight.dtype != dtype or weight.requires_grad or torch.compiler.is_compiling():
            return False
        if self.holds(weight):
            return True
        if movable(weight) or weight.is_meta or not torch.is_grad_enabled():
            return False
        rows, fan_in = weight.shape
        width = fan_in + len(slices) * lora_b.shape[1]
        with torch.no_grad():
            # Rows of a multiple of 16 bytes, which matrix units read fastest.
            buffer = weight.new_zeros(rows, -(-width // _ALIGNED) * _ALIGNED)
            buffer[:, :fan_in] = weight
            self._buffer, self.all, self.weight = buffer, buffer[:, :width], buffer[:, :fan_in]
            self.a = weight.new_empty(width - fan_in, fan_in)
            self.b = buffer[:, fan_in:width]
            self.places = [(lo, hi, cols, self.b[lo:hi, cols]) for lo, hi, cols, _ in parts_of(slices, lora_b.shape[1])]
            self.heights = [hi - lo for lo, hi in slices]
            weight.data = self.weight
        return True

    def write(self, lora_a: Tensor, lora_b: Tensor) -> None:
        """Write the adapters as they are now."""
        self.a.copy_(lora_a)
        for (_, _, _, place), part in zip(self.places, lora_b.split(self.heights), strict=True):
            place.copy_(part)


#: Elements of 16 bit in 16 bytes.
_ALIGNED = 8


class _KeptAugmented(torch.autograd.Function):
    """`lora_linear` by the augmented product, whose [W | B] is kept; [x | u] is made in one piece, and kept as such."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, wide: WideWeight, scale: float
    ) -> Tensor:
        wide.write(lora_a, lora_b)
        fan_in = x.shape[-1]
        rows = wide.a.new_empty(x.numel() // fan_in, wide.all.shape[1])
        inputs, u = rows.tensor_split((fan_in,), dim=1)
        inputs.copy_(x.reshape(-1, fan_in))
        u.addmm_(inputs, wide.a.t(), beta=0, alpha=scale)  # with beta = 0 what was there is not read
        y = rows @ wide.all.t() if bias is None else torch.addmm(_cast(bias, rows), rows, wide.all.t())
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            ctx.save_for_backward(rows)
        ctx.wide, ctx.scale, ctx.x_shape, ctx.x_dtype = wide, scale, x.shape, x.dtype
        ctx.dtypes = None if bias is None else bias.dtype, lora_a.dtype, lora_b.dtype
        return _shaped(y, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wide, scale = ctx.wide, ctx.scale
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        bias_dtype, a_dtype, b_dtype = ctx.dtypes
        dx = db = da = dlb = None
        with no_autocast(grad.device):  # the backward pass may run under another state of autocast than the forward did
            dy = grad.reshape(-1, grad.shape[-1])
            if need_a or need_b:
                inputs, u = ctx.saved_tensors[0].tensor_split((wide.a.shape[1],), dim=1)
            if need_x or need_a:
                du = _product(dy, wide.b, scale)  # rows of no slice are 0 in B
            if need_x:
                # In place: the sum needs no second tensor of the size of x. The small product first.
                dx = (du @ wide.a).addmm_(dy, wide.weight).view(ctx.x_shape).to(ctx.x_dtype)
            if need_a:
                da = (du.t() @ inputs).to(a_dtype)
            if need_b:
                dlb = torch.cat([dy[:, lo:hi].t() @ u[:, cols] for lo, hi, cols, _ in wide.places]).to(b_dtype)
            if need_bias:
                db = dy.sum(0).to(bias_dtype)
        return dx, db, da, dlb, None, None


def _forward_eager(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slices: Slices) -> Tensor:
    # The small products come first and the wide one is added to them: in 16 bit an update that is rounded together with
    # the bias alone survives, one that is added to a rounded result does not; and it takes less time.
    y = x.new_zeros(len(x), len(weight)) if bias is None else bias.expand(len(x), -1).clone()
    for lo, hi, cols, part in parts_of(slices, b.shape[1]):
        y[:, lo:hi].addmm_(u[:, cols], b[part].t())
    return y.addmm_(x, weight.t())


def _forward_augmented(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slices: Slices) -> Tensor:
    fan_in = weight.shape[1]
    wide = weight.new_zeros(weight.shape[0], fan_in + u.shape[1])
    wide[:, :fan_in] = weight
    for lo, hi, cols, part in parts_of(slices, b.shape[1]):
        wide[lo:hi, fan_in + cols.start : fan_in + cols.stop] = b[part]
    rows = torch.cat([x, u], dim=1)
    return rows @ wide.t() if bias is None else torch.addmm(bias, rows, wide.t())


def _forward_triton(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slices: Slices) -> Tensor:
    from visft_ds.ops.triton.lora import lora_forward

    return lora_forward(x, u, weight, bias, b, [edge for pair in slices for edge in pair])


_FORWARD = {"eager": _forward_eager, "augmented": _forward_augmented, "triton": _forward_triton}


def _backward_library(dy: Tensor, du: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    # In place: the sum needs no second tensor of the size of x. The small product first, as in the forward.
    return (du @ a).addmm_(dy, weight)


def _backward_triton(dy: Tensor, du: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    from visft_ds.ops.triton.lora import lora_backward

    return lora_backward(dy, du, weight, a)


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one pass and with one rounding. With beta = 0 the empty tensor is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def parts_of(slices: Sequence[tuple[int, int]], rank: int) -> Iterator[tuple[int, int, slice, slice]]:
    """For every slice: its output range, its columns of u (rows of A), its rows of B."""
    start = 0
    for index, (lo, hi) in enumerate(slices):
        yield lo, hi, slice(index * rank, (index + 1) * rank), slice(start, start + hi - lo)
        start += hi - lo


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """(N, out) -> (..., out) with the leading sides of `like`; to autograd no view: timm's EVA adds a bias in place."""
    shaped: Tensor = torch.ops.aten._unsafe_view.default(rows, [*like.shape[:-1], rows.shape[1]])
    return shaped


def _cast(tensor: Tensor, like: Tensor) -> Tensor:
    return tensor.to(like.dtype)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend "triton" cannot compute in this dtype on this device; None where it can."""
    if (reason := why_not(device)) is not None:
        return reason
    known = DTYPES if interpreted() else _SHORT  # a GPU's shared memory holds tiles of this size in 16 bit only
    return None if dtype in known else f"it computes in {', '.join(map(str, known))}, not in {dtype}"


def _check_shapes(weight: Tensor, lora_a: Tensor, lora_b: Tensor, slices: Sequence[tuple[int, int]]) -> None:
    edges = [0, *(edge for pair in slices for edge in pair), len(weight)]
    if not slices or edges != sorted(edges) or any(lo == hi for lo, hi in slices):
        raise ValueError(f"lora_linear: slices {tuple(slices)} must be ascending, disjoint and within 0..{len(weight)}")
    rank = lora_b.shape[1]
    wanted = ((len(slices) * rank, weight.shape[1]), (sum(hi - lo for lo, hi in slices), rank))
    found = (tuple(lora_a.shape), tuple(lora_b.shape))
    if found != wanted:
        raise ValueError(f"lora_linear: lora_a, lora_b have shapes {found}; slices {tuple(slices)} need {wanted}")
