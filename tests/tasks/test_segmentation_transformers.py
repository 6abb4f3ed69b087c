"""The segmentation head, matching and losses against the Mask2Former of `transformers`, its three levels set
to one.

Its pixel decoder, encoder, masked-attention decoder, matcher and loss are used as they are; attributes and
layers that count levels are replaced. Its pixel decoder knows no padding, so padded maps are compared in its
encoder only.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former import modeling_mask2former as theirs

from tests.options import criterion_of, head_of
from tests.tasks.cases import map_of, masks_of
from visft_ds.tasks.masks.data import MaskTargets
from visft_ds.tasks.masks.loss import MaskCriterion
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.points import draw_points
from visft_ds.tasks.segmentation.head import SegmentationHead
from visft_ds.tasks.transformer import sine_positions

CHANNELS, WIDTH, HEADS, POINTS, QUERIES, CLASSES = 24, 64, 4, 4, 7, 5
ENCODER_LAYERS, DECODER_LAYERS = 2, 3
NUM_POINTS = 96

# float32 on both sides with sums in another order; activations after norms are of order one.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _config() -> Mask2FormerConfig:
    return Mask2FormerConfig(
        feature_size=WIDTH,
        mask_feature_size=WIDTH,
        hidden_dim=WIDTH,
        encoder_layers=ENCODER_LAYERS,
        decoder_layers=DECODER_LAYERS + 1,  # theirs counts the prediction before the first layer
        encoder_feedforward_dim=48,
        dim_feedforward=40,
        num_attention_heads=HEADS,
        num_queries=QUERIES,
        num_labels=CLASSES,
        train_num_points=NUM_POINTS,
    )


class Reference(nn.Module):
    """Modules of transformers put together as its Mask2FormerForUniversalSegmentation does, for one level."""

    def __init__(self) -> None:
        super().__init__()
        config = _config()
        self.pixels = theirs.Mask2FormerPixelDecoder(config, feature_channels=[CHANNELS])
        self.pixels.num_feature_levels = 1
        self.pixels.level_embed = nn.Parameter(torch.randn(1, WIDTH))
        for layer in self.pixels.encoder.layers:
            layer.self_attn = theirs.Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention(
                WIDTH, HEADS, n_levels=1, n_points=POINTS
            )
        self.queries = theirs.Mask2FormerTransformerModule(in_features=WIDTH, config=config)
        self.queries.num_feature_levels = self.queries.decoder.num_feature_levels = 1
        self.queries.level_embed = nn.Embedding(1, WIDTH)
        self.class_predictor = nn.Linear(WIDTH, CLASSES + 1)

    def forward(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        pixels = self.pixels([features])
        out = self.queries(pixels.multi_scale_features, pixels.mask_features)
        logits = [self.class_predictor(states.transpose(0, 1)) for states in out.intermediate_hidden_states]
        return logits, list(out.masks_queries_logits)


def _head() -> SegmentationHead:
    ours = {"hidden_dim": WIDTH, "num_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40}
    layers = {"encoder_layers": ENCODER_LAYERS, "decoder_layers": DECODER_LAYERS}
    head: SegmentationHead = head_of(
        "segmentation", CHANNELS, num_classes=CLASSES, num_queries=QUERIES, **ours, **layers
    )
    return head


#: Beginnings of their names -> ours, then the parts of layers; q, k and v of the queries are stacked.
_RULES = {
    r"^pixels\.level_embed$": "pixel_decoder.level_embed.weight",
    r"^pixels\.input_projections\.0\.0\.": "pixel_decoder.input_proj.",
    r"^pixels\.input_projections\.0\.1\.": "pixel_decoder.input_norm.",
    r"^pixels\.mask_projection\.": "pixel_decoder.mask_proj.",
    r"^pixels\.adapter_1\.0\.": "pixel_decoder.lateral_proj.",
    r"^pixels\.adapter_1\.1\.": "pixel_decoder.lateral_norm.",
    r"^pixels\.layer_1\.0\.": "pixel_decoder.output_conv.",
    r"^pixels\.layer_1\.1\.": "pixel_decoder.output_norm.",
    r"^pixels\.encoder\.(.*)self_attn_layer_norm\.": r"pixel_decoder.\1norm1.",
    r"^pixels\.encoder\.(.*)final_layer_norm\.": r"pixel_decoder.\1norm2.",
    r"^pixels\.encoder\.": "pixel_decoder.",
    r"^queries\.queries_embedder\.": "decoder.query_pos.",
    r"^queries\.queries_features\.": "decoder.query_feat.",
    r"^queries\.level_embed\.": "decoder.level_embed.",
    r"^queries\.decoder\.layernorm\.": "decoder.norm.",
    r"^queries\.decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.": r"decoder.mask_embed.layers.\1.",
    r"^queries\.decoder\.": "decoder.",
    r"^class_predictor\.": "decoder.class_embed.",
    r"cross_attn_layer_norm": "norm1",
    r"self_attn_layer_norm": "norm2",
    r"final_layer_norm": "norm3",
    r"\.fc([12])\.": r".linear\1.",
}


def _copy_weights(reference: Reference, head: SegmentationHead) -> None:
    """Every tensor of the reference into the head, by name; `load_state_dict` refuses a rest on either
    side.
    """
    ours: dict[str, Tensor] = {}
    for name, value in reference.state_dict().items():
        for pattern, new in _RULES.items():
            name = re.sub(pattern, new, name)
        ours[name] = value
    for layer in range(DECODER_LAYERS):
        for kind in ("weight", "bias"):
            parts = [ours.pop(f"decoder.layers.{layer}.self_attn.{one}_proj.{kind}") for one in "qkv"]
            ours[f"decoder.layers.{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    head.load_state_dict(ours)


@pytest.fixture(scope="module")
def pair() -> tuple[Reference, SegmentationHead]:
    """The same random weights on both sides; sampling offsets and norms too, which start out trivial."""
    torch.manual_seed(1)
    reference, head = Reference(), _head()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        # an offset common to all cells, so that some queries' masks cover nothing and some cover a part
        reference.pixels.mask_projection.bias.add_(0.5)
    _copy_weights(reference, head)
    return reference.eval(), head.eval()


def test_head_and_gradient(pair: tuple[Reference, SegmentationHead]) -> None:
    """All prediction sets, and the gradient that reaches the features (which stage 2 trains on)."""
    reference, head = pair
    features = torch.randn(2, CHANNELS, 6, 9, requires_grad=True)
    logits, masks = reference(features)
    out = head([map_of(features, torch.ones(2, 6, 9, dtype=torch.bool))])
    torch.testing.assert_close(out.logits, torch.stack(logits), **CLOSE)
    torch.testing.assert_close(out.masks, torch.stack(masks), **CLOSE)
    # Every kind of mask occurs, else the comparison would say little about the masked attention.
    share = (torch.stack(masks) > 0).float().flatten(3).mean(dim=-1)
    assert (share == 0).any() and ((share > 0) & (share < 1)).any()
    direction = torch.randn_like(out.logits), torch.randn_like(out.masks)
    gradients = []
    for scores, shapes in ((torch.stack(logits), torch.stack(masks)), (out.logits, out.masks)):
        total = (direction[0] * scores).sum() + (direction[1] * shapes).sum()
        gradients.append(torch.autograd.grad(total, features)[0])
    # sums over all sets and cells: an order of magnitude more terms
    torch.testing.assert_close(
        gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max())
    )


def test_padded_encoder(pair: tuple[Reference, SegmentationHead]) -> None:
    """Positions, sampling points and the values of padded cells where the images of a batch differ in
    size.
    """
    reference, head = pair
    valid = torch.zeros(2, 6, 8, dtype=torch.bool)
    valid[0, :4, :8] = valid[1, :6, :5] = True
    positions = theirs.Mask2FormerSinePositionEmbedding(WIDTH // 2, normalize=True)
    place = positions((2, WIDTH, 6, 8), "cpu", torch.float32, valid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(sine_positions(valid, WIDTH).flatten(1, 2), place)
    entries = torch.randn(2, 48, WIDTH)
    expected = reference.pixels.encoder(
        inputs_embeds=entries,
        attention_mask=~valid.flatten(1),
        position_embeddings=place,
        spatial_shapes_list=[(6, 8)],
        level_start_index=None,
        valid_ratios=reference.pixels.get_valid_ratio(~valid)[:, None],
        return_dict=True,
    ).last_hidden_state
    for layer in head.pixel_decoder.layers:
        entries = layer(entries, place, valid.flatten(1), (6, 8))
    torch.testing.assert_close(entries[valid.flatten(1)], expected[valid.flatten(1)], **CLOSE)


def _case(counts: list[int]) -> tuple[MaskOutput, MaskTargets]:
    """Random predictions of all sets and soft masks; blobs rather than noise, so that costs differ."""
    shape = (DECODER_LAYERS + 1, len(counts), QUERIES)
    blobs = nn.functional.interpolate(
        3 * torch.randn(*shape[:2], QUERIES * 9).view(-1, QUERIES, 3, 3), (6, 9), mode="bicubic"
    )
    logits, masks = torch.randn(*shape, CLASSES + 1), blobs.view(*shape, 6, 9)
    targets = masks_of(counts, CLASSES, grid=(20, 28))
    return MaskOutput(logits.requires_grad_(), masks.requires_grad_(), torch.ones(len(counts), 2)), targets


def _criterion() -> MaskCriterion:
    options = {"num_classes": CLASSES, "num_queries": QUERIES, "decoder_layers": DECODER_LAYERS}
    return criterion_of("segmentation", **options, train_num_points=NUM_POINTS)


@pytest.fixture
def same_draws(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let transformers draw its points from a list."""
    queue: list[Tensor] = []

    def rand(*shape: int, device: object = None) -> Tensor:
        drawn = queue.pop(0)
        assert drawn.shape == shape
        return drawn

    monkeypatch.setattr(theirs.torch, "rand", rand)
    return queue


def test_losses_and_their_gradient(same_draws: list[Tensor]) -> None:
    """Every name, with the same pairs; more objects than queries in one image.

    Theirs sees one image at a time, as the published code does on each GPU.
    """
    counts = [3, 1, 9]
    out, targets = _case(counts)
    criterion = _criterion()
    sizes = (NUM_POINTS, 3 * NUM_POINTS, NUM_POINTS // 4)
    matching, candidates, uniform = draw_points(
        targets.keys.tolist(), DECODER_LAYERS + 1, sizes, torch.device("cpu")
    )
    theirs_loss, wanted = theirs.Mask2FormerLoss(_config(), weight_dict={}), dict[str, Tensor]()
    each = zip(counts, targets.masks.split(counts), targets.labels.split(counts), strict=True)
    for image, (count, masks, labels) in enumerate(each):
        for layer in (DECODER_LAYERS, *range(DECODER_LAYERS)):  # theirs begins with the last
            same_draws.append(matching[image, layer][None])
            same_draws += [
                drawn[image, layer].repeat(min(count, QUERIES), 1, 1) for drawn in (candidates, uniform)
            ]
        here = zip(out.masks[:, image : image + 1], out.logits[:, image : image + 1], strict=True)
        *auxiliary, last = ({"masks_queries_logits": m, "class_queries_logits": c} for m, c in here)
        found = theirs_loss(*last.values(), [masks.float() / 255], [labels], auxiliary)
        assert not same_draws
        for name, value in found.items():  # classes: the mean over images; masks: that over all objects
            share = 1 / len(counts) if "cross_entropy" in name else count / sum(counts)
            wanted[name] = wanted.get(name, torch.tensor(0.0)) + share * value
    losses = criterion(out, targets, {"masks": torch.tensor(13.0), "images": torch.tensor(3.0)})
    names = {"ce": "loss_cross_entropy", "bce": "loss_mask", "dice": "loss_dice"}
    assert len(criterion.weights) == len(wanted) == 3 * (DECODER_LAYERS + 1)
    pairs = []
    for name in criterion.weights:
        kind, _, number = name.partition("_")
        pairs.append((losses[name], wanted[f"{names[kind]}_{number}" if number else names[kind]]))
        torch.testing.assert_close(*pairs[-1], rtol=1e-5, atol=1e-6)
    tensors = (out.logits, out.masks)
    ours, expected = (
        torch.autograd.grad(torch.stack(terms).sum(), tensors) for terms in zip(*pairs, strict=True)
    )
    for gradient, wanted_gradient in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-7)
