"""The dense detection head: what cells answer for, losses under any division of the batch, results."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from tests.options import criterion_of, head_of
from tests.tasks.cases import batch_of, boxes_of, map_of
from visft_ds.tasks import TASKS
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.dense import DenseCriterion, DenseHead, DenseOutput, assign, dense_results

CLASSES, GRID = 3, (6, 8)


def _head(**options: int) -> DenseHead:
    head: DenseHead = head_of("detection", 12, type="dense", num_classes=CLASSES, width=32, **options)
    return head.double()


def _inputs(images: int) -> tuple[Tensor, Tensor]:
    """Features and where they are image: the second image of each pair ends earlier."""
    valid = torch.ones(images, *GRID, dtype=torch.bool)
    valid[1::2, 4:] = valid[1::2, :, 5:] = False
    return torch.randn(images, 12, *GRID, dtype=torch.float64), valid


def _targets(counts: list[int]) -> DetectionTargets:
    return boxes_of(counts, CLASSES)


def _rows(output: DenseOutput, rows: slice) -> DenseOutput:
    tensors = {name: value[rows] for name, value in vars(output).items() if isinstance(value, Tensor)}
    return replace(output, **tensors)


def _by_hand(output: DenseOutput, targets: DetectionTargets) -> list[list[int]]:
    """`assign`, image by image and cell by cell."""
    found, first = [], 0
    for image, count in enumerate(targets.counts.tolist()):
        owner = [sum(targets.counts.tolist())] * output.valid.shape[1]
        objects = sorted(range(first, first + count), key=lambda n: -float(targets.boxes[n, 2:].prod()))
        for number in objects:  # smaller ones later: they win
            width, height = targets.boxes[number, 2:].tolist()
            far = {}
            for cell in output.valid[image].nonzero().flatten().tolist():
                dx, dy = (output.centres[image, cell] - targets.boxes[number, :2]).abs().tolist()
                cells = (dx / float(output.pitch[image, 0]), dy / float(output.pitch[image, 1]))
                far[cell] = math.hypot(*cells)
                if max(cells) < 1.5 and dx <= width / 2 and dy <= height / 2:
                    owner[cell] = number
            owner[min(far, key=lambda cell: far[cell])] = number
        found.append(owner)
        first += count
    return found


def test_cells_answer_for_objects_as_counted_by_hand() -> None:
    output = _head()([map_of(*_inputs(4))])
    targets = _targets([5, 4, 0, 7])
    assert assign(output, targets).tolist() == _by_hand(output, targets)
    nothing = assign(output, _targets([0, 0, 0, 0]))
    assert nothing.eq(0).all() and nothing.shape == (4, 48)


@pytest.mark.parametrize("is_joined", [False, True])
def test_padding_changes_nothing(is_joined: bool) -> None:
    """Of one map, and of a fine one that is joined with a coarse one: an image ends within a coarse cell."""
    features, valid = _inputs(2)
    valid[1, :, 5] = valid[1, :, 4]
    valid[1, 3] = False  # 3 x 6 cells, within 2 x 3 coarse ones
    padded_maps = [map_of(features, valid)]
    maps_alone = [map_of(features[1:, :, :4, :6], valid[1:, :4, :6])]
    if is_joined:
        coarse = torch.randn(2, 5, 3, 4, dtype=torch.float64)
        padded_maps.append(map_of(coarse, valid[:, ::2, ::2]))
        maps_alone.append(map_of(coarse[1:, :, :2, :3], valid[1:, :4:2, :6:2]))
    widths = [map_.features.shape[1] for map_ in padded_maps]
    settings = TASKS["detection"].settings("head", {"type": "dense", "num_classes": CLASSES, "width": 32})
    head = TASKS["detection"].build_head([(width, 8) for width in widths], settings, None).double()
    padded = head(padded_maps)
    alone = head(maps_alone)
    assert padded.boxes.shape == (2, 48, 4)
    seen = padded.valid[1]
    inside = alone.valid[0]
    torch.testing.assert_close(padded.logits[1, seen], alone.logits[0, inside])
    torch.testing.assert_close(padded.boxes[1, seen], alone.boxes[0, inside])
    torch.testing.assert_close(padded.centres[1, seen], alone.centres[0, inside])


def test_a_box_is_measured_in_cells_whatever_the_size_of_the_image() -> None:
    """Images of several sizes and shapes show an object of so many cells alike."""
    head = _head()
    features = torch.ones(1, 12, 40, 60, dtype=torch.float64)
    sides = []
    for rows, columns in ((40, 60), (20, 30)):
        image = map_of(features[:, :, :rows, :columns], torch.ones(1, rows, columns, dtype=torch.bool))
        output = head([image])
        middle = output.boxes[0, rows // 2 * columns + columns // 2]
        sides.append((middle[2:] - middle[:2]) * torch.tensor([columns, rows]))
    torch.testing.assert_close(sides[0], sides[1])


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_mean_over_micro_batches_is_the_global_loss(parts: int) -> None:
    head, criterion = _head(), criterion_of("detection", type="dense")
    assert isinstance(criterion, DenseCriterion)
    output, targets = head([map_of(*_inputs(4))]), _targets([3, 0, 6, 1])
    number = sum(targets.counts.tolist())
    whole = criterion(output, targets, {"boxes": torch.tensor(number).double()})
    ends, sums = [0, 3, 3, 9, 10], dict.fromkeys(whole, torch.zeros((), dtype=torch.float64))
    for part in range(parts):
        first, last = part * 4 // parts, (part + 1) * 4 // parts
        rows = slice(ends[first], ends[last])
        inner = DetectionTargets(targets.boxes[rows], targets.labels[rows], targets.counts[first:last])
        losses = criterion(
            _rows(output, slice(first, last)), inner, {"boxes": torch.tensor(number / parts).double()}
        )
        sums = {name: sums[name] + value / parts for name, value in losses.items()}
    for name, value in whole.items():
        torch.testing.assert_close(sums[name], value)


def test_losses_are_those_of_the_field() -> None:
    output, targets = _head()([map_of(*_inputs(1))]), _targets([2])
    losses = criterion_of("detection", type="dense")(output, targets, {"boxes": torch.tensor(2.0)})
    owner = assign(output, targets)[0]
    probability = output.logits[0].sigmoid()
    wanted = torch.zeros_like(probability)
    per_object = []
    for number in range(2):
        mine = owner == number
        wanted[mine, targets.labels[number]] = 1
        x, y, w, h = targets.boxes[number].double()
        box = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2)).expand(int(mine.sum()), 4)
        per_object.append(generalized_box_iou_loss(output.boxes[0, mine], box, reduction="mean"))
    right = torch.where(wanted > 0, probability, 1 - probability)
    alpha = torch.where(wanted > 0, 0.25, 0.75)
    torch.testing.assert_close(losses["ce"], -(alpha * (1 - right) ** 2 * right.log()).sum() / 18)
    expected = torch.stack(per_object).mean()  # with 1e-7 in the denominators
    torch.testing.assert_close(losses["giou"], expected, rtol=1e-5, atol=0)


def test_results_are_suppressed_cut_and_in_pixels() -> None:
    """Two cells tell nearly the same box of a class, one of them the same of another class, one is
    padding.
    """
    logits = torch.full((1, 4, CLASSES), -9.0)
    logits[0, 0, 1], logits[0, 1, 1], logits[0, 1, 2], logits[0, 3, 0] = 3.0, 2.0, 1.0, 9.0
    boxes = torch.tensor(
        [[[-0.1, 0.2, 0.5, 0.6], [0.0, 0.2, 0.5, 0.61], [0.7, 0.7, 0.8, 0.8], [0.0, 0.0, 1.0, 1.0]]]
    )
    valid = torch.tensor([[True, True, True, False]])
    output = DenseOutput(logits, boxes, torch.zeros(1, 4, 2), torch.ones(1, 2), valid)
    found = dense_results(
        output, batch_of(1, original_sizes=torch.tensor([[100, 200]])), classes=(7, 11, 13), threshold=0.5
    )
    assert [(one["image_id"], one["category_id"]) for one in found] == [(1, 11), (1, 13)]
    assert found[0]["bbox"] == pytest.approx([0, 20, 100, 40], abs=1e-4)
    assert found[0]["score"] == pytest.approx(torch.tensor(3.0).sigmoid().item())
