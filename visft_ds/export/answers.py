"""Answers of heads, decoded by operations that every runtime has: boxes, scores, labels, masks, classes.

Each picture gets the same number of objects, the best first: where there are fewer, the score is 0 and the
label -1. Letters: B pictures, N objects, H W their pixels, h w grid, Q queries, C classes, S cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.samples import Map
from visft_ds.data.transforms import Size
from visft_ds.tasks.depth.head import DepthOutput
from visft_ds.tasks.detection.data import corners_of
from visft_ds.tasks.detection.dense import CANDIDATES, LEAST_SCORE, OVERLAP, DenseHead, DenseOutput
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.panoptic.head import PanopticOutput
from visft_ds.tasks.panoptic.results import INSIDE
from visft_ds.tasks.semantic.head import SemanticOutput

Outputs = dict[str, Tensor]  #: of a file, by name

_GROUP = 8  # classes, or masks, that are held at full size at a time


class Picture(NamedTuple):
    """Sizes of the pictures of a batch."""

    height: int  #: H
    width: int  #: W
    size: Size  #: in pixels, at which the network sees them
    padded: Size  #: of its frame
    ids: Sequence[int] = ()  #: of the categories that the data has, by label

    def corners(self, relative: Tensor) -> Tensor:
        """Corners (B, N, 4) in pixels, of shares of the picture."""
        x = relative[..., 0::2] * self.width
        y = relative[..., 1::2] * self.height
        return torch.stack((x, y), dim=-1).flatten(-2)

    def fine(self, maps: Tensor) -> Tensor:
        """Maps (..., h, w) of the frame, interpolated to (..., H, W)."""
        rows = _spread(maps.shape[-2], self.size[0], self.padded[0], self.height, maps)
        columns = _spread(maps.shape[-1], self.size[1], self.padded[1], self.width, maps)
        return rows @ maps @ columns.T


def _spread(cells: int, side: int, frame: int, pixels: int, like: Tensor) -> Tensor:
    """`masks.interpolation.interpolation` of cells of which `side` of `frame` pixels show the picture.

    In whole numbers up to the last quotient: no runtime needs float64.
    """
    centres = (2 * torch.arange(pixels, device=like.device) + 1) * (side * cells)
    unit = 2 * pixels * frame
    last = -(-side * cells // frame) - 1
    positions = centres - pixels * frame
    positions = torch.maximum(positions, torch.zeros_like(positions))
    positions = torch.minimum(positions, torch.full_like(positions, 1) * (last * unit))
    distances = (positions[:, None] - torch.arange(cells, device=like.device) * unit).abs()
    # (unit - distance) is exact, and so small that fp32 rounds the quotient alone.
    weights = torch.maximum(unit - distances, torch.zeros_like(distances)).to(torch.float32)
    return weights / (torch.full_like(weights[:1, :1], 1) * unit)


def quotient(numbers: Tensor, divisor: Tensor | int) -> Tensor:
    """float32 of the whole quotients, below 2^20, of whole numbers: exact."""
    multiples = numbers - numbers % divisor
    return (multiples.float() / divisor).round()


def dense(output: DenseOutput, picture: Picture) -> Outputs:
    """boxes (B, N, 4) xyxy, scores (B, N), labels (B, N): as `detection.dense.dense_results`."""
    detections = _detections(output, 0.0)
    return {**detections, "boxes": picture.corners(detections["boxes"])}


def dense_with_masks(head: DenseHead, maps: Sequence[Map], picture: Picture) -> Outputs:
    """Those of `dense`, and box_masks (B, N, SIDE, SIDE): logits in the cells of each box."""
    assert head.masks is not None
    detections = _detections(head.boxes(maps), LEAST_SCORE)
    corners = detections["boxes"]
    every = torch.arange(corners.shape[0] * corners.shape[1], device=corners.device)
    box_masks = head.masks(maps, corners, every).unflatten(0, corners.shape[:2])
    return {**detections, "boxes": picture.corners(corners), "box_masks": box_masks}


def _detections(output: DenseOutput, least: float) -> Outputs:
    """boxes (B, N, 4) relative to the picture, scores, labels; those of a score below `least` are none."""
    scores = output.logits.sigmoid().masked_fill(~output.valid[..., None], -1.0)
    num_classes = scores.shape[2]
    most = output.max_detections
    number = min(CANDIDATES * most, scores.shape[1] * num_classes)
    best, pairs = scores.flatten(1).topk(number)
    cells = quotient(pairs, num_classes).long()
    labels = pairs % num_classes
    corners = output.boxes.clamp(0, 1).gather(1, cells[..., None].expand(-1, -1, 4))
    stays = _distinct(corners, labels) & (best >= least)
    return _best(torch.where(stays, best, -1.0), corners, labels, most)


def _distinct(corners: Tensor, labels: Tensor) -> Tensor:
    """(B, N) bool: what non-maximum suppression within a class leaves of boxes (B, N, 4), the best first.

    A box goes if a better one that stays overlaps it. This is repeated, from all boxes, until nothing
    changes, which is what one box after another gives.
    """
    low = torch.maximum(corners[:, :, None, :2], corners[:, None, :, :2])
    high = torch.minimum(corners[:, :, None, 2:], corners[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(dim=-1)
    areas = (corners[..., 2:] - corners[..., :2]).prod(dim=-1)
    union = areas[:, :, None] + areas[:, None] - common
    overlaps = common > OVERLAP * union
    of_class = labels[:, :, None] == labels[:, None]
    rank = torch.arange(corners.shape[1], device=corners.device)
    is_better = rank[None] < rank[:, None]
    suppressed_by = (overlaps & of_class & is_better).float()

    def changes(stays: Tensor, before: Tensor) -> Tensor:
        return (stays != before).any()

    def again(stays: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        stronger = (suppressed_by @ stays[..., None]).squeeze(-1)
        return (stronger == 0).float(), stays.clone()

    every = torch.ones_like(areas)
    stays, _ = torch._higher_order_ops.while_loop(changes, again, (every, torch.zeros_like(every)))
    return stays > 0


def _best(scores: Tensor, boxes: Tensor, labels: Tensor, most: int, masks: Tensor | None = None) -> Outputs:
    """The `most` objects of each picture with the highest scores; -1 marks none."""
    best, positions = scores.topk(min(most, scores.shape[1]))
    is_object = best >= 0
    chosen = {"boxes": boxes.gather(1, positions[..., None].expand(-1, -1, 4))}
    chosen["scores"] = torch.where(is_object, best, 0.0)
    chosen["labels"] = torch.where(is_object, labels.gather(1, positions), -1)
    if masks is not None:
        where = positions[:, :, None, None].expand(-1, -1, masks.shape[2], masks.shape[3])
        chosen["masks"] = masks.gather(1, where).bool()
    return chosen


def queries(output: DetectionOutput, picture: Picture) -> Outputs:
    """boxes (B, N, 4) xyxy, scores (B, N), labels (B, N): as `detection.head.postprocess`."""
    probability = output.logits[-1].softmax(dim=-1)
    scores, labels = probability[..., :-1].max(dim=-1)
    corners = corners_of(output.boxes[-1])
    return _best(scores, picture.corners(corners), labels, scores.shape[1])


def masks(output: MaskOutput, picture: Picture) -> Outputs:
    """masks (B, N, H, W) bool, boxes around them, scores, labels: as `segmentation.results.instances`."""
    probability = output.logits[-1].softmax(dim=-1)
    is_contiguous = output.class_ids == "contiguous"
    if is_contiguous:
        pairs = probability[..., :-1][..., : len(picture.ids)].flatten(1)
        scores, chosen = pairs.topk(min(output.max_detections, pairs.shape[1]))
        number = min(len(picture.ids), probability.shape[2] - 1)
        rows = quotient(chosen, number).long()
        labels = chosen % number
    else:
        scores, labels = probability[..., 1:-1][..., : len(picture.ids)].max(dim=-1)
        rows = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    grids = output.masks[-1]
    grids = grids.gather(1, rows[:, :, None, None].expand(-1, -1, grids.shape[2], grids.shape[3]))
    logits = picture.fine(grids)
    inside = logits > 0
    covered = inside.float()
    areas = covered.sum(dim=(2, 3))
    if is_contiguous:
        scores = scores * (logits.sigmoid() * covered).sum(dim=(2, 3)) / areas.clamp(min=1)
    scores = torch.where(areas > 0, scores, -1.0)
    return _best(scores, _around(inside), labels, scores.shape[1], covered)


def _around(inside: Tensor) -> Tensor:
    """Corners (B, N, 4) of the smallest boxes around masks (B, N, H, W)."""
    sides = []
    for axis in (2, 3):
        is_covered = inside.any(dim=axis)  # (B, N, W), then (B, N, H)
        index = torch.arange(is_covered.shape[2], device=inside.device)
        first = torch.where(is_covered, index, is_covered.shape[2]).amin(dim=2)
        last = torch.where(is_covered, index + 1, 0).amax(dim=2)
        sides.append((first, last))
    (left, right), (top, bottom) = sides
    return torch.stack((left, top, right, bottom), dim=-1).float()


def depths(output: DepthOutput, picture: Picture) -> Outputs:
    """depth (B, H, W) in metres, or inverse_depth without a unit: as `depth.results.depth_results`, not
    rounded.
    """
    metres = picture.fine(output.metres)
    return {"inverse_depth": 1 / metres} if output.relative else {"depth": metres}


def class_maps(output: SemanticOutput, picture: Picture) -> Outputs:
    """labels (B, H, W) uint8, logits (B, C, h, w): as `semantic.results.semantic_results`."""
    labels = _most_probable(output.logits.softmax(dim=1), picture)
    return {"labels": labels, "logits": output.logits}


def class_maps_of_masks(output: MaskOutput, picture: Picture) -> Outputs:
    """labels (B, H, W) uint8, and scores (B, C, h, w) of the classes, sums over masks."""
    masks, whole = _as_evaluated(output, picture)
    weights = output.logits[-1].softmax(dim=-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", weights, masks.sigmoid())
    return {"labels": _most_probable(scores, whole), "scores": scores}


def _as_evaluated(output: MaskOutput, picture: Picture) -> tuple[Tensor, Picture]:
    """Mask logits (B, Q, h, w) at the size that the network sees, and the picture that they fill."""
    height, width = picture.size
    shown = picture._replace(height=height, width=width)
    return shown.fine(output.masks[-1]), picture._replace(padded=picture.size)


def segments(output: PanopticOutput, picture: Picture) -> Outputs:
    """segments (B, H, W) int32, the place from 1 of each pixel's segment in scores and labels (B, N), 0 of
    none: as `panoptic.results.panoptic_results`.
    """
    options = output.options
    scores, labels = output.logits[-1].softmax(dim=-1).max(dim=-1)
    is_likely = (scores > options.score) & (labels < len(picture.ids))
    owners, is_inside, areas = _owners(output, picture, torch.where(is_likely, scores, 0.0))
    left = []
    parts = []
    queries = torch.arange(scores.shape[1], device=scores.device)
    for numbers in queries.split(_GROUP):
        is_own = owners[:, None] == numbers[:, None, None]
        left.append(is_own.sum(dim=(2, 3)))
        parts.append((is_own & is_inside[:, None]).sum(dim=(2, 3)))
    share = Fraction(str(options.overlap))  # in whole numbers, which no runtime rounds
    is_enough = torch.cat(left, dim=1) * share.denominator > areas * share.numerator
    is_part = is_enough & (torch.cat(parts, dim=1) > 0)

    of_stuff = torch.tensor([*(id_ in options.stuff for id_ in picture.ids), False], device=labels.device)
    is_stuff = of_stuff[torch.where(is_likely, labels, len(picture.ids))]
    is_joined = (labels[:, :, None] == labels[:, None]) & is_stuff[:, :, None] & is_part[:, None]
    is_joined = is_joined | (queries[:, None] == queries)
    first = is_joined.float().argmax(dim=2)  # of the queries that are one segment with each
    best, positions = torch.where(is_part & (first == queries), scores, -1.0).topk(scores.shape[1])
    ranks = (positions[:, None] == first[:, :, None]).float().argmax(dim=2) + 1
    ranks = F.pad(torch.where(is_part, ranks, 0), (0, 1))  # the last one: of pixels without a mask
    of_pixels = ranks.gather(1, owners.flatten(1)).unflatten(1, owners.shape[1:])
    is_segment = best >= 0
    return {
        "segments": torch.where(is_inside, of_pixels, 0).to(torch.int32),
        "scores": torch.where(is_segment, best, 0.0),
        "labels": torch.where(is_segment, labels.gather(1, positions), -1),
    }


def _owners(output: PanopticOutput, picture: Picture, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, H, W) whose mask times its score (B, Q) is the highest at a pixel, Q of none; whether the
    pixel is in that mask; and the pixels (B, Q) in each mask.
    """
    masks, whole = _as_evaluated(output, picture)
    number = masks.shape[1]
    pixels = (masks.shape[0], picture.height, picture.width)  # len() would fix the batch
    best = masks.new_zeros(pixels)
    owners = masks.new_full(pixels, number, dtype=torch.int64)
    is_inside = masks.new_zeros(pixels, dtype=torch.bool)
    areas = []
    for first in range(0, number, _GROUP):
        probability = whole.fine(masks[:, first : first + _GROUP]).sigmoid()
        covers = probability >= INSIDE
        areas.append(covers.sum(dim=(2, 3)))
        weighted = probability * scores[:, first : first + _GROUP, None, None]
        highest, owner = weighted.max(dim=1)
        wins = highest > best
        best = torch.where(wins, highest, best)
        owners = torch.where(wins, owner + first, owners)
        is_covered = covers.gather(1, owner[:, None])[:, 0]
        is_inside = (wins & is_covered) | (~wins & is_inside)  # onnxruntime has no choice of bool
    return owners, is_inside, torch.cat(areas, dim=1)


def _most_probable(scores: Tensor, picture: Picture) -> Tensor:
    """(B, H, W) uint8 class of the highest score, of maps (B, C, h, w)."""
    best = labels = None
    for first in range(0, scores.shape[1], _GROUP):
        fine = picture.fine(scores[:, first : first + _GROUP])
        highest, label = fine.max(dim=1)
        label = label + first
        if best is None or labels is None:
            best = highest
            labels = label
            continue
        labels = torch.where(highest > best, label, labels)
        best = torch.maximum(highest, best)
    assert labels is not None
    return labels.to(torch.uint8)


#: (task, type of a head's output) -> how it is decoded.
ANSWERS: dict[tuple[str, type[Any]], Callable[..., Outputs]] = {
    ("detection", DenseOutput): dense,
    ("detection", DetectionOutput): queries,
    ("segmentation", MaskOutput): masks,
    ("depth", DepthOutput): depths,
    ("semantic", SemanticOutput): class_maps,
    ("semantic", MaskOutput): class_maps_of_masks,
    ("panoptic", PanopticOutput): segments,
}
