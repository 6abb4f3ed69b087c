"""The exact (erf) GELU, and one that keeps 8 bits of its slope for the backward pass instead of its whole input.

In a vision transformer the input of the GELU is the widest tensor of a block, 55 % of what EVA-ViT-E keeps. Its
backward pass needs the slope alone, which lies between -0.129 and 1.129: 8 bits suffice (Few-Bit Backward, arXiv
2202.00441, has tables for such codes; here the steps are equal). The result is exact. A slope is off by 0.0025 at most
and 0.0014 in the mean square, about what rounding it to bfloat16 costs; 0 and 1, where most slopes of a trained model
lie, are met exactly, so units that are off stay off.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import kernels
from visft_ds.ops.triton import DTYPES

#: Codes for one unit of slope, and the code of slope 0; so codes run from 1 to 254.
STEPS, ZERO = 201, 27


def gelu(x: Tensor, *, coded: bool = False) -> Tensor:
    """x * Phi(x), elementwise, in the dtype of x.

    Args:
        coded: keep one byte a number for the backward pass instead of x. Gradients differ by the rounding of the slope.
    """
    out: Tensor = _CodedGelu.apply(x) if coded else F.gelu(x)
    return out


class _CodedGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y, code = _triton_forward(x) if _fused(x) else _forward(x)
        ctx.save_for_backward(code)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (code,) = ctx.saved_tensors
        if _fused(dy):
            return _triton_backward(dy, code)
        slope = code.to(_precise(dy)).sub_(ZERO).div_(STEPS)
        return slope.mul_(dy).to(dy.dtype)


def _forward(x: Tensor) -> tuple[Tensor, Tensor]:
    precise = x.to(_precise(x))
    slope = torch.ops.aten.gelu_backward(torch.ones_like(precise), precise)
    return F.gelu(x), slope.mul_(STEPS).add_(ZERO).round_().to(torch.uint8)


def _precise(x: Tensor) -> torch.dtype:
    """The slope is never computed in 16 bit: a step of the code is finer than that."""
    return torch.promote_types(x.dtype, torch.float32)


def _fused(x: Tensor) -> bool:
    return kernels(x.device) == "triton" and x.dtype in DTYPES


def _triton_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    from visft_ds.ops.triton.pointwise import gelu_coded

    return gelu_coded(x, STEPS, ZERO)


def _triton_backward(dy: Tensor, code: Tensor) -> Tensor:
    from visft_ds.ops.triton.pointwise import gelu_coded_backward

    return gelu_coded_backward(dy, code, STEPS, ZERO)
