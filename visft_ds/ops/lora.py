"""A frozen linear layer with low-rank updates on slices of its output, as one autograd function.

LoRA, https://arxiv.org/abs/2106.09685: y = x W^T + b, then y[..., lo:hi] += scale * (x A_g^T) B_g^T for each
slice g of the output, from lo to hi.

In 16 bit the update must meet the rest in the fp32 accumulator: bf16 drops what is below 1/512 of the number
it is added to, which is most of an update with ViSFT's scale of 1/64. Three implementations, called backends:

- eager: small products into slices of the output, to which the wide one is added. The specification; CPUs and
  fp32.
- augmented: one product of [x | u] with [W | B], so that 16-bit results are rounded once, in any library's
  product.
- triton: the same rounding without a copy of x (`triton_lora`; sm_80 and later).

Kept for the backward pass: x, u = scale * x A^T, and the parameters by reference (ZeRO-3 swaps their
storage). Never
built: the dense update B A.

Letters: K inputs, F outputs, G slices, r rank, M tokens (all leading dimensions of x).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import autocast_dtype, autocast_to, stand_in

Slices = tuple[tuple[int, int], ...]  #: (lo, hi) ranges of output features, ascending and disjoint

_on_gpus = "augmented"  #: as `use_kernels` chose


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    slices: Slices,
    *,
    backend: str | None = None,
    wide: WideWeight | None = None,
) -> Tensor:
    """Linear layer plus low-rank updates of some output slices, in autocast's dtype, else that of x: (...,
    F).

    Gradients arrive in the dtype of their tensor, so fp32 adapters over 16-bit weights get fp32 gradients.

    Args:
        x: (..., K).
        weight: (F, K). It gets a gradient only if it requires one.
        bias: (F,) or None.
        lora_a: (G*r, K), stacked slice by slice.
        lora_b: (sum of the slices' widths, r), stacked slice by slice.
        scale: factor of the update, alpha / r.
        backend: "eager", "augmented" or "triton"; None: `choose_backend`.
        wide: kept beside this weight, for the augmented product; None: [W | B] is made in every pass.
    """
    dtype = autocast_dtype(x.device) or x.dtype
    backend = backend or choose_backend(weight.device, dtype)
    kept = wide if wide and backend == "augmented" and wide.holds(weight, dtype, len(lora_a)) else None
    # x is cast outside of the function: it keeps x for the backward pass, and a 16-bit copy is smaller than
    # fp32.
    out: Tensor = _LoraLinear.apply(x.to(dtype), weight, bias, lora_a, lora_b, scale, slices, backend, kept)
    return out


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for this device and dtype of computation; on CPUs updates below 16-bit resolution are
    rounded off.
    """
    device = getattr(stand_in(device), "stands_for", device)
    return _on_gpus if device.type == "cuda" and dtype.itemsize == 2 else "eager"


def use_kernels(name: str, device: torch.device) -> None:
    """Choose what adapted layers run on in 16 bit on GPUs, once for the process: "library" (cuBLAS and the
    like), or "triton", our own. Raises ValueError: Triton where it cannot run."""
    global _on_gpus
    runs = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "triton" and not (runs and importlib.util.find_spec("triton")):
        raise ValueError(
            "visft.model.kernels=triton needs the package triton and a GPU from sm_80 on; use library"
        )
    _on_gpus = "triton" if name == "triton" else "augmented"


def parts_of(slices: Slices, rank: int) -> Iterator[tuple[int, int, slice, slice]]:
    """For every slice: its output range, its columns of u (rows of A), its rows of B."""
    start = 0
    for index, (lo, hi) in enumerate(slices):
        yield lo, hi, slice(index * rank, (index + 1) * rank), slice(start, start + hi - lo)
        start += hi - lo


class WideWeight:
    """[W | B] and A of a layer in the dtype of computation, kept from pass to pass; the frozen W is a view
    into it.

    So there is no second W: `holds` moves the values of the parameter and lets it look at them there; its
    name, shape and values stay. Each forward writes A and B, so no stale value is multiplied, whoever changed
    it. Not for a W that trains or that ZeRO-3 divides: their storage belongs to the engine. Nor without a
    graph: before DeepSpeed starts, it broadcasts weights, which have to be contiguous for that, and only
    checks run until then.
    """

    wide: Tensor  #: [W | B] (F, K + G*r)
    b: Tensor  #: its last columns, zero beside the slices
    a: Tensor  #: (G*r, K)

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def holds(self, weight: Tensor, dtype: torch.dtype, width: int) -> bool:
        """Return True if W is kept here, beside a B of this width."""
        if weight.dtype != dtype or weight.requires_grad or torch.compiler.is_compiling():
            return False
        buffer = self._buffer
        # `.to()`, a merge and the like give the weight another storage.
        if buffer is None or weight.untyped_storage()._cdata != buffer.untyped_storage()._cdata:
            if hasattr(weight, "ds_id") or weight.is_meta or not torch.is_grad_enabled():
                return False
            rows, fan_in = weight.shape
            with torch.no_grad():
                # Rows of a multiple of 16 bytes, which matrix units read fastest.
                buffer = self._buffer = weight.new_zeros(rows, -(-(fan_in + width) // 8) * 8)
                buffer[:, :fan_in] = weight
                weight.data = buffer[:, :fan_in]
                self.wide = buffer[:, : fan_in + width]
                self.a, self.b = weight.new_empty(width, fan_in), self.wide[:, fan_in:]
        return True


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
        kept: WideWeight | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        w = weight.to(x.dtype)
        a = lora_a.to(x.dtype) if kept is None else kept.a.copy_(lora_a)
        added = None if bias is None else bias.to(x.dtype)
        u = _product(rows, a.t(), scale)
        if backend == "eager":
            y = _small_products(rows, u, w, added, lora_b.to(x.dtype), slices)
        elif backend == "augmented":
            y = _one_product(rows, u, w, added, lora_b, slices, kept)
        else:
            from visft_ds.ops.triton_lora import sum_of_products

            y = sum_of_products(
                rows, w.t(), u, _spread(lora_b, slices, w.new_zeros(len(w), u.shape[1])).t(), added
            )
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        # ZeRO-3 swaps the storage behind a parameter: keep the parameters themselves, never a view or a cast
        # of them.
        ctx.save_for_backward(
            x if need_weight or need_a else None, u if need_b else None, weight, lora_a, lora_b
        )
        ctx.scale, ctx.slices, ctx.backend, ctx.kept, ctx.x_shape = scale, slices, backend, kept, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        # To autograd no view: timm's EVA adds a bias in place.
        return y if x.ndim == 2 else torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, u, weight, lora_a, lora_b = ctx.saved_tensors
        need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = dw = db = da = dlb = None  # gradients of x, weight, bias, lora_a, lora_b
        with autocast_to(
            grad.device, None
        ):  # the backward pass may run under another state of autocast than the forward
            dy = grad.reshape(-1, grad.shape[-1])
            parts = list(parts_of(ctx.slices, lora_b.shape[1]))
            # Sums over tokens below: on CPUs it is faster to leave the wider tensor as it lies, and to
            # transpose the small result.
            xt: Any = None if x is None else x.reshape(-1, x.shape[-1]).t()
            if ctx.kept is not None:  # as the forward left them
                a, du = ctx.kept.a, _product(dy, ctx.kept.b, ctx.scale)
            elif need_x or need_a:
                a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
                du = torch.cat(
                    [_product(dy[:, lo:hi], b[part], ctx.scale) for lo, hi, _, part in parts], dim=1
                )
            if need_x and ctx.backend == "triton":
                from visft_ds.ops.triton_lora import sum_of_products

                dx = sum_of_products(dy, weight.to(dy.dtype), du, a, None).view(ctx.x_shape)
            elif need_x:  # in place: the sum needs no second tensor of the size of x; the small product first
                dx = (du @ a).addmm_(dy, weight.to(dy.dtype)).view(ctx.x_shape)
            if need_a:
                da = (xt @ du).t().to(lora_a.dtype).contiguous()
            if need_b:
                dlb = torch.cat([(u[:, cols].t() @ dy[:, lo:hi]).t() for lo, hi, cols, _ in parts]).to(
                    lora_b.dtype
                )
            if need_weight:
                dw = (dy.t() @ xt.t()).to(weight.dtype)
            if need_bias:
                db = dy.sum(0).to(ctx.bias_dtype)
        return dx, dw, db, da, dlb, None, None, None, None


def _small_products(
    x: Tensor, u: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, slices: Slices
) -> Tensor:
    """Small products first, the wide one added to them: an update rounded together with the bias alone
    survives.
    """
    y = x.new_zeros(len(x), len(w)) if bias is None else bias.expand(len(x), -1).clone()
    for lo, hi, cols, part in parts_of(slices, b.shape[1]):
        y[:, lo:hi].addmm_(u[:, cols], b[part].t())
    return y.addmm_(x, w.t())


def _one_product(
    x: Tensor, u: Tensor, w: Tensor, bias: Tensor | None, b: Tensor, slices: Slices, kept: WideWeight | None
) -> Tensor:
    """[x | u] [W | B]^T: every number is rounded once."""
    if kept is None:
        wide = torch.cat([w, _spread(b, slices, w.new_zeros(len(w), u.shape[1]))], dim=1)
    else:
        wide = kept.wide
        _spread(b, slices, kept.b)
    rows = torch.cat([x, u], dim=1)
    return rows @ wide.t() if bias is None else torch.addmm(bias, rows, wide.t())


def _spread(b: Tensor, slices: Slices, out: Tensor) -> Tensor:
    """Write B into (F, G*r): each slice's rows into its own columns; the rest of it is zero and stays so."""
    for lo, hi, cols, part in parts_of(slices, b.shape[1]):
        out[lo:hi, cols] = b[part]
    return out


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one pass and with one rounding. With beta = 0 the empty tensor is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
