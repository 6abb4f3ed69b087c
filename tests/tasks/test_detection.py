"""The detection head, its criterion and post-processing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.options import criterion_of, head_of
from visft_ds.data.samples import Batch
from visft_ds.tasks import get_task
from visft_ds.tasks.detection.data import DetectionTargets
from visft_ds.tasks.detection.head import DetectionHead, DetectionOutput, postprocess
from visft_ds.tasks.transformer import MultiHeadAttention

SMALL = {"num_queries": 7, "encoder_dim": 16, "decoder_dim": 32, "num_heads": 4, "ffn_dim": 24, "num_classes": 6}

#: Our names -> those of the published ViSFT head files (after `visft_heads.`); the first prefix that fits counts.
PUBLISHED_KEYS = {
    "input_proj.": "input_proj.",
    "task_embed.": "transformer.task_embeddings_enc.",
    "encoder.": "transformer.encoder.",
    "memory_proj.": "transformer.enc2dec_proj.",
    "position_proj.": "transformer.pos_embed_proj.",
    "decoder.": "transformer.decoders.detection.detection_coco.",
    "query_embed.": "query_embeds.detection.detection_coco.",
    "class_embed.": "class_embeds.",
    "box_embed.": "bbox_embeds.",
}


def _small_head(**options: int | float) -> DetectionHead:
    return head_of("detection", 12, **{**SMALL, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0, **options})


def _targets(counts: list[int], classes: int = 6) -> DetectionTargets:
    total = sum(counts)
    centers = torch.rand(total, 4) * 0.5 + 0.2
    return DetectionTargets(centers, torch.randint(1, classes, (total,)), torch.tensor(counts))


def _batch(targets: DetectionTargets, **fields: Tensor) -> Batch:
    count = len(targets.counts)
    numbers = torch.arange(count)
    return Batch(
        **{
            "images": torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
            "sizes": torch.full((count, 2), 8),
            "original_sizes": torch.full((count, 2), 8),
            "indices": numbers,
            "image_ids": numbers + 1,
            "random_keys": numbers,
            "real": torch.ones(count, dtype=torch.bool),
            **fields,
        },
        targets={"detection": targets},
    )


def _random_output(images: int, *, layers: int = 3, queries: int = 7, classes: int = 6) -> DetectionOutput:
    logits = torch.randn(layers, images, queries, classes + 1, dtype=torch.float64)
    boxes = torch.rand(layers, images, queries, 4, dtype=torch.float64)
    each = [DetectionOutput(*pair) for pair in zip(logits, boxes, strict=True)]
    return replace(each[-1], aux=tuple(each[:-1]))


def _normaliser(counts: list[Mapping[str, float]], parts: int) -> dict[str, Tensor]:
    """As the training loop makes it: global sum, at least 1, divided by ranks times micro-batches."""
    return {name: torch.tensor(max(sum(c[name] for c in counts), 1.0) / parts).double() for name in counts[0]}


# ---- head ----


@pytest.mark.parametrize(("width", "parameters"), [(1792, 8_810_464), (1408, 8_761_312)])
def test_size_is_the_published_one(width: int, parameters: int) -> None:
    with torch.device("meta"):
        head = get_task("detection").build_head(width, {}, None)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters


def test_names_map_onto_the_published_files() -> None:
    with torch.device("meta"):
        head = head_of("detection", 1792)
    published = {}
    for name, value in head.state_dict().items():
        ours, theirs = next(pair for pair in PUBLISHED_KEYS.items() if name.startswith(pair[0]))
        renamed = theirs + name[len(ours) :].replace("cross_attn", "multihead_attn")
        published[renamed] = tuple(value.shape)
    # 6 encoder layers of 12, 6 decoder layers of 18 and a norm, three projections, task, queries, classes, 3 box layers
    assert len(published) == 72 + 110 + 6 + 1 + 1 + 2 + 6
    assert published["input_proj.weight"] == (128, 1792, 1, 1)
    assert published["query_embeds.detection.detection_coco.weight"] == (100, 256)
    assert published["class_embeds.weight"] == (92, 256)
    assert published["transformer.task_embeddings_enc.weight"] == (256, 128)
    assert published["bbox_embeds.layers.2.bias"] == (4,)
    # the layers of PyTorch's own transformer have the names and shapes of DETR's, which the files follow
    kinds = (
        ("transformer.encoder.layers.5.", nn.TransformerEncoderLayer(128, 8, 1024)),
        ("transformer.decoders.detection.detection_coco.layers.0.", nn.TransformerDecoderLayer(256, 8, 1024)),
    )
    for prefix, layer in kinds:
        wanted = {prefix + name: tuple(value.shape) for name, value in layer.state_dict().items()}
        assert wanted == {name: shape for name, shape in published.items() if name.startswith(prefix)}


def test_initialisation() -> None:
    """Xavier for the encoder and the two projections; the reference builds its decoder after that step."""
    head = head_of("detection", 16)
    xavier = math.sqrt(6 / (128 + 1024))
    linear = 1 / math.sqrt(256)
    # the largest of 131,072 uniform numbers is within 0.1 % of the bound
    assert head.encoder.layers[3].linear1.weight.abs().max().item() == pytest.approx(xavier, rel=1e-3)
    assert head.decoder.layers[3].linear1.weight.abs().max().item() == pytest.approx(linear, rel=1e-3)
    assert head.memory_proj.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (128 + 256)), rel=1e-3)


def test_attention_equals_torch() -> None:
    ours, theirs = MultiHeadAttention(16, 4, 0.0), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    query, key, value = torch.randn(2, 5, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    valid = torch.rand(2, 9) > 0.4
    wanted, _ = theirs(query, key, value, key_padding_mask=~valid)
    # float32, 16 channels: a few roundings
    torch.testing.assert_close(ours(query, key, value, valid[:, None]), wanted, rtol=0, atol=1e-6)


def test_task_token_and_positions_take_part() -> None:
    head = _small_head().eval()
    features, valid = torch.randn(1, 12, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool)
    before = head(features, valid).boxes
    flipped = head(features.flip(-1), valid).boxes
    assert (flipped - before).abs().max() > 1e-4  # without positions a set of patches has no left and right
    with torch.no_grad():
        head.task_embed.weight[0] += 1
    assert (head(features, valid).boxes - before).abs().max() > 1e-4


def test_the_encoder_input_goes_around_the_encoder() -> None:
    """With an encoder that gives zeros, the patches must still reach the decoder."""
    head = _small_head().eval()
    last = head.encoder.layers[-1].norm2
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    first, second = (head(torch.randn(1, 12, 3, 4), valid).boxes for _ in range(2))
    assert (first - second).abs().max() > 1e-4


# ---- criterion ----


def test_losses_of_a_prediction_that_is_known() -> None:
    """Every number by hand: one object found exactly, one query left over, uniform class scores over 6 + 1."""
    criterion = criterion_of("detection", num_queries=2, decoder_layers=1, no_object=0.1)
    box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    targets = DetectionTargets(box[None], torch.tensor([3]), torch.tensor([1]))
    output = DetectionOutput(torch.zeros(1, 2, 7), torch.stack([box + 0.1, box])[None])
    losses = criterion(output, targets, _normaliser([criterion.count(_batch(targets))], 1))
    assert losses["ce"].item() == pytest.approx(math.log(7))  # a weighted mean of equal terms
    assert losses["l1"].item() == losses["giou"].item() == pytest.approx(0, abs=1e-6)
    assert losses["class_error"].item() == 100  # all scores are equal: class 0 is named, not 3
    assert losses["cardinality_error"].item() == 1  # two queries see an object, there is one
    assert criterion.weights == {"ce": 1.0, "l1": 5.0, "giou": 2.0}


def test_degenerate_boxes_give_finite_gradients() -> None:
    """A predicted and a wanted box without area at the same point: 0/0 in the usual formula."""
    boxes = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.2, 0.2, 0.1, 0.1]]], requires_grad=True)
    targets = DetectionTargets(boxes.detach()[0, :1], torch.tensor([1]), torch.tensor([1]))
    criterion = criterion_of("detection", num_queries=2, decoder_layers=1)
    losses = criterion(
        DetectionOutput(torch.zeros(1, 2, 7), boxes), targets, _normaliser([criterion.count(_batch(targets))], 1)
    )
    (losses["l1"] + losses["giou"]).backward()
    assert boxes.grad is not None and torch.isfinite(boxes.grad).all()


# ---- task ----


def test_postprocess() -> None:
    """Pixels of the stored image (not square), raw ids, never "no object", and no result for a repeated image."""
    logits = torch.full((2, 2, 7), -20.0)
    logits[0, 0, 5] = 20.0
    logits[0, 1, 6] = 20.0  # surely nothing: still a result, with a tiny score and the best class that is left
    logits[0, 1, 2] = -10.0
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(2, 2, 4)
    batch = _batch(
        _targets([0, 0]),
        original_sizes=torch.tensor([[100, 200], [10, 10]]),
        image_ids=torch.tensor([493652, 493652]),
        real=torch.tensor([True, False]),
    )
    results = postprocess(DetectionOutput(logits, boxes), batch)
    assert [result["category_id"] for result in results] == [5, 2]
    assert {result["image_id"] for result in results} == {493652}
    assert results[0]["bbox"] == pytest.approx([80, 30, 40, 40], abs=1e-4)  # float32 corners times 200 pixels
    assert results[0]["score"] == pytest.approx(1.0) and results[1]["score"] < 1e-6
