"""Pixel decoder of the segmentation head: deformable-attention layers over a feature map, and features for
masks.

Letters: B images, h w patch grid, S = h*w cells, D backbone width, E head width, M attention heads, P
sampling points of a head.

Architecture after Mask2Former (Cheng et al., arXiv 2112.01527, section 3.2 and appendix A), reduced to a
single scale as in the published ViSFT heads: one level of deformable attention and one lateral connection at
the same resolution.

Padded cells (`valid` False) have no influence on the others: their values count as zeros in attention, norms
over space leave them out, and convolutions see zeros there as they do beyond the border of an unpadded map.

A parameter is used only in the forward of the module that owns it, and modules that own parameters directly
take and return tensors: ZeRO-3 gathers parameters in hooks at module boundaries.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.transforms import Size
from visft_ds.ops import at_least_float32
from visft_ds.ops.deform_attn import deform_attn
from visft_ds.tasks.masks.norm import GROUPS, MaskedGroupNorm
from visft_ds.tasks.segmentation.config import SegmentationHeadConfig
from visft_ds.tasks.transformer import cell_centres, sine_positions


class DeformableAttention(nn.Module):
    """Deformable self-attention over a feature map (Deformable DETR, arXiv 2010.04159, section 4.1).

    A query attends to P points around its cell in each head; their offsets and weights are linear in it.
    """

    def __init__(self, width: int, num_heads: int, n_points: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(width, num_heads * n_points * 2)
        self.attention_weights = nn.Linear(width, num_heads * n_points)
        self.value_proj = nn.Linear(width, width)
        self.output_proj = nn.Linear(width, width)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.device("cpu"):  # arithmetic on the meta device is torch's compiler, a second of imports
            offsets = self._first_offsets()
        self.sampling_offsets.bias.data.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def _first_offsets(self) -> Tensor:
        """(M, P, 2) offsets before training, in cells.

        Points of head m start 1, 2, ... cells away at angle 2 pi m / M, with equal weights (ibid., appendix
        A.4).
        """
        angle = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)  # on the square [-1, 1]^2
        steps = torch.arange(self.n_points) + 1.0
        return direction[:, None] * steps[:, None]

    def forward(
        self,
        query: Tensor,
        entries: Tensor,
        valid: Tensor,
        shape: Size,
    ) -> Tensor:
        """query (with positions) and entries (B, S, E), valid (B, S) bool, shape (h, w) -> (B, S, E)."""
        value = self.value_proj(entries)
        offsets = self.sampling_offsets(query)
        weights = self.attention_weights(query)
        # In bf16, points would be off by a share of a cell.
        value = at_least_float32(value)
        offsets = at_least_float32(offsets)
        weights = at_least_float32(weights)
        value = value.masked_fill(~valid[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        offsets = offsets.unflatten(-1, (self.num_heads, self.n_points, 2))  # (B, S, M, P, 2), in cells
        weights = weights.unflatten(-1, (self.num_heads, -1)).softmax(dim=-1)
        height, width = shape
        # Made from Python numbers on the device, without a copy that waits.
        extent = torch.stack((offsets.new_full((), width), offsets.new_full((), height)))
        centres = cell_centres(shape, offsets) / extent
        points = centres[:, None, None] + offsets / extent
        mixed: Tensor = self.output_proj(deform_attn(value, shape, points, weights))
        return mixed


class PixelLayer(nn.Module):
    """Deformable attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(self, options: SegmentationHeadConfig) -> None:
        super().__init__()
        width = options.hidden_dim
        self.self_attn = DeformableAttention(width, options.num_heads, options.n_points)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, options.encoder_ffn_dim)
        self.linear2 = nn.Linear(options.encoder_ffn_dim, width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(
        self,
        entries: Tensor,
        positions: Tensor,
        valid: Tensor,
        shape: Size,
    ) -> Tensor:
        """entries, positions (B, S, E), valid (B, S) bool -> (B, S, E)."""
        attended = self.self_attn(entries + positions, entries, valid, shape)
        entries = self.norm1(entries + self.dropout(attended))
        hidden = self.dropout(F.relu(self.linear1(entries)))
        out: Tensor = self.norm2(entries + self.dropout(self.linear2(hidden)))
        return out


class PixelDecoder(nn.Module):
    """Feature map -> memory that queries attend to, and embeddings of cells whose products with queries are
    masks.
    """

    def __init__(self, in_channels: int, options: SegmentationHeadConfig) -> None:
        super().__init__()
        width = options.hidden_dim
        self.width = width
        self.input_proj = nn.Conv2d(in_channels, width, kernel_size=1)
        self.input_norm = MaskedGroupNorm(GROUPS, width)
        self.level_embed = nn.Embedding(1, width)
        self.layers = nn.ModuleList(PixelLayer(options) for _ in range(options.encoder_layers))
        self.lateral_proj = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.lateral_norm = MaskedGroupNorm(GROUPS, width)
        self.output_conv = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.output_norm = MaskedGroupNorm(GROUPS, width)
        self.mask_proj = nn.Conv2d(width, width, kernel_size=1)
        nn.init.xavier_uniform_(self.input_proj.weight)
        for conv in (self.lateral_proj, self.output_conv, self.mask_proj):
            nn.init.kaiming_uniform_(conv.weight, a=1)  # bound sqrt(3 / fan_in): Mask2Former's c2_xavier_fill
        for conv in (self.input_proj, self.mask_proj):
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def forward(self, features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """features (B, D, h, w), valid (B, h, w) bool -> memory (B, S, E), mask features (B, E, h, w).

        What both hold at padded cells has no meaning.
        """
        shape = (features.shape[2], features.shape[3])
        entries = self.input_norm(self.input_proj(features), valid)
        entries = entries.flatten(2).mT
        level = torch.zeros(1, dtype=torch.int64, device=features.device)
        positions = sine_positions(valid, self.width).flatten(1, 2)
        positions = positions.to(entries.dtype) + self.level_embed(level)
        for layer in self.layers:
            entries = layer(entries, positions, valid.flatten(1), shape)
        lateral = self.lateral_norm(self.lateral_proj(features), valid)
        merged = lateral + entries.mT.unflatten(2, shape)
        merged = merged.masked_fill(~valid[:, None], 0.0)
        merged = self.output_norm(self.output_conv(merged), valid)
        return entries, self.mask_proj(F.relu(merged))
