"""The detection head, its criterion, matching and post-processing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.options import criterion_of, head_of
from tests.tasks.cases import batch_of, denominators, map_of
from visft_ds.tasks import transformer
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.head import DetectionHead, DetectionOutput, postprocess
from visft_ds.tasks.detection.loss import generalized_box_iou
from visft_ds.tasks.transformer import MultiHeadAttention

SMALL = {
    "num_queries": 7,
    "encoder_dim": 16,
    "decoder_dim": 32,
    "num_heads": 4,
    "ffn_dim": 24,
    "num_classes": 6,
}


def _small_head() -> DetectionHead:
    head: DetectionHead = head_of("detection", 12, **SMALL, encoder_layers=2, decoder_layers=3, dropout=0.0)
    return head.eval()


@pytest.mark.parametrize("rows", [None, 1, 9])
def test_attention_with_dropout_is_torchs(monkeypatch: pytest.MonkeyPatch, rows: int | None) -> None:
    """Head by head: result, gradients, what is dropped and what is drawn afterwards."""
    layer = MultiHeadAttention(16, 4, 0.3).train()
    query = torch.randn(2, 9, 16)
    memory = torch.randn(2, 11, 16)
    allowed = None
    if rows is not None:
        allowed = torch.rand(2, rows, 11) < 0.7
        allowed[..., 0] = True
    results = []
    for least in (1, 1 << 30):
        monkeypatch.setattr(transformer, "_LARGE", least)
        torch.manual_seed(1)
        leaves = [query.clone().requires_grad_(), memory.clone().requires_grad_(), *layer.parameters()]
        out = layer(leaves[0], leaves[1], leaves[1] * 2, allowed)
        direction = torch.sin(torch.arange(288.0)).view(2, 9, 16)
        results.append([out, *torch.autograd.grad(out, leaves, direction), torch.rand(3)])
    assert torch.equal(results[0][-1], results[1][-1])
    for by_head, of_torch in zip(*results, strict=True):
        assert (by_head - of_torch).norm() < 1e-6 * of_torch.norm()  # fp32, sums of 11 terms


def test_initialisation() -> None:
    """Xavier for the encoder and the two projections; the reference builds its decoder after that step."""
    head = head_of("detection", 16)
    xavier = math.sqrt(6 / (128 + 1024))
    linear = 1 / math.sqrt(256)
    # the largest of 131,072 uniform numbers is within 0.1 % of the bound
    assert head.encoder.layers[3].linear1.weight.abs().max().item() == pytest.approx(xavier, rel=1e-3)
    assert head.decoder.layers[3].linear1.weight.abs().max().item() == pytest.approx(linear, rel=1e-3)
    assert head.memory_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (128 + 256)), rel=1e-3)


def test_task_token_positions_and_the_way_around_the_encoder_take_part() -> None:
    head = _small_head()
    features, valid = torch.randn(1, 12, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool)
    before = head([map_of(features, valid)]).boxes
    flipped = head([map_of(features.flip(-1), valid)]).boxes
    assert (flipped - before).abs().max() > 1e-4  # without positions a set of patches has no left and right
    with torch.no_grad():
        head.task_embed.weight[0] += 1
    assert (head([map_of(features, valid)]).boxes - before).abs().max() > 1e-4
    last = head.encoder.layers[-1].norm2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    first, second = (head([map_of(torch.randn(1, 12, 3, 4), valid)]).boxes for _ in range(2))
    assert (first - second).abs().max() > 1e-4  # patches reach the decoder although the encoder gives zeros


def test_losses_of_a_prediction_that_is_known() -> None:
    """Every number by hand: one object found exactly, one query left over, uniform class scores over 6 +
    1.
    """
    criterion = criterion_of("detection", num_queries=2, decoder_layers=1, eos_coef=0.1)
    box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    targets = DetectionTargets(box[None], torch.tensor([3]), torch.tensor([1]))
    output = DetectionOutput(torch.zeros(1, 1, 2, 7), torch.stack([box + 0.1, box])[None, None])
    losses = criterion(output, targets, denominators("detection", criterion, targets))
    assert losses["ce"].item() == pytest.approx(math.log(7))  # a weighted mean of equal terms
    assert losses["l1"].item() == losses["giou"].item() == pytest.approx(0, abs=1e-6)
    assert losses["class_error"].item() == 100  # all scores are equal: class 0 is named, not 3
    assert losses["cardinality_error"].item() == 1  # two queries see an object, there is one
    assert criterion.weights == {"ce": 1.0, "l1": 5.0, "giou": 2.0}


def test_postprocess() -> None:
    """Pixels of the stored image (not square), raw ids, never "no object", and no result for a repeated
    image.
    """
    logits = torch.full((1, 2, 2, 7), -20.0)
    logits[0, 0, 0, 5] = 20.0
    logits[0, 0, 1, 6] = (
        20.0  # surely nothing: still a result, with a tiny score and the best class that is left
    )
    logits[0, 0, 1, 2] = -10.0
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(1, 2, 2, 4)
    batch = batch_of(
        2,
        original_sizes=torch.tensor([[100, 200], [10, 10]]),
        image_ids=torch.tensor([493652, 493652]),
        real=torch.tensor([True, False]),
    )
    results = postprocess(DetectionOutput(logits, boxes), batch)
    assert [result["category_id"] for result in results] == [5, 2]
    assert {result["image_id"] for result in results} == {493652}
    assert results[0]["bbox"] == pytest.approx([80, 30, 40, 40], abs=1e-4)  # float32 corners times 200 pixels
    assert results[0]["score"] == pytest.approx(1.0) and results[1]["score"] < 1e-6
    assert postprocess(DetectionOutput(logits, boxes), batch, threshold=0.5) == results[:1]


# ---- matching; which pairs it finds: see the transformers ----


def test_16_bit_predictions_are_compared_in_float32() -> None:
    """Two candidates 0.02 apart in cost, which bfloat16 arithmetic would round away: around 8 it has steps of
    1/16.
    """
    boxes = torch.full((1, 1, 2, 4), 0.5)
    boxes[0, 0, 1, 0] += 2**-8  # one step of bfloat16 nearer to the object
    targets = DetectionTargets(torch.full((1, 4), 0.9), torch.tensor([0]), torch.tensor([1]))
    criterion = criterion_of("detection", num_queries=2, decoder_layers=1)
    output = DetectionOutput(torch.zeros(1, 1, 2, 7).bfloat16(), boxes.bfloat16())
    losses = criterion(output, targets, denominators("detection", criterion, targets))
    assert losses["l1"].item() == pytest.approx(1.6 - 2**-8)  # of the second candidate


def test_boxes_without_area_are_finite() -> None:
    point, line = [0.5, 0.5, 0.5, 0.5], [0.2, 0.5, 0.8, 0.5]
    degenerate = torch.tensor([point, line, line], requires_grad=True)
    other = torch.tensor([point, line, [0.1, 0.1, 0.9, 0.9]])
    values = generalized_box_iou(degenerate, other)
    values.sum().backward()
    # equal boxes without area: nothing overlaps and the hull is empty too; the line in a box of 0.64 leaves
    # all of it
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert degenerate.grad is not None and torch.isfinite(degenerate.grad).all()
