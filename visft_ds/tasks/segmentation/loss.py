"""Segmentation: matching, criterion and post-processing of single-scale Mask2Former (arXiv 2112.01527).

Letters: B images, A of them with objects, h w patch grid, Q queries, C classes, L prediction sets = decoder
layers + 1, N objects of all images concatenated, n objects and m matched pairs of an image, P points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.ops import at_least_float32, to_device
from visft_ds.tasks import Results
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.matching import Matches, class_losses, solve
from visft_ds.tasks.segmentation.config import PlainHeadConfig, SegmentationHeadConfig, SegmentationLoss
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.head import SegmentationOutput
from visft_ds.tasks.segmentation.mask_points import draw_points, sample, uncertain_points

#: Values of full-size masks that post-processing holds at a time: 128 MiB of float32.
_MASK_BUDGET = 1 << 25
_RESULTS = 100  #: of an image, as COCO's evaluation counts them


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


@torch.no_grad()
def postprocess(
    output: SegmentationOutput, batch: Batch, classes: Sequence[int] | None = None, threshold: float = 0.0
) -> Results:
    """Predictions in COCO's results format: image_id, category_id, segmentation, bbox, score.

    segmentation is a run-length code at the size of the stored image, its counts as str; bbox is the (x, y,
    w, h) around it in pixels, category_id the entry of `classes` (by default COCO's) for the class. A mask is
    where its bilinearly interpolated logits are above 0, in one region or several: what stands in front of an
    object divides it. Heads in our labelling give the 100 pairs of a query and a class with the highest
    softmax probability, scored by that times the mean probability inside the mask (as in Mask2Former's code).
    In the published labelling a query gives its best class and the probability of that, as in ViSFT's code. A
    query without a single pixel gives nothing: it would count as a confident mistake. Images without
    `batch.real` are left out. The batch must have been resized without cropping, as evaluation transforms do.
    Masks are made in groups of a bounded size, and of scores from `threshold` on only.
    """
    classes = COCO_CATEGORY_IDS if classes is None else classes
    first = 0 if output.labelling == "contiguous" else 1  # class 0 means nothing in the published labelling
    likely = at_least_float32(output.logits[-1]).softmax(dim=-1)[..., first:-1][
        ..., : len(classes)
    ]  # (B, Q, C)
    if first == 0:
        scores, pairs = likely.flatten(1).topk(min(_RESULTS, likely[0].numel()))
        queries, best = pairs // likely.shape[2], pairs % likely.shape[2]
    else:
        scores, best = likely.max(dim=-1)
        queries = torch.arange(likely.shape[1]).expand(len(likely), -1)
    found = [part.tolist() for part in (queries, best, scores)]
    whole = batch.sizes.double().cpu() / torch.tensor(batch.images.shape[-2:])
    extents, results = whole if output.extents is None else output.extents, Results()
    for image in batch.real.nonzero().flatten().tolist():
        kept = [
            one for one in zip(*(part[image] for part in found), strict=True) if not one[2] < threshold
        ]  # NaN, too
        shown = sorted({query for query, _, _ in kept})
        masks = at_least_float32(output.masks[-1, image, shown])
        shares, stored = extents[image].tolist(), batch.original_sizes[image].tolist()
        codes, qualities = _mask_codes(masks, shares, stored)
        number = {query: place for place, query in enumerate(shown)}
        for query, label, likelihood in kept:
            code = codes[number[query]]
            score = likelihood * qualities[number[query]] if first == 0 else likelihood
            if not coco_mask.area(code) or score < threshold:
                continue
            about = {"image_id": int(batch.image_ids[image]), "category_id": classes[label]}
            shape = {"size": stored, "counts": code["counts"].decode("ascii")}
            results.append(
                {**about, "segmentation": shape, "bbox": coco_mask.toBbox(code).tolist(), "score": score}
            )
    return results


def _mask_codes(
    masks: Tensor, shares: list[float], stored: list[int]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Run-length codes of masks at the stored size, and the mean probability inside each, 0 where it is
    empty.

    `masks` (Q, h, w) are logits, of which `shares` (height, width) are image.
    """
    rows = interpolation(masks.shape[1], shares[0], stored[0], masks)  # (H, h)
    columns = interpolation(masks.shape[2], shares[1], stored[1], masks)  # (W, w)
    step = max(1, _MASK_BUDGET // (stored[0] * stored[1]))
    codes: list[dict[str, Any]] = []
    qualities: list[float] = []
    for part in masks.split(step):
        # bilinear interpolation is one linear map along each axis; transposed, as run-length codes go down
        # columns
        logits = columns @ (rows @ part).transpose(1, 2)  # (q, W, H)
        inside = logits > 0
        codes += coco_mask.encode(inside.to(torch.uint8).cpu().numpy().transpose(2, 1, 0))
        probabilities = logits.sigmoid_().mul_(inside)  # in place: a copy would double what is held
        pixels = inside.sum(dim=(1, 2)).clamp(min=1)
        qualities += (probabilities.sum(dim=(1, 2)) / pixels).tolist()
    return codes, qualities


def interpolation(cells: int, share: float, pixels: int, like: Tensor) -> Tensor:
    """Matrix (pixels, cells) of linear interpolation from cells to pixels spread over the first `share` of
    the cells.

    As `F.interpolate(mode="bilinear", align_corners=False)`, which can take a whole number of cells only.
    Cells beyond the image have no part in it.
    """
    inside = share * cells
    place = (torch.arange(pixels, device=like.device, dtype=torch.float64) + 0.5) * (inside / pixels) - 0.5
    place = place.clamp(0, math.ceil(inside - 1e-4) - 1)[:, None]
    return (1 - (place - torch.arange(cells, device=like.device)).abs()).clamp(min=0).to(like.dtype)
