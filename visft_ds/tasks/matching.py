"""Set prediction: matching of queries to objects, the loss of their classes, and the overlap of boxes.

Letters: L decoder layers, B images, Q queries, C classes without "no object", N objects of all images
concatenated, M matched pairs of all layers.

Objects are assigned to queries one to one at the least total cost (Carion et al., arXiv 2005.12872, eq. 1,
2). The host waits for the device once: all costs are copied to it together, and the indices of all pairs go
back in one copy. Boxes are `centers` (cx, cy, w, h) or `corners` (x0, y0, x1, y1) on the last axis, in any
unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visft_ds.ops import at_least_float32, to_device
from visft_ds.tasks.detection.data import DetectionTargets

# Areas and unions are divided by no less than this. Relative boxes of one pixel in a million pixels have area
# 1e-6, so that only boxes without any area are affected; their overlap is 0 instead of NaN.
_SMALLEST_AREA = 1e-12


@dataclass(frozen=True)
class Matches:
    """Index vectors of the M matched pairs, int64, ordered by layer and then by image.

    Every layer has the same number of pairs, `M / L`: an image with n objects has min(n, Q) of them.
    """

    layers: Tensor  #: (M,)
    images: Tensor  #: (M,)
    queries: Tensor  #: (M,)
    objects: Tensor  #: (M,) rows of the packed targets


def class_losses(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor,
    matches: Matches,
    no_object: float,
    loss_denominators: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy (L,) of the classes of all queries, and 100 times the objects that got a wrong
    class.

    `logits` (L, B, Q, C + 1), `labels` (N,) and `counts` (B,) of the objects. A query has the class of its
    object, or the last one, "no object". A term has the weight of its class: 1, or `no_object`, as nearly all
    queries see none. The weighted mean of each image is averaged over images; one without objects has the
    mean over its queries.
    """
    classes = torch.full(logits.shape[:3], logits.shape[3] - 1, dtype=torch.int64, device=logits.device)
    classes[matches.layers, matches.images, matches.queries] = labels[matches.objects]
    weight = logits.new_ones(logits.shape[-1])
    weight[-1:].fill_(no_object)  # a number in a kernel: unlike `weight[-1] = ...`, nothing is copied
    terms = F.cross_entropy(logits.flatten(end_dim=2), classes.flatten(), weight, reduction="none")
    means = terms.view_as(classes).sum(dim=2) / weight[classes].sum(dim=2)  # (L, B)
    right = (logits[-1].detach().argmax(dim=-1) == classes[-1]) & (classes[-1] != logits.shape[-1] - 1)
    return means.sum(dim=1) / loss_denominators["images"], 100 * (counts.sum() - right.sum())


@torch.no_grad()
def match(
    logits: Tensor,
    boxes: Tensor,
    targets: DetectionTargets,
    costs: Sequence[float],
    image_ids: Tensor | None = None,
) -> Matches:
    """The cheapest assignment of objects to queries, for each layer and image on its own.

    `logits` (L, B, Q, C + 1) with "no object" last, `boxes` (L, B, Q, 4) cxcywh in [0, 1], targets on the
    same device, weights `costs` of minus the probability of the object's class, the L1 distance of the boxes
    and minus their generalized IoU. Where an image has more objects than there are queries, the cheapest Q
    objects are matched. `image_ids` (B,) are for errors only.

    Raises FloatingPointError where a cost is not finite.
    """
    count = len(targets.boxes)
    # (N,): the image of each object. With output_size, repeat_interleave does not wait for the device.
    images = torch.arange(len(targets.counts), device=logits.device)
    image_of = torch.repeat_interleave(images, targets.counts, output_size=count)
    probability = at_least_float32(logits).softmax(dim=-1)
    candidates = at_least_float32(boxes)[:, image_of]  # (L, N, Q, 4)
    wanted = targets.boxes.to(candidates.dtype)[:, None]  # (N, 1, 4)
    # two index vectors around a slice: torch moves their axis to the front, (N, L, Q)
    of_class = -probability[:, image_of, :, targets.labels].transpose(0, 1)
    distance = (candidates - wanted).abs().sum(dim=-1)
    overlap = -generalized_box_iou(centers_to_corners(candidates), centers_to_corners(wanted))
    cost = costs[0] * of_class + costs[1] * distance + costs[2] * overlap
    return solve(cost, targets.counts, count, image_ids)


def solve(cost: Tensor, counts: Tensor, pairs: int, image_ids: Tensor | None) -> Matches:
    """Assign objects of each layer and image at the least `cost` (L, N, Q).

    `counts` (B,) are the objects of each image, there or on the host; `pairs` is the number of pairs of a
    layer, for costs on the meta device (planner), where there are no values; `image_ids` (B,) are for errors
    only.
    """
    if cost.is_meta:
        return Matches(*torch.empty(4, len(cost) * pairs, dtype=torch.int64, device=cost.device))
    # One copy for all that is on the device. As floats, counts below 2**24 stay exact.
    together = [counts.to(cost.dtype)] if counts.device == cost.device else []
    host = torch.cat([*together, cost.flatten()]).cpu().numpy()
    number = host[: len(counts)].astype(np.int64) if together else counts.numpy()
    costs = host[len(host) - cost.numel() :].reshape(cost.shape)
    if not np.isfinite(costs).all():
        bad = np.repeat(np.arange(len(number)), number)[~np.isfinite(costs).all(axis=(0, 2))]
        ids = sorted(set((bad if image_ids is None else image_ids.cpu().numpy()[bad]).tolist()))
        remedy = "the training has diverged, or a 16-bit type overflowed"
        raise FloatingPointError(f"the matching costs of the images {ids} are not finite: {remedy}")
    ends = np.cumsum(number)
    found = [np.empty((4, 0), dtype=np.int64)]  # layer, image, query, object
    for layer, cost_of_layer in enumerate(costs):
        for image in np.flatnonzero(number):
            start = ends[image] - number[image]
            objects, queries = linear_sum_assignment(cost_of_layer[start : ends[image]])
            same = np.ones_like(objects)
            found.append(np.stack([layer * same, image * same, queries, objects + start]))
    return Matches(*to_device(torch.from_numpy(np.concatenate(found, axis=1)), cost.device))


def centers_to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) cxcywh -> (..., 4) xyxy, same unit."""
    centres, sides = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centres - 0.5 * sides, centres + 0.5 * sides), dim=-1)


def generalized_box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Generalized IoU of corner boxes paired by broadcasting, in (-1, 1].

    Rezatofighi et al., arXiv 1902.09630, algorithm 1. Unlike torchvision's, finite for two boxes without
    area, and the host does not wait for the device.
    """
    overlap = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])
    intersection = overlap.clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    union = areas[0] + areas[1] - intersection
    low = torch.minimum(first[..., :2], second[..., :2])
    high = torch.maximum(first[..., 2:], second[..., 2:])
    hull = (high - low).prod(dim=-1)
    iou = intersection / union.clamp(min=_SMALLEST_AREA)
    return iou - (hull - union) / hull.clamp(min=_SMALLEST_AREA)
