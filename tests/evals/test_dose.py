"""A control at the scale at which it moves features as far as what it is a control of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.evals.test_judge import _record, _run, world
from tests.random_tower import save_adapter
from visft_ds.evals.judge.dose import WITHIN, scale_for
from visft_ds.interop.adapter import Adapter

__all__ = ["world"]  # the fixture


@pytest.mark.parametrize(
    "dose",
    [lambda scale: 0.4 * scale, lambda scale: 3 * scale**2, lambda scale: 0.9 * math.tanh(scale / 4), math.expm1],
    ids=["linear", "square", "saturating", "steep"],
)
@pytest.mark.parametrize("wanted", [0.02, 0.35, 0.8])
def test_a_scale_is_found_for_any_dose(dose: Callable[[float], float], wanted: float) -> None:
    calls = []
    scale = scale_for(lambda scale: calls.append(scale) or dose(scale), wanted)  # type: ignore[func-returns-value]
    assert abs(dose(scale) - wanted) <= WITHIN * wanted and len(calls) <= 20


def test_a_dose_that_no_scale_reaches_is_told() -> None:
    with pytest.raises(ValueError, match="no scale up to 8 was found"):
        scale_for(lambda scale: min(scale, 0.1), 0.3)


def test_a_control_is_brought_to_the_dose_of_what_it_controls(world: Path, tmp_path: Path) -> None:
    """Measured on the same images and the same features as the shift that is printed."""
    base, adapter = world / "clip.safetensors", Adapter.load(world / "adapter")
    generator = torch.Generator().manual_seed(0)
    other = {name: torch.randn(value.shape, generator=generator) for name, value in adapter.tensors.items()}
    save_adapter(replace(adapter, tensors=other), tmp_path / "other")
    words = [f"base={base}", f"tuned={base}+{world}/adapter", f"other={base}+{tmp_path}/other"]
    words += ["--control", f"equal={base}+{tmp_path}/other", "--on", f"zero_shot={world}/shapes"]
    status, _, errors = _run(*words, "--primary", "zero_shot/shapes top1", "--out", tmp_path / "out")
    assert (status, errors) == (0, "")
    record = _record(tmp_path / "out")
    moved = record["doses"]
    assert moved["equal"] == pytest.approx(moved["tuned"], rel=2 * WITHIN)
    assert abs(moved["other"] / moved["tuned"] - 1) > 0.03
    trial, other = record["trials"]
    assert trial["controls"] == ["equal"] and other["controls"] == [] and trial["dose"] == moved["tuned"]
    assert record["rows"][0]["controls"]["tuned"].keys() == {"equal"}
