"""Hungarian matching of queries to masks, for all prediction sets and all images of a batch.

Letters: L prediction sets, B images, A images with objects, Q queries, C classes, N objects of all images
concatenated, n objects of an image, P points, M matched pairs of all sets.

Costs are those of Mask2Former (arXiv 2112.01527, section 3.3): class probability, cross-entropy and dice of the masks,
the latter two on points that all masks of an image share. One copy to the host for the whole batch, as in `matching`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.ops import placed
from visft_ds.tasks.matching import (
    Matches,
    at_least_float32,
    check_labels,
    matches_of,
    raise_not_finite,
    shapes_of_matches,
    to_host,
)
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.mask_points import sample


@dataclass(frozen=True)
class MaskCosts:
    """Weights of the three terms of the cost of assigning an object to a query (Mask2Former's 2, 5, 5)."""

    ce: float = 2.0  #: times minus the probability of the object's class
    bce: float = 5.0  #: times the mean binary cross-entropy at the points
    dice: float = 5.0  #: times 1 - (2 * overlap + 1) / (area + area + 1) at the points


@torch.no_grad()
def match_masks(
    logits: Tensor,
    masks: Tensor,
    targets: SegmentationTargets,
    labels: Tensor,
    classes: range,
    points: Tensor,
    costs: MaskCosts,
    image_ids: Tensor | None = None,
) -> Matches:
    """The cheapest assignment of objects to queries, for each prediction set and image on its own.

    `logits` (L, B, Q, C + 1), `masks` (L, B, Q, h, w) logits, `labels` (N,) int64 in the head's numbering, which must
    lie in `classes`, `points` (A, L, P, 2) in [0, 1] of each image that has objects. Where an image has more objects
    than there are queries, the cheapest Q objects are matched. `image_ids` (B,) are for errors only.

    Raises ValueError for a label outside `classes`; FloatingPointError where the prediction makes a cost non-finite
    (it names the term and the image).
    """
    counts = targets.counts.numpy()
    # A label out of range is reported below, by name; as an index it would abort the device before that.
    terms = _cost_terms(logits, masks, targets, labels.clamp(0, logits.shape[-1] - 1), counts, points)
    cost = costs.ce * terms["ce"] + costs.bce * terms["bce"] + costs.dice * terms["dice"]
    if cost.is_meta:
        return shapes_of_matches(cost, int(counts.clip(max=logits.shape[2]).sum()))
    labels_host, cost_host = to_host(labels, cost)
    image_of = np.repeat(np.arange(len(counts)), counts)
    check_labels(labels_host.astype(np.int64), classes, image_of, image_ids)
    if not np.isfinite(cost_host).all():
        raise_not_finite(terms, image_of, image_ids)
    return matches_of(cost_host, counts, logits.device)


def _cost_terms(
    logits: Tensor,
    masks: Tensor,
    targets: SegmentationTargets,
    labels: Tensor,
    counts: npt.NDArray[np.int64],
    points: Tensor,
) -> dict[str, Tensor]:
    """The three unweighted terms, each (L, N, Q): every object against the queries of its own image only."""
    parts: dict[str, list[Tensor]] = {"ce": [], "bce": [], "dice": []}
    ends, at_once = np.cumsum(counts), 1 if placed(masks.device).type == "cpu" else len(masks)
    for number, image in enumerate(np.flatnonzero(counts)):
        rows = slice(ends[image] - counts[image], ends[image])
        probability = at_least_float32(logits[:, image]).softmax(dim=-1)  # (L, Q, C + 1)
        parts["ce"].append(-probability[..., labels[rows]].transpose(1, 2))
        wanted = targets.masks[rows].to(probability.dtype) / 255  # one map of n channels
        extents = targets.extents[image], targets.mask_extents[image]
        # A GPU takes all sets at once; on a CPU what one set needs stays in its caches, and is a tenth of the memory.
        of_sets = zip(masks[:, image].split(at_once), points[number].split(at_once), strict=True)
        blocks = [_mask_terms(predicted, wanted, at, *extents) for predicted, at in of_sets]
        for name, found in zip(("bce", "dice"), zip(*blocks, strict=True), strict=True):
            parts[name].append(torch.cat(found))
    empty = at_least_float32(logits).new_zeros(len(logits), 0, logits.shape[2])
    return {name: torch.cat([empty, *blocks], dim=1) for name, blocks in parts.items()}


def _mask_terms(
    predicted: Tensor, wanted: Tensor, points: Tensor, extent: Tensor, mask_extent: Tensor
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and dice of masks of an image, each (l, n, Q).

    Logits `predicted` (l, Q, h, w), `wanted` (n, hm, wm) in [0, 1], `points` (l, P, 2) of each set.
    """
    logits = at_least_float32(sample(predicted, points, extent))  # (l, Q, P)
    wanted = sample(wanted[None].to(logits.dtype), points.reshape(1, -1, 2), mask_extent)[0]
    wanted = wanted.unflatten(1, points.shape[:2]).transpose(0, 1)  # (l, n, P)
    # BCE is softplus(-x) t + softplus(x) (1 - t), which is softplus(x) - x t: one product instead of two
    overlap = wanted @ logits.transpose(1, 2)  # (l, n, Q)
    bce = (F.softplus(logits).sum(-1)[:, None] - overlap) / logits.shape[-1]
    shares = logits.sigmoid()
    areas = shares.sum(-1)[:, None] + wanted.sum(-1)[..., None]
    return bce, 1 - (2 * (wanted @ shares.transpose(1, 2)) + 1) / (areas + 1)
