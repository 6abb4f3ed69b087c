"""Hungarian matching of queries to masks, for all prediction sets and all images of a batch.

Letters: L prediction sets, B images, A images with objects, Q queries, C classes, N objects of all images
concatenated, n objects of an image, P points, M matched pairs of all sets.

Costs are those of Mask2Former (arXiv 2112.01527, section 3.3): class probability, cross-entropy and dice of the masks,
the latter two on points that all masks of an image share. One copy to the host for the whole batch, as in `matching`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.tasks.matching import Matches, at_least_float32, solve
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.mask_points import sample


@torch.no_grad()
def match_masks(
    logits: Tensor,
    masks: Tensor,
    targets: SegmentationTargets,
    labels: Tensor,
    points: Tensor,
    costs: tuple[float, float, float],
    image_ids: Tensor | None = None,
) -> Matches:
    """The cheapest assignment of objects to queries, for each prediction set and image on its own.

    `logits` (L, B, Q, C + 1), `masks` (L, B, Q, h, w) logits, `labels` (N,) int64 in the head's numbering, `points`
    (A, L, P, 2) in [0, 1] of each image that has objects, weights `costs` of minus the probability of the object's
    class, the mean cross-entropy and the dice at the points. Where an image has more objects than there are queries,
    the cheapest Q objects are matched. `image_ids` (B,) are for errors only.

    Raises FloatingPointError where a cost is not finite.
    """
    counts = targets.counts.numpy()
    parts, ends = [at_least_float32(logits).new_zeros(len(logits), 0, logits.shape[2])], np.cumsum(counts)
    for number, image in enumerate(np.flatnonzero(counts)):
        rows = slice(ends[image] - counts[image], ends[image])
        probability = at_least_float32(logits[:, image]).softmax(dim=-1)  # (L, Q, C + 1)
        of_class = -probability[..., labels[rows]].transpose(1, 2)
        at = points[number]  # (L, P, 2)
        x = at_least_float32(sample(masks[:, image], at, targets.extents[image]))  # (L, Q, P) logits
        true = targets.masks[rows].to(probability.dtype) / 255  # one map of n channels
        wanted = sample(true[None].to(x.dtype), at.reshape(1, -1, 2), targets.mask_extents[image])[0]
        wanted = wanted.unflatten(1, at.shape[:2]).transpose(0, 1)  # (L, n, P)
        # BCE is softplus(-x) t + softplus(x) (1 - t), which is softplus(x) - x t: one product instead of two
        bce = (F.softplus(x).sum(-1)[:, None] - wanted @ x.transpose(1, 2)) / x.shape[-1]  # (L, n, Q)
        shares = x.sigmoid()
        areas = shares.sum(-1)[:, None] + wanted.sum(-1)[..., None]
        dice = 1 - (2 * (wanted @ shares.transpose(1, 2)) + 1) / (areas + 1)
        parts.append(costs[0] * of_class + costs[1] * bce + costs[2] * dice)
    pairs = int(counts.clip(max=logits.shape[2]).sum())
    return solve(torch.cat(parts, dim=1), targets.counts, pairs, image_ids)
