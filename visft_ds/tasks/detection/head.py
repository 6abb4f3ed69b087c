"""Detection: head, criterion and post-processing of the set-prediction detector (DETR, arXiv 2005.12872).

Letters: B images, h w patch grid, D backbone width, Q queries, C classes (raw COCO ids 0..90, or indices of
other categories), L decoder layers, N objects of all images concatenated, M matched pairs of all layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Results
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss
from visft_ds.tasks.detection.data import DetectionTargets, box_results
from visft_ds.tasks.matching import centers_to_corners, class_losses, generalized_box_iou, match
from visft_ds.tasks.transformer import DecoderLayer, EncoderLayer, FeedForward, sine_positions

# Rows of the task embedding. Only row 0 is used; the published files have them all (UniT had a row for each
# task).
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
        narrow, wide, sizes = options.encoder_dim, options.decoder_dim, (options.num_heads, options.ffn_dim)
        self.num_queries, self.encoder_dim = options.num_queries, narrow
        self.input_proj = nn.Conv2d(in_channels, narrow, kernel_size=1)
        self.task_embed = nn.Embedding(_TASK_ROWS, narrow)
        encoder = (EncoderLayer(narrow, *sizes, options.dropout) for _ in range(options.encoder_layers))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(encoder)})  # named as in the published files
        for parameter in self.encoder.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.memory_proj = nn.Linear(narrow, wide)
        self.position_proj = nn.Linear(narrow, wide)
        for projection in (self.memory_proj, self.position_proj):
            nn.init.xavier_uniform_(projection.weight)
        decoder = (DecoderLayer(wide, *sizes, options.dropout) for _ in range(options.decoder_layers))
        self.decoder = nn.ModuleDict({"layers": nn.ModuleList(decoder), "norm": nn.LayerNorm(wide)})
        self.query_embed = nn.Embedding(options.num_queries, wide)
        self.class_embed = nn.Linear(wide, options.num_classes + 1)
        self.box_embed = FeedForward(wide, wide, 4, num_layers=3)

    def forward(self, maps: Sequence[Map]) -> DetectionOutput:
        """Boxes and classes from the last map."""
        features, valid = maps[-1].features, maps[-1].valid
        # The residual stream keeps the features' precision; under autocast the projection would start it in
        # 16 bit.
        patches = (
            self.input_proj(features).to(features.dtype).flatten(start_dim=2).transpose(1, 2)
        )  # (B, h*w, encoder)
        positions = sine_positions(valid, self.encoder_dim).to(features.dtype).flatten(start_dim=1, end_dim=2)
        inside = valid.flatten(start_dim=1)
        # The task token stands in front while patches are encoded; its position embedding is 0.
        batch_size = len(features)
        token = self.task_embed(torch.zeros(batch_size, 1, dtype=torch.int64, device=features.device))
        entries = torch.cat((token.to(patches.dtype), patches), dim=1)
        places, entry_valid = F.pad(positions, (0, 0, 1, 0)), F.pad(inside, (1, 0), value=True)
        for layer in self.encoder["layers"].children():
            entries = layer(entries, places, entry_valid)
        memory = self.memory_proj(patches + entries[:, 1:])
        memory_key = memory + self.position_proj(positions)
        query = self.query_embed(torch.arange(self.num_queries, device=features.device)).expand(
            batch_size, -1, -1
        )
        state = torch.zeros_like(query)  # `query`, the learnt positions, is added to it in every attention
        layers = []
        for layer in self.decoder["layers"].children():
            state = layer(state, query, memory, memory_key, inside[:, None])
            layers.append(state)
        states = self.decoder["norm"](torch.stack(layers))  # (L, B, Q, D)
        boxes = at_least_float32(self.box_embed(states)).sigmoid()
        return DetectionOutput(at_least_float32(self.class_embed(states)), boxes)


class DetectionCriterion:
    """Set-prediction loss of every decoder layer: class cross-entropy, L1 and generalized IoU of the matched
    boxes.

    `ce`, `l1` and `giou` weigh the losses and the costs of the matching alike (DETR's, appendix A.4).

    Calling it gives *unweighted* losses by name: `ce`, `l1`, `giou` of the last layer, `ce_0` .. `giou_{L-2}`
    of the earlier ones; `weights` holds the factor of each. Two more entries are for the log only and not in
    `weights`: `class_error` (percent of the objects whose matched query names another class) and
    `cardinality_error` (mean absolute difference between the number of objects and of queries that see one).
    """

    def __init__(self, head: DetectionHeadConfig, loss: DetectionLoss) -> None:
        self.num_queries, self.eos_coef = head.num_queries, loss.eos_coef
        self.costs = (loss.ce, loss.l1, loss.giou)
        self._suffixes = [*(f"_{layer}" for layer in range(head.decoder_layers - 1)), ""]
        by_name, order = {"ce": loss.ce, "l1": loss.l1, "giou": loss.giou}, ["", *self._suffixes[:-1]]
        self.weights: dict[str, float] = {name + s: weight for s in order for name, weight in by_name.items()}

    def count(self, batch: Batch) -> dict[str, float]:
        counts = batch.targets["detection"].counts
        return {"boxes": float(counts.sum()), "images": float(len(counts))}

    def __call__(
        self,
        output: DetectionOutput,
        targets: DetectionTargets,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        logits, boxes = at_least_float32(output.logits), at_least_float32(output.boxes)
        assert (len(logits), logits.shape[2]) == (len(self._suffixes), self.num_queries), logits.shape
        matches = match(logits, boxes, targets, self.costs, image_ids)
        ce, wrong = class_losses(
            logits, targets.labels, targets.counts, matches, self.eos_coef, loss_denominators
        )
        # Without any pair the sums are zero and still carry a (zero) gradient.
        predicted = boxes[matches.layers, matches.images, matches.queries]  # (M, 4)
        true, number = targets.boxes.to(boxes.dtype)[matches.objects], loss_denominators["boxes"]
        distance = (predicted - true).abs().sum(dim=-1)
        overlap = generalized_box_iou(centers_to_corners(predicted), centers_to_corners(true))
        # the pairs are ordered by layer and every layer has the same number of them
        per_layer = (len(boxes), len(predicted) // len(boxes))
        by_name = {  # (L,) each
            "ce": ce,
            "l1": distance.view(per_layer).sum(dim=1) / number,
            "giou": (1 - overlap).view(per_layer).sum(dim=1) / number,
        }
        seen = (logits[-1].detach().argmax(dim=-1) != logits.shape[-1] - 1).sum(dim=1)  # (B,)
        return {
            **{
                name + s: one
                for name, each in by_name.items()
                for s, one in zip(self._suffixes, each, strict=True)
            },
            "class_error": wrong / number,
            "cardinality_error": (seen - targets.counts).abs().float().mean(),
        }


@torch.no_grad()
def postprocess(
    output: DetectionOutput, batch: Batch, classes: Sequence[int] | None = None, threshold: float = 0.0
) -> Results:
    """Predictions in COCO's results format, see `box_results`.

    As in DETR every query gives a result: its best class apart from "no object", and the softmax probability
    of that. Only scores below `threshold` are dropped (there is no non-maximum suppression), and boxes are
    not clipped. Images without `batch.real` are left out. The batch must have been resized without cropping,
    as evaluation transforms do.
    """
    scores, best = (
        values.cpu() for values in at_least_float32(output.logits[-1]).softmax(-1)[..., :-1].max(dim=-1)
    )
    corners, results = centers_to_corners(at_least_float32(output.boxes[-1])).cpu(), Results()
    for image in batch.real.nonzero().flatten().tolist():
        kept = ~(scores[image] < threshold)  # NaN is kept
        results += box_results(
            batch, image, corners[image, kept], scores[image, kept], best[image, kept], classes
        )
    return results
