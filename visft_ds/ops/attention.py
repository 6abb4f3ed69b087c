"""Softmax attention without a mask: which kernel computes it, for batches of one length and for packed lengths.

There is no kernel of our own: the widths of heads that matter (112 and 88) are served by those of PyTorch, cuDNN and
flash attention, and this file holds the table of which one is taken where, with reasons and sources.

Letters: B images, N tokens of an image, T tokens of all packed images, d width of a head.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, current_flash_attention_impl, sdpa_kernel

from visft_ds.ops import placed
from visft_ds.ops.copies import to_device

#: What PyTorch tries first, and then in this order, should the first not take these tensors.
_ORDER = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
#: Reported by others, on GPUs that this project has not had: of flash attention 2 cuDNN's kernel reaches 0.82 on A100
#: and 0.88 on RTX PRO 6000, and 1.7 to 2.3 times its speed on Hopper with long images (transformers#48163); at 576 to
#: 1,024 tokens it is level or behind (sglang#30090). A plan takes it 0.44 and 0.55 s on a B200 (FunASR#3704).
#: Tokens from which cuDNN is taken on Hopper.
_LONG = 1025
_VARYING = "for varying numbers of tokens; cuDNN would build a plan for each, about a second every time"
#: Numbers of tokens that come with all images of a stream, see `use_fixed_lengths`.
_fixed: frozenset[int] = frozenset()
#: Tokens from which torch's fused kernel is taken for bf16 on a CPU with matrix instructions (AMX); it uses them.
_LONG_ON_AMX = 512
_AMX: bool = torch.cpu._is_amx_tile_supported()


def use_fixed_lengths(lengths: Iterable[int]) -> None:
    """Name, for the whole process, the numbers of tokens that come again and again: for them alone cuDNN is taken.

    It builds a plan of execution for each number (and batch) that it meets, forward and backward. Torch can avoid that
    (TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1) only where q, k and v lie apart, token by token; ours are parts of one product.
    """
    global _fixed
    _fixed = frozenset(lengths)


def fixed_lengths() -> tuple[int, ...]:
    """The numbers of tokens that `use_fixed_lengths` was told, in order."""
    return tuple(sorted(_fixed))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, by the backend `attention_backend` names.

    Args:
        q, k, v: (B, heads, N, d), any strides, one dtype.

    Returns:
        (B, heads, N, d).
    """
    where = placed(q.device)
    if where.type == "cuda" and q.device.type == "meta":  # it need not exist, and its fused kernels keep the same
        return F.scaled_dot_product_attention(q, k, v)
    name, _ = attention_backend(where, q.dtype, q.shape[-1], q.shape[-2])
    if name == "reference":
        return attention_reference(q, k, v)
    if name == "sdpa":
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(_ORDER[name], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The specification of `attention`. Memory grows with N^2."""
    # Scaled afterwards, in place: a scaled copy of q would be kept for the backward pass, as wide as the block.
    scores = (q @ k.transpose(-2, -1)).mul_(q.shape[-1] ** -0.5)
    return scores.softmax(dim=-1) @ v


def attention_backend(
    device: torch.device, dtype: torch.dtype, head_dim: int = 112, length: int = 256
) -> tuple[str, str]:
    """Name ("sdpa" | "reference" | "cudnn" | "flash" | "efficient") and reason of the implementation.

    Args:
        head_dim, length: d and N; the defaults are those of EVA-ViT-E at 224 px.
    """
    if length < plain_below(device, dtype):
        if _AMX:
            return "reference", f"bf16 on a CPU, below {_LONG_ON_AMX} tokens: plain products beat torch's fused kernel"
        return "reference", "bf16 on a CPU without AMX: plain matrix products are faster than torch's fused kernel"
    if device.type != "cuda":
        return "sdpa", f"torch.nn.functional.scaled_dot_product_attention on {device.type}"
    # One by one: where the number is a symbol of torch.compile, it may be compared and not looked up.
    fixed = any(length == known for known in _fixed)
    capability = _capability(device)
    return choose_for_gpu(capability, dtype, head_dim, length, current_flash_attention_impl(), fixed=fixed)


def plain_below(device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of an image below which attention is made of plain products there (`attention_reference`); 0: never."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return 0
    # Forward + backward, 16 heads of 112, one thread, plain against fused. Without AMX: 70 ms against 151 ms at
    # 4 x 257 tokens, 6.3 s against 8.6 s at 5,330. With AMX: 8.7 ms against 11.3 ms at 256 tokens, 39 against 38 at
    # 512, 184 against 109 at 1,024; there the scores that plain products keep are 9 times as wide as the tokens.
    return _LONG_ON_AMX if _AMX else sys.maxsize


@cache
def choose_for_gpu(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    flash: str | None = None,
    *,
    fixed: bool = False,
) -> tuple[str, str]:
    """Name and reason for a GPU.

    Args:
        capability: (9, 0) for an H100.
        flash: "FA3" or "FA4" where `torch.nn.attention.activate_flash_attention_impl` has put it into the place of
            torch's own flash attention.
        fixed: this number of tokens comes again and again (`use_fixed_lengths`).
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return "efficient", f"{dtype}: cuDNN and flash attention compute in 16 bit only"
    if capability < (8, 0):
        return "efficient", f"sm_{capability[0]}{capability[1]}: torch's memory-efficient kernel is the only fused one"
    if head_dim % 8:
        return "efficient", f"heads of {head_dim}: cuDNN and flash attention need multiples of 8"
    if flash is not None:
        unfit = _unfit(flash, capability, head_dim)
        if unfit is None:
            return "flash", f"{flash} was activated"
        if fixed:
            return "cudnn", f"{flash} was activated, but {unfit}"
        return "efficient", f"{flash} was activated, but {unfit}; {_VARYING}"
    if capability[0] in (9, 10) and not fixed:
        return "flash", _VARYING
    if capability[0] == 9:
        if length >= _LONG:
            return "cudnn", f"Hopper, {length} tokens: cuDNN's kernel is the faster one for long images"
        return "flash", f"Hopper, {length} tokens: flash attention; cuDNN from {_LONG} tokens on"
    if capability[0] == 10:
        return "cudnn", "Blackwell: torch's own flash attention was made for Ampere"
    return "flash", f"sm_{capability[0]}{capability[1]}: flash attention is faster than cuDNN's kernel"


def _unfit(flash: str, capability: tuple[int, int], head_dim: int) -> str | None:
    """Why an activated flash attention cannot be taken; None where it can."""
    if flash == "FA3" and capability[0] != 9:
        return "it is for sm_90 only"
    if flash == "FA4" and capability[0] not in (9, 10):
        return "it is for sm_90 and sm_100"
    if flash == "FA4" and capability[0] == 10 and head_dim % 32:
        return f"its backward pass on sm_100 needs heads of a multiple of 32, not {head_dim}"
    return None


@dataclass(frozen=True)
class Packing:
    """Lengths and offsets of several images of different lengths packed in one row of T tokens."""

    lengths: tuple[int, ...]  #: tokens of each image
    offsets: Tensor  #: (images + 1,) int32, where each begins, and T

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Raises ValueError unless there is an image and each has a token."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths {list(lengths)}: give at least one image of at least one token")
        ends = [sum(lengths[:index]) for index in range(len(lengths) + 1)]
        return cls(tuple(lengths), to_device(torch.tensor(ends, dtype=torch.int32), device))


@torch.compiler.disable  # lengths are numbers of Python, and every other one would be compiled anew
def attention_packed(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """`attention` within each image; the same as one image after the other, without any padding.

    Args:
        q, k, v: (T, heads, d), any strides, one dtype, the images one after another.

    Returns:
        (T, heads, d).
    """
    assert sum(packing.lengths) == len(q), (packing.lengths, q.shape)
    name, _ = packed_backend(q.device, q.dtype, q.shape[-1])
    return PACKED[name](q, k, v, packing)


def packed_backend(device: torch.device, dtype: torch.dtype, head_dim: int = 112) -> tuple[str, str]:
    """Name ("one by one" | "varlen" | "flash_attn") and reason of the implementation of `attention_packed`."""
    if device.type != "cuda":
        return "one by one", f"{device.type} has no kernel for packed lengths"
    installed = importlib.util.find_spec("flash_attn") is not None
    return choose_packed_for_gpu(_capability(device), dtype, head_dim, current_flash_attention_impl(), installed)


@cache
def choose_packed_for_gpu(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, flash: str | None, installed: bool
) -> tuple[str, str]:
    """Name and reason for a GPU; `installed`: the package flash_attn is there. Else as `choose_for_gpu`."""
    if dtype not in (torch.float16, torch.bfloat16) or capability < (8, 0) or head_dim % 8 or head_dim > 256:
        return "one by one", "kernels for packed lengths need sm_80, 16 bit and heads of a multiple of 8 up to 256"
    if flash is not None:
        unfit = _unfit(flash, capability, head_dim)
        if unfit is None:
            return "varlen", f"{flash} was activated"
        if not installed:
            return "one by one", f"{flash} was activated, but {unfit}"
    if installed:
        return "flash_attn", "the package flash-attn is installed"
    return "varlen", "torch's own flash attention for packed lengths"


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    parts = zip(*(tensor.split(packing.lengths) for tensor in (q, k, v)), strict=True)
    done = [attention(*(part.transpose(0, 1)[None] for part in image)) for image in parts]
    return torch.cat([image[0].transpose(0, 1) for image in done])


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packing.lengths)
    out = varlen_attn(q, k, v, packing.offsets, packing.offsets, longest, longest)
    assert isinstance(out, Tensor)  # nothing else was asked for
    return out


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    longest = max(packing.lengths)
    out: Tensor = flash_attn_varlen_func(q, k, v, packing.offsets, packing.offsets, longest, longest)
    return out


PACKED = {"one by one": _one_by_one, "varlen": _varlen, "flash_attn": _flash_attn}


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)  # which torch.compile knows to be constant
    return found.major, found.minor
