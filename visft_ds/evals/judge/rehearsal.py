"""Preview of a comparison: its models, its data, and the time it takes, by that of one batch."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from visft_ds.evals.judge.benchmark import Benchmark
from visft_ds.evals.judge.comparison import Comparison
from visft_ds.evals.judge.encoding import Settings, forward
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.shift import SEARCHED
from visft_ds.evals.judge.variants import Variant
from visft_ds.monitor.console import Section

_BATCH = 4  # images whose time is taken
_SEARCHES = 6  # measurements until a control has its shift


def rehearsal(comparison: Comparison) -> list[Section]:
    """Models and data of the comparison, and how long its encoding takes."""
    settings = comparison.settings
    best = comparison.best
    models = [
        [spec.label, _blocks(variant, best), str(spec)]
        for variant in [comparison.base, *comparison.tuned, *comparison.named]
        for spec in variant.models
    ]
    data = []
    for benchmark in comparison.benchmarks:
        sets = benchmark.sets_for(has_text=comparison.base.has_text)
        sizes = ", ".join(f"{len(images)} {name}" for name, images in sets.items())
        data.append([benchmark.label, sizes, ", ".join(benchmark.names)])

    trainings = sum(len(variant.models) for variant in comparison.tuned)
    of_base = sum(len(variant.models) for variant in comparison.tuned if variant.of_base)
    controls = of_base * (len(comparison.named) + best)
    scored = 1 + trainings + controls + of_base * best  # BASE, trainings, controls and halves
    images = _images(comparison, trainings, controls, scored)
    hours = seconds_of(comparison.origin, settings) * images / 3600
    times = [["encoding", f"{images:,} images", f"{hours:.2g} hours on {settings.device}"]]
    published = [benchmark for benchmark in comparison.benchmarks if benchmark.published is not None]
    if published:
        hours = _published_hours(comparison.origin, published, scored, settings)
        times.append(["published heads", f"{scored} models", f"{hours:,.2g} hours on {settings.device}"])
    return [
        Section("models", models, ["", "layers", ""]),
        Section("data, images and numbers", data),
        Section("notes", [[note] for note in comparison.notes]),
        Section("primary number, which decides", [[comparison.primary]]),
        Section("time, by one batch; probes and heads of quick numbers come on top", times),
    ]


def _blocks(variant: Variant, best: bool) -> str:
    if best and variant.has_choice:
        return f"best of {next(iter(variant.blocks))} to {variant.last}"
    return variant.last


def _images(comparison: Comparison, trainings: int, controls: int, scored: int) -> int:
    """Number of images that are encoded as models take them: for layers, for shifts and for quick scores."""
    total = 0
    for benchmark in comparison.benchmarks:
        if benchmark.published is None:
            images = sum(map(len, benchmark.sets_for(has_text=comparison.base.has_text).values()))
            total += images * scored
        if comparison.best and benchmark.layer_choice:
            total += len(benchmark.layer_choice.images) * (1 + trainings)
        if comparison.primary in benchmark.full_names:
            images = len(benchmark.training_images)
            total += min(SEARCHED, images) * (1 + _SEARCHES * controls)
            if images > SEARCHED:
                total += 2 * images * (trainings + controls)  # BASE is encoded again beside each
    return total


def seconds_of(spec: ModelSpec, settings: Settings) -> float:
    """Seconds that a model takes for an image."""
    encoder = load_encoder(spec, settings.precision)
    encoder.module.to(settings.device)
    images = torch.zeros(_BATCH, len(encoder.normalisation[0]), encoder.side, encoder.side)
    forward(encoder, images, ("patches",), settings)  # the first one also fetches and compiles
    began = time.perf_counter()
    forward(encoder, images, ("patches",), settings)["patches"].cpu()
    return (time.perf_counter() - began) / _BATCH


def _published_hours(
    spec: ModelSpec, benchmarks: Sequence[Benchmark], models: int, settings: Settings
) -> float:
    """Hours that published numbers of so many models take, by the time that one image takes a pixel."""
    pixels = 0
    for benchmark in benchmarks:
        images = sum(map(len, benchmark.sets.values()))
        # Numbers of one size that learn from no crops read the same features.
        for side, crops in {(number.side, number.crops) for number in benchmark.numbers}:
            pixels += side**2 * (crops + images)
    side = load_encoder(spec, settings.precision).side
    return seconds_of(spec, settings) / side**2 * pixels * models / 3600
