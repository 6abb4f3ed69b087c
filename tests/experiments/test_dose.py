"""An adapter at the scale at which it moves features as far as another one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.evals.test_benchmarks import _record, _run, world
from tests.random_tower import save_adapter
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.judge.dose import WITHIN, as_noise, scale_for
from visft_ds.interop.adapter import Adapter

__all__ = ["world"]  # the fixture


@pytest.mark.parametrize(
    "dose",
    [lambda scale: 0.4 * scale, lambda scale: 3 * scale**2, lambda scale: 0.9 * math.tanh(scale / 7), math.expm1],
    ids=["linear", "square", "saturating", "steep"],
)
@pytest.mark.parametrize("wanted", [0.02, 0.35, 0.8])
def test_a_scale_is_found_for_any_dose(dose: Callable[[float], float], wanted: float) -> None:
    calls = []
    scale = scale_for(lambda scale: calls.append(scale) or dose(scale), wanted)  # type: ignore[func-returns-value]
    assert abs(dose(scale) - wanted) <= WITHIN * wanted and len(calls) <= 20


def test_a_dose_that_no_scale_reaches_is_told() -> None:
    with pytest.raises(ValueError, match="no scale up to 1024 was found"):
        scale_for(lambda scale: min(scale, 0.1), 0.3)


def test_equal_dose_is_equal_in_the_table(world: Path, tmp_path: Path) -> None:
    """Measured on the same images and the same features as the column of the comparison."""
    base, adapter, judge = world / "clip.safetensors", Adapter.load(world / "adapter"), f"zero_shot={world}/shapes"
    save_adapter(as_noise(adapter, 1), tmp_path / "other")
    like = f"{base}+{world}/adapter"
    words = ["dose", "--model", f"{base}+{tmp_path}/other", "--like", like, "--benchmark", judge]
    assert evaluate([*words, "--threads", "1", "--out", str(tmp_path / "equal")]) == 0
    models = (f"base={base}", f"like={like}", f"other={base}+{tmp_path}/other", f"equal={base}+{tmp_path}/equal")
    words = [word for model in models for word in ("--model", model)]
    assert _run(*words, "--benchmark", judge, "--out", tmp_path / "out")[0] == 0
    moved, dose = _record(tmp_path / "out")["moved"], json.loads((tmp_path / "equal/dose.json").read_text())
    assert (moved["equal"], moved["like"]) == pytest.approx((dose["dose"], dose["wanted"]), rel=2e-3)
    assert moved["equal"] == pytest.approx(moved["like"], rel=WITHIN) and abs(moved["other"] / moved["like"] - 1) > 0.03


def test_noise_is_as_large_as_what_was_learnt() -> None:
    tensors = {"a.lora_A": torch.full((8, 400), 3.0), "a.lora_B": torch.linspace(-1, 1, 3200).reshape(400, 8)}
    found = as_noise(Adapter({"preset": "timm:x"}, 8, 8.0, ("a",), {"a": (400, ((0, 400),))}, tensors), 1).tensors
    for name, value in tensors.items():
        assert float(found[name].square().mean()) == pytest.approx(float(value.square().mean()), rel=0.1)
    assert abs(float((found["a.lora_B"] * tensors["a.lora_B"]).mean())) < 0.05
