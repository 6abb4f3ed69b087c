"""The part of a frozen transformer block behind its attention, as one autograd function.

Autograd makes a node of each operator, and modules need Python between them; at the pace of an H100 that is what a step
of EVA-ViT-E waits for. Here the same operators run in the same order, forward and backward, so that every number is the
same to the last bit, and what is kept for the backward pass is the same as well.

Letters: M tokens of all images, D width, F hidden width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import no_autocast

_linear = F.linear
_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_gelu_backward = torch.ops.aten.gelu_backward.grad_input

Pair = tuple[Tensor, Tensor]  #: weight and bias


class Rest(NamedTuple):
    """Frozen parameters behind an attention, all in the dtype of computation."""

    proj: Pair
    norm1: Pair
    fc1: Pair
    fc2: Pair
    norm2: Pair
    eps: tuple[float, float]  #: of the norms


def replaced_linear() -> bool:
    """Return True where torch's linear layer is another one (DeepSpeed's under ZeRO-3): then it wants to be called."""
    return F.linear is not _linear


def rest_of_block(x: Tensor, attended: Tensor, rest: Rest) -> Tensor:
    """s + norm2(fc2(gelu(fc1(s)))) with s = x + norm1(proj(attended)): the stream behind a block of EVA-ViT-E's form.

    Args:
        x: (B, N, D), the residual stream in front of the block.
        attended: (B, N, D) in the dtype of computation.
    """
    out: Tensor = _RestOfBlock.apply(x, attended, rest)
    return out


class _RestOfBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, attended: Tensor, rest: Rest) -> Tensor:
        width = x.shape[-1:]
        with no_autocast(x.device):
            branch = _linear(attended.reshape(-1, *width), *rest.proj)
            normed, mean1, scale1 = torch.native_layer_norm(branch, width, *rest.norm1, rest.eps[0])
            stream = x.reshape(-1, *width) + normed
            del normed
            hidden = _linear(stream.to(branch.dtype), *rest.fc1)
            last = _linear(F.gelu(hidden), *rest.fc2)
            normed, mean2, scale2 = torch.native_layer_norm(last, width, *rest.norm2, rest.eps[1])
            out = stream + normed
        ctx.save_for_backward(branch, mean1, scale1, hidden, last, mean2, scale2)
        ctx.rest, ctx.shape, ctx.dtypes = rest, x.shape, (x.dtype, last.dtype)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        rest, width, (x_dtype, dtype) = ctx.rest, ctx.shape[-1:], ctx.dtypes
        kept = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # each is given back as soon as it has been used
        with no_autocast(grad.device):
            grad = grad.reshape(-1, *width)
            back = _through_norm(grad.to(dtype), kept, rest.norm2)
            wide = back @ rest.fc2[0]
            _gelu_backward(wide, kept.pop(), grad_input=wide)  # in place: both are fresh and contiguous
            back = wide @ rest.fc1[0]
            del wide
            grad = grad + back
            back = _through_norm(grad.to(dtype), kept, rest.norm1)
            return grad.view(ctx.shape).to(x_dtype), (back @ rest.proj[0]).view(ctx.shape), None


def _through_norm(grad: Tensor, kept: list[Tensor], norm: Pair) -> Tensor:
    """Gradient of a norm's input (M, D), which with mean and scale of its rows is taken from the end of `kept`."""
    given, mean, scale = kept[-3:]
    del kept[-3:]
    found: Tensor = _norm_backward(grad, given, given.shape[-1:], mean, scale, *norm, [True, False, False])[0]
    return found
