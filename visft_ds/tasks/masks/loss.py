"""Segmentation: matching, criterion and post-processing of single-scale Mask2Former (arXiv 2112.01527).

Letters: B images, A of them with objects, h w patch grid, Q queries, C classes, L prediction sets = decoder
layers + 1, N objects of all images concatenated, n objects and m matched pairs of an image, P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.ops import at_least_float32, to_device
from visft_ds.tasks.masks.config import PlainHeadConfig, SegmentationLoss
from visft_ds.tasks.masks.data import SegmentationTargets
from visft_ds.tasks.masks.output import SegmentationOutput
from visft_ds.tasks.masks.points import draw_points, sample, uncertain_points
from visft_ds.tasks.matching import Matches, class_losses, solve
from visft_ds.tasks.segmentation.config import SegmentationHeadConfig


class SegmentationCriterion:
    """Set-prediction loss of every prediction set: class cross-entropy, mask cross-entropy and dice at
    points.

    `ce`, `bce` and `dice` weigh the losses and the costs of the matching alike. The masks of a pair are
    compared at `num_points` points (112 x 112): the share `importance` are those of `num_points * oversample`
    random ones where the prediction is least certain, the others uniform (see `mask_points`).

    Calling it gives *unweighted* losses by name: `ce`, `bce`, `dice` of the last layer, and with suffixes
    `_0` (before the first layer), `_1` .. `_{layers - 1}` those of the earlier sets; `weights` holds the
    factor of each. A plain head in evaluation mode gives the last set alone.
    `class_error` (percent of the objects whose matched query names another class) is for the log only.

    The points depend on an image's random key and on the layer alone: how the batch is split changes nothing.
    """

    def __init__(
        self,
        head: SegmentationHeadConfig | PlainHeadConfig,
        loss: SegmentationLoss,
        task: str = "segmentation",
    ) -> None:
        self.head, self.eos_coef, self.task = head, loss.eos_coef, task
        self.uncertain = int(loss.importance * loss.num_points)
        #: points of an image and prediction set: for the matching, candidates for the uncertain ones, uniform
        #: ones
        self.points = (
            loss.num_points,
            int(loss.num_points * loss.oversample),
            loss.num_points - self.uncertain,
        )
        self.costs = (loss.ce, loss.bce, loss.dice)
        self._suffixes = [*(f"_{layer}" for layer in range(head.decoder_layers)), ""]
        by_name = {"ce": loss.ce, "bce": loss.bce, "dice": loss.dice}
        self.weights: dict[str, float] = {
            name + s: weight for s in self._suffixes for name, weight in by_name.items()
        }

    def count(self, batch: Batch) -> dict[str, float]:
        counts = batch.targets[self.task].counts
        return {"masks": float(counts.sum()), "images": float(len(counts))}

    def __call__(
        self,
        output: SegmentationOutput,
        targets: SegmentationTargets,
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        head = self.head
        if output.extents is not None:
            targets = replace(targets, extents=to_device(output.extents, output.masks.device))
        logits, masks = at_least_float32(output.logits), at_least_float32(output.masks)
        given, suffixes = (
            (logits.shape[2], logits.shape[3] - 1, output.labelling),
            self._suffixes[-len(logits) :],
        )
        assert given == (head.num_queries, head.num_classes, head.labelling) and len(suffixes) == len(
            logits
        ), given
        keys = targets.keys[targets.counts > 0].tolist()
        matching, candidates, uniform = draw_points(keys, len(masks), self.points, masks.device)
        labels = targets.labels if head.labelling == "contiguous" else targets.labels + 1
        matches = match_masks(logits, masks, targets, labels, matching, self.costs, image_ids)
        ce, wrong = class_losses(logits, labels, targets.counts, matches, self.eos_coef, loss_denominators)
        # Without any pair the sums (L,) are zeros that still carry a (zero) gradient.
        bce = dice = masks.flatten(1)[:, :0].sum(dim=1)
        # the pairs are ordered by set and then by image, and every set has the same number of them
        queries, objects = matches.queries.view(len(masks), -1), matches.objects.view(len(masks), -1)
        every_set = torch.arange(len(masks), device=masks.device)[:, None]
        # the image's first pair and first object, and its place among the images with objects, for which
        # points exist
        pair = first = place = 0
        for image, count in enumerate(targets.counts.tolist()):
            if count == 0:
                continue
            pairs = slice(pair, pair + min(count, head.num_queries))
            predicted = masks[every_set, image, queries[:, pairs]]  # (L, m, h, w)
            extent = targets.extents[image]
            chosen = uncertain_points(
                predicted.detach(), candidates[place], uniform[place], self.uncertain, extent
            )
            true = targets.masks[first : first + count, None].to(masks.dtype) / 255  # stored as uint8
            # set by set, so that there is never a copy of the masks for every pair of every set
            sets = zip(objects[:, pairs] - first, chosen, strict=True)
            seen = [sample(true[rows], at, targets.mask_extents[image]).squeeze(1) for rows, at in sets]
            wanted = torch.stack(seen)  # (L, m, P) in [0, 1]
            x = sample(predicted.flatten(0, 1)[:, None], chosen.flatten(0, 1), extent).view_as(
                wanted
            )  # logits
            share = x.sigmoid()
            bce = bce + F.binary_cross_entropy_with_logits(x, wanted, reduction="none").mean(dim=-1).sum(
                dim=1
            )
            # + 1 as in Mask2Former's code: defined, and 0 for two empty masks
            overlap, areas = (share * wanted).sum(dim=-1), share.sum(dim=-1) + wanted.sum(dim=-1)
            dice = dice + (1 - (2 * overlap + 1) / (areas + 1)).sum(dim=1)
            pair, first, place = pairs.stop, first + count, place + 1
        number = loss_denominators["masks"]
        by_name = {"ce": ce, "bce": bce / number, "dice": dice / number}  # (L,) each
        losses = {
            name + s: one for name, each in by_name.items() for s, one in zip(suffixes, each, strict=True)
        }
        return {**losses, "class_error": wrong / number}


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
    """The cheapest assignment of objects to queries, for each prediction set and image on its own (ibid.,
    3.3).

    `logits` (L, B, Q, C + 1), `masks` (L, B, Q, h, w) logits, `labels` (N,) int64 in the head's numbering,
    `points` (A, L, P, 2) in [0, 1] of each image that has objects, weights `costs` of minus the probability
    of the object's class, the mean cross-entropy and the dice at the points. Where an image has more objects
    than there are queries, the cheapest Q objects are matched. `image_ids` (B,) are for errors only.

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
