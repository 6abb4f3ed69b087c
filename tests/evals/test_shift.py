"""A control at the scale at which it moves features as far as what it is a control of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.clip_case import SIDE
from tests.golden.judge import record_in, run
from tests.random_tower import relative, save_adapter
from visft_ds.evals.judge import shift as shift_of
from visft_ds.evals.judge import variants
from visft_ds.evals.judge.benchmark import Benchmark, ImageSet, Number
from visft_ds.evals.judge.classes import read_classes
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.model_text import ModelSpec, parse_model, parse_variants
from visft_ds.evals.judge.models import Mixture, load_encoder
from visft_ds.evals.judge.shift import WITHIN, ShiftMeter, scale_for
from visft_ds.interop.published import read_adapter
from visft_ds.settings.fields import Precision


@pytest.mark.parametrize(
    "shift",
    [
        lambda scale: 0.4 * scale,
        lambda scale: 3 * scale**2,
        lambda scale: 0.9 * math.tanh(scale / 4),
        math.expm1,
    ],
    ids=["linear", "square", "saturating", "steep"],
)
@pytest.mark.parametrize("wanted", [0.02, 0.35, 0.8])
def test_a_scale_is_found_for_any_shift(shift: Callable[[float], float], wanted: float) -> None:
    calls = []

    def measured(scale: float) -> float:
        calls.append(scale)
        return shift(scale)

    scale, found, near = scale_for(measured, wanted)
    assert (
        near and found == shift(scale) and abs(shift(scale) - wanted) <= WITHIN * wanted and len(calls) <= 20
    )


def test_a_shift_that_no_scale_reaches_is_told() -> None:
    assert scale_for(lambda scale: min(scale / 10, 0.1), 0.3)[1:] == (0.1, False)
    assert scale_for(lambda scale: scale / 10 if scale < 3 else math.nan, 0.3) == (2.0, 0.2, False)


class _Looking(torch.nn.Module):
    """An encoder whose features are the pixels, or those of other images."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, images: torch.Tensor, kinds: Any) -> dict[str, torch.Tensor]:
        return {"pooled": torch.cat([images.mean(dim=(2, 3)), torch.full((len(images), 1), self.by)], dim=1)}


def test_the_shift_is_of_directions_over_all_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: (r, g, b, 0) against (r, g, b, x), over all images; a control's scale is searched on every k-th
    and is right on all.
    """
    seen = []

    def read(place: int) -> Image.Image:
        seen.append(place)
        return Image.new("RGB", (4, 4), (10 * place + 10,) * 3)

    def load(spec: Any, precision: str) -> Encoder:
        assert precision == "fp32"
        return Encoder(
            _Looking(spec),
            ("pooled",),
            square_preprocess(4, (0,) * 3, (1,) * 3),
            ((0,) * 3, (1,) * 3),
            4,
            None,
        )

    images = ImageSet([str(place) for place in range(9)], read, "")
    benchmark = Benchmark("b", {"train": images}, ("pooled",), (Number("n", ""),), {}, lambda *_: iter(()))
    monkeypatch.setattr(shift_of, "load_encoder", load)
    monkeypatch.setattr(shift_of, "SEARCHED", 5)
    meter = ShiftMeter(0.0, "end", benchmark, Settings(torch.device("cpu"), "bf16", Path(), 2, 1))  # type: ignore[arg-type]
    assert sorted(seen) == [0, 2, 4, 6, 8]
    grey = [(10 * place + 10) / 255 for place in range(9)]
    cosines = [math.sqrt(3) * value / math.hypot(math.sqrt(3) * value, 0.2) for value in grey]
    expected = math.sqrt(sum(2 - 2 * cosine for cosine in cosines) / 9)
    spec = SimpleNamespace(scale=1.0)
    monkeypatch.setattr(shift_of, "load_encoder", lambda *_: load(0.2, "fp32"))
    assert meter.measure(spec)[1] == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]
    mixture = SimpleNamespace(at=lambda scale: load(scale, "fp32"))
    monkeypatch.setattr(shift_of, "Mixture", lambda *_: mixture)
    scale, shift, reached = meter.match(spec, expected)  # type: ignore[arg-type]
    assert reached and shift == pytest.approx(expected, rel=WITHIN) and scale == pytest.approx(0.2, rel=0.03)


def test_controls_are_brought_to_the_shift_of_what_they_control(
    clip_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A control that is named, noise that comes by itself, and half, which keeps its own shift. Where models
    run in 16 bit, shifts are those of fp32, and weights that are mixed stay in it."""
    base, adapter = clip_world / "clip.safetensors", read_adapter(clip_world / "adapter")
    generator = torch.Generator().manual_seed(0)
    other = {}
    for name, factors in adapter.layers.items():
        a, b = (torch.randn(value.shape, generator=generator) for value in (factors.a, factors.b))
        other[name] = factors._replace(a=a, b=b)
    save_adapter(replace(adapter, layers=other), tmp_path / "other")
    words = [
        f"base={base}",
        f"tuned={clip_world}/merged.safetensors",
        "--control",
        f"equal={base}+{tmp_path}/other",
    ]
    words += [
        "--on",
        f"zero_shot={clip_world}/shapes",
        "--primary",
        "zero_shot/shapes top1",
        "--out",
        tmp_path / "out",
    ]
    loaded = set()

    def load(spec: ModelSpec, precision: Precision) -> Encoder:
        loaded.add((spec.label, precision))
        return load_encoder(spec, precision)

    monkeypatch.setattr(variants, "load_encoder", load)
    status, _, errors = run(*words, "--precision", "bf16")
    assert (status, errors) == (0, "")
    assert loaded == {
        ("base", "bf16"),
        ("tuned", "bf16"),
        ("noise", "fp32"),
        ("half", "fp32"),
        ("equal", "bf16"),
    }
    record = record_in(tmp_path / "out")
    shifts, (trial,) = record["shifts"], record["trials"]
    assert (trial["variant"], trial["controls"], trial["half"]) == ("tuned", ["noise", "equal"], "half")
    assert trial["shift"] == shifts["tuned"] and not trial["missed"] and not trial["compared"]
    assert [shifts["noise"], shifts["equal"]] == pytest.approx([shifts["tuned"]] * 2, rel=WITHIN)
    assert shifts["half"] < 0.9 * shifts["tuned"] and record["scales"]["half"] == 0.5
    assert record["rows"][0]["controls"]["tuned"].keys() == {"noise", "equal"}
    assert shifts["tuned"] == pytest.approx(_plain_shift(clip_world), rel=1e-4)


def _plain_shift(clip_world: Path) -> float:
    """Root mean square over images and sentences, by plain loops in fp32."""
    models = [
        load_encoder(parse_model(str(clip_world / f"{name}.safetensors")), "fp32")
        for name in ("clip", "merged")
    ]
    data = read_classes(str(clip_world / "shapes"))
    images = torch.stack([models[0].preprocess(data.images.read(index)) for index in range(len(data.labels))])
    with torch.no_grad():
        before, after = (model.module(images, ["clip"])["clip"] for model in models)
    squares = ((after - before) ** 2).sum(dim=1).tolist()
    return math.sqrt(sum(squares) / (len(squares) + len(data.classes)))  # texts have not moved


def test_what_is_mixed_of_merged_weights_is_what_the_adapter_gives_at_that_scale(clip_world: Path) -> None:
    base, image = clip_world / "clip.safetensors", torch.randn(2, 3, SIDE, SIDE)
    arms = parse_variants(
        [f"{base}", f"a={base}+{clip_world}/adapter@0.3", f"b={clip_world}/merged.safetensors@0.3"]
    )
    own, merged = (load_encoder(arms[label][0], "fp32").module for label in "ab")
    with torch.no_grad():
        assert relative(merged(image, ["pooled"])["pooled"], own(image, ["pooled"])["pooled"]) < 1e-6


def test_noise_is_as_large_as_what_was_learnt_and_where_it_was(clip_world: Path) -> None:
    (tuned,) = parse_variants([str(clip_world / "clip.safetensors"), f"t={clip_world}/merged.safetensors"])[
        "t"
    ]
    learnt, noise = (Mixture(replace(tuned, noise=seed), "fp32").changes for seed in (None, 1))
    assert learnt.keys() == noise.keys() == {f"blocks.{number}.attn.qkv.weight" for number in (0, 1)}
    for name, change in learnt.items():
        assert float(noise[name].norm()) == pytest.approx(float(change.norm()), rel=1e-5)
        assert abs(float((noise[name] * change).sum() / change.norm() ** 2)) < 0.1
