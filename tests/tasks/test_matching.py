"""Matching compares in float32; the overlap of boxes is torchvision's, and finite. Matches: see the transformers."""

from __future__ import annotations

import torch

from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.matching import generalized_box_iou, match


def test_16_bit_predictions_are_compared_in_float32() -> None:
    """Two candidates 0.02 apart in cost, which bfloat16 arithmetic would round away: around 8 it has steps of 1/16."""
    boxes = torch.full((1, 1, 2, 4), 0.5)
    boxes[0, 0, 1, 0] += 2**-8  # one step of bfloat16 nearer to the object
    targets = DetectionTargets(torch.full((1, 4), 0.9), torch.tensor([0]), torch.tensor([1]))
    matches = match(torch.zeros(1, 1, 2, 6).bfloat16(), boxes.bfloat16(), targets, (1.0, 5.0, 2.0))
    assert matches.queries.tolist() == [1]


def test_boxes_without_area_are_finite() -> None:
    point, line = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5]
    degenerate = torch.tensor([point, line, line], requires_grad=True)
    other = torch.tensor([point, line, [0.1, 0.1, 0.9, 0.9]])
    values = generalized_box_iou(degenerate, other)
    values.sum().backward()
    # equal boxes without area: nothing overlaps and the hull is empty too; the line in a box of 0.64 leaves all of it
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert degenerate.grad is not None and torch.isfinite(degenerate.grad).all()
