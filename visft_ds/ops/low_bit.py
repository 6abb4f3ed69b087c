"""Frozen matrices stored in 8 or 4 bits, and the linear layer that computes with them.

Only the storage is small: a product takes the values themselves, in the dtype computed in, and they are forgotten
after it. The backward pass makes them again, so that nothing dense is kept. No device multiplies these codes as they
are with 16-bit activations in PyTorch, so this is what torchao's weight-only layers do as well.

Formats, as torchao quantises (https://github.com/pytorch/ao), all with scales of each row:

- int8: symmetric, one scale to a row.
- fp8: e4m3 (OCP FP8), one scale to a row.
- nf4: 4-bit NormalFloat in blocks of 64, their scales quantised as well (QLoRA, arXiv 2305.14314), row by row.

A matrix (F, K) is one tensor (F, bytes of a row): the scales, then the codes. So it is a parameter like any other to
engines that broadcast, divide, gather or move parameters, of which none knows torchao's tensors.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.ops import autocast_dtype, matmul_dtype, no_autocast, placed

FORMATS = ("int8", "fp8", "nf4")
BLOCK = 64  #: values of nf4 that share a scale
INSTALL = "pip install 'torchao>=0.18,<0.19'"
#: torchao's table: the quantiles of arXiv 2305.14314, appendix E, to four digits.
NF4_LEVELS = (
    *(-1.0000, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0000),
    *(0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0000),
)
#: Values that are made at a time, in fp32: few enough for a cache, or for the memory of a GPU.
_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 23}


@dataclass(frozen=True)
class LowBit:
    """How one matrix is stored. Raises ValueError for an unknown format, and rows that nf4 cannot cut into blocks."""

    format: str  #: one of FORMATS
    fan_in: int  #: K
    dtype: torch.dtype  #: that the matrix had; computed in where there is no autocast

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"a frozen matrix cannot be stored as {self.format!r}: use {', '.join(FORMATS)}")
        if self.format == "nf4" and self.fan_in % BLOCK:
            raise ValueError(
                f"nf4 needs rows of a multiple of {BLOCK} values, and these have {self.fan_in}: use int8 or fp8"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales included."""
        if self.format == "nf4":
            return 8 + self.fan_in // BLOCK + self.fan_in // 2
        return 4 + self.fan_in

    def pack(self, weight: Tensor) -> Tensor:
        """(F, K) of any float dtype -> (F, row_bytes) uint8.

        Raises:
            ValueError: torchao is not installed, or a value that no scale fits.
        """
        if not import_torchao():
            raise ValueError(f"storing frozen matrices as {self.format} needs torchao: {INSTALL}")
        parts = _QUANTISERS[self.format](weight.detach().float().contiguous())
        packed = torch.cat([part.view(torch.uint8).view(len(weight), -1) for part in parts], dim=1)
        assert packed.shape[1] == self.row_bytes, (packed.shape, self.row_bytes)
        scales = packed[:, : 4 if self.format != "nf4" else 8].contiguous().view(torch.float32)
        if not scales.isfinite().all():
            raise ValueError(f"a frozen matrix has rows that {self.format} finds no finite scale for: use another one")
        return packed

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """(F, row_bytes) uint8 -> (F, K): computed in fp32 and rounded once to `dtype`."""
        out = torch.empty(len(packed), self.fan_in, dtype=dtype, device=packed.device)
        rows = max(1, _AT_ONCE.get(placed(packed.device).type, _AT_ONCE["cuda"]) // self.fan_in)
        for start in range(0, len(packed), rows):
            _VALUES[self.format](packed[start : start + rows], out[start : start + rows])
        return out

    def matmul_dtype(self, packed: Tensor) -> torch.dtype:
        """The dtype a product is computed in: autocast's, else the one that the matrix had."""
        return autocast_dtype(packed.device) or self.dtype


def dtype_of_product(weight: Tensor, low_bit: LowBit | None) -> torch.dtype:
    """The dtype that a product with this weight is computed in, whatever it is stored in."""
    return matmul_dtype(weight) if low_bit is None else low_bit.matmul_dtype(weight)


def low_bit_linear(x: Tensor, packed: Tensor, bias: Tensor | None, low_bit: LowBit) -> Tensor:
    """x W^T + b with a frozen W: (..., K) -> (..., F), in autocast's dtype, else in that of the matrix.

    Kept for the backward pass: the packed matrix, by reference. The gradient of x is that through `unpack`.
    """
    dtype = low_bit.matmul_dtype(packed)
    out: Tensor = _LowBitLinear.apply(x.to(dtype), packed, None if bias is None else bias.to(dtype), low_bit)
    return out


class _LowBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, packed: Tensor, bias: Tensor | None, low_bit: LowBit) -> Tensor:
        return F.linear(x, low_bit.unpack(packed, x.dtype), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, packed, _, ctx.low_bit = inputs
        # ZeRO-3 swaps the storage behind a parameter: keep the parameter itself.
        ctx.save_for_backward(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        dx = db = None
        with no_autocast(grad.device):
            if ctx.needs_input_grad[0]:
                dx = grad @ ctx.low_bit.unpack(packed, grad.dtype)
            if ctx.needs_input_grad[2]:
                db = grad.reshape(-1, grad.shape[-1]).sum(0)
        return dx, None, db, None


# ------------------------------------------------------------------------------------- fp32 matrix -> parts of rows


def import_torchao() -> bool:
    """Import it, where it is installed, without warnings that it cannot load kernels of its own, which nobody uses."""
    if find_spec("torchao") is None:
        return False
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    import torchao.quantization  # noqa: F401

    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    return True


def _with_scales(weight: Tensor, block: int) -> Tensor:
    """A block of zeros has no scale; one value that is next to nothing gives it one."""
    blocks = weight.view(-1, block)
    empty = ~blocks.any(dim=1)
    if empty.any():
        blocks = blocks.clone()
        blocks[empty, 0] = 1e-30
    return blocks.view_as(weight)


def _quantise_int8(weight: Tensor) -> tuple[Tensor, ...]:
    from torchao.quantization import Int8Tensor, PerRow

    stored = Int8Tensor.from_hp(weight, PerRow())
    return stored.scale, stored.qdata


def _quantise_fp8(weight: Tensor) -> tuple[Tensor, ...]:
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.common import KernelPreference

    weight = _with_scales(weight, weight.shape[1])
    stored = Float8Tensor.from_hp(weight, torch.float8_e4m3fn, PerRow(), kernel_preference=KernelPreference.TORCH)
    return stored.scale, stored.qdata


def _quantise_nf4(weight: Tensor) -> tuple[Tensor, ...]:
    from torchao.quantization.quantize_.workflows import to_nf4

    stored = to_nf4(_with_scales(weight, BLOCK), BLOCK, weight.shape[1] // BLOCK)
    mean = stored.scaler_mean.expand(len(weight)).contiguous()
    return stored.quantization_factor, mean, stored.quantized_scalers, stored.quantized_data


_QUANTISERS = {"int8": _quantise_int8, "fp8": _quantise_fp8, "nf4": _quantise_nf4}

# ------------------------------------------------------------------------------------- rows of bytes -> values


def _scaled(codes: Tensor, packed: Tensor, out: Tensor) -> None:
    """out = codes * scale of the row."""
    # A copy, since rows need not begin at a multiple of four bytes.
    scale = packed[:, :4].contiguous().view(torch.float32)
    if out.dtype == torch.float32:
        out.copy_(codes).mul_(scale)
    else:
        out.copy_(codes.float().mul_(scale))


def _values_int8(packed: Tensor, out: Tensor) -> None:
    _scaled(packed[:, 4:].view(torch.int8), packed, out)


def _values_fp8(packed: Tensor, out: Tensor) -> None:
    _scaled(packed[:, 4:].view(torch.float8_e4m3fn), packed, out)


def _values_nf4(packed: Tensor, out: Tensor) -> None:
    rows, blocks = len(packed), out.shape[1] // BLOCK
    factor, mean = packed[:, :8].contiguous().view(torch.float32).split(1, dim=1)
    scales = packed[:, 8 : 8 + blocks].view(torch.int8) / factor + mean
    pairs = F.embedding(packed[:, 8 + blocks :].int(), _pairs(packed.device))  # two values a byte, the upper bits first
    out.copy_(pairs.view(rows, blocks, BLOCK).mul_(scales[:, :, None]).view(rows, -1))


_VALUES = {"int8": _values_int8, "fp8": _values_fp8, "nf4": _values_nf4}


@cache
def _pairs(device: torch.device) -> Tensor:
    """(256, 2): the two values of each byte."""
    levels = torch.tensor(NF4_LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
