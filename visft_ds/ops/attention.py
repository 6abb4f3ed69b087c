"""Softmax attention without a mask within each of several images of different lengths, packed in one row of
tokens.

Letters: T tokens of all packed images, d width of a head.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.ops import to_device


@dataclass(frozen=True)
class Packing:
    """Lengths and offsets of several images of different lengths packed in one row of T tokens."""

    lengths: tuple[int, ...]  #: tokens of each image
    offsets: Tensor  #: (images + 1,) int32, where each begins, and T

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """For at least one image of at least one token."""
        assert lengths and min(lengths) > 0, lengths
        ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        return cls(tuple(lengths), to_device(ends, device))


@torch.compiler.disable  # lengths are numbers of Python, and every other one would be compiled anew
def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each image, (T, heads, d) each, any strides, one after another -> (T,
    heads, d).
    """
    assert sum(packing.lengths) == len(q), (packing.lengths, q.shape)
    if not has_packed_kernel(q):
        return _one_by_one(q, k, v, packing.lengths)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_varlen_func as kernel
    else:
        from torch.nn.attention.varlen import varlen_attn as kernel
    longest = max(packing.lengths)
    out: Tensor = kernel(q, k, v, packing.offsets, packing.offsets, longest, longest)
    return out


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
) -> Tensor:
    """The same, image by image: the specification."""
    results = []
    for q_image, k_image, v_image in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        heads_first = [tensor.transpose(0, 1)[None] for tensor in (q_image, k_image, v_image)]
        mixed = F.scaled_dot_product_attention(*heads_first)
        results.append(mixed[0].transpose(0, 1))
    return torch.cat(results)


def has_packed_kernel(q: Tensor) -> bool:
    """Return True if the kernels of torch and flash-attn for packed lengths take tensors like this."""
    if q.device.type != "cuda" or q.dtype.itemsize != 2:
        return False
    head_width = q.shape[-1]
    if head_width % 8 or head_width > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)
