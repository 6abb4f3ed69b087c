"""Segmentation head, single-scale Mask2Former: queries attend to the cells their own mask covers.

Letters: B images, h w patch grid, S = h*w cells, D backbone width, Q queries, E width, C classes, L
prediction sets = decoder layers + 1.

Masked attention after Mask2Former (Cheng et al., arXiv 2112.01527, section 3.2.1): attention into the memory
first, then among the queries, then the feed-forward; post-norm. A query attends where the mask it predicted
before the layer is at least one half. The queries predict masks before the first layer already, hence L =
layers + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.data.samples import Map
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.segmentation.config import SegmentationHeadConfig
from visft_ds.tasks.segmentation.pixel_decoder import PixelDecoder
from visft_ds.tasks.transformer import DecoderLayer, FeedForward, sine_positions

_PIXEL = "segment_pixel_decoder."
_PREDICTOR = "segment_predictor."
_CROSS = f"{_PREDICTOR}transformer_cross_attention_layers.{{n}}."
_SELF = f"{_PREDICTOR}transformer_self_attention_layers.{{n}}."
_FFN = f"{_PREDICTOR}transformer_ffn_layers.{{n}}."
#: Our names -> those of the published files (`interop.published`), the first whose beginning fits; {n} is a
#: layer.
PUBLISHED_NAMES = {
    "pixel_decoder.input_proj.": f"{_PIXEL}input_proj.0.0.",
    "pixel_decoder.input_norm.": f"{_PIXEL}input_proj.0.1.",
    "pixel_decoder.level_embed.weight": f"{_PIXEL}transformer.level_embed",
    "pixel_decoder.layers.": f"{_PIXEL}transformer.encoder.layers.",
    "pixel_decoder.lateral_norm.": f"{_PIXEL}adapter_1.norm.",
    "pixel_decoder.lateral_proj.": f"{_PIXEL}adapter_1.",
    "pixel_decoder.output_norm.": f"{_PIXEL}layer_1.norm.",
    "pixel_decoder.output_conv.": f"{_PIXEL}layer_1.",
    "pixel_decoder.mask_proj.": f"{_PIXEL}mask_features.",
    "decoder.query_feat.": f"{_PREDICTOR}query_feat.",
    "decoder.query_pos.": f"{_PREDICTOR}query_embed.",
    "decoder.level_embed.": f"{_PREDICTOR}level_embed.",
    "decoder.layers.{n}.cross_attn.": f"{_CROSS}multihead_attn.",
    "decoder.layers.{n}.norm1.": f"{_CROSS}norm.",
    "decoder.layers.{n}.self_attn.": f"{_SELF}self_attn.",
    "decoder.layers.{n}.norm2.": f"{_SELF}norm.",
    "decoder.layers.{n}.linear1.": f"{_FFN}linear1.",
    "decoder.layers.{n}.linear2.": f"{_FFN}linear2.",
    "decoder.layers.{n}.norm3.": f"{_FFN}norm.",
    "decoder.norm.": f"{_PREDICTOR}decoder_norm.",
    "decoder.class_embed.": f"{_PREDICTOR}class_embed.",
    "decoder.mask_embed.": f"{_PREDICTOR}mask_embed.",
}


@contextmanager
def choosing(head: Any, choose: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Replace the cells (B, Q, S) that a head's masks cover, layer by layer, by those of `choose(logits,
    covered)`; other heads have none.
    """
    head.choose = choose
    try:
        yield
    finally:
        head.choose = None


class SegmentationHead(nn.Module):
    """Feature map -> a fixed set of Q masks with classes, from every decoder layer.

    The single-scale Mask2Former of the published ViSFT heads: masks have the resolution of the feature map.
    What an image's valid cells predict does not depend on how far its batch is padded. `class_ids` is a
    property of trained weights; the loss and the results follow it.
    """

    def __init__(self, in_channels: int, options: SegmentationHeadConfig) -> None:
        super().__init__()
        width = options.hidden_dim
        sizes = (options.num_heads, options.decoder_ffn_dim, options.dropout)
        self.width = width
        self.class_ids = options.class_ids
        self.num_queries = options.num_queries
        self.max_detections = options.max_detections
        self.pixel_decoder = PixelDecoder(in_channels, options)
        self.choose: Callable[[Tensor, Tensor], Tensor] | None = None  # see `choosing`
        self.decoder = nn.ModuleDict(
            {
                "query_feat": nn.Embedding(self.num_queries, width),  # initial state of the queries
                "query_pos": nn.Embedding(self.num_queries, width),  # added to q and k of every attention
                "level_embed": nn.Embedding(1, width),  # of the single scale; a row for each in Mask2Former
                "layers": nn.ModuleList(
                    DecoderLayer(width, *sizes, masked=True) for _ in range(options.decoder_layers)
                ),
                "norm": nn.LayerNorm(width),
                "class_embed": nn.Linear(width, options.num_classes + 1),
                "mask_embed": FeedForward(width, width),
            }
        )

    def forward(self, maps: Sequence[Map]) -> MaskOutput:
        """Masks and classes from the last map."""
        features = maps[-1].features
        valid = maps[-1].valid
        memory, mask_features = self.pixel_decoder(features, valid)
        decoder = self.decoder
        level = features.new_zeros(1, dtype=torch.int64)
        memory = memory + decoder["level_embed"](level)
        positions = sine_positions(valid, self.width).flatten(1, 2)
        memory_key = memory + positions.to(memory.dtype)
        numbers = torch.arange(self.num_queries, device=features.device)
        query = decoder["query_pos"](numbers).expand(memory.shape[0], -1, -1)
        state = decoder["query_feat"](numbers).expand(memory.shape[0], -1, -1)
        inside = valid[:, None].flatten(2)  # (B, 1, S)
        sets = [self._predict(state, mask_features, valid)]
        for layer in decoder["layers"].children():
            _, masks = sets[-1]
            covered = masks.detach().flatten(2) >= 0  # a probability of at least one half
            if self.choose is not None:
                covered = self.choose(masks, covered)
            covered = covered & inside  # (B, Q, S)
            # A query whose mask covers no cell attends to the whole image: a softmax over nothing would be
            # NaN.
            covers_some = covered.any(dim=-1, keepdim=True)
            allowed = covered | (inside & ~covers_some)
            state = layer(state, query, memory, memory_key, allowed)
            sets.append(self._predict(state, mask_features, valid))
        return MaskOutput.of_sets(sets, maps[-1].shares(), self.max_detections, self.class_ids)

    def _predict(self, state: Tensor, mask_features: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, C + 1) and mask logits (B, Q, h, w) of queries (B, Q, E)."""
        normed = self.decoder["norm"](state)
        logits = self.decoder["class_embed"](normed)
        embeddings = self.decoder["mask_embed"](normed)
        masks = torch.einsum("bqe,behw->bqhw", embeddings, mask_features)
        return logits, masks.masked_fill(~valid[:, None], 0.0)
