"""Matching: optimal, one to one, each image on its own; the overlap of boxes is torchvision's, and finite."""

from __future__ import annotations

import itertools

import torch
import torchvision.ops
from torch import Tensor

from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.matching import Matches, centers_to_corners, generalized_box_iou, match

COSTS = (1.0, 5.0, 2.0)


def _predictions(layers: int, images: int, queries: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(layers, images, queries, classes + 1), torch.rand(layers, images, queries, 4)


def _targets(counts: list[int], classes: int = 5) -> DetectionTargets:
    total = sum(counts)
    return DetectionTargets(torch.rand(total, 4), torch.randint(classes, (total,)), torch.tensor(counts))


def _cost(logits: Tensor, boxes: Tensor, targets: DetectionTargets, rows: slice) -> Tensor:
    """(queries, objects) of one image and layer, written out from the definition."""
    wanted = targets.boxes[rows]
    probability = logits.softmax(-1)[:, targets.labels[rows]]
    distance = (boxes[:, None] - wanted).abs().sum(-1)
    overlap = generalized_box_iou(centers_to_corners(boxes)[:, None], centers_to_corners(wanted))
    return -probability + 5 * distance - 2 * overlap


def _of(matches: Matches, layer: int, image: int) -> list[tuple[int, int]]:
    here = (matches.layers == layer) & (matches.images == image)
    return list(zip(matches.queries[here].tolist(), matches.objects[here].tolist(), strict=True))


def test_best_of_all_assignments() -> None:
    """Against trying out every assignment; a neighbour image's objects or queries must never be chosen."""
    logits, boxes = _predictions(layers=2, images=3, queries=4)
    targets = _targets([2, 0, 3])
    matches = match(logits, boxes, targets, COSTS)
    assert len(matches.layers) == 2 * 5
    for layer in range(2):
        for image, rows in ((0, slice(0, 2)), (1, slice(2, 2)), (2, slice(2, 5))):
            cost = _cost(logits[layer, image], boxes[layer, image], targets, rows)
            objects = range(rows.stop - rows.start)
            best = min(
                itertools.permutations(range(4), len(objects)),
                key=lambda queries: sum(float(cost[q, o]) for q, o in zip(queries, objects, strict=True)),
            )
            assert sorted(_of(matches, layer, image)) == sorted(zip(best, range(rows.start, rows.stop), strict=True))


def test_batch_equals_one_image_at_a_time() -> None:
    logits, boxes = _predictions(layers=3, images=4, queries=10)
    counts = [3, 0, 12, 5]
    targets = _targets(counts)
    together = match(logits, boxes, targets, COSTS)
    start = 0
    for image, count in enumerate(counts):
        alone = DetectionTargets(
            targets.boxes[start : start + count], targets.labels[start : start + count], torch.tensor([count])
        )
        single = match(logits[:, image : image + 1], boxes[:, image : image + 1], alone, COSTS)
        for layer in range(3):
            shifted = [(query, row + start) for query, row in _of(single, layer, 0)]
            assert _of(together, layer, image) == shifted
        start += count


def test_16_bit_predictions_are_compared_in_float32() -> None:
    """Two candidates 0.02 apart in cost, which bfloat16 arithmetic would round away: around 8 it has steps of 1/16."""
    boxes = torch.full((1, 1, 2, 4), 0.5)
    boxes[0, 0, 1, 0] += 2**-8  # one step of bfloat16 nearer to the object
    targets = DetectionTargets(torch.full((1, 4), 0.9), torch.tensor([0]), torch.tensor([1]))
    matches = match(torch.zeros(1, 1, 2, 6).bfloat16(), boxes.bfloat16(), targets, COSTS)
    assert matches.queries.tolist() == [1]


def _boxes(count: int) -> torch.Tensor:
    return centers_to_corners(torch.rand(count, 4, dtype=torch.float64))


def test_overlap_of_all_pairs_equals_torchvision() -> None:
    first, second = _boxes(7), _boxes(5)
    # float64: both orders of the same few operations
    wanted = torchvision.ops.generalized_box_iou(first, second)
    torch.testing.assert_close(generalized_box_iou(first[:, None], second), wanted, rtol=0, atol=1e-12)


def test_boxes_without_area_are_finite() -> None:
    point, line = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5]
    degenerate = torch.tensor([point, line, line], requires_grad=True)
    other = torch.tensor([point, line, [0.1, 0.1, 0.9, 0.9]])
    values = generalized_box_iou(degenerate, other)
    values.sum().backward()
    # equal boxes without area: nothing overlaps and the hull is empty too; the line in a box of 0.64 leaves all of it
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert degenerate.grad is not None and torch.isfinite(degenerate.grad).all()
