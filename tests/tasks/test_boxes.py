"""Boxes: agreement with torchvision, and what becomes of boxes without area."""

from __future__ import annotations

import torch
import torchvision.ops

from visft_ds.tasks.matching import centers_to_corners, generalized_box_iou


def _boxes(count: int) -> torch.Tensor:
    return centers_to_corners(torch.rand(count, 4, dtype=torch.float64))


def test_formats() -> None:
    centers = torch.tensor([[0.5, 0.25, 0.2, 0.5]])
    assert torch.equal(centers_to_corners(centers), torch.tensor([[0.4, 0.0, 0.6, 0.5]]))


def test_overlap_of_all_pairs_equals_torchvision() -> None:
    first, second = _boxes(7), _boxes(5)
    # float64: both orders of the same few operations
    wanted = torchvision.ops.generalized_box_iou(first, second)
    torch.testing.assert_close(generalized_box_iou(first[:, None], second), wanted, rtol=0, atol=1e-12)


def test_row_by_row_is_the_diagonal_of_all_pairs() -> None:
    first, second = _boxes(6), _boxes(6)
    assert torch.equal(generalized_box_iou(first, second), generalized_box_iou(first[:, None], second).diagonal())


def test_tiny_boxes_are_exact() -> None:
    """The guard against dividing by zero must not touch an object of 2 x 2 pixels in a 672 pixel image."""
    tiny = centers_to_corners(torch.tensor([[0.5, 0.5, 2 / 672, 2 / 672]], dtype=torch.float64))
    assert generalized_box_iou(tiny, tiny).item() == 1.0


def test_boxes_without_area_are_finite() -> None:
    point, line = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5]
    degenerate = torch.tensor([point, line, line], requires_grad=True)
    other = torch.tensor([point, line, [0.1, 0.1, 0.9, 0.9]])
    values = generalized_box_iou(degenerate, other)
    values.sum().backward()
    # equal boxes without area: nothing overlaps and the hull is empty too; the line in a box of 0.64 leaves all of it
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert degenerate.grad is not None and torch.isfinite(degenerate.grad).all()
