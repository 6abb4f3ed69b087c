"""Pointwise operations: the exact (erf) GELU, one that keeps 8 bits of its slope for the backward pass instead of its
input, and layer norm, alone or added to a residual stream.

In a vision transformer the input of the GELU is the widest tensor of a block, 55 % of what EVA-ViT-E keeps. Its
backward pass needs the slope alone, which lies between -0.129 and 1.129: 8 bits suffice (Few-Bit Backward, arXiv
2202.00441, has tables for such codes; here the steps are equal). The result is exact. A slope is off by 0.0025 at most
and 0.0014 in the mean square, about what rounding it to bfloat16 costs; 0 and 1, where most slopes of a trained model
lie, are met exactly, so units that are off stay off.

Tensors as wide as the hidden layer are what fills the memory at the fullest moment of a step. So both forms write over
what nobody reads any more: the gradient of the result becomes that of the input, and with codes the input becomes the
result. This asks for an input that nothing else reads, and a result that one layer alone reads, as in an MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import FrozenCasts, kernels, no_autocast, placed
from visft_ds.ops.triton import DTYPES

#: Codes for one unit of slope, and the code of slope 0; so codes run from 1 to 254.
STEPS, ZERO = 201, 27
#: Slopes that are made at a time: few enough for a cache, or for the memory of a GPU.
_AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 23}


def gelu(x: Tensor, *, coded: bool = False) -> Tensor:
    """x * Phi(x), elementwise, in the dtype of x.

    Args:
        x: fresh and for this function alone, see above.
        coded: keep one byte a number for the backward pass instead of x. Gradients differ by the rounding of the slope.
    """
    if coded:
        coded_out: Tensor = _CodedGelu.apply(x)
        return coded_out
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return F.gelu(x)
    out: Tensor = _Gelu.apply(x)
    return out


class _Gelu(torch.autograd.Function):
    """`F.gelu`, bit for bit, whose backward pass needs no second tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if not dy.is_contiguous() or not x.is_contiguous():
            return torch.ops.aten.gelu_backward(dy, x)
        torch.ops.aten.gelu_backward.grad_input(dy, x, grad_input=dy)
        return dy


class _CodedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if _fused(x):
            from visft_ds.ops.triton.pointwise import gelu_coded

            y, code = gelu_coded(x, STEPS, ZERO)
        else:
            y, code = _forward(x)
        ctx.save_for_backward(code)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (code,) = ctx.saved_tensors
        if _fused(dy):
            from visft_ds.ops.triton.pointwise import gelu_coded_backward

            return gelu_coded_backward(dy, code, STEPS, ZERO)
        if torch.compiler.is_compiling():
            return _slopes(code, dy).mul_(dy).to(dy.dtype)
        dx = dy.contiguous()
        for gradient, codes in _pieces(dx, code):
            gradient.copy_(_slopes(codes, dy).mul_(gradient))
        return dx


def _slopes(code: Tensor, like: Tensor) -> Tensor:
    return code.to(_precise(like)).sub_(ZERO).div_(STEPS)


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """The result in the memory of x, and the codes."""
    if torch.compiler.is_compiling():  # which plans its memory itself
        return F.gelu(x), _codes(x)
    code = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    # Not a view: autograd would follow one back to x, which is gone.
    given = x.contiguous()
    y = torch.empty(0, dtype=x.dtype, device=x.device).set_(
        given.untyped_storage(), given.storage_offset(), given.shape, given.stride()
    )
    for values, codes in _pieces(y, code):
        codes.copy_(_codes(values))
        values.copy_(F.gelu(values))
    return y, code


def _codes(x: Tensor) -> Tensor:
    precise = x.to(_precise(x))
    slope = torch.ops.aten.gelu_backward(torch.ones_like(precise), precise)
    return slope.mul_(STEPS).add_(ZERO).round_().to(torch.uint8)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Contiguous tensors of one size, a few values at a time, as views."""
    flat, at_once = [tensor.view(-1) for tensor in tensors], _AT_ONCE.get(placed(tensors[0].device).type, 1 << 23)
    for start in range(0, flat[0].numel(), at_once):
        yield tuple(tensor[start : start + at_once] for tensor in flat)


def _precise(x: Tensor) -> torch.dtype:
    """The slope is never computed in 16 bit: a step of the code is finer than that."""
    return torch.promote_types(x.dtype, torch.float32)


def _fused(x: Tensor) -> bool:
    return kernels(x.device) == "triton" and x.dtype in DTYPES


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    added_to: Tensor | None = None,
    cast: FrozenCasts | None = None,
) -> Tensor:
    """Layer norm over the last axis, (..., D) -> (..., D), in the dtype of x; or the sum of it and `added_to`.

    `cast` keeps the parameters in the dtype of x, where that is another one. Gradients of weight and bias are computed
    only where they train. The Triton kernel for the sum has none, so it is taken for frozen norms only; it adds before
    it rounds.
    """
    frozen = not (torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad))
    if added_to is not None and frozen and kernels(x.device) == "triton" and {x.dtype, added_to.dtype} <= set(DTYPES):
        from visft_ds.ops.triton.pointwise import add_normed

        return add_normed(added_to, x, weight.detach(), bias.detach(), eps)
    # Autocast on CUDA would keep an fp32 copy of a 16-bit input for the backward pass; the kernel sums in fp32.
    if weight.dtype != x.dtype:
        weight, bias = (cast or FrozenCasts())(x.dtype, weight, bias)
    with no_autocast(x.device):
        normed = F.layer_norm(x, weight.shape, weight, bias, eps)
    return normed if added_to is None else added_to + normed
