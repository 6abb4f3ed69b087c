"""Deformable attention: forward and backward, one program for some queries of one head and image.

Letters as in `visft_ds.ops.deform_attn`. Each level is a launch of its own, so that sizes of images are plain numbers
and a new one compiles nothing. Sums are float32. The gradient of the values is added up atomically, in whatever order
programs come: its last bits differ from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from visft_ds.ops.triton import interpreted, readable

#: Queries of a program.
BLOCK = 32


@triton.jit
def _places(
    locations: tl.tensor, weights: tl.tensor, base: tl.tensor, query_in: tl.tensor, H: tl.tensor, W: tl.tensor
) -> tl.tuple:
    """Of one point: its share, the cell up and left of it, and how far it lies beyond that cell's centre."""
    x = tl.load(locations + 2 * base, mask=query_in, other=-2.0).to(tl.float32) * W - 0.5
    y = tl.load(locations + 2 * base + 1, mask=query_in, other=-2.0).to(tl.float32) * H - 0.5
    share = tl.load(weights + base, mask=query_in, other=0.0).to(tl.float32)
    left, top = tl.floor(x), tl.floor(y)
    return share, left.to(tl.int32), top.to(tl.int32), x - left, y - top


@triton.jit
def forward_kernel(
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    S: tl.tensor,
    Q: tl.tensor,
    M: tl.tensor,
    c: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    start: tl.tensor,
    level: tl.tensor,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BQ: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """Adds a level to out (B, Q, M, c), float32; C: the power of two from c upwards; grid (Q / BQ, M, B)."""
    query = tl.program_id(0) * BQ + tl.arange(0, BQ)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query_in = query < Q
    channel = tl.arange(0, C)
    channel_in = channel < c
    row = (image * Q + query) * M + head
    maps = value + (image * S + start) * M * c + head * c
    total = tl.zeros((BQ, C), tl.float32)
    for p in tl.static_range(P):
        share, left, top, right_part, below_part = _places(
            locations, weights, (row * LEVELS + level) * P + p, query_in, H, W
        )
        for corner in tl.static_range(4):
            x, y = left + corner % 2, top + corner // 2
            across = right_part if corner % 2 == 1 else 1 - right_part
            down = below_part if corner // 2 == 1 else 1 - below_part
            inside = query_in & (x >= 0) & (x < W) & (y >= 0) & (y < H)
            cell = tl.load(
                maps + ((y * W + x) * (M * c))[:, None] + channel[None, :],
                mask=inside[:, None] & channel_in[None, :],
                other=0.0,
            )
            total += cell.to(tl.float32) * (across * down * share)[:, None]
    place = out + (row * c)[:, None] + channel[None, :]
    stored = query_in[:, None] & channel_in[None, :]
    if not FIRST:
        total += tl.load(place, mask=stored, other=0.0)
    tl.store(place, total, mask=stored)


@triton.jit
def backward_kernel(
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    dout: tl.tensor,
    dvalue: tl.tensor,
    dlocations: tl.tensor,
    dweights: tl.tensor,
    S: tl.tensor,
    Q: tl.tensor,
    M: tl.tensor,
    c: tl.tensor,
    H: tl.tensor,
    W: tl.tensor,
    start: tl.tensor,
    level: tl.tensor,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BQ: tl.constexpr,
) -> None:
    """One level of dvalue (B, S, M, c), float32, zero before; dlocations and dweights are written once."""
    query = tl.program_id(0) * BQ + tl.arange(0, BQ)
    head, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    query_in = query < Q
    channel = tl.arange(0, C)
    channel_in = channel < c
    row = (image * Q + query) * M + head
    first = (image * S + start) * M * c + head * c
    gradient = tl.load(
        dout + (row * c)[:, None] + channel[None, :], mask=query_in[:, None] & channel_in[None, :], other=0.0
    ).to(tl.float32)
    for p in tl.static_range(P):
        base = (row * LEVELS + level) * P + p
        share, left, top, right_part, below_part = _places(locations, weights, base, query_in, H, W)
        by_x, by_y = tl.zeros((BQ,), tl.float32), tl.zeros((BQ,), tl.float32)
        by_share = tl.zeros((BQ,), tl.float32)
        for corner in tl.static_range(4):
            x, y = left + corner % 2, top + corner // 2
            across = right_part if corner % 2 == 1 else 1 - right_part
            down = below_part if corner // 2 == 1 else 1 - below_part
            inside = query_in & (x >= 0) & (x < W) & (y >= 0) & (y < H)
            place = first + ((y * W + x) * (M * c))[:, None] + channel[None, :]
            stored = inside[:, None] & channel_in[None, :]
            product = tl.sum(tl.load(value + place, mask=stored, other=0.0).to(tl.float32) * gradient, 1)
            by_share += product * across * down
            by_x += product * (down if corner % 2 == 1 else -down)
            by_y += product * (across if corner // 2 == 1 else -across)
            tl.atomic_add(dvalue + place, gradient * (across * down * share)[:, None], mask=stored)
        tl.store(dlocations + 2 * base, (by_x * share * W).to(dlocations.dtype.element_ty), mask=query_in)
        tl.store(dlocations + 2 * base + 1, (by_y * share * H).to(dlocations.dtype.element_ty), mask=query_in)
        tl.store(dweights + base, by_share.to(dweights.dtype.element_ty), mask=query_in)


@torch.library.custom_op("visft_ds::deform_attn", mutates_args=())
def sampled(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    """Arguments and result of `visft_ds.ops.deform_attn.deform_attn`; shapes flat: height, width, height, ..."""
    cells, places, shares = (readable(tensor.contiguous()) for tensor in (value, locations, weights))
    batch, queries, heads, _, _ = weights.shape
    out = torch.empty(batch, queries, heads, value.shape[3], dtype=torch.float32, device=value.device)
    for level, grid, sizes, constants in _levels(value, shapes, weights):
        forward_kernel[grid](cells, places, shares, out, *sizes, **constants, FIRST=level == 0)
    return out.flatten(2).to(value.dtype)


@sampled.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    return value.new_empty(weights.shape[0], weights.shape[1], value.shape[2] * value.shape[3])


@torch.library.custom_op("visft_ds::deform_attn_backward", mutates_args=())
def sampled_backward(
    gradient: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, each in its dtype."""
    cells, places, shares, dout = (readable(t.contiguous()) for t in (value, locations, weights, gradient))
    dvalue = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    dplaces, dshares = torch.empty_like(places), torch.empty_like(shares)
    for _, grid, sizes, constants in _levels(value, shapes, weights):
        backward_kernel[grid](cells, places, shares, dout, dvalue, dplaces, dshares, *sizes, **constants)
    return dvalue.to(value.dtype), dplaces.to(locations.dtype), dshares.to(weights.dtype)


@sampled_backward.register_fake
def _(
    gradient: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    dvalue, dlocations, dweights = sampled_backward(gradient, value, ctx.shapes, locations, weights)
    return dvalue, None, dlocations, dweights


sampled.register_autograd(_differentiate, setup_context=_keep)


def _levels(
    value: Tensor, shapes: Sequence[int], weights: Tensor
) -> Iterator[tuple[int, tuple[int, int, int], tuple[int, ...], dict[str, int]]]:
    """For each level: its number, the grid of programs, and the numbers and constants that both kernels take last."""
    batch, queries, heads, levels, points = weights.shape
    channels, start = value.shape[3], 0
    block = 8 if interpreted() else BLOCK
    constants = {"LEVELS": levels, "P": points, "C": triton.next_power_of_2(channels), "BQ": block}
    for level, (height, width) in enumerate(zip(shapes[::2], shapes[1::2], strict=True)):
        sizes = (value.shape[1], queries, heads, channels, height, width, start, level)
        yield level, (triton.cdiv(queries, block), heads, batch), sizes, constants
        start += height * width
