"""The segmentation head and its criterion."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tests.options import criterion_of, head_of
from tests.planner.made_up import LiveBytes
from tests.tasks.cases import CLASSES, denominators, hide_parameters, map_of, masks_of
from visft_ds.tasks.masks.loss import MaskCriterion, images_with_objects, match_masks
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.points import draw_points
from visft_ds.tasks.segmentation.head import SegmentationHead

CHANNELS, LAYERS, QUERIES = 12, 2, 7
OPTIONS = {"num_classes": CLASSES, "num_queries": QUERIES, "decoder_layers": LAYERS}


def _head(**options: int | float | str) -> SegmentationHead:
    sizes = {
        "hidden_dim": 32,
        "encoder_layers": 2,
        "num_heads": 4,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    }
    return head_of("segmentation", CHANNELS, **{**OPTIONS, **sizes, **options})


def _criterion(**options: int | float | str) -> MaskCriterion:
    return criterion_of("segmentation", **{**OPTIONS, "train_num_points": 64, **options})


def _output(size: tuple[int, int] = (5, 6)) -> MaskOutput:
    logits = torch.randn(LAYERS + 1, 1, QUERIES, CLASSES + 1, dtype=torch.float64)
    return MaskOutput(
        logits, torch.randn(LAYERS + 1, 1, QUERIES, *size, dtype=torch.float64), torch.ones(1, 2)
    )


# ---- head ----


def test_a_mask_that_covers_nothing_lets_its_query_see_the_whole_image() -> None:
    """Otherwise the softmax runs over nothing and gives NaN; padding stays out of sight all the same."""
    head = _head().eval()
    nn.init.zeros_(head.pixel_decoder.mask_proj.weight)
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[:, 2] = False
    seen = []
    for sign in (
        -1.0,
        1.0,
    ):  # every mask covers all or, with its sign turned, nothing: one or the other of each query
        nn.init.constant_(head.pixel_decoder.mask_proj.bias, sign)
        seen.append(head([map_of(torch.ones(1, CHANNELS, 3, 4), valid)]).logits)
    assert torch.isfinite(seen[0]).all()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_parameters_are_used_by_their_owner_only() -> None:
    head = _head().eval()
    inputs = torch.randn(1, CHANNELS, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool)
    expected = head([map_of(*inputs)])
    hide_parameters(head)
    with torch.no_grad():
        output = head([map_of(*inputs)])
    assert torch.equal(output.masks, expected.masks) and torch.equal(output.logits, expected.logits)


# ---- points ----


def test_points_belong_to_key_and_layer() -> None:
    """Not to the batch, not to the global generator; no two layers or images share theirs."""
    together = draw_points([5, 9], 3, (8, 24, 2), torch.device("cpu"))
    torch.manual_seed(1)
    alone = draw_points([9], 2, (8, 24, 2), torch.device("cpu"))
    for count, drawn, own in zip((8, 24, 2), together, alone, strict=True):
        assert drawn.shape == (2, 3, count, 2) and torch.equal(drawn[1:, :2], own)
        assert len(torch.unique(drawn)) == drawn.numel()
        assert drawn.min() >= 0 and drawn.max() < 1


# ---- criterion ----


def test_padding_of_batch_and_masks_changes_nothing() -> None:
    """The loss of an image that covers a part of the predicted grid and of the mask grid, as in a mixed
    batch.
    """
    targets, output, criterion = masks_of([3]), _output(), _criterion()
    divisors = denominators("segmentation", criterion, targets)
    alone = criterion(output, targets, divisors)
    padded = replace(output, masks=F.pad(output.masks, (0, 2, 0, 5)), extents=torch.tensor([[5 / 10, 6 / 8]]))
    wider = replace(targets, masks=F.pad(targets.masks, (0, 16, 0, 4)))
    mixed = criterion(padded, wider, divisors)
    for name, value in alone.items():
        # the points are float32, and so is their place on the grid
        torch.testing.assert_close(mixed[name], value, rtol=1e-5, atol=1e-6)


def test_more_prediction_sets_need_no_more_memory_to_be_matched() -> None:
    """Values at the points, (queries, points) of a set, are the largest tensors of a step: a set of so many
    is compared alone.
    """
    targets = masks_of([3])
    images = images_with_objects(targets, torch.ones(1, 2))
    peaks = []
    for sets in (1, 10):
        logits = torch.randn(sets, 1, 20, CLASSES + 1)
        masks = torch.randn(sets, 1, 20, 12, 16)
        points = torch.rand(1, sets, 20000, 2)
        with LiveBytes() as live:
            match_masks(logits, masks, targets, images, targets.labels, points, (2.0, 5.0, 5.0))
        peaks.append(live.peak)
    assert peaks[1] < 1.5 * peaks[0]


def test_values_at_points_are_not_kept_for_the_backward_pass() -> None:
    """Nor does a head of more prediction sets need more at a time."""
    targets, output = masks_of([9]), _output()
    criterion = _criterion(num_queries=9, train_num_points=12544)
    divisors = denominators("segmentation", criterion, targets)
    masks = torch.randn(LAYERS + 1, 1, 9, 5, 6)
    with LiveBytes() as live:
        output = MaskOutput(
            torch.randn(LAYERS + 1, 1, 9, CLASSES + 1), masks.requires_grad_(), torch.ones(1, 2)
        )
        losses = criterion(output, targets, divisors)
        values = 9 * 12544 * masks.element_size()  # of a set
        assert losses and live.now < values * (LAYERS + 1)  # of all sets
