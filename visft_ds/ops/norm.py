"""Layer norm, alone or added to a residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.ops import kernels, no_autocast
from visft_ds.ops.triton import DTYPES


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, added_to: Tensor | None = None) -> Tensor:
    """Layer norm over the last axis, (..., D) -> (..., D), in the dtype of x; or the sum of it and `added_to`.

    Gradients of weight and bias are computed only where they train. The Triton kernel for the sum has none, so it is
    taken for frozen norms only; it adds before it rounds.
    """
    frozen = not (torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad))
    if added_to is not None and frozen and kernels(x.device) == "triton" and {x.dtype, added_to.dtype} <= set(DTYPES):
        from visft_ds.ops.triton.pointwise import add_normed

        return add_normed(added_to, x, weight.detach(), bias.detach(), eps)
    # Autocast on CUDA would keep an fp32 copy of a 16-bit input for the backward pass; the kernel sums in fp32.
    with no_autocast(x.device):
        normed = F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)
    return normed if added_to is None else added_to + normed
