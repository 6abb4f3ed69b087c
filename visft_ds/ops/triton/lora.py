"""The two large products of a layer with low-rank updates, each with its update in the fp32 accumulator.

Forward y = x W^T + b + u B^T and backward dx = dy W + du A, where u = scale * x A^T and du = scale * dy B are made by
the library beforehand (the split of LoRAFusion, arXiv 2510.00206). The gradients of A and B are skinny products that
the library has. Nothing as large as x, y or W is copied.

Letters: M tokens, K inputs, F outputs, G slices, r rank. Offsets of rows are 64 bit: M * F passes 2^31 at 1024 px.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from visft_ds.ops.triton import interpreted, readable

#: Tile sizes and launch options of each kernel: of a GPU before sm_90 and from there on, and of the interpreter, where
#: small tiles make several of them out of a small problem. tests/ops/compiled_kernels.json has what they compile to.
TILES: dict[str, dict[str, dict[str, int]]] = {
    "forward": {
        "sm_80": {"BM": 128, "BN": 128, "BK": 64, "BR": 64, "num_warps": 8, "num_stages": 3},
        "sm_90": {"BM": 128, "BN": 256, "BK": 64, "BR": 64, "num_warps": 8, "num_stages": 3},
        "interpreter": {"BM": 16, "BN": 32, "BK": 32, "BR": 16},
    },
    "backward": {
        "sm_80": {"BM": 128, "BN": 128, "BK": 64, "BR": 64, "num_warps": 8, "num_stages": 3},
        "sm_90": {"BM": 128, "BN": 256, "BK": 64, "BR": 64, "num_warps": 8, "num_stages": 3},
        "interpreter": {"BM": 16, "BN": 32, "BK": 32, "BR": 16},
    },
}
#: Tiles of rows that share a stripe of the weight while it is in the L2 cache.
_GROUP = 8


@triton.jit
def _tile(rows: tl.tensor, columns: tl.tensor, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr) -> tl.tuple:
    """Row and column number of this program's tile: GROUP tiles of rows go through the columns together."""
    program = tl.program_id(0)
    down = tl.cdiv(rows, BM)
    group = program // (GROUP * tl.cdiv(columns, BN))
    height = min(down - group * GROUP, GROUP)
    within = program % (GROUP * tl.cdiv(columns, BN))
    return group * GROUP + within % height, within // height


@triton.jit
def forward_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    u: tl.tensor,
    b: tl.tensor,
    y: tl.tensor,
    M: tl.tensor,
    F: tl.tensor,
    K: tl.tensor,
    x_row: tl.tensor,
    weight_row: tl.tensor,
    u_row: tl.tensor,
    SLICES: tl.constexpr,
    GROUPS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """x (M, K), weight (F, K), u (M, G*r), b (., r), y (M, F); SLICES: low, high, first row of b, for every slice."""
    down, across = _tile(M, F, BM, BN, GROUP)
    row = down * BM + tl.arange(0, BM)
    column = across * BN + tl.arange(0, BN)
    row_in, column_in = row < M, column < F
    row_long, column_long = row.to(tl.int64), column.to(tl.int64)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        inner_in = k + inner < K
        left = tl.load(
            x + row_long[:, None] * x_row + (k + inner)[None, :], mask=row_in[:, None] & inner_in[None, :], other=0.0
        )
        right = tl.load(
            weight + column_long[:, None] * weight_row + (k + inner)[None, :],
            mask=column_in[:, None] & inner_in[None, :],
            other=0.0,
        )
        total = tl.dot(left, right.T, total, input_precision="ieee")
    for g in tl.static_range(GROUPS):
        # A tile may lie in several slices, and slices need not end with a tile.
        if (across * BN < SLICES[3 * g + 1]) & (across * BN + BN > SLICES[3 * g]):
            inside = (column >= SLICES[3 * g]) & (column < SLICES[3 * g + 1])
            for start in range(0, RANK, BR):
                low = start + tl.arange(0, BR)
                low_in = low < RANK
                left = tl.load(
                    u + row_long[:, None] * u_row + (g * RANK + low)[None, :],
                    mask=row_in[:, None] & low_in[None, :],
                    other=0.0,
                )
                right = tl.load(
                    b + (column - SLICES[3 * g] + SLICES[3 * g + 2])[:, None] * RANK + low[None, :],
                    mask=inside[:, None] & low_in[None, :],
                    other=0.0,
                )
                total = tl.dot(left, right.T, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column_in, other=0.0).to(tl.float32)[None, :]
    place = y + row_long[:, None] * F + column[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


@triton.jit
def backward_kernel(
    dy: tl.tensor,
    weight: tl.tensor,
    du: tl.tensor,
    a: tl.tensor,
    dx: tl.tensor,
    M: tl.tensor,
    F: tl.tensor,
    K: tl.tensor,
    dy_row: tl.tensor,
    weight_row: tl.tensor,
    DOWN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """dy (M, F), weight (F, K), du (M, G*r), a (G*r, K), dx (M, K); DOWN = G*r, tiles (BM, BN) of dx, BK outputs."""
    down, across = _tile(M, K, BM, BN, GROUP)
    row = down * BM + tl.arange(0, BM)
    column = across * BN + tl.arange(0, BN)
    row_in, column_in = row < M, column < K
    row_long = row.to(tl.int64)
    inner = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for f in range(0, F, BK):
        inner_in = f + inner < F
        left = tl.load(
            dy + row_long[:, None] * dy_row + (f + inner)[None, :], mask=row_in[:, None] & inner_in[None, :], other=0.0
        )
        right = tl.load(
            weight + (f + inner).to(tl.int64)[:, None] * weight_row + column[None, :],
            mask=inner_in[:, None] & column_in[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    for start in range(0, DOWN, BR):
        low = start + tl.arange(0, BR)
        low_in = low < DOWN
        left = tl.load(du + row_long[:, None] * DOWN + low[None, :], mask=row_in[:, None] & low_in[None, :], other=0.0)
        right = tl.load(a + low[:, None] * K + column[None, :], mask=low_in[:, None] & column_in[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    place = dx + row_long[:, None] * K + column[None, :]
    tl.store(place, total.to(dx.dtype.element_ty), mask=row_in[:, None] & column_in[None, :])


def _launch(kernel: Any, name: str, shape: Sequence[int], device: torch.device, *given: Any, **constants: Any) -> None:
    """Run a kernel that makes tiles of a matrix of this shape."""
    tiles = TILES[name][_machine(device)]
    grid = (triton.cdiv(shape[0], tiles["BM"]) * triton.cdiv(shape[1], tiles["BN"]),)
    kernel[grid](*given, **constants, **tiles, GROUP=_GROUP)


def _machine(device: torch.device) -> str:
    if interpreted():
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


# Custom operators, so that torch.compile keeps each as one node and never looks into a launch.
@torch.library.custom_op("visft_ds::lora_forward", mutates_args=())
def lora_forward(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slices: Sequence[int]) -> Tensor:
    """x (M, K), u (M, G*r), weight (F, K), bias (F,), b (., r) of one dtype, slices (low, high, low, high, ...)

    -> (M, F).
    """
    left, right, low, up = readable(x), readable(weight), readable(u), readable(b.contiguous())
    y = left.new_empty(len(x), len(weight))
    edges: list[int] = []
    start = 0
    for low_edge, high_edge in zip(slices[::2], slices[1::2], strict=True):
        edges += [low_edge, high_edge, start]
        start += high_edge - low_edge
    added = None if bias is None else readable(bias)
    sizes = (*y.shape, left.shape[1], left.stride(0), right.stride(0), low.stride(0))
    constants = {"SLICES": tuple(edges), "GROUPS": len(edges) // 3, "RANK": b.shape[1], "HAS_BIAS": bias is not None}
    _launch(forward_kernel, "forward", y.shape, x.device, left, right, added, low, up, y, *sizes, **constants)
    return y.to(x.dtype)


@lora_forward.register_fake
def _(x: Tensor, u: Tensor, weight: Tensor, bias: Tensor | None, b: Tensor, slices: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("visft_ds::lora_backward", mutates_args=())
def lora_backward(dy: Tensor, du: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    """dy (M, F), du (M, G*r), weight (F, K), a (G*r, K) of one dtype -> dx (M, K)."""
    left, right, low, down = readable(dy), readable(weight), readable(du.contiguous()), readable(a.contiguous())
    dx = left.new_empty(len(dy), weight.shape[1])
    sizes = (len(dy), *weight.shape, left.stride(0), right.stride(0))
    _launch(backward_kernel, "backward", dx.shape, dy.device, left, right, low, down, dx, *sizes, DOWN=len(a))
    return dx.to(dy.dtype)


@lora_backward.register_fake
def _(dy: Tensor, du: Tensor, weight: Tensor, a: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


@register_flop_formula(torch.ops.visft_ds.lora_forward)
def _forward_flops(
    x: Any, u: Any, weight: Any, bias: Any, b: Any, slices: Any, *rest: Any, out_shape: Any = None, **named: Any
) -> int:
    return int(2 * x[0] * (x[1] * weight[0] + b[0] * b[1]))


@register_flop_formula(torch.ops.visft_ds.lora_backward)
def _backward_flops(dy: Any, du: Any, weight: Any, a: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    return int(2 * dy[0] * (weight[0] * weight[1] + a[0] * a[1]))
