"""Loss of the set-prediction detector: the matching of queries to boxes, and the losses of matched pairs.

Letters: L decoder layers, B images, Q queries, C classes without "no object", N objects of all images
concatenated, M matched pairs of all layers. Boxes are cxcywh or, as `corners`, x0 y0 x1 y1 on the last axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Numbers
from visft_ds.tasks.criterion import Denominators, Losses
from visft_ds.tasks.detection.config import DetectionHeadConfig, DetectionLoss
from visft_ds.tasks.detection.data import DetectionTargets, corners_of
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.matching import Matches, class_losses, solve

#: Areas and unions are divided by no less than this. Relative boxes of one pixel in a million pixels have
#: area 1e-6, so that only boxes without any area are affected; their overlap is 0 instead of NaN.
_SMALLEST_AREA = 1e-12


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
        self.eos_coef = loss.eos_coef
        self.costs = (loss.ce, loss.l1, loss.giou)
        earlier = [f"_{layer}" for layer in range(head.decoder_layers - 1)]
        self._suffixes = [*earlier, ""]  # of the layers in order
        self.weights: Numbers = {}
        for suffix in ["", *earlier]:
            self.weights[f"ce{suffix}"] = loss.ce
            self.weights[f"l1{suffix}"] = loss.l1
            self.weights[f"giou{suffix}"] = loss.giou

    def count(self, batch: Batch) -> Numbers:
        """Objects, by which the losses of boxes are divided, and images, by which those of classes are."""
        counts = batch.targets["detection"].counts
        return {"boxes": float(counts.sum()), "images": float(len(counts))}

    def __call__(
        self,
        output: DetectionOutput,
        targets: DetectionTargets,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        logits = at_least_float32(output.logits)
        boxes = at_least_float32(output.boxes)
        assert len(logits) == len(self._suffixes), logits.shape
        matches = match(logits, boxes, targets, self.costs, image_ids)
        labels = targets.labels
        ce, wrong = class_losses(logits, labels, targets.counts, matches, self.eos_coef, loss_denominators)
        number = loss_denominators["boxes"]
        l1, giou = self.loss_boxes(boxes, targets, matches)
        l1 = l1 / number
        giou = giou / number
        losses = {}
        for layer, suffix in enumerate(self._suffixes):
            losses[f"ce{suffix}"] = ce[layer]
            losses[f"l1{suffix}"] = l1[layer]
            losses[f"giou{suffix}"] = giou[layer]
        losses["class_error"] = wrong / number
        losses["cardinality_error"] = self.cardinality_error(logits[-1].detach(), targets)
        return losses

    def loss_boxes(self, boxes: Tensor, targets: DetectionTargets, matches: Matches) -> tuple[Tensor, Tensor]:
        """L1 distance and 1 - generalized IoU (L,) of `boxes` (L, B, Q, 4), summed over the matched pairs."""
        # Without any pair the sums are zero and still carry a (zero) gradient.
        predicted = boxes[matches.layers, matches.images, matches.queries]  # (M, 4)
        true = targets.boxes.to(boxes.dtype)[matches.objects]
        distance = (predicted - true).abs().sum(dim=-1)
        overlap = generalized_box_iou(corners_of(predicted), corners_of(true))
        # The pairs are ordered by layer, and every layer has the same number of them.
        per_layer = (len(boxes), len(predicted) // len(boxes))
        l1 = distance.view(per_layer).sum(dim=1)
        giou = (1 - overlap).view(per_layer).sum(dim=1)
        return l1, giou

    def cardinality_error(self, logits: Tensor, targets: DetectionTargets) -> Tensor:
        """Mean difference between the objects of an image and its queries that see one, by `logits`
        (B, Q, C + 1) of the last layer.
        """
        no_object = logits.shape[-1] - 1
        seen = (logits.argmax(dim=-1) != no_object).sum(dim=1)  # (B,)
        return (seen - targets.counts).abs().float().mean()


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: DetectionTargets,
    costs: Sequence[float],
    image_ids: Tensor | None = None,
) -> Matches:
    """The cheapest assignment of objects to queries, for each layer and image on its own.

    Where an image has more objects than there are queries, the cheapest Q objects are matched.

    Args:
        logits: (L, B, Q, C + 1) with "no object" last.
        boxes: (L, B, Q, 4) cxcywh in [0, 1].
        targets: on the same device.
        costs: weights of minus the probability of the object's class, the L1 distance of the boxes and minus
            their generalized IoU.
        image_ids: (B,) for errors only.

    Raises:
        FloatingPointError: a cost is not finite.
    """
    image_of = targets.image_of()
    probability = logits.softmax(dim=-1)
    predicted = boxes[:, image_of]  # (L, N, Q, 4)
    true = targets.boxes.to(predicted.dtype)[:, None]  # (N, 1, 4)
    # Two index vectors around a slice: torch moves their axis to the front, (N, L, Q).
    of_class = -probability[:, image_of, :, targets.labels].transpose(0, 1)
    distance = (predicted - true).abs().sum(dim=-1)
    overlap = -generalized_box_iou(corners_of(predicted), corners_of(true))
    ce, l1, giou = costs
    cost = ce * of_class + l1 * distance + giou * overlap
    return solve(cost, targets.counts, len(image_of), image_ids)


def generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalized IoU of corner boxes (..., 4) paired by broadcasting, in (-1, 1].

    Rezatofighi et al., arXiv 1902.09630, algorithm 1. Unlike torchvision's, finite for two boxes without
    area, and the host does not wait for the device.
    """
    low = first[..., :2]
    high = first[..., 2:]
    other_low = second[..., :2]
    other_high = second[..., 2:]
    overlap = torch.minimum(high, other_high) - torch.maximum(low, other_low)
    intersection = overlap.clamp(min=0).prod(dim=-1)
    areas = (high - low).prod(dim=-1) + (other_high - other_low).prod(dim=-1)
    union = areas - intersection
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(dim=-1)
    iou = intersection / union.clamp(min=_SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=_SMALLEST_AREA)
