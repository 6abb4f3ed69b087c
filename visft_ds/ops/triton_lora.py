"""A large product and a thin one added up in one fp32 accumulator, as layers with low-rank updates need them.

Forward y = x W^T + u B^T + b and backward dx = dy W + du A, where u = scale * x A^T and du = scale * dy B are
made by the library beforehand (the split of LoRAFusion, arXiv 2510.00206). The gradients of A and B are
skinny products that the library has. Nothing as large as x, y or W is copied.

TRITON_INTERPRET=1 runs the kernel on a CPU, for tests: slow, and silently wrong in bf16 (Triton 3.9), so it
is given float32 there. Letters: left (M, K), right (K, N), low (M, D), up (D, N). Offsets of rows are 64 bit:
M * N passes 2^31 at 1024 px.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: Tile sizes and launch options: of a GPU before sm_90 and from there on, and of the interpreter, where small
#: tiles make several of them out of a small problem. tests/ops/compiled_kernels.json has what they compile
#: to.
TILES: dict[str, dict[str, int]] = {
    "sm_80": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "sm_90": {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 3},
    "interpreter": {"BM": 16, "BN": 32, "BK": 32},
}
#: Tiles of rows that share a stripe of the right factor while it is in the L2 cache.
GROUP = 8


@triton.jit
def _add_product(  # type: ignore[no-untyped-def]
    total, left, right, row, column, M, N, K, left_row, right_row, right_column, BK: tl.constexpr
):
    """total + left @ right for a tile of rows and columns; the columns of left lie side by side."""
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        is_inside = inner < K
        left_tile = left + row[:, None] * left_row + inner[None, :]
        right_tile = right + inner.to(tl.int64)[:, None] * right_row + column[None, :] * right_column
        a = tl.load(left_tile, mask=(row < M)[:, None] & is_inside[None, :], other=0.0)
        b = tl.load(right_tile, mask=is_inside[:, None] & (column < N)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def kernel(
    left: tl.tensor,
    right: tl.tensor,
    low: tl.tensor,
    up: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    D: tl.tensor,
    left_row: tl.tensor,
    right_row: tl.tensor,
    right_column: tl.tensor,
    low_row: tl.tensor,
    up_row: tl.tensor,
    up_column: tl.tensor,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """out (M, N) = left @ right + low @ up + bias, a tile a program: GROUP tiles of rows share the columns'
    tiles.
    """
    program = tl.program_id(0)
    down = tl.cdiv(M, BM)
    across = tl.cdiv(N, BN)
    first = program // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    within = program % (GROUP * across)
    row = (first + within % height).to(tl.int64) * BM + tl.arange(0, BM)
    column = (within // height).to(tl.int64) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    total = _add_product(total, left, right, row, column, M, N, K, left_row, right_row, right_column, BK)
    total = _add_product(total, low, up, row, column, M, N, D, low_row, up_row, up_column, BK)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    tile = out + row[:, None] * N + column[None, :]
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(tile, total.to(out.dtype.element_ty), mask=mask)


@torch.library.custom_op("visft_ds::sum_of_products", mutates_args=())  # one node of a traced step
def sum_of_products(left: Tensor, right: Tensor, low: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """left (M, K) @ right (K, N) + low (M, D) @ up (D, N) + bias (N,), of one dtype -> (M, N)."""
    if INTERPRETED and left.dtype == torch.bfloat16:
        bias = None if bias is None else bias.float()
        exact: Tensor = sum_of_products(left.float(), right.float(), low.float(), up.float(), bias)
        return exact.bfloat16()
    if left.stride(1) != 1:
        left = left.contiguous()
    if low.stride(1) != 1:
        low = low.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    out = left.new_empty(len(left), right.shape[1])
    tiles = TILES[_tiles_for(left.device)]
    down = triton.cdiv(len(out), tiles["BM"])
    across = triton.cdiv(out.shape[1], tiles["BN"])
    sizes = (*out.shape, left.shape[1], low.shape[1])
    strides = (left.stride(0), *right.stride(), low.stride(0), *up.stride())
    kernel[(down * across,)](
        left,
        right,
        low,
        up,
        bias,
        out,
        *sizes,
        *strides,
        HAS_BIAS=bias is not None,
        **tiles,
        GROUP=GROUP,
    )
    return out


def _tiles_for(device: torch.device) -> str:
    """Key of TILES."""
    if INTERPRETED:
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


@sum_of_products.register_fake
def _(left: Tensor, right: Tensor, low: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


@register_flop_formula(torch.ops.visft_ds.sum_of_products)
def _operations(left: Any, right: Any, low: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    return int(2 * left[0] * right[1] * (left[1] + low[1]))
