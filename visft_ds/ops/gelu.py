"""The exact (erf) GELU, whose backward pass needs no second tensor as wide as the hidden layer of an MLP."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), elementwise, in the dtype of x. One layer alone may read the result: its gradient is written over."""
    if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
        return F.gelu(x)
    out: Tensor = _Gelu.apply(x)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dense = dy.is_contiguous() and x.is_contiguous()
        into = dy if dense else torch.empty_like(x)
        return torch.ops.aten.gelu_backward.grad_input(dy, x, grad_input=into)
