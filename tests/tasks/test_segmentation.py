"""The segmentation head and its criterion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.options import criterion_of, head_of
from visft_ds.data.samples import Batch
from visft_ds.tasks.segmentation.data import SegmentationTargets
from visft_ds.tasks.segmentation.head import SegmentationHead, SegmentationOutput
from visft_ds.tasks.segmentation.loss import SegmentationCriterion
from visft_ds.tasks.segmentation.mask_points import PointCounts, draw_points, uncertain_points
from visft_ds.tasks.segmentation.pixel_decoder import MaskedGroupNorm

#: Our names -> those of the published ViSFT head files (after `visft_heads.`); {n} is a layer's number.
PUBLISHED_KEYS = {
    "pixel_decoder.input_proj.": "segment_pixel_decoder.input_proj.0.0.",
    "pixel_decoder.input_norm.": "segment_pixel_decoder.input_proj.0.1.",
    "pixel_decoder.level_embed.weight": "segment_pixel_decoder.transformer.level_embed",
    "pixel_decoder.layers.": "segment_pixel_decoder.transformer.encoder.layers.",
    "pixel_decoder.lateral_proj.": "segment_pixel_decoder.adapter_1.",
    "pixel_decoder.lateral_norm.": "segment_pixel_decoder.adapter_1.norm.",
    "pixel_decoder.output_conv.": "segment_pixel_decoder.layer_1.",
    "pixel_decoder.output_norm.": "segment_pixel_decoder.layer_1.norm.",
    "pixel_decoder.mask_proj.": "segment_pixel_decoder.mask_features.",
    "decoder.query_feat.": "segment_predictor.query_feat.",
    "decoder.query_pos.": "segment_predictor.query_embed.",
    "decoder.level_embed.": "segment_predictor.level_embed.",
    "decoder.layers.{n}.cross_attn.": "segment_predictor.transformer_cross_attention_layers.{n}.multihead_attn.",
    "decoder.layers.{n}.norm1.": "segment_predictor.transformer_cross_attention_layers.{n}.norm.",
    "decoder.layers.{n}.self_attn.": "segment_predictor.transformer_self_attention_layers.{n}.self_attn.",
    "decoder.layers.{n}.norm2.": "segment_predictor.transformer_self_attention_layers.{n}.norm.",
    "decoder.layers.{n}.linear1.": "segment_predictor.transformer_ffn_layers.{n}.linear1.",
    "decoder.layers.{n}.linear2.": "segment_predictor.transformer_ffn_layers.{n}.linear2.",
    "decoder.layers.{n}.norm3.": "segment_predictor.transformer_ffn_layers.{n}.norm.",
    "decoder.norm.": "segment_predictor.decoder_norm.",
    "decoder.class_embed.": "segment_predictor.class_embed.",
    "decoder.mask_embed.": "segment_predictor.mask_embed.",
}
CHANNELS, LAYERS, QUERIES, CLASSES = 12, 2, 7, 6
OPTIONS = {"num_classes": CLASSES, "num_queries": QUERIES, "decoder_layers": LAYERS}


def _head(**options: int | float | str) -> SegmentationHead:
    sizes = {"hidden_dim": 32, "encoder_layers": 2, "num_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return head_of("segmentation", CHANNELS, **{**OPTIONS, **sizes, **options})


def _criterion(**options: int | float | str) -> SegmentationCriterion:
    return criterion_of("segmentation", **{**OPTIONS, "num_points": 64, **options})


def _targets(counts: list[int], grid: tuple[int, int] = (12, 16)) -> SegmentationTargets:
    total = sum(counts)
    blobs = F.interpolate(torch.randn(total + 1, 1, 3, 4), size=grid, mode="bicubic")[:total, 0]
    return SegmentationTargets(
        masks=(blobs.clamp(-1, 1) * 127.5 + 127.5).to(torch.uint8),
        labels=torch.randint(CLASSES, (total,)),
        extents=torch.ones(len(counts), 2),
        mask_extents=torch.ones(len(counts), 2),
        counts=torch.tensor(counts),
        keys=torch.arange(len(counts)) + 100,
    )


def _batch(targets: SegmentationTargets) -> Batch:
    count = len(targets.counts)
    numbers = torch.arange(count)
    return Batch(
        images=torch.zeros(count, 3, 8, 8, dtype=torch.uint8),
        sizes=torch.full((count, 2), 8),
        original_sizes=torch.full((count, 2), 8),
        indices=numbers,
        image_ids=numbers + 1,
        random_keys=numbers,
        real=torch.ones(count, dtype=torch.bool),
        targets={"segmentation": targets},
    )


def _count(criterion: SegmentationCriterion, targets: SegmentationTargets) -> dict[str, float]:
    return criterion.count(_batch(targets))


def _normaliser(counts: list[Mapping[str, float]], parts: int) -> dict[str, Tensor]:
    """As the training loop makes it: global sum, at least 1, divided by ranks times micro-batches."""
    return {name: torch.tensor(max(sum(c[name] for c in counts), 1.0) / parts).double() for name in counts[0]}


def _output(images: int, size: tuple[int, int] = (5, 6)) -> SegmentationOutput:
    logits = torch.randn(LAYERS + 1, images, QUERIES, CLASSES + 1, dtype=torch.float64)
    masks = torch.randn(LAYERS + 1, images, QUERIES, *size, dtype=torch.float64)
    each = [SegmentationOutput(*pair) for pair in zip(logits, masks, strict=True)]
    return replace(each[-1], aux=tuple(each[:-1]))


# ---- head ----


@pytest.mark.parametrize(("width", "parameters"), [(1792, 13_847_441), (1408, 13_650_833)])
def test_size_is_the_published_one(width: int, parameters: int) -> None:
    with torch.device("meta"):
        head = head_of("segmentation", width)
    assert sum(parameter.numel() for parameter in head.parameters()) == parameters
    assert sum(parameter.numel() for parameter in head.decoder.parameters()) == 9_751_121


def test_names_map_onto_the_published_files() -> None:
    with torch.device("meta"):
        head = head_of("segmentation", 1792)
    published = {}
    for name, value in head.state_dict().items():
        number = re.match(r"decoder\.layers\.(\d+)\.", name)
        rules = (
            ((a.replace("{n}", number[1]), b.replace("{n}", number[1])) for a, b in PUBLISHED_KEYS.items())
            if number
            else PUBLISHED_KEYS.items()
        )
        ours, theirs = next(pair for pair in rules if name.startswith(pair[0]))
        published[theirs + name[len(ours) :]] = tuple(value.shape)
    # 6 pixel layers of 16; 3 convolutions and norms with 8 tensors, mask features, level; 9 layers of 18 and 14 others
    assert len(published) == len(head.state_dict()) == 6 * 16 + 3 + 8 + 2 + 9 * 18 + 3 + 2 + 2 + 6
    pixel, predictor = "segment_pixel_decoder.", "segment_predictor."
    assert published[f"{pixel}transformer.level_embed"] == (1, 256)
    assert published[f"{pixel}transformer.encoder.layers.5.self_attn.sampling_offsets.weight"] == (64, 256)
    assert published[f"{pixel}transformer.encoder.layers.0.self_attn.attention_weights.weight"] == (32, 256)
    assert published[f"{pixel}input_proj.0.0.weight"] == (256, 1792, 1, 1)
    assert published[f"{pixel}layer_1.weight"] == (256, 256, 3, 3)
    assert published[f"{predictor}class_embed.weight"] == (81, 256)
    assert published[f"{predictor}transformer_cross_attention_layers.8.multihead_attn.in_proj_weight"] == (768, 256)


def test_group_norm_of_unpadded_maps_is_torchs() -> None:
    ours, theirs = MaskedGroupNorm(4, 12), nn.GroupNorm(4, 12)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 12, 5, 3) + 2
    torch.testing.assert_close(ours(x, torch.ones(2, 5, 3, dtype=torch.bool)), theirs(x))


def test_a_mask_that_covers_nothing_lets_its_query_see_the_whole_image() -> None:
    """Otherwise the softmax runs over nothing and gives NaN; padding stays out of sight all the same."""
    head = _head().eval()
    nn.init.zeros_(head.pixel_decoder.mask_proj.weight)
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[:, 2] = False
    seen = []
    for sign in (-1.0, 1.0):  # every mask covers all or, with its sign turned, nothing: one or the other of each query
        nn.init.constant_(head.pixel_decoder.mask_proj.bias, sign)
        seen.append(head(torch.ones(1, CHANNELS, 3, 4), valid).logits)
    assert torch.isfinite(seen[0]).all()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_parameters_are_used_by_their_owner_only() -> None:
    """ZeRO-3 has a parameter's values between the start and the end of its owner's forward, and nowhere else."""
    head = _head().eval()
    inputs = torch.randn(1, CHANNELS, 3, 4), torch.ones(1, 3, 4, dtype=torch.bool)
    expected = head(*inputs)
    for module in head.modules():
        own = {parameter: parameter.detach().clone() for parameter in module.parameters(recurse=False)}
        if own:
            module.register_forward_pre_hook(
                lambda *_, own=own: [p.data.copy_(value) for p, value in own.items()] and None
            )
            module.register_forward_hook(lambda *_, own=own: [p.data.fill_(torch.nan) for p in own] and None)
            for parameter in own:
                parameter.data.fill_(torch.nan)
    with torch.no_grad():
        output = head(*inputs)
    assert torch.equal(output.masks, expected.masks) and torch.equal(output.logits, expected.logits)


# ---- points ----


def test_points_belong_to_key_and_layer() -> None:
    """Not to the batch, not to the global generator; no two layers or images share theirs."""
    counts = PointCounts.of(8, 3.0, 0.75)
    assert (counts.matching, counts.candidates, counts.uncertain, counts.uniform) == (8, 24, 6, 2)
    together = draw_points([5, 9], 3, counts, torch.device("cpu"))
    torch.manual_seed(1)
    alone = draw_points([9], 2, counts, torch.device("cpu"))
    for kind in ("matching", "candidates", "uniform"):
        drawn = getattr(together, kind)
        assert torch.equal(drawn[1:, :2], getattr(alone, kind))
        assert len(torch.unique(drawn)) == drawn.numel()
        assert drawn.min() >= 0 and drawn.max() < 1


def test_uncertain_points() -> None:
    """A prediction that is certain except on its middle line."""
    masks = torch.linspace(-4, 4, 9).expand(1, 1, 9, 9)  # logits grow with x
    candidates, uniform = torch.rand(1, 300, 2), torch.rand(1, 10, 2)
    points = uncertain_points(masks, candidates, uniform, 30, torch.ones(2))
    assert points.shape == (1, 1, 40, 2) and torch.equal(points[0, 0, 30:], uniform[0])
    distance = (candidates[0, :, 0] - 0.5).abs().sort().values
    assert (points[0, 0, :30, 0] - 0.5).abs().max() == distance[29]


# ---- criterion ----


def test_padding_of_batch_and_masks_changes_nothing() -> None:
    """The loss of an image that covers a part of the predicted grid and of the mask grid, as in a mixed batch."""
    targets, output, criterion = _targets([3]), _output(1, (5, 6)), _criterion()
    loss_denominators = _normaliser([_count(criterion, targets)], 1)
    alone = criterion(output, targets, loss_denominators)

    def padded(one: SegmentationOutput) -> SegmentationOutput:
        return SegmentationOutput(one.logits, F.pad(one.masks, (0, 2, 0, 5)), tuple(padded(aux) for aux in one.aux))

    wider = replace(
        targets,
        masks=F.pad(targets.masks, (0, 16, 0, 4)),
        extents=torch.tensor([[5 / 10, 6 / 8]]),
        mask_extents=torch.tensor([[12 / 16, 16 / 32]]),
    )
    mixed = criterion(padded(output), wider, loss_denominators)
    for name, value in alone.items():
        # the points are float32, and so is their place on the grid
        torch.testing.assert_close(mixed[name], value, rtol=1e-5, atol=1e-6)


def test_a_perfect_prediction_costs_next_to_nothing() -> None:
    """With the queries in another order than the objects; another class or mask costs more."""
    criterion, targets = _criterion(num_points=512, importance=0.0), _targets([3])
    hard = (targets.masks > 127).to(torch.uint8) * 255
    targets = replace(targets, masks=hard, labels=torch.tensor([4, 0, 2]))
    logits = torch.zeros(1, QUERIES, CLASSES + 1)
    logits[..., -1] = 20
    masks = torch.full((1, QUERIES, 12, 16), -6.0)
    for row, query in enumerate((5, 1, 3)):
        logits[0, query, targets.labels[row]] = 40
        masks[0, query] = hard[row] / 255.0 * 12 - 6
    output = SegmentationOutput(logits, masks)
    output = replace(output, aux=(output,) * LAYERS)
    loss_denominators = _normaliser([_count(criterion, targets)], 1)
    losses = criterion(output, targets, loss_denominators)
    assert losses["ce"] < 1e-3 and losses["class_error"] == 0
    # along the edges, the probability passes from 0 to 1 more steeply than the target does
    assert losses["dice"] < 0.1 and losses["bce"] < 0.3
    broken = criterion(replace(output, masks=-masks), targets, loss_denominators)
    assert broken["dice"] > 0.3 and broken["bce"] > 2
    renamed = criterion(output, replace(targets, labels=torch.tensor([4, 0, 3])), loss_denominators)
    assert renamed["ce"] > 1 and renamed["class_error"].item() == pytest.approx(100 / 3)


def test_learns_one_picture() -> None:
    """Head and criterion pull in the same direction: three objects are found in a few dozen steps."""
    head, criterion = _head(num_queries=5, hidden_dim=64), _criterion(num_queries=5, num_points=256)
    masks = torch.zeros(3, 32, 32, dtype=torch.uint8)
    masks[0, :16, :12], masks[1, 16:, :20], masks[2, 4:28, 22:] = 255, 255, 255
    targets = replace(_targets([3]), masks=masks, labels=torch.tensor([4, 0, 2]))
    features, valid = torch.randn(1, CHANNELS, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    loss_denominators = {name: value.float() for name, value in _normaliser([_count(criterion, targets)], 1).items()}
    for step in range(60):
        one = replace(targets, keys=torch.tensor([step]))
        losses = criterion(head(features, valid), one, loss_denominators)
        optimizer.zero_grad()
        sum(weight * losses[name] for name, weight in criterion.weights.items()).backward()
        optimizer.step()
    output = head(features, valid)
    best = output.logits.softmax(-1)[0, :, :-1].max(dim=-1)
    found = {label: query for query, label in enumerate(best.indices.tolist()) if best.values[query] > 0.5}
    assert set(found) == {4, 0, 2}
    for row, label in enumerate((4, 0, 2)):
        seen = F.interpolate(output.masks[:, found[label]][None], size=(32, 32), mode="bilinear")[0, 0] > 0
        wanted = masks[row] > 0
        assert (seen & wanted).sum() / (seen | wanted).sum() > 0.75
