"""Segmentation head, single-scale Mask2Former, and its decoder: queries attend to the cells their own mask covers.

Letters: B images, h w patch grid, S = h*w cells, D backbone width, Q queries, E width, C classes, L prediction sets =
decoder layers + 1.

Masked attention after Mask2Former (Cheng et al., arXiv 2112.01527, section 3.2.1): attention into the memory first,
then among the queries, then the feed-forward; post-norm. A query attends where the mask it predicted before the layer
is at least one half. The queries predict masks before the first layer already, hence L = layers + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from visft_ds.data.samples import Map
from visft_ds.tasks.matching import at_least_float32
from visft_ds.tasks.segmentation.config import Labelling, SegmentationHeadConfig
from visft_ds.tasks.segmentation.pixel_decoder import PixelDecoder
from visft_ds.tasks.transformer import DecoderLayer, FeedForward, sine_positions


@dataclass(frozen=True)
class SegmentationOutput:
    """Predictions before the first decoder layer and of each; the last are the head's answer."""

    logits: Tensor  #: (L, B, Q, C + 1), the last class is "no object"
    masks: Tensor  #: (L, B, Q, h, w) logits over the padded batch, 0 at padded cells
    labelling: Labelling = "contiguous"  #: of the head
    #: (B, 2) height and width of each image as a share of (h, w), for packed images; None: their share of the padded
    #: batch in pixels is meant.
    extents: Tensor | None = None

    def last(self) -> SegmentationOutput:
        """The answer without what only losses look at."""
        return replace(self, logits=self.logits[-1:], masks=self.masks[-1:])


class SegmentationHead(nn.Module):
    """Feature map -> a fixed set of Q masks with classes, from every decoder layer.

    The single-scale Mask2Former of the published ViSFT heads: masks have the resolution of the feature map. What an
    image's valid cells predict does not depend on how far its batch is padded. `labelling` is a property of trained
    weights; the loss and the results follow it.
    """

    def __init__(self, in_channels: int, options: SegmentationHeadConfig) -> None:
        super().__init__()
        self.labelling: Labelling = options.labelling
        self.pixel_decoder = PixelDecoder(in_channels, options)
        self.decoder = MaskedDecoder(options)

    def forward(self, maps: Sequence[Map]) -> SegmentationOutput:
        """Masks and classes from the last map."""
        features, valid = maps[-1].features, maps[-1].valid
        memory, mask_features = self.pixel_decoder(features, valid)
        logits, masks = (at_least_float32(values) for values in self.decoder(memory, mask_features, valid))
        return SegmentationOutput(logits, masks, self.labelling)


class MaskedDecoder(nn.Module):
    """Queries -> classes and masks, before the first layer and after each."""

    def __init__(self, options: SegmentationHeadConfig) -> None:
        super().__init__()
        width, sizes = options.hidden_dim, (options.num_heads, options.decoder_ffn_dim, options.dropout)
        self.width, self.num_queries = width, options.num_queries
        self.query_feat = nn.Embedding(self.num_queries, width)  # initial state of the queries
        self.query_pos = nn.Embedding(self.num_queries, width)  # added to queries and keys of every attention
        self.level_embed = nn.Embedding(1, width)  # of the single scale; a row for each in Mask2Former
        self.layers = nn.ModuleList(DecoderLayer(width, *sizes, masked=True) for _ in range(options.decoder_layers))
        self.norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, options.num_classes + 1)
        self.mask_embed = FeedForward(width, width, width, num_layers=3)

    def forward(self, memory: Tensor, mask_features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (L, B, Q, C + 1) and mask logits (L, B, Q, h, w), which are 0 at padded cells.

        memory (B, S, E) and mask_features (B, E, h, w) are the pixel decoder's; valid (B, h, w) bool, True inside the
        image, at least once for each image.
        """
        device = memory.device
        level = self.level_embed(torch.zeros(1, dtype=torch.int64, device=device))
        memory = memory + level
        memory_key = memory + sine_positions(valid, self.width).to(memory.dtype).flatten(1, 2)
        numbers = torch.arange(self.num_queries, device=device)
        query = self.query_pos(numbers).expand(len(memory), -1, -1)
        state = self.query_feat(numbers).expand(len(memory), -1, -1)
        inside = valid[:, None].flatten(2)  # (B, 1, S)
        logits, masks = self._predict(state, mask_features, valid)
        predictions = [(logits, masks)]
        for layer in self.layers:
            covered = (masks.detach().flatten(2).sigmoid() >= 0.5) & inside  # (B, Q, S)
            # A query whose mask covers no cell attends to the whole image: a softmax over nothing would be NaN.
            allowed = torch.where(covered.any(dim=-1, keepdim=True), covered, inside)
            state = layer(state, query, memory, memory_key, allowed)
            logits, masks = self._predict(state, mask_features, valid)
            predictions.append((logits, masks))
        return torch.stack([logits for logits, _ in predictions]), torch.stack([masks for _, masks in predictions])

    def _predict(self, state: Tensor, mask_features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w) of queries (B, Q, E)."""
        normed = self.norm(state)
        masks = torch.einsum("bqe,behw->bqhw", self.mask_embed(normed), mask_features)
        return self.class_embed(normed), masks.masked_fill(~valid[:, None], 0.0)
