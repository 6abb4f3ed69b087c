"""Anchors: their losses, and the second forward of the tower without its adapters."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parallel.engine_case import build, global_batch, loss_denominators
from visft_ds.config import resolve
from visft_ds.data.samples import Map
from visft_ds.models.lora import lora_parameters
from visft_ds.planner.memory import model_operations, planned_run
from visft_ds.prepare.model import plan_model
from visft_ds.tasks import anchor
from visft_ds.tasks.anchor import anchor_losses

BOTH = {"gram": 10.0, "cosine": 100.0}


def held(now: Tensor, base: Tensor, valid: Tensor | None = None, *prefixes: Tensor) -> dict[str, Tensor]:
    """Losses of maps (B, D, h, w), all of which is image unless `valid` says so."""
    valid = torch.ones_like(now[:, 0], dtype=torch.bool) if valid is None else valid
    first, second = prefixes or (None, None)
    return anchor_losses(
        BOTH, Map(now, valid, first), Map(base, valid, second), torch.arange(len(now)), bool(prefixes)
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_terms_are_those_of_their_definition() -> None:
    now, base, tokens, tokens0 = (
        drawn(*shape, seed=seed) for seed, shape in enumerate([(2, 5, 2, 3)] * 2 + [(2, 2, 5)] * 2)
    )
    rows, rows0 = now.flatten(2).mT, base.flatten(2).mT
    grams = [F.cosine_similarity(one[:, :, None], one[:, None], dim=-1) for one in (rows, rows0)]
    gram, turned = (grams[0] - grams[1]).square().mean(), 1 - F.cosine_similarity(rows, rows0, dim=-1).mean()
    mean, token = (rows.mean(1), rows0.mean(1)), (tokens[:, 0], tokens0[:, 0])
    for prefixes, whole in (((), mean), ((tokens, tokens0), token)):
        cosine = (turned + 1 - F.cosine_similarity(*whole).mean()) / 2
        found = held(now, base, None, *prefixes)
        expected = {"anchor": 10 * gram + 100 * cosine, "anchor/gram": gram, "anchor/cosine": cosine}
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], value, rtol=1e-12) for name, value in expected.items())


def test_the_gradient_is_that_of_the_losses() -> None:
    base, valid = drawn(2, 3, 2, 2, seed=1), torch.tensor([[[1, 1], [1, 1]], [[1, 0], [1, 0]]]).bool()
    assert torch.autograd.gradcheck(
        lambda now: held(now, base, valid)["anchor"], drawn(2, 3, 2, 2).requires_grad_()
    )


@pytest.mark.parametrize("most", [1024, 4])
def test_padding_changes_nothing(most: int) -> None:
    now, base, shape = drawn(2, 5, 3, 3), drawn(2, 5, 3, 3, seed=1), (0, 2, 0, 1)
    region = F.pad(torch.ones(2, 3, 3, dtype=torch.bool), shape)
    with patch.object(anchor, "_MOST", most):
        alone, padded = (
            held(now, base),
            held(F.pad(now, shape, value=7.0), F.pad(base, shape, value=-7.0), region),
        )
    assert all(torch.allclose(padded[name], value, rtol=1e-12) for name, value in alone.items())


def test_the_patches_of_a_large_image_are_drawn_by_its_key() -> None:
    now, base = drawn(1, 5, 4, 4), drawn(1, 5, 4, 4, seed=1)
    with patch.object(anchor, "_MOST", 8):
        found = [
            anchor_losses(
                {"gram": 1.0},
                *(Map(one, torch.ones(1, 4, 4).bool()) for one in (now, base)),
                torch.tensor([key]),
                False,
            )
            for key in (1, 1, 2)
        ]
    assert found[0] == found[1] != found[2]


def test_nothing_pulls_before_the_first_update() -> None:
    module, _ = build(2)
    module.double()
    for name, parameter in lora_parameters(module).items():
        if name.endswith("lora_B"):
            torch.nn.init.zeros_(parameter)
    module.anchor, batch = BOTH, global_batch(3)
    losses = module(batch, loss_denominators(module, batch, 1))
    assert losses["anchor"] == losses["anchor/gram"] == losses["anchor/cosine"] == 0
    losses["anchor"].backward()
    assert all(
        one.grad is not None and one.grad.abs().max() < 1e-12 for one in lora_parameters(module).values()
    )


def test_the_second_forward_is_made_for_a_weighted_loss_alone() -> None:
    module, _ = build(2)
    batch, calls = global_batch(3), list[bool]()
    module.backbone.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    divisors = loss_denominators(module, batch, 1)
    plain = module(batch, divisors)
    assert calls == [True] and not any("anchor" in name for name in plain)
    module.anchor = {"gram": 10.0}
    anchored = module(batch, divisors)
    assert calls == [True, False, True] and "anchor/cosine" not in anchored
    assert (
        anchored["loss"] == plain["loss"] + anchored["anchor"]
        and anchored["anchor"] == 10 * anchored["anchor/gram"] > 0
    )
    module(batch)
    assert len(calls) == 4


def test_a_configuration_turns_it_on_and_a_plan_counts_it() -> None:
    settings = ["visft.tasks=detection", "visft.mode=sampled"]
    plain, zero, on = (
        resolve(stage=2, model="debug", settings=[*settings, *more])
        for more in ([], ["visft.anchor.gram=0"], ["visft.anchor.gram=10"])
    )
    assert plain.identity() == zero.identity() != on.identity()
    assert plan_model(on.visft, on.optimizer.params)[0].anchor == {"gram": 10.0}
    runs = [planned_run(one, 1, "fp32", None, torch.device("cpu")) for one in (plain, on)]
    counts = [model_operations(run, run.config.visft.streams()["detection"]) for run in runs]
    assert counts[1] > 1.1 * counts[0]
