"""Hungarian matching of queries to objects, for all decoder layers and all images of a batch at once.

Letters: L decoder layers, B images, Q queries, C classes without "no object", N objects packed over the batch,
M matched pairs of all layers.

Set prediction gives every object the query that suits it best, one to one (Carion et al., arXiv 2005.12872, eq. 1, 2).
The device is asked once: the costs of all layers and images, the counts and the labels travel to the host in a single
copy, scipy solves the small problems there, and the indices of all pairs go back in a single copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visft_ds.tasks.boxes import centers_to_corners, generalized_box_iou
from visft_ds.tasks.detection.data import DetectionTargets


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the three terms of the cost of giving an object to a query (the reference's 1, 5, 2)."""

    ce: float = 1.0  #: times minus the probability of the object's class
    l1: float = 5.0  #: times the L1 distance of the relative cxcywh boxes
    giou: float = 2.0  #: times minus the generalized IoU


@dataclass(frozen=True)
class Matches:
    """Index vectors of the M matched pairs, int64, ordered by layer and then by image.

    Every layer has the same number of pairs, `M / L`: an image with n objects has min(n, Q) of them.
    """

    layers: Tensor  #: (M,)
    images: Tensor  #: (M,)
    queries: Tensor  #: (M,)
    objects: Tensor  #: (M,) rows of the packed targets


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, targets: DetectionTargets, costs: MatchingCosts, image_ids: Tensor | None = None
) -> Matches:
    """The cheapest assignment of objects to queries, for each layer and image on its own.

    `logits` (L, B, Q, C + 1) with "no object" last, `boxes` (L, B, Q, 4) cxcywh in [0, 1], targets on the same device.
    Where an image has more objects than there are queries, the cheapest Q objects are matched. `image_ids` (B,) only
    serve to name an image in an error.

    Raises ValueError for a label outside 0..C-1 and for target boxes that are not finite; FloatingPointError where the
    prediction makes a cost non-finite (it names the term and the image).
    """
    num_classes = logits.shape[-1] - 1
    num_objects = targets.boxes.shape[0]
    # output_size keeps repeat_interleave from asking the device how long its result is
    owner = torch.repeat_interleave(
        torch.arange(targets.counts.shape[0], device=logits.device), targets.counts, output_size=num_objects
    )
    # a label out of range is reported below, by name; the lookup itself must not crash the device before that
    labels = targets.labels.clamp(0, num_classes - 1)
    terms = _cost_terms(logits, boxes, targets.boxes, labels, owner)
    cost = costs.ce * terms["ce"] + costs.l1 * terms["l1"] + costs.giou * terms["giou"]
    if cost.is_meta:
        return shapes_of_matches(cost, num_objects)
    counts_host, labels_host, cost_host = _to_host(targets, cost)
    assert len(counts_host) == logits.shape[1] and counts_host.sum() == num_objects, "targets are packed wrongly"
    owner_host = np.repeat(np.arange(len(counts_host)), counts_host)
    check_labels(labels_host, range(num_classes), owner_host, image_ids)
    if not np.isfinite(cost_host).all():
        _raise_not_finite(terms, targets, owner_host, image_ids)
    pairs = torch.from_numpy(assign(cost_host, counts_host)).to(logits.device)
    return Matches(*pairs)


def shapes_of_matches(cost: Tensor, count: int) -> Matches:
    """Pairs of `count` objects in each layer, of shapes without numbers: for costs (L, N, Q) on the meta device."""
    return Matches(*(torch.empty(4, len(cost) * count, dtype=torch.int64, device=cost.device)))


def _cost_terms(logits: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor, owner: Tensor) -> dict[str, Tensor]:
    """The three unweighted terms, each (L, N, Q): every object against the queries of its own image only."""
    probability = at_least_float32(logits).softmax(dim=-1)
    candidates = at_least_float32(boxes)[:, owner]  # (L, N, Q, 4)
    wanted = targets.to(candidates.dtype)[:, None]  # (N, 1, 4)
    return {
        # two index vectors around a slice: torch moves their axis to the front, (N, L, Q)
        "ce": -probability[:, owner, :, labels].transpose(0, 1),
        "l1": (candidates - wanted).abs().sum(dim=-1),
        "giou": -generalized_box_iou(centers_to_corners(candidates), centers_to_corners(wanted)),
    }


def _to_host(
    targets: DetectionTargets, cost: Tensor
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Counts, labels and cost in one copy. As floats: both integers are far below 2**24, where float32 is exact."""
    num_images, num_objects = targets.counts.shape[0], targets.labels.shape[0]
    numbers = (targets.counts.to(cost.dtype), targets.labels.to(cost.dtype), cost.flatten())
    host = torch.cat(numbers).cpu().numpy()
    counts = host[:num_images].astype(np.int64)
    labels = host[num_images : num_images + num_objects].astype(np.int64)
    return counts, labels, host[num_images + num_objects :].reshape(cost.shape)


def assign(cost: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Solve every (objects, queries) problem; rows of the result: layer, image, query, object."""
    ends = np.cumsum(counts)
    found: list[npt.NDArray[np.int64]] = []
    for layer, cost_of_layer in enumerate(cost):
        for image, (count, end) in enumerate(zip(counts, ends, strict=True)):
            if count == 0:
                continue
            start = end - count
            objects, queries = linear_sum_assignment(cost_of_layer[start:end])
            pairs = np.empty((4, len(objects)), dtype=np.int64)
            pairs[0], pairs[1], pairs[2], pairs[3] = layer, image, queries, objects + start
            found.append(pairs)
    return np.concatenate(found, axis=1) if found else np.empty((4, 0), dtype=np.int64)


def _raise_not_finite(
    terms: dict[str, Tensor], targets: DetectionTargets, owner: npt.NDArray[np.int64], image_ids: Tensor | None
) -> None:
    bad_targets = np.flatnonzero(~torch.isfinite(targets.boxes).all(dim=-1).cpu().numpy())
    if len(bad_targets):
        row = bad_targets[0]
        raise ValueError(
            f"target box {targets.boxes[row].tolist()} in {_name(owner[row], image_ids)} is not finite: "
            "remove it from the annotations and build the shards again"
        )
    raise_not_finite(terms, owner, image_ids)


def raise_not_finite(terms: dict[str, Tensor], owner: npt.NDArray[np.int64], image_ids: Tensor | None) -> NoReturn:
    """The error for costs of which one at least is not finite; `owner` (N,) is the image of each object."""
    for term, cost in terms.items():
        bad = np.argwhere(~torch.isfinite(cost).cpu().numpy())
        if len(bad):
            layer, row, query = bad[0]
            raise FloatingPointError(
                f"the matching cost {term!r} of {_name(owner[row], image_ids)} is {cost[layer, row, query].item()} in "
                f"decoder layer {layer}, query {query} ({len(bad)} of {cost.numel()} values are not finite): the "
                "head's output is not finite. Training has diverged, a 16-bit type overflowed, or the image has no "
                "valid patch"
            )
    raise FloatingPointError(
        "the matching cost overflowed although each of its terms is finite: lower the matching weights"
    )


def check_labels(
    labels: npt.NDArray[np.int64], classes: range, owner: npt.NDArray[np.int64], image_ids: Tensor | None
) -> None:
    """Raise ValueError unless every label (N,) lies in `classes`; `owner` (N,) is the image of each object."""
    wrong = np.flatnonzero((labels < classes.start) | (labels >= classes.stop))
    if len(wrong):
        raise ValueError(
            f"label {labels[wrong[0]]} in {_name(owner[wrong[0]], image_ids)} is outside the head's classes "
            f"{classes.start}..{classes.stop - 1}: raise the head's num_classes or map the categories"
        )


def _name(image: int, image_ids: Tensor | None) -> str:
    return f"image {image} of the micro-batch" if image_ids is None else f"image_id {int(image_ids[image])}"


def at_least_float32(values: Tensor) -> Tensor:
    """Costs and losses are never computed in 16 bit."""
    return values if values.dtype == torch.float64 else values.float()
