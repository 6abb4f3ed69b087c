"""The contrastive loss against open_clip's, LoRA inside PyTorch's attention, and the pairs of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import nn
from torch.nn import functional as F

from visft_ds.experiments.contrastive.fitting import LARGEST_LOG_SCALE, ContrastiveRecipe, clip_loss, fit
from visft_ds.experiments.contrastive.pairs import PairOrder
from visft_ds.experiments.contrastive.text import TextTuning, inject_updates, merge_updates, update_parameters


@pytest.mark.parametrize("pairs", [1, 2, 33])
def test_loss_and_gradients_are_open_clips(pairs: int) -> None:
    images, texts = (F.normalize(torch.randn(pairs, 12, dtype=torch.float64), dim=-1) for _ in range(2))
    found = []
    for loss in (clip_loss, lambda a, b, scale: ClipLoss()(a, b, scale.exp())):
        leaves = [images.clone().requires_grad_(), texts.clone().requires_grad_()]
        scale = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
        value = loss(*leaves, scale)
        value.backward()
        found.append([value.detach(), scale.grad, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)  # float64: the same sums in another order


def test_loss_of_what_tells_nothing() -> None:
    same = F.normalize(torch.ones(16, 4), dim=-1)
    assert clip_loss(same, same, torch.tensor(3.0)).item() == pytest.approx(math.log(16), rel=1e-6)


def test_an_epoch_has_every_image_once_with_a_caption_of_its_own() -> None:
    owners = np.repeat(np.arange(21), [1, 5, 2] * 7).astype(np.int64)
    order = PairOrder(owners, batch_size=4, seed=3)
    epochs = [[order.step(5 * epoch + step) for step in range(5)] for epoch in range(40)]
    for epoch in epochs:
        images = np.concatenate([images for images, _ in epoch])
        assert len(set(images.tolist())) == 20  # the one that fills no batch waits
        for images, captions in epoch:
            assert (owners[captions] == images).all()
    assert [step[0].tolist() for step in epochs[0]] != [step[0].tolist() for step in epochs[1]]
    drawn = np.concatenate([captions for epoch in epochs for _, captions in epoch])
    assert set(drawn.tolist()) == set(range(len(owners)))  # every caption comes in time, every image too
    again = PairOrder(owners, batch_size=4, seed=3).step(7)
    assert all((ours == theirs).all() for ours, theirs in zip(again, order.step(7), strict=True))
    assert (PairOrder(owners, batch_size=4, seed=4).step(7)[0] != again[0]).any()


@pytest.mark.parametrize("size", [1, 22])
def test_a_batch_needs_others_to_tell_a_pair_from(size: int) -> None:
    with pytest.raises(ValueError, match="give 2 to 21"):
        PairOrder(np.arange(21), size, 0)


def test_lora_in_attention_starts_as_nothing_trains_q_and_v_and_merges_exactly() -> None:
    tower = nn.ModuleDict({"attn": nn.MultiheadAttention(12, 3, batch_first=True)}).requires_grad_(False).eval()
    parameters = dict(tower.named_parameters())
    before = parameters["attn.in_proj_weight"].clone()
    x = torch.randn(2, 5, 12)
    plain = tower["attn"](x, x, x)[0]
    changed = inject_updates(tower, parameters, rank=2, alpha=4.0, seed=0)
    assert changed == ["attn.in_proj_weight"]
    torch.testing.assert_close(tower["attn"](x, x, x)[0], plain, rtol=1e-5, atol=1e-6)  # PyTorch's faster path before
    trained = update_parameters(tower)
    assert sum(value.numel() for value in trained.values()) == 2 * 2 * 12 + 2 * 12 * 2
    for value in trained.values():
        nn.init.normal_(value)
    adapted = tower["attn"](x, x, x)[0]
    adapted.sum().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in trained.values())
    merge_updates(tower)
    torch.testing.assert_close(tower["attn"](x, x, x)[0], adapted, rtol=1e-5, atol=1e-6)
    after = dict(tower.named_parameters())["attn.in_proj_weight"]
    assert after is parameters["attn.in_proj_weight"]  # what is written is what was merged
    moved = (after != before).any(dim=1)
    assert moved[:12].all() and not moved[12:24].any() and moved[24:].all()
    a, scale = trained["attn.parametrizations.in_proj_weight.0.lora_A"], 4.0 / 2
    b = trained["attn.parametrizations.in_proj_weight.0.lora_B"]
    torch.testing.assert_close(after[24:] - before[24:], scale * b[12:] @ a[2:], rtol=1e-5, atol=1e-6)


def test_lora_says_where_it_has_no_place() -> None:
    tower = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="no attention with a fused weight"):
        inject_updates(tower, dict(tower.named_parameters()), 2, 2.0, 0)
    with pytest.raises(ValueError, match="must be positive"):
        TextTuning(rank=0)


def test_recipe_and_loop() -> None:
    recipe = ContrastiveRecipe(steps=10, batch_size=2, lr=0.5, warmup=0.2, weight_decay=0.0)
    factors = [recipe.factor(step) for step in range(10)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and factors[3:] == sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 0.1
    scale, value = nn.Parameter(torch.tensor(4.0)), nn.Parameter(torch.ones(3))

    def compute(step: int) -> float:
        loss = value.square().sum() - 50 * scale  # wants a temperature beyond all bounds
        loss.backward()
        return loss.item()

    losses = fit(compute, {"value": value, "logit_scale": scale}, scale, recipe).losses
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert scale.item() == pytest.approx(LARGEST_LOG_SCALE)
    with pytest.raises(ValueError, match=r"step 1: the loss is nan.*lower learning rate"):
        fit(lambda step: math.nan, {"value": value}, scale, recipe)
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"warmup": 1.0}, {"seed": -1}, {"max_norm": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ContrastiveRecipe(**{"steps": 1, "batch_size": 2, "lr": 1.0, **wrong})
