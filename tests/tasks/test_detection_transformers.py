"""Matcher, losses and layers against the DETR of `transformers`.

Its decoder as a whole is not compared: with auxiliary outputs it feeds the normed state of a layer into the
next one. Layers and losses are compared one by one instead, on the same tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import DetrConfig
from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss
from transformers.models.detr.modeling_detr import DetrDecoderLayer, DetrEncoderLayer

from tests.options import criterion_of
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.head import DetectionOutput
from visft_ds.tasks.detection.loss import match
from visft_ds.tasks.transformer import DecoderLayer, EncoderLayer

LAYERS, QUERIES, CLASSES = 3, 20, 91
COUNTS = [4, 0, 11, 25]  # none; more than there are queries


@pytest.fixture(scope="module")
def case() -> tuple[Tensor, Tensor, DetectionTargets]:
    generator = torch.Generator().manual_seed(1)
    total = sum(COUNTS)
    logits = torch.randn(LAYERS, len(COUNTS), QUERIES, CLASSES + 1, generator=generator) * 2
    boxes = torch.rand(LAYERS, len(COUNTS), QUERIES, 4, generator=generator) * 0.8 + 0.1
    expected = torch.rand(total, 4, generator=generator) * 0.8 + 0.1
    labels = torch.randint(1, CLASSES, (total,), generator=generator)
    return logits, boxes, DetectionTargets(expected, labels, torch.tensor(COUNTS))


def _their_targets(targets: DetectionTargets) -> list[dict[str, Tensor]]:
    counts = targets.counts.tolist()
    pairs = zip(targets.labels.split(counts), targets.boxes.split(counts), strict=True)
    return [{"class_labels": labels, "boxes": boxes} for labels, boxes in pairs]


def _their_matcher() -> HungarianMatcher:
    return HungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)


def test_matches_are_equal(case: tuple[Tensor, Tensor, DetectionTargets]) -> None:
    logits, boxes, targets = case
    ours = match(logits, boxes, targets, (1, 5, 2))
    starts = targets.counts.cumsum(0) - targets.counts
    for layer in range(LAYERS):
        theirs = _their_matcher()(
            {"logits": logits[layer], "pred_boxes": boxes[layer]}, _their_targets(targets)
        )
        for image, (queries, objects) in enumerate(theirs):
            here = (ours.layers == layer) & (ours.images == image)
            expected = set(zip(queries.tolist(), (objects + starts[image]).tolist(), strict=True))
            assert set(zip(ours.queries[here].tolist(), ours.objects[here].tolist(), strict=True)) == expected


def test_losses_and_gradients_are_equal(case: tuple[Tensor, Tensor, DetectionTargets]) -> None:
    logits, boxes, targets = case[0].clone().requires_grad_(), case[1].clone().requires_grad_(), case[2]
    denominators = {"boxes": torch.tensor(float(sum(COUNTS))), "images": torch.tensor(float(len(COUNTS)))}
    criterion = criterion_of("detection", num_queries=QUERIES, decoder_layers=LAYERS)
    ours, pairs = criterion(DetectionOutput(logits, boxes), targets, denominators), []
    oracle = ImageLoss(_their_matcher(), CLASSES, eos_coef=0.1, losses=["boxes", "cardinality"])
    for layer, suffix in enumerate(["_0", "_1", ""]):
        theirs = oracle({"logits": logits[layer], "pred_boxes": boxes[layer]}, _their_targets(targets))
        theirs["loss_ce"] = _their_class_loss(logits[layer], boxes[layer], targets)
        for name, their_name in (("ce", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")):
            pairs.append((ours[name + suffix], theirs[their_name]))
            # float32 sums of up to 80 terms in another order
            torch.testing.assert_close(*pairs[-1], rtol=2e-6, atol=0)
    assert ours["cardinality_error"].item() == theirs["cardinality_error"].item()
    gradients = (
        torch.autograd.grad(torch.stack(terms).sum(), (logits, boxes)) for terms in zip(*pairs, strict=True)
    )
    for our_gradient, their_gradient in zip(*gradients, strict=True):
        # float32; the formulas of the overlap divide in another order
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-7)


def _their_class_loss(logits: Tensor, boxes: Tensor, targets: DetectionTargets) -> Tensor:
    """Mean over images, each as the one image of a GPU, as in the published code."""
    oracle = ImageLoss(_their_matcher(), CLASSES, eos_coef=0.1, losses=["labels"])
    each = zip(logits.split(1), boxes.split(1), _their_targets(targets), strict=True)
    return torch.stack(
        [oracle({"logits": a, "pred_boxes": b}, [one])["loss_ce"] for a, b, one in each]
    ).mean()


def _their_names(layer: nn.Module, width: int, norms: dict[str, str]) -> dict[str, Tensor]:
    """Our weights under their names: they keep q, k and v apart."""
    renamed = {}
    for name, value in layer.state_dict().items():
        name = (
            name.replace("cross_attn", "encoder_attn")
            .replace("linear", "mlp.fc")
            .replace("out_proj", "o_proj")
        )
        for ours, theirs in norms.items():
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for part, piece in zip("qkv", value.split(width), strict=True):
                renamed[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            renamed[name] = value
    return renamed


def test_layers_are_equal_with_positions() -> None:
    """Positions belong to queries and keys, never to values."""
    width = 16
    config = DetrConfig(
        d_model=width,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        dropout=0.0,
        use_pretrained_backbone=False,
        attn_implementation="eager",
    )
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    mask = torch.zeros(2, 1, 1, 6).masked_fill(~valid[:, None, None], -1e9)
    memory, positions, state, query = (torch.randn(2, n, width) for n in (6, 6, 5, 5))

    encoder, their_encoder = EncoderLayer(width, 4, 24, 0.0), DetrEncoderLayer(config)
    norms = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
    their_encoder.load_state_dict(_their_names(encoder, width, norms))
    # float32: a few dozen roundings of numbers around 1
    torch.testing.assert_close(
        encoder(memory, positions, valid), their_encoder(memory, mask, positions), rtol=0, atol=2e-6
    )

    decoder, their_decoder = DecoderLayer(width, 4, 24, 0.0), DetrDecoderLayer(config)
    norms = {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
    their_decoder.load_state_dict(_their_names(decoder, width, norms))
    torch.testing.assert_close(
        decoder(state, query, memory, memory + positions, valid[:, None]),
        their_decoder(state, None, positions, query, memory, mask),
        rtol=0,
        atol=2e-6,
    )
