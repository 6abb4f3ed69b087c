"""A frozen linear layer with low-rank updates on slices of its output, as one autograd function.

LoRA, https://arxiv.org/abs/2106.09685: y = x W^T + b, then y[..., lo:hi] += scale * (x A_g^T) B_g^T for each
slice g of the output, from lo to hi.

In 16 bit the update must meet the rest in the fp32 accumulator: bf16 drops what is below 1/512 of the number
it is added to, which is most of an update with ViSFT's scale of 1/64. Three implementations, called backends:

- eager: small products into slices of the output, to which the wide one is added. The specification; CPUs and
  fp32.
- augmented: one product of [x | u] with [W | B], so that 16-bit results are rounded once, by any library.
- triton: the same rounding without a copy of x (`triton_lora`; sm_80 and later).

Kept for the backward pass: x, u = scale * x A^T, and the parameters by reference (ZeRO-3 swaps their
storage). Never built: the dense update B A.

Letters: K inputs, F outputs, G slices, r rank, M tokens (all leading dimensions of x).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import autocast_dtype, autocast_to, real_device

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
) -> Tensor:
    """Linear layer plus low-rank updates of some output slices, (..., F), in autocast's dtype, else x's.

    Gradients arrive in the dtype of their tensor, so fp32 adapters over 16-bit weights get fp32 gradients.

    Args:
        x: (..., K).
        weight: (F, K). It gets a gradient only if it requires one.
        bias: (F,) or None.
        lora_a: (G*r, K), stacked slice by slice.
        lora_b: (sum of the slices' widths, r), stacked slice by slice.
        scale: factor of the update, alpha / r.
        slices: (lo, hi) of each adapted range of outputs.
        backend: "eager", "augmented" or "triton"; None: `choose_backend`.
    """
    dtype = autocast_dtype(x.device) or x.dtype
    backend = backend or choose_backend(weight.device, dtype)
    # Cast outside of the function, which keeps x for the backward pass: a 16-bit copy is smaller than fp32.
    out: Tensor = _LoraLinear.apply(x.to(dtype), weight, bias, lora_a, lora_b, scale, slices, backend)
    return out


def choose_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend for this device and dtype of computation.

    On CPUs it is "eager" in 16 bit, too: updates below the resolution are rounded off there.
    """
    if real_device(device).type == "cuda" and dtype.itemsize == 2:
        return _on_gpus
    return "eager"


def use_kernels(name: str, device: torch.device) -> None:
    """Choose what adapted layers run on in 16 bit on GPUs, once for the process: "library" (cuBLAS and the
    like), or "triton", our own. Raises ValueError: Triton where it cannot run."""
    global _on_gpus
    if name != "triton":
        _on_gpus = "augmented"
        return
    gpu_can = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    if not gpu_can or importlib.util.find_spec("triton") is None:
        raise ValueError(
            "visft.model.kernels=triton needs the package triton and a GPU from sm_80 on; use library"
        )
    _on_gpus = "triton"


def ranges_of(slices: Slices, rank: int) -> Iterator[tuple[slice, slice, slice]]:
    """For every slice: its range of outputs, its columns of u (which are rows of A), its rows of B."""
    first_row = 0
    for index, (lo, hi) in enumerate(slices):
        columns = slice(index * rank, (index + 1) * rank)
        rows = slice(first_row, first_row + hi - lo)
        yield slice(lo, hi), columns, rows
        first_row = rows.stop


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
        rows = x.reshape(-1, x.shape[-1])  # (M, K)
        w = weight.to(x.dtype)
        b = None if bias is None else bias.to(x.dtype)
        u = _product(rows, lora_a.to(x.dtype).t(), scale)  # (M, G*r)
        if backend == "eager":
            y = _small_products_first(rows, u, w, b, lora_b.to(x.dtype), slices)
        else:
            up = spread(lora_b.to(x.dtype), slices, len(w))  # (F, G*r)
            if backend == "augmented":
                y = _one_product(rows, u, w, b, up)
            else:
                from visft_ds.ops.triton_lora import sum_of_products

                y = sum_of_products(rows, w.t(), u, up.t(), b)
        _, need_weight, _, need_a, need_b = ctx.needs_input_grad[:5]
        # The parameters themselves, never a view or a cast: ZeRO-3 swaps the storage behind a parameter.
        kept_x = x if need_weight or need_a else None
        kept_u = u if need_b else None
        ctx.save_for_backward(kept_x, kept_u, weight, lora_a, lora_b)
        ctx.scale = scale
        ctx.slices = slices
        ctx.backend = backend
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        if x.ndim == 2:
            return y
        # To autograd no view: timm's EVA adds a bias in place.
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The backward pass may run under another state of autocast than the forward.
        with autocast_to(grad.device, None):
            return (*_gradients(ctx, grad), None, None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, lora_a and lora_b; None for one that is not needed."""
    x, u, weight, lora_a, lora_b = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    grad_x = grad_weight = grad_bias = grad_a = grad_b = None
    dy = grad.reshape(-1, grad.shape[-1])  # (M, F)
    ranges = list(ranges_of(ctx.slices, lora_b.shape[1]))
    # Sums over tokens below: on CPUs it is faster to leave the wider tensor as it lies, and to transpose the
    # small result.
    x_t: Any = None
    if x is not None:
        x_t = x.reshape(-1, x.shape[-1]).t()
    if need_x or need_a:
        b = lora_b.to(dy.dtype)
        of_slices = [_product(dy[:, outputs], b[rows], ctx.scale) for outputs, _, rows in ranges]
        du = torch.cat(of_slices, dim=1)  # (M, G*r)
    if need_x:
        a = lora_a.to(dy.dtype)
        w = weight.to(dy.dtype)
        if ctx.backend == "triton":
            from visft_ds.ops.triton_lora import sum_of_products

            grad_x = sum_of_products(dy, w, du, a, None)
        else:  # in place: the sum needs no second tensor of the size of x; the small product first
            grad_x = (du @ a).addmm_(dy, w)
        grad_x = grad_x.view(ctx.x_shape)
    if need_a:
        grad_a = (x_t @ du).t().to(lora_a.dtype).contiguous()
    if need_b:
        transposed = [u[:, columns].t() @ dy[:, outputs] for outputs, columns, _ in ranges]
        grad_b = torch.cat([of_slice.t() for of_slice in transposed]).to(lora_b.dtype)
    if need_weight:
        grad_weight = (dy.t() @ x_t.t()).to(weight.dtype)
    if need_bias:
        grad_bias = dy.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b


def _small_products_first(
    x: Tensor,
    u: Tensor,
    w: Tensor,
    bias: Tensor | None,
    b: Tensor,
    slices: Slices,
) -> Tensor:
    """Small products into their slices, then the wide one added: an update that was rounded together with the
    bias alone survives.
    """
    y = x.new_zeros(len(x), len(w)) if bias is None else bias.expand(len(x), -1).clone()
    for outputs, columns, rows in ranges_of(slices, b.shape[1]):
        y[:, outputs].addmm_(u[:, columns], b[rows].t())
    return y.addmm_(x, w.t())


def _one_product(x: Tensor, u: Tensor, w: Tensor, bias: Tensor | None, up: Tensor) -> Tensor:
    """[x | u] [W | B]^T: every number is rounded once."""
    wide = torch.cat([w, up], dim=1)  # (F, K + G*r)
    rows = torch.cat([x, u], dim=1)
    if bias is None:
        return rows @ wide.t()
    return torch.addmm(bias, rows, wide.t())


def spread(b: Tensor, slices: Slices, outputs: int) -> Tensor:
    """B as (F, G*r): the rows of each slice in its own columns, zero elsewhere."""
    rank = b.shape[1]
    result = b.new_zeros(outputs, len(slices) * rank)
    for outputs_of_slice, columns, rows in ranges_of(slices, rank):
        result[outputs_of_slice, columns] = b[rows]
    return result


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right in one pass and with one rounding. With beta = 0 the empty tensor is not read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
