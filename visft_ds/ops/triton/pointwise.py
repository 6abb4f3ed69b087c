"""Pointwise kernels between a block's matrix products: GELU that keeps its slope in 8 bits, and a norm that is added.

Reading and writing memory is all that these cost, so each is one pass over its tensors where PyTorch makes several.
The slope's code and the order of operations are those of `visft_ds.ops.gelu`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visft_ds.ops.triton import interpreted, readable

#: Numbers of a program of the GELU.
BLOCK = 1024


@triton.jit
def gelu_forward_kernel(
    x: tl.tensor,
    y: tl.tensor,
    code: tl.tensor,
    count: tl.tensor,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """y = gelu(x) and the code of its slope, for `count` numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(value * 0.7071067811865476))
    slope = share + value * 0.3989422804014327 * tl.exp(-0.5 * value * value)
    tl.store(y + place, (value * share).to(y.dtype.element_ty), mask=inside)
    tl.store(code + place, tl.floor(slope * STEPS + (ZERO + 0.5)).to(tl.uint8), mask=inside)


@triton.jit
def gelu_backward_kernel(
    dy: tl.tensor,
    code: tl.tensor,
    dx: tl.tensor,
    count: tl.tensor,
    STEPS: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """dx = dy * slope, for `count` numbers."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gradient = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    slope = (tl.load(code + place, mask=inside, other=0).to(tl.float32) - ZERO) / STEPS
    tl.store(dx + place, (gradient * slope).to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_forward_kernel(
    x: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    D: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """y = x + layer_norm(branch): one program for a row of D <= BLOCK numbers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(branch + row * D + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(x + row * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * D + column, (added + normed * scale + shift).to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    dy: tl.tensor,
    branch: tl.tensor,
    weight: tl.tensor,
    dbranch: tl.tensor,
    D: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The gradient of the branch; mean and deviation are recomputed from the row, which is read anyway."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    value = tl.load(branch + row * D + column, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - tl.sum(value, 0) / D, 0.0)
    spread = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    normed = centred * spread
    gradient = tl.load(dy + row * D + column, mask=inside, other=0.0).to(tl.float32)
    gradient *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(gradient * normed, 0) / D
    result = (gradient - tl.sum(gradient, 0) / D - normed * along) * spread
    tl.store(dbranch + row * D + column, result.to(dbranch.dtype.element_ty), mask=inside)


@torch.library.custom_op("visft_ds::gelu_coded", mutates_args=())
def gelu_coded(x: Tensor, steps: int, zero: int) -> tuple[Tensor, Tensor]:
    """gelu(x), and round(steps * slope) + zero as uint8."""
    given = readable(x.contiguous())
    y, code = torch.empty_like(given), torch.empty_like(given, dtype=torch.uint8)
    grid = (triton.cdiv(given.numel(), BLOCK),)
    gelu_forward_kernel[grid](given, y, code, given.numel(), STEPS=steps, ZERO=zero, BLOCK=BLOCK)
    return y.to(x.dtype), code


@gelu_coded.register_fake
def _(x: Tensor, steps: int, zero: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.uint8)


@torch.library.custom_op("visft_ds::gelu_coded_backward", mutates_args=())
def gelu_coded_backward(dy: Tensor, code: Tensor, steps: int, zero: int) -> Tensor:
    """dy * slope."""
    given = readable(dy.contiguous())
    dx = torch.empty_like(given)
    grid = (triton.cdiv(given.numel(), BLOCK),)
    gelu_backward_kernel[grid](given, code, dx, given.numel(), STEPS=steps, ZERO=zero, BLOCK=BLOCK)
    return dx.to(dy.dtype)


@gelu_coded_backward.register_fake
def _(dy: Tensor, code: Tensor, steps: int, zero: int) -> Tensor:
    return dy.new_empty(dy.shape)


@torch.library.custom_op("visft_ds::add_normed", mutates_args=())
def add_normed(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x + layer_norm(branch) over the last axis, (..., D), in the dtype of x. No gradient for weight and bias."""
    stream, rows, scale, shift = (readable(tensor.contiguous()) for tensor in (x, branch, weight, bias))
    y = torch.empty_like(stream)
    width = x.shape[-1]
    norm_forward_kernel[(rows.numel() // width,)](stream, rows, scale, shift, y, width, eps, **_row(width))
    return y.to(x.dtype)


@add_normed.register_fake
def _(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("visft_ds::add_normed_backward", mutates_args=())
def add_normed_backward(dy: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The gradient of the branch, in its dtype; that of x is dy itself."""
    gradient, rows, scale = (readable(tensor.contiguous()) for tensor in (dy, branch, weight))
    dbranch = torch.empty_like(rows)
    width = branch.shape[-1]
    norm_backward_kernel[(rows.numel() // width,)](gradient, rows, scale, dbranch, width, eps, **_row(width))
    return dbranch.to(branch.dtype)


@add_normed_backward.register_fake
def _(dy: Tensor, branch: Tensor, weight: Tensor, eps: float) -> Tensor:
    return branch.new_empty(branch.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, branch, weight, _, ctx.eps = inputs
    ctx.save_for_backward(branch, weight)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    branch, weight = ctx.saved_tensors
    return gradient, add_normed_backward(gradient, branch, weight, ctx.eps), None, None, None


add_normed.register_autograd(_differentiate, setup_context=_keep)


def _row(width: int) -> dict[str, int]:
    """The constants of a program that holds a whole row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block} if interpreted() else {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}
