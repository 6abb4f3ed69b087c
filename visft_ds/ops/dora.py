"""A frozen linear layer whose rows are turned by a low-rank update and have a length of their own.

DoRA, https://arxiv.org/abs/2402.09353: for the rows of each adapted slice W' = m * (W + s B A) / |W + s B A|, the
length of a row (over its inputs) apart from its direction. As in section 4.3 no gradient flows through the length in
the denominator. All other rows are as `visft_ds.ops.lora` leaves them.
Letters: K inputs, F outputs, R adapted outputs, G slices, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from visft_ds.ops import no_autocast
from visft_ds.ops.lora import lora_linear


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float,
    slices: Sequence[tuple[int, int]],
) -> Tensor:
    """Linear layer plus low-rank updates of some output slices, whose rows then have the lengths `magnitude`.

    Equal to `lora_linear` bit for bit where magnitudes are the lengths that the rows have. In 16 bit what the
    magnitudes change is added to a result that is already rounded.

    Args:
        x: (..., K).
        magnitude: (R,), stacked slice by slice like the rows of `lora_b`; all others as in `lora_linear`.

    Returns:
        (..., F) in the dtype computed in.
    """
    y = lora_linear(x, weight, bias, lora_a, lora_b, scale, slices)
    lengths = row_lengths(weight, lora_a, lora_b, scale, slices)
    with no_autocast(y.device):
        excess = magnitude.to(lengths.dtype) / lengths - 1  # 0 where nothing has been learnt: y stays as it is
        parts, start = [], 0
        edges = [0, *(edge for pair in slices for edge in pair), weight.shape[0]]
        for index, (lo, hi) in enumerate(pairwise(edges)):
            if index % 2 == 0:
                parts.append(excess.new_zeros(hi - lo))
            else:
                parts.append(excess[start : start + hi - lo])
                start += hi - lo
        product = y if bias is None else y.to(excess.dtype) - bias.to(excess.dtype)
        return (y + torch.cat(parts) * product).to(y.dtype)


@torch.no_grad()
def row_lengths(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, slices: Sequence[tuple[int, int]]
) -> Tensor:
    """|W + s B A| of each adapted row, without the dense product.

    |w|^2 + 2 s b (A w) + s^2 b (A A^T) b, in fp32 or wider; with b = 0 exactly the length of w.

    Args:
        weight: (F, K).
        lora_a: (G*r, K).
        lora_b: (R, r).

    Returns:
        (R,) float32, of float64 weights float64.
    """
    rank, found, start = lora_b.shape[1], [], 0
    wide = torch.promote_types(weight.dtype, torch.float32)
    with no_autocast(weight.device):
        for index, (lo, hi) in enumerate(slices):
            rows, a = weight[lo:hi].to(wide), lora_a[index * rank : (index + 1) * rank].to(wide)
            b = lora_b[start : start + hi - lo].to(wide)
            squares = rows.square().sum(1) + 2 * scale * (b * (rows @ a.t())).sum(1)
            found.append((squares + scale**2 * (b * (b @ (a @ a.t()))).sum(1)).sqrt())
            start += hi - lo
    return torch.cat(found).clamp(min=torch.finfo(wide).tiny)  # a row of zeros stays one
