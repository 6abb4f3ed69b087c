"""A control at the scale at which it moves features as far as what it is a control of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.clip_case import SIDE
from tests.evals.test_judge import _record, _run, world
from tests.random_tower import relative, save_adapter
from visft_ds.evals.judge.models import Mixture, load_encoder, parse_arms
from visft_ds.evals.judge.shift import WITHIN, scale_for
from visft_ds.interop.adapter import Adapter

__all__ = ["world"]  # the fixture


@pytest.mark.parametrize(
    "shift",
    [lambda scale: 0.4 * scale, lambda scale: 3 * scale**2, lambda scale: 0.9 * math.tanh(scale / 4), math.expm1],
    ids=["linear", "square", "saturating", "steep"],
)
@pytest.mark.parametrize("wanted", [0.02, 0.35, 0.8])
def test_a_scale_is_found_for_any_shift(shift: Callable[[float], float], wanted: float) -> None:
    calls = []
    scale, found = scale_for(lambda scale: calls.append(scale) or shift(scale), wanted, "x")  # type: ignore[func-returns-value]
    assert found == shift(scale) and abs(shift(scale) - wanted) <= WITHIN * wanted and len(calls) <= 20


def test_a_shift_that_no_scale_reaches_is_told() -> None:
    with pytest.raises(ValueError, match="no A up to 8"):
        scale_for(lambda scale: min(scale, 0.1), 0.3, "x")


def test_controls_are_brought_to_the_shift_of_what_they_control(world: Path, tmp_path: Path) -> None:
    """A control that is named, noise that comes by itself, and half, which keeps its own shift."""
    base, adapter = world / "clip.safetensors", Adapter.load(world / "adapter")
    generator = torch.Generator().manual_seed(0)
    other = {name: torch.randn(value.shape, generator=generator) for name, value in adapter.tensors.items()}
    save_adapter(replace(adapter, tensors=other), tmp_path / "other")
    words = [f"base={base}", f"tuned={world}/merged.safetensors", "--control", f"equal={base}+{tmp_path}/other"]
    words += ["--on", f"zero_shot={world}/shapes", "--primary", "zero_shot/shapes top1", "--out", tmp_path / "out"]
    status, _, errors = _run(*words)
    assert (status, errors) == (0, "")
    record = _record(tmp_path / "out")
    shifts, (trial,) = record["shifts"], record["trials"]
    assert trial == {"arm": "tuned", "controls": ["noise", "equal"], "half": "half", "shift": shifts["tuned"]}
    assert [shifts["noise"], shifts["equal"]] == pytest.approx([shifts["tuned"]] * 2, rel=WITHIN)
    assert shifts["half"] < 0.9 * shifts["tuned"] and record["scales"]["half"] == 0.5
    assert record["rows"][0]["controls"]["tuned"].keys() == {"noise", "equal"}


def test_what_is_mixed_of_merged_weights_is_what_the_adapter_gives_at_that_scale(world: Path) -> None:
    base, image = world / "clip.safetensors", torch.randn(2, 3, SIDE, SIDE)
    arms = parse_arms([f"{base}", f"a={base}+{world}/adapter@0.3", f"b={world}/merged.safetensors@0.3"])
    own, merged = (load_encoder(arms[label][0], "fp32").module for label in "ab")
    with torch.no_grad():
        assert relative(merged(image, ["pooled"])["pooled"], own(image, ["pooled"])["pooled"]) < 1e-6


def test_noise_is_as_large_as_what_was_learnt_and_where_it_was(world: Path) -> None:
    (tuned,) = parse_arms([str(world / "clip.safetensors"), f"t={world}/merged.safetensors"])["t"]
    learnt, noise = (Mixture(replace(tuned, noise=seed), "fp32").changes for seed in (None, 1))
    assert learnt.keys() == noise.keys() == {f"blocks.{number}.attn.qkv.weight" for number in (0, 1)}
    for name, change in learnt.items():
        assert float(noise[name].norm()) == pytest.approx(float(change.norm()), rel=1e-5)
        assert abs(float((noise[name] * change).sum() / change.norm() ** 2)) < 0.1
