"""Softmax attention without a mask within each of several images of different lengths, packed in one row of
tokens.

Letters: T tokens of all packed images, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

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


#: Kernels of packed attention by their names in reports, the first ones first: the fastest on its GPUs.
FLASH_3 = "flash-attn 3"
FLASH_2 = "flash-attn 2"
VARLEN = "torch's varlen_attn"
PLAIN = "image by image"


def attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    kernel: str | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of each image, (T, heads, d) each, any strides, one after another -> (T,
    heads, d).

    `kernel` is one of the names above, by default that of `packed_kernel`.
    """
    assert sum(packing.lengths) == len(q), (packing.lengths, q.shape)
    if kernel is None:
        kernel, _ = packed_kernel(q.device, q.dtype, q.shape[-1])
    if kernel == PLAIN:
        return _one_by_one(q, k, v, packing.lengths)
    longest = max(packing.lengths)
    out: Any = _load(kernel)(q, k, v, packing.offsets, packing.offsets, longest, longest)
    # Early releases of flash-attn 3 return the logarithms of the sums, too.
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


def _load(kernel: str) -> Callable[..., Any]:
    """The function of a kernel; all of them take the same first seven arguments."""
    if kernel == FLASH_3:
        import flash_attn_interface

        return flash_attn_interface.flash_attn_varlen_func
    if kernel == FLASH_2:
        import flash_attn

        return flash_attn.flash_attn_varlen_func
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@cache  # it looks for packages, and every block asks
def packed_kernel(device: torch.device, dtype: torch.dtype, head_width: int) -> tuple[str, str]:
    """The kernel that computes packed attention in a process, and why."""
    if device.type != "cuda":
        return PLAIN, "no GPU"
    if dtype.itemsize != 2:
        return PLAIN, "the kernels for packed images compute in 16 bits"
    if head_width % 8 or head_width > 256:
        return PLAIN, f"the kernels for packed images do not take heads of {head_width} numbers"
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"sm_{major}{minor}"
    if major < 8:
        return PLAIN, f"the kernels for packed images begin at sm_80, and this GPU is {gpu}"
    if major == 9 and find_spec("flash_attn_interface"):
        return FLASH_3, f"installed, and this GPU is {gpu}"
    if find_spec("flash_attn_2_cuda"):  # flash-attn 4 has a package `flash_attn`, too
        return FLASH_2, f"installed; flash-attn 3 is not, or not for {gpu}"
    return VARLEN, "flash-attn is not installed"


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
