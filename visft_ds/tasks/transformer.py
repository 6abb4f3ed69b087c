"""Attention of the heads, and the layers of their transformers.

Letters: B images, h w patch grid, S = h*w (+ 1 task token) entries, Q queries, D width.

Architecture after DETR (Carion et al., arXiv 2005.12872, appendix A.3): post-norm layers, positions added to
queries and keys of every attention but never to the values.

A parameter is used only in the forward of the module that owns it, and these modules take and return tensors:
ZeRO-3 gathers parameters in hooks that fire at module boundaries and look into tensors only. That is why
attention is not `nn.MultiheadAttention`, whose parent reads `out_proj.weight` without calling `out_proj`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visft_ds.ops import real_device

#: Queries times entries from which on attention with dropout is computed head by head on a CPU.
_LARGE = 1 << 16


def sine_positions(valid: Tensor, width: int) -> Tensor:
    """Sine positions (B, h, w, width) float32 of a padded grid, first half for y, second half for x.

    `valid` (B, h, w) bool is True inside the image. A coordinate runs to 2 pi at the end of the *valid* part,
    so that a position means the same share of the image whatever the padding. 4 divides `width`.
    """
    exponent = torch.arange(width // 4, dtype=torch.float32, device=valid.device) * (4 / width)
    halves = []
    for axis in (1, 2):
        count = valid.cumsum(dim=axis).float()  # as whole numbers: a GPU sums floats in any order
        share = count / (count.narrow(axis, -1, 1) + 1e-6)
        angle = (share * (2 * math.pi))[..., None] / 10_000.0**exponent
        pairs = torch.stack((angle.sin(), angle.cos()), dim=-1)
        halves.append(pairs.flatten(start_dim=-2))
    return torch.cat(halves, dim=-1)


def cell_centres(grid: Sequence[int], like: Tensor) -> Tensor:
    """(S, 2) x and y of the centres of the cells of a grid (h, w), row by row, in cells."""
    height, width = grid
    y = torch.arange(height, device=like.device, dtype=like.dtype) + 0.5
    x = torch.arange(width, device=like.device, dtype=like.dtype) + 0.5
    pairs = torch.meshgrid(x, y, indexing="xy")
    return torch.stack(pairs, dim=-1).flatten(end_dim=1)


def by_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, D) -> (B, heads, S, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class MultiHeadAttention(nn.Module):
    """Multi-head attention; parameter names and shapes of `nn.MultiheadAttention`.

    Initialisation as there too: of the output projection that of `nn.Linear`, or Xavier with `xavier_output`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        dropout: float,
        *,
        xavier_output: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        if xavier_output:
            nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """query (B, Q, D), key and value (B, S, D) -> (B, Q, D).

        `allowed` (B, Q or 1, S) bool: entries that a query may attend to, at least one, else its output is
        NaN.
        """
        inputs = (query, key, value)
        projections = zip(inputs, self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (by_head(F.linear(x, weight, bias), self.num_heads) for x, weight, bias in projections)
        mask = None if allowed is None else allowed[:, None]  # the same for all heads
        dropout = self.dropout if self.training else 0.0
        shares = q.shape[2] * k.shape[2]
        if dropout and shares >= _LARGE and q.dtype == torch.float32 and real_device(q.device).type == "cpu":
            mixed = _DroppedAttention.apply(q, k, v, mask, dropout)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(start_dim=2))
        return out


class _DroppedAttention(torch.autograd.Function):
    """`F.scaled_dot_product_attention` with dropout on a CPU: the same draws, the sums in another order.

    torch has no fused kernel for it there, and keeps three tensors of (B, heads, Q, S). Here one head is
    worked on at a time, and a byte for each share of attention is kept, which says whether it was dropped.
    Letters: H heads, d width of a head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        allowed: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """q (B, H, Q, d), k and v (B, H, S, d), allowed (B, 1, Q or 1, S) bool or None -> (B, H, Q, d)."""
        is_kept = q.new_empty(*q.shape[:3], k.shape[2], dtype=torch.bool)
        is_kept.bernoulli_(1 - dropout)
        ctx.save_for_backward(q, k, v, allowed, is_kept)
        ctx.factor = 1 / (1 - dropout)
        out = torch.empty_like(q)
        for image, head in np.ndindex(q.shape[:2]):
            at = (image, head)
            shares = _shares(q[at], k[at], None if allowed is None else allowed[image, 0])
            shares *= is_kept[at].to(q.dtype)  # a product with bool takes twice as long
            torch.mm(shares, v[at], out=out[at])
        return out.mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, allowed, is_kept = ctx.saved_tensors
        grad = grad * ctx.factor
        scale = q.shape[-1] ** -0.5
        grad_q = torch.empty_like(q)
        grad_k = torch.empty_like(k)
        grad_v = torch.empty_like(v)
        for image, head in np.ndindex(q.shape[:2]):
            at = (image, head)
            shares = _shares(q[at], k[at], None if allowed is None else allowed[image, 0])
            factors = is_kept[at].to(q.dtype)
            torch.mm((shares * factors).t(), grad[at], out=grad_v[at])
            grad_shares = (grad[at] @ v[at].t()).mul_(factors)
            grad_scores = torch.ops.aten._softmax_backward_data(grad_shares, shares, -1, q.dtype)
            torch.mm(grad_scores, k[at], out=grad_q[at])
            torch.mm(grad_scores.t(), q[at], out=grad_k[at])
        return grad_q.mul_(scale), grad_k.mul_(scale), grad_v, None, None


def _shares(q: Tensor, k: Tensor, allowed: Tensor | None) -> Tensor:
    """Shares of attention (Q, S) of one head, q (Q, d) and k (S, d)."""
    scores = (q * q.shape[-1] ** -0.5) @ k.t()
    if allowed is not None:
        scores.masked_fill_(~allowed, -torch.inf)
    return torch.softmax(scores, dim=-1)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = MultiHeadAttention(width, num_heads, dropout)
        self.linear1 = nn.Linear(width, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, entries: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """entries and positions (B, S, D), valid (B, S) bool -> (B, S, D)."""
        placed = entries + positions
        attended = self.self_attn(placed, placed, entries, valid[:, None])
        entries = self.norm1(entries + self.dropout(attended))
        inner = self.dropout(F.relu(self.linear1(entries)))
        out: Tensor = self.norm2(entries + self.dropout(self.linear2(inner)))
        return out


class DecoderLayer(nn.Module):
    """Self-attention among the queries, attention into the memory, feed-forward; post-norm.

    `masked`: in Mask2Former's order, the memory first, and with its initialisation, Xavier throughout.
    """

    self_attn: MultiHeadAttention
    cross_attn: MultiHeadAttention

    def __init__(
        self,
        width: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        *,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.masked = masked
        # In the order of the forward, in which their random numbers are drawn.
        order = ["cross_attn", "self_attn"] if masked else ["self_attn", "cross_attn"]
        for name in order:
            self.add_module(name, MultiHeadAttention(width, num_heads, dropout, xavier_output=masked))
        self.linear1 = nn.Linear(width, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, width)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        if masked:
            nn.init.xavier_uniform_(self.linear1.weight)
            nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        state: Tensor,
        query: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        allowed: Tensor,
    ) -> Tensor:
        """Queries after the layer, (B, Q, D).

        Args:
            state: (B, Q, D).
            query: (B, Q, D) positions of the queries, added to `state` in each attention.
            memory: (B, S, D).
            memory_key: memory + positions.
            allowed: (B, Q or 1, S) bool, entries of the memory that a query may attend to.
        """
        if self.masked:
            state = self.norm1(state + self._of_memory(state, query, memory, memory_key, allowed))
            state = self.norm2(state + self._of_queries(state, query))
        else:
            state = self.norm1(state + self._of_queries(state, query))
            state = self.norm2(state + self._of_memory(state, query, memory, memory_key, allowed))
        inner = self.dropout(F.relu(self.linear1(state)))
        out: Tensor = self.norm3(state + self.dropout(self.linear2(inner)))
        return out

    def _of_queries(self, state: Tensor, query: Tensor) -> Tensor:
        placed = state + query
        seen: Tensor = self.dropout(self.self_attn(placed, placed, state))
        return seen

    def _of_memory(
        self,
        state: Tensor,
        query: Tensor,
        memory: Tensor,
        memory_key: Tensor,
        allowed: Tensor,
    ) -> Tensor:
        seen: Tensor = self.dropout(self.cross_attn(state + query, memory_key, memory, allowed))
        return seen


class FeedForward(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, width: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, out) for out in (width, width, out_dim))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out
