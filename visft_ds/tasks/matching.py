"""Hungarian matching of queries to objects, for all layers and images of a batch at once; the loss of their classes.

Letters: L decoder layers, B images, Q queries, C classes without "no object", N objects of all images concatenated,
M matched pairs of all layers.

Set prediction assigns objects to queries one to one at the least total cost (Carion et al., arXiv 2005.12872, eq. 1,
2). The host waits for the device once: the costs of all layers and images, the counts and the labels are copied to the
host together, scipy solves the small problems there, and the indices of all pairs go back in one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visft_ds.config.task_schema import ClassAverage
from visft_ds.ops.copies import to_device
from visft_ds.tasks.boxes import centers_to_corners, generalized_box_iou
from visft_ds.tasks.detection.data import DetectionTargets


@dataclass(frozen=True)
class MatchingCosts:
    """Weights of the three terms of the cost of assigning an object to a query (DETR's 1, 5, 2)."""

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


@dataclass(frozen=True)
class ClassLoss:
    """Weighted cross-entropy of the queries' classes against those of their objects.

    A term has the weight of its target class: 1, or `no_object` for the last one, as nearly all queries see none.
    `average` says which terms share a weighted mean: those of an image, whose means are then averaged over images, or
    those of the global batch. An image without objects, or with crowds alone, has the mean over its queries.
    """

    no_object: float
    average: ClassAverage

    def count(self, images: int, queries: int, matched: int) -> dict[str, float]:
        """Denominator of the loss by its name, to be summed over ranks and micro-batches.

        `matched` of the `images * queries` terms have the weight 1, the others `no_object`.
        """
        if self.average == "image":
            return {"images": float(images)}
        return {"class_weight": matched + self.no_object * (images * queries - matched)}

    def __call__(self, logits: Tensor, classes: Tensor, loss_denominators: Mapping[str, Tensor]) -> Tensor:
        """Loss (L,) of logits (L, B, Q, C + 1) with target classes (L, B, Q) int64."""
        weight = logits.new_ones(logits.shape[-1])
        weight[-1:].fill_(self.no_object)  # a number in a kernel: unlike `weight[-1] = ...`, nothing is copied
        terms = F.cross_entropy(logits.flatten(end_dim=2), classes.flatten(), weight, reduction="none")
        if self.average == "batch":
            return terms.view(len(logits), -1).sum(dim=1) / loss_denominators["class_weight"]
        means = terms.view_as(classes).sum(dim=2) / weight[classes].sum(dim=2)  # (L, B)
        return means.sum(dim=1) / loss_denominators["images"]


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, targets: DetectionTargets, costs: MatchingCosts, image_ids: Tensor | None = None
) -> Matches:
    """The cheapest assignment of objects to queries, for each layer and image on its own.

    `logits` (L, B, Q, C + 1) with "no object" last, `boxes` (L, B, Q, 4) cxcywh in [0, 1], targets on the same device.
    Where an image has more objects than there are queries, the cheapest Q objects are matched. `image_ids` (B,) are
    for errors only.

    Raises ValueError for a label outside 0..C-1 and for target boxes that are not finite; FloatingPointError where the
    prediction makes a cost non-finite (it names the term and the image).
    """
    num_classes = logits.shape[-1] - 1
    num_objects = targets.boxes.shape[0]
    # (N,): the image of each object. With output_size, repeat_interleave does not wait for the device.
    image_of = torch.repeat_interleave(
        torch.arange(targets.counts.shape[0], device=logits.device), targets.counts, output_size=num_objects
    )
    # A label out of range is reported below, by name; as an index it would abort the device before that.
    labels = targets.labels.clamp(0, num_classes - 1)
    terms = _cost_terms(logits, boxes, targets.boxes, labels, image_of)
    cost = costs.ce * terms["ce"] + costs.l1 * terms["l1"] + costs.giou * terms["giou"]
    if cost.is_meta:
        return shapes_of_matches(cost, num_objects)
    on_host = to_host(targets.counts, targets.labels, cost)
    counts_host, labels_host, cost_host = *(numbers.astype(np.int64) for numbers in on_host[:2]), on_host[2]
    assert len(counts_host) == logits.shape[1] and counts_host.sum() == num_objects, "targets are packed wrongly"
    image_of_host = np.repeat(np.arange(len(counts_host)), counts_host)
    check_labels(labels_host, range(num_classes), image_of_host, image_ids)
    if not np.isfinite(cost_host).all():
        _raise_not_finite(terms, targets, image_of_host, image_ids)
    return matches_of(cost_host, counts_host, logits.device)


def shapes_of_matches(cost: Tensor, count: int) -> Matches:
    """Matches of `count` objects in each layer, without values: for costs (L, N, Q) on the meta device (planner)."""
    return Matches(*(torch.empty(4, len(cost) * count, dtype=torch.int64, device=cost.device)))


def _cost_terms(logits: Tensor, boxes: Tensor, targets: Tensor, labels: Tensor, image_of: Tensor) -> dict[str, Tensor]:
    """The three unweighted terms, each (L, N, Q): every object against the queries of its own image only."""
    probability = at_least_float32(logits).softmax(dim=-1)
    candidates = at_least_float32(boxes)[:, image_of]  # (L, N, Q, 4)
    wanted = targets.to(candidates.dtype)[:, None]  # (N, 1, 4)
    return {
        # two index vectors around a slice: torch moves their axis to the front, (N, L, Q)
        "ce": -probability[:, image_of, :, labels].transpose(0, 1),
        "l1": (candidates - wanted).abs().sum(dim=-1),
        "giou": -generalized_box_iou(centers_to_corners(candidates), centers_to_corners(wanted)),
    }


def to_host(*tensors: Tensor) -> list[npt.NDArray[np.float64]]:
    """Copy tensors together, in the dtype of the last one; as floats, integers below 2**24 stay exact."""
    host = torch.cat([tensor.to(tensors[-1].dtype).flatten() for tensor in tensors]).cpu().numpy()
    parts = np.split(host, np.cumsum([tensor.numel() for tensor in tensors])[:-1])
    return [part.reshape(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def matches_of(cost: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], device: torch.device) -> Matches:
    """`assign`, on the device."""
    return Matches(*to_device(torch.from_numpy(assign(cost, counts)), device))


def assign(cost: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Assign objects of each layer and image: cost (L, N, Q), counts (B,) -> (4, M) layer, image, query, object."""
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
    terms: dict[str, Tensor], targets: DetectionTargets, image_of: npt.NDArray[np.int64], image_ids: Tensor | None
) -> None:
    bad_targets = np.flatnonzero(~torch.isfinite(targets.boxes).all(dim=-1).cpu().numpy())
    if len(bad_targets):
        row = bad_targets[0]
        raise ValueError(
            f"target box {targets.boxes[row].tolist()} in {_name(image_of[row], image_ids)} is not finite: "
            "remove it from the annotations and build the shards again"
        )
    raise_not_finite(terms, image_of, image_ids)


def raise_not_finite(terms: dict[str, Tensor], image_of: npt.NDArray[np.int64], image_ids: Tensor | None) -> NoReturn:
    """Raise FloatingPointError for costs of which at least one is not finite; `image_of` (N,): each object's image."""
    for term, cost in terms.items():
        bad = np.argwhere(~torch.isfinite(cost).cpu().numpy())
        if len(bad):
            layer, row, query = bad[0]
            raise FloatingPointError(
                f"the matching cost {term!r} of {_name(image_of[row], image_ids)} is {cost[layer, row, query].item()} "
                f"in decoder layer {layer}, query {query} ({len(bad)} of {cost.numel()} values are not finite): the "
                "head's output is not finite. Training has diverged, a 16-bit type overflowed, or the image has no "
                "valid patch"
            )
    raise FloatingPointError(
        "the matching cost overflowed although each of its terms is finite: lower the matching weights"
    )


def check_labels(
    labels: npt.NDArray[np.int64], classes: range, image_of: npt.NDArray[np.int64], image_ids: Tensor | None
) -> None:
    """Raise ValueError unless every label (N,) lies in `classes`; `image_of` (N,) is the image of each object."""
    wrong = np.flatnonzero((labels < classes.start) | (labels >= classes.stop))
    if len(wrong):
        raise ValueError(
            f"label {labels[wrong[0]]} in {_name(image_of[wrong[0]], image_ids)} is outside the head's classes "
            f"{classes.start}..{classes.stop - 1}: raise the head's num_classes or map the categories"
        )


def _name(image: int, image_ids: Tensor | None) -> str:
    return f"image {image} of the micro-batch" if image_ids is None else f"image_id {int(image_ids[image])}"


def at_least_float32(values: Tensor) -> Tensor:
    """Convert to float32, unless the values are float64: costs and losses are never computed in 16 bit."""
    return values if values.dtype == torch.float64 else values.float()
