"""Detection: head and post-processing of the set-prediction detector (DETR, arXiv 2005.12872).

Letters: B images, h w patch grid, D backbone width, Q queries, C classes (raw COCO ids 0..90, or indices of
other categories), L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Results
from visft_ds.tasks.detection.config import DetectionHeadConfig
from visft_ds.tasks.detection.data import box_results, corners_of
from visft_ds.tasks.transformer import DecoderLayer, EncoderLayer, FeedForward, sine_positions

#: Rows of the task embedding. Only row 0 is used; the published files have them all (UniT had a row for each
#: task).
_TASK_ROWS = 256

_DETR = "transformer.decoders.detection.detection_coco."
#: Our names -> those of the published files (`interop.published`), the first whose beginning fits; {n} is a
#: layer.
PUBLISHED_NAMES = {
    "input_proj.": "input_proj.",
    "task_embed.": "transformer.task_embeddings_enc.",
    "encoder.": "transformer.encoder.",
    "memory_proj.": "transformer.enc2dec_proj.",
    "position_proj.": "transformer.pos_embed_proj.",
    "decoder.layers.{n}.cross_attn.": f"{_DETR}layers.{{n}}.multihead_attn.",
    "decoder.": _DETR,
    "query_embed.": "query_embeds.detection.detection_coco.",
    "class_embed.": "class_embeds.",
    "box_embed.": "bbox_embeds.",
}


@dataclass(frozen=True)
class DetectionOutput:
    """Predictions of all decoder layers, the last of which are the head's answer."""

    logits: Tensor  #: (L, B, Q, C + 1), the last class is "no object"
    boxes: Tensor  #: (L, B, Q, 4) cxcywh in [0, 1], relative to the valid (unpadded) image

    def last(self) -> DetectionOutput:
        """The answer without what only losses look at."""
        return DetectionOutput(self.logits[-1:], self.boxes[-1:])


class DetectionHead(nn.Module):
    """Feature map -> a fixed set of Q boxes with classes, from every decoder layer.

    The asymmetric DETR of the published ViSFT heads, after UniT (Hu and Singh, arXiv 2102.10772): 1x1
    projection to `encoder_dim`, a learnt task token in front of the patches, encoder with a residual around
    it, linear projections of memory and positions to the wider `decoder_dim`, decoder, and a norm, a class
    layer and a box MLP that all decoder layers share. Initialisation: Xavier for the encoder and the two
    projections, PyTorch's defaults elsewhere.
    """

    def __init__(self, in_channels: int, options: DetectionHeadConfig) -> None:
        super().__init__()
        encoder_dim = options.encoder_dim
        decoder_dim = options.decoder_dim
        layer_options = (options.num_heads, options.ffn_dim, options.dropout)
        self.num_queries = options.num_queries
        self.encoder_dim = encoder_dim
        self.input_proj = nn.Conv2d(in_channels, encoder_dim, kernel_size=1)
        self.task_embed = nn.Embedding(_TASK_ROWS, encoder_dim)
        encoder = [EncoderLayer(encoder_dim, *layer_options) for _ in range(options.encoder_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(encoder)})  # named as in the published files
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.memory_proj = nn.Linear(encoder_dim, decoder_dim)
        self.position_proj = nn.Linear(encoder_dim, decoder_dim)
        nn.init.xavier_uniform_(self.memory_proj.weight)
        nn.init.xavier_uniform_(self.position_proj.weight)
        decoder = [DecoderLayer(decoder_dim, *layer_options) for _ in range(options.decoder_layers)]
        norm = nn.LayerNorm(decoder_dim)
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(decoder), "norm": norm})
        self.query_embed = nn.Embedding(options.num_queries, decoder_dim)
        self.class_embed = nn.Linear(decoder_dim, options.num_classes + 1)
        self.box_embed = FeedForward(decoder_dim, 4)

    def forward(self, maps: Sequence[Map]) -> DetectionOutput:
        """Boxes and classes from the last map."""
        features = maps[-1].features
        valid = maps[-1].valid
        positions = sine_positions(valid, self.encoder_dim).to(features.dtype).flatten(1, 2)
        valid = valid.flatten(1)
        projected = self.input_proj(features)
        # The residual stream keeps the features' precision; under autocast it would start in 16 bit.
        patches = projected.to(features.dtype).flatten(2).transpose(1, 2)  # (B, h*w, encoder)
        encoded = self._encoded(patches, positions, valid)
        memory = self.memory_proj(patches + encoded)
        memory_key = memory + self.position_proj(positions)
        states = self._decoded(memory, memory_key, valid)  # (L, B, Q, decoder)
        boxes = at_least_float32(self.box_embed(states)).sigmoid()
        return DetectionOutput(at_least_float32(self.class_embed(states)), boxes)

    def _encoded(self, patches: Tensor, positions: Tensor, valid: Tensor) -> Tensor:
        """Patches (B, S, D) behind the encoder; positions (B, S, D), valid (B, S) bool."""
        # The task token stands in front while patches are encoded; its position embedding is 0.
        task = torch.zeros(patches.shape[0], 1, dtype=torch.int64, device=patches.device)
        token = self.task_embed(task).to(patches.dtype)
        entries = torch.cat((token, patches), dim=1)
        positions = F.pad(positions, (0, 0, 1, 0))
        valid = F.pad(valid, (1, 0), value=True)
        for layer in self.encoder["layers"].children():
            entries = layer(entries, positions, valid)
        return entries[:, 1:]

    def _decoded(self, memory: Tensor, memory_key: Tensor, valid: Tensor) -> Tensor:
        """Normed states (L, B, Q, D) of the queries behind each decoder layer; memory (B, S, D)."""
        rows = torch.arange(self.num_queries, device=memory.device)
        query = self.query_embed(rows).expand(memory.shape[0], -1, -1)
        state = torch.zeros_like(query)  # `query`, the learnt positions, is added to it in every attention
        states = []
        for layer in self.decoder["layers"].children():
            state = layer(state, query, memory, memory_key, valid[:, None])
            states.append(state)
        normed: Tensor = self.decoder["norm"](torch.stack(states))
        return normed


@torch.no_grad()
def postprocess(
    output: DetectionOutput,
    batch: Batch,
    classes: Sequence[int] | None = None,
    threshold: float = 0.0,
) -> Results:
    """Predictions in COCO's results format, see `box_results`.

    As in DETR every query gives a result: its best class apart from "no object", and the softmax probability
    of that. Only scores below `threshold` are dropped (there is no non-maximum suppression), and boxes are
    not clipped. Images without `batch.real` are left out. The batch must have been resized without cropping,
    as evaluation transforms do.
    """
    probability = at_least_float32(output.logits[-1]).softmax(dim=-1)
    scores, best = probability[..., :-1].max(dim=-1)
    scores = scores.cpu()
    best = best.cpu()
    corners = corners_of(at_least_float32(output.boxes[-1])).cpu()
    is_certain = ~(scores < threshold)  # NaN is among them
    chosen = (batch.real[:, None] & is_certain).nonzero()
    return box_results(batch, chosen, corners, scores, best, classes)
