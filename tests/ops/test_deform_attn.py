"""Deformable attention against its definition, written out sample by sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visft_ds.ops.deform_attn import deform_attn

SHAPE = (4, 6)


def _bilinear(level: Tensor, x: float, y: float) -> Tensor:
    """level (h, w, c); x, y in cells, where the first cell's centre is (0.5, 0.5); zeros outside."""
    height, width = level.shape[:2]
    total = level.new_zeros(level.shape[2])
    left, top = math.floor(x - 0.5), math.floor(y - 0.5)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < height and 0 <= column < width:
                total += (1 - abs(x - 0.5 - column)) * (1 - abs(y - 0.5 - row)) * level[row, column]
    return total


def test_definition() -> None:
    """Several heads and images; samples outside the map too."""
    batch, heads, channels, queries, points = 2, 3, 2, 5, 4
    value = torch.randn(batch, 24, heads, channels, dtype=torch.float64)
    locations = torch.rand(batch, queries, heads, points, 2, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(batch, queries, heads, points, dtype=torch.float64)
    expected = torch.zeros(batch, queries, heads, channels, dtype=torch.float64)
    for b in range(batch):
        for q in range(queries):
            for m in range(heads):
                cells = value[b, :, m].view(*SHAPE, channels)
                for p in range(points):
                    x, y = locations[b, q, m, p].tolist()
                    sample = _bilinear(cells, x * SHAPE[1], y * SHAPE[0])
                    expected[b, q, m] += weights[b, q, m, p] * sample
    torch.testing.assert_close(deform_attn(value, SHAPE, locations, weights), expected.flatten(2))


def test_gradients() -> None:
    """Of values, locations and weights, by finite differences."""
    value = torch.randn(1, 24, 2, 1, dtype=torch.float64, requires_grad=True)
    locations = torch.rand(1, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *tensors: deform_attn(tensors[0], SHAPE, *tensors[1:]), (value, locations, weights)
    )
