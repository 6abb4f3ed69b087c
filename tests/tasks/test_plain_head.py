"""The plain mask head against transformers' EoMT of decoder blocks, and what keeps a loss independent of its
batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import EomtDinov3Config
from transformers.models.eomt_dinov3.modeling_eomt_dinov3 import EomtDinov3ForUniversalSegmentation

from tests.options import criterion_of
from tests.tasks.cases import CLASSES, denominators, hide_parameters, map_of, masks_of
from visft_ds.data.samples import Map
from visft_ds.tasks.masks.config import PlainHeadConfig
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.plain import Block, PlainHead, masked_share, rotations

WIDTH, HEADS, BLOCKS, QUERIES, PREFIX = 32, 2, 3, 7, 5
KEYS = torch.tensor([11, 12])
#: Of both decoders, positions are computed in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _head(widths: Sequence[int] = (WIDTH, WIDTH), **options: Any) -> PlainHead:
    """A head in float64 whose gains, norms and biases are not trivial."""
    given = {
        "num_classes": CLASSES,
        "num_queries": QUERIES,
        "blocks": BLOCKS,
        "hidden_dim": WIDTH,
        "num_heads": HEADS,
    }
    head = PlainHead([(width, 16) for width in widths], PlainHeadConfig(**{**given, **options}))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        head.mask3.bias.add_(0.3)  # masks that cover a part
    return head.double().requires_grad_()


def _maps(count: int = 2, grid: tuple[int, int] = (4, 6), prefix: int = PREFIX, images: int = 2) -> list[Map]:
    valid = torch.ones(images, *grid, dtype=torch.bool)
    draw = [(torch.randn(images, WIDTH, *grid), torch.randn(images, prefix, WIDTH)) for _ in range(count)]
    return [map_of(one.double(), valid, first.double() if prefix else None) for one, first in draw]


class Tokens(nn.Module):
    """In place of their embedding and tower."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens, self.num_prefix_tokens = tokens, PREFIX

    def forward(self, images: Tensor) -> Tensor:
        return self.tokens


#: Beginnings of our names -> theirs.
RULES = {
    "queries.": "query.",
    "blocks.": "layers.",
    "norm.": "layernorm.",
    "upscale.": "upscale_block.block.",
    "mask": "mask_head.fc",
    "classes.": "class_predictor.",
}
PARTS = {
    ".q.": "attention.q_proj",
    ".k.": "attention.k_proj",
    ".v.": "attention.v_proj",
    ".proj.": "attention.o_proj",
}
PARTS |= {
    ".fc1.": "mlp.up_proj",
    ".fc2.": "mlp.down_proj",
    ".up.": "conv1",
    ".near.": "conv2",
    ".norm.": "layernorm2d",
}


def _theirs(head: PlainHead, tokens: Tensor, side: int, share: float) -> EomtDinov3ForUniversalSegmentation:
    """EoMT whose blocks are all of its decoder, with our weights."""
    config = EomtDinov3Config(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_blocks=BLOCKS,
        num_attention_heads=HEADS,
        intermediate_size=WIDTH,
        layer_norm_eps=1e-5,
        image_size=side,
        num_queries=QUERIES,
        num_labels=CLASSES,
        num_register_tokens=PREFIX - 1,
    )
    model = EomtDinov3ForUniversalSegmentation(config)
    model.embeddings = Tokens(tokens)
    values = {}
    for name, value in head.state_dict().items():
        if name.startswith("laterals."):
            continue
        rule = next(rule for rule in RULES if name.startswith(rule))
        name = RULES[rule] + name[len(rule) :]
        for part, other in PARTS.items() if rule in ("blocks.", "upscale.") else ():
            name = name.replace(part, f".{other}.")
        for number in "12":
            name = name.replace(f"gain{number}", f"layer_scale{number}.lambda1")
        values[name] = value
    values["attn_mask_probs"] = torch.full((BLOCKS,), share)
    wrong = model.load_state_dict(values, strict=False)
    ours = ("criterion.", "rope_embeddings.")
    assert not wrong.unexpected_keys and all(name.startswith(ours) for name in wrong.missing_keys), wrong
    return model.double().eval()


@pytest.mark.parametrize("share", [1.0, 0.0], ids=["masked", "unmasked"])
def test_as_transformers(share: float) -> None:
    """Every set of classes and masks, at both ends of the annealing."""
    torch.manual_seed(2)
    head, maps = _head(), _maps(grid=(5, 5))
    found = head.train()(maps, KEYS, progress=1.0 - share)
    theirs, sets = _theirs(head, head._tokens(maps)[:, QUERIES:].detach(), side=80, share=share), []
    predict = theirs.predict
    theirs.predict = lambda states: sets.append(predict(states)) or sets[-1]  # type: ignore[func-returns-value]
    theirs(torch.zeros(2, 3, 80, 80, dtype=torch.float64))
    logits, masks = torch.stack([c for _, c in sets]), torch.stack([m for m, _ in sets])
    assert len(found.logits) == BLOCKS + 1 and len(logits) == (BLOCKS + 1 if share else 1)
    torch.testing.assert_close(found.logits[-len(logits) :], logits, **CLOSE)
    torch.testing.assert_close(found.masks[-len(masks) :], masks, **CLOSE)
    part = (masks > 0).double().mean(dim=(3, 4))
    assert ((part > 0) & (part < 1)).double().mean() > 0.5  # masks that show something
    if not share:
        assert torch.equal(head.eval()(maps).masks, found.masks[-1:])


def test_two_calls_are_one_masked_call() -> None:
    """Attention of few rows with masks and of the others without; an open mask is none."""
    torch.manual_seed(3)
    block, x = Block(WIDTH, HEADS, WIDTH).double(), torch.randn(2, QUERIES + 20, WIDTH, dtype=torch.float64)
    cos, sin = rotations(torch.ones(2, 4, 5, dtype=torch.bool), WIDTH // HEADS)
    seen = torch.rand(2, 1, QUERIES, x.shape[1]) > 0.5
    seen[..., :QUERIES] = True
    whole = torch.cat((seen, seen.new_ones(2, 1, 20, x.shape[1])), dim=2)
    masked, open_ = block(x, cos, sin, seen, None), block(x, cos, sin, torch.ones_like(seen), None)
    torch.testing.assert_close(masked, block(x, cos, sin, None, whole), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(open_, block(x, cos, sin, None, None), rtol=1e-12, atol=1e-12)
    assert (masked - open_).abs().max() > 1e-3


def test_order_of_queries_and_maps() -> None:
    torch.manual_seed(4)
    head, maps = _head().eval(), _maps()
    before, order = head(maps), torch.randperm(QUERIES)
    head.queries.weight.data = head.queries.weight[order]
    after = head(maps)
    torch.testing.assert_close(after.masks, before.masks[:, :, order], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(after.logits, before.logits[:, :, order], rtol=1e-10, atol=1e-10)
    head.laterals = nn.ModuleList(reversed(head.laterals))
    assert torch.equal(head(maps[::-1]).masks, after.masks)


def test_padding_and_division_change_nothing() -> None:
    """A small image beside a large one gives what it gives alone, in training, whatever the padding holds."""
    torch.manual_seed(5)
    head = _head(widths=[WIDTH]).train()
    (small,), (large,) = _maps(1, grid=(3, 4), images=1), _maps(1, grid=(4, 6))
    large.features[1, :, :3, :4] = small.features[0]
    large.valid[1, 3:] = large.valid[1, :, 4:] = False
    both = map_of(large.features, large.valid, torch.cat((large.prefix[:1], small.prefix)))  # type: ignore[index, list-item]
    progress = 0.5  # the first block without masks, one on the way, one with
    shares = [masked_share(block, BLOCKS, progress) for block in range(BLOCKS)]
    assert shares[0] == 0 < shares[1] < 1 == shares[2]
    alone = head([small], KEYS[1:], progress)
    known = torch.tensor([[4.0, 6.0], [2.5, 3.5]], dtype=torch.float64)
    for cells in (known, both.cells):
        found = head([replace(both, cells=cells)], KEYS, progress)
        torch.testing.assert_close(found.logits[:, 1], alone.logits[:, 0], rtol=1e-6, atol=1e-6)
        inside = found.masks[:, 1, :, :12, :16]
        torch.testing.assert_close(inside, alone.masks[:, 0], rtol=1e-6, atol=1e-6)
        assert found.masks[:, 1].count_nonzero() == inside.count_nonzero()


def test_draws_belong_to_key_and_block() -> None:
    """Not to the global generator: half-way, queries of equal keys are masked alike, others are not."""
    torch.manual_seed(6)
    head, (one,) = _head(widths=[WIDTH]).train(), _maps(1, images=1)
    twice = [map_of(one.features.repeat(2, 1, 1, 1), one.valid.repeat(2, 1, 1), one.prefix.repeat(2, 1, 1))]  # type: ignore[union-attr]
    same, other = (head(twice, torch.tensor([7, key]), 0.5).logits for key in (7, 8))
    torch.manual_seed(7)
    again = head(twice, torch.tensor([7, 7]), 0.5).logits
    assert torch.equal(same, again) and torch.equal(other[:, 0], same[:, 0])
    torch.testing.assert_close(same[:, 1], same[:, 0], rtol=1e-12, atol=1e-12)
    assert (other[-1, 1] - same[-1, 1]).abs().max() > 1e-3


#: Of the published recipes: steps of the run, and the first and last step of each block's annealing.
SCHEDULES = {
    88692: ([0, 23651, 32520, 41389, 50258, 59128], [3000, 38433, 47302, 56171, 65040, 73910]),
    20190: ([0, 5384, 7403, 9422, 11442, 13461], [3000, 8749, 10769, 12788, 14807, 16826]),
}


@pytest.mark.parametrize("total", SCHEDULES)
def test_annealing_is_that_of_the_published_recipes(total: int) -> None:
    starts, ends = SCHEDULES[total]
    for block, (start, end) in enumerate(zip(starts, ends, strict=True)):
        assert masked_share(block, 6, start / total) == pytest.approx(1, abs=1e-3)
        if block:
            assert masked_share(block, 6, (start - 20) / total) == 1 == masked_share(block, 6, 0)
            assert masked_share(block, 6, (start + end) / 2 / total) == pytest.approx(0.5**0.9, abs=1e-3)
            assert masked_share(block, 6, (end + 2) / total) == 0
    assert masked_share(0, 6, 3016 / 88692) < 1e-3 and masked_share(0, 1, 1.0) == 0


def test_recomputed_predictions_give_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(8)
    head, maps, gradients = _head().train(), _maps(), []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(PlainHead, "_predict", PlainHead._prediction)
        head.zero_grad()
        found = head(maps, KEYS, 0.0)
        (found.masks.square().sum() + found.logits.square().sum()).backward()
        gradients.append({name: parameter.grad for name, parameter in head.named_parameters()})
    assert all(
        value is not None and torch.equal(value, gradients[1][name]) for name, value in gradients[0].items()
    )


def test_parameters_are_used_by_their_owner_only() -> None:
    head, maps = _head().eval(), _maps()
    expected = head(maps)
    hide_parameters(head)
    with torch.no_grad():
        assert torch.equal(head(maps).masks, expected.masks)


def test_maps_of_unequal_strides_meet_at_the_one_nearest_16() -> None:
    head = PlainHead(
        [(8, 8), (12, 16), (WIDTH, 32)], PlainHeadConfig(num_classes=CLASSES, num_queries=QUERIES, blocks=1)
    )
    valid = [torch.ones(1, 8 >> index, 8 >> index, dtype=torch.bool) for index in range(3)]
    maps = [
        map_of(torch.randn(1, width, *one.shape[1:]), one)
        for width, one in zip((8, 12, WIDTH), valid, strict=True)
    ]
    found = head.eval()(maps)
    assert found.masks.shape == (1, 1, QUERIES, 16, 16) and found.logits.shape == (1, 1, QUERIES, CLASSES + 1)
    with pytest.raises(ValueError, match="not a multiple of 4"):
        PlainHead([(40, 16)], PlainHeadConfig(num_heads=4))


@pytest.mark.parametrize("sets", [1, BLOCKS + 1])
def test_losses_of_as_many_sets_as_come(sets: int) -> None:
    """Those of the last set have the same names and values whether or not others are in front of it."""
    criterion = criterion_of(
        "segmentation", type="plain", num_classes=CLASSES, num_queries=QUERIES, blocks=BLOCKS
    )
    logits, masks = torch.randn(sets, 2, QUERIES, CLASSES + 1), torch.randn(sets, 2, QUERIES, 5, 6)
    targets = masks_of([2, 3])
    output = MaskOutput(logits, masks, torch.ones(2, 2))
    losses = criterion(output, targets, denominators("segmentation", criterion, targets))
    assert len(losses) == 3 * sets + 1 and {"ce", "bce", "dice", "class_error"} <= losses.keys() - {""}
    assert losses.keys() - {"class_error"} <= criterion.weights.keys() and len(criterion.weights) == 3 * (
        BLOCKS + 1
    )
