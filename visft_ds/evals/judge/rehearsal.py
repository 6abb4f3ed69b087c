"""What a comparison would do, before it does it: its models, its data, and the time it takes, by that of one
batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from visft_ds.evals.judge.benchmark import Benchmark
from visft_ds.evals.judge.comparison import SIDE, Arm, Comparison
from visft_ds.evals.judge.models import ModelSpec, load_encoder
from visft_ds.evals.judge.scoring import Settings, forward
from visft_ds.evals.judge.shift import SEARCHED
from visft_ds.monitor.console import Section

CROPS = 640_000  #: that a published head learns from
_BATCH = 4  # images whose time is taken
_SEARCHES = 6  # measurements until a control has its shift


def rehearsal(comparison: Comparison, *, best: bool) -> list[Section]:
    """What the comparison consists of, and how long its encoding takes.

    Args:
        best: layers are chosen, and noise and half come by themselves.
    """
    settings = comparison.settings
    arms = [comparison.base, *comparison.tuned, *comparison.named]
    models = []
    for arm in arms:
        for spec in arm.models:
            models.append([spec.label, _blocks(arm, best), str(spec)])
    data = []
    for benchmark in comparison.benchmarks:
        sizes = ", ".join(f"{len(images)} {name}" for name, images in benchmark.sets.items())
        data.append([benchmark.label, sizes, ", ".join(benchmark.names)])
    seconds = seconds_of(comparison.origin, settings)
    quick = [benchmark for benchmark in comparison.benchmarks if benchmark.published is None]
    times = list[list[str]]()
    if quick:
        images = _images(comparison, quick, best=best)
        times.append(
            ["encoding", f"{images:,} images", f"{seconds * images / 3600:.2g} hours on {settings.device}"]
        )
    published = len(comparison.benchmarks) - len(quick)
    if published:
        scored = sum(len(arm.models) for arm in arms) * (3 if best else 1)  # with noise and half
        hours = hours_of(comparison.origin, published * scored, settings)
        times.append(
            ["published heads", f"{published * scored} or more", f"{hours:,.2g} hours on {settings.device}"]
        )
    return [
        Section("models", models, ["", "layers", ""]),
        Section("data, images and numbers", data),
        Section("primary number, which decides", [[comparison.primary]]),
        Section("time, by one batch; probes and heads of quick numbers come on top", times),
    ]


def _blocks(arm: Arm, best: bool) -> str:
    names = list(arm.blocks)
    if best and arm.asked:
        return f"best of {names[0]} to {names[-1]}"
    return names[-1]


def _images(comparison: Comparison, benchmarks: Sequence[Benchmark], *, best: bool) -> int:
    """How many images are encoded: for layers, for shifts and for scores."""
    total = 0
    for benchmark in benchmarks:
        of_scores = sum(map(len, benchmark.sets.values()))
        of_layers = len(benchmark.layer_choice.images) if best and benchmark.layer_choice else 0
        of_shift = 0
        if comparison.primary in benchmark.full_names:
            of_shift = min(SEARCHED, len(benchmark.training_images))
        total += of_scores + of_layers
        for arm in comparison.tuned:
            total += len(arm.models) * (of_scores + of_layers)
            controls = len(comparison.named) + best
            if arm.alike:
                total += len(arm.models) * (controls * (of_scores + _SEARCHES * of_shift) + best * of_scores)
    return total


def seconds_of(spec: ModelSpec, settings: Settings) -> float:
    """Seconds that a model takes for an image."""
    encoder = load_encoder(spec, settings.precision)
    encoder.module.to(settings.device)
    images = torch.zeros(_BATCH, 3, encoder.side, encoder.side)
    forward(encoder, images, ("patches",), settings)  # the first one also fetches and compiles
    began = time.perf_counter()
    forward(encoder, images, ("patches",), settings)["patches"].cpu()
    return (time.perf_counter() - began) / _BATCH


def hours_of(spec: ModelSpec, heads: int, settings: Settings) -> float:
    """Hours that so many heads of published protocols take, by the time of one image."""
    side = load_encoder(spec, settings.precision).side
    return seconds_of(spec, settings) * (SIDE / side) ** 2 * CROPS * heads / 3600
