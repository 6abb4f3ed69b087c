"""What a comparison would do, before it does it: its models, its data, and the time it takes, by that of one
batch.
"""

from __future__ import annotations

import time

import torch

from visft_ds.evals.judge.benchmark import Benchmark
from visft_ds.evals.judge.comparison import Comparison
from visft_ds.evals.judge.encoding import Settings, forward
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.protocol import PUBLISHED_SIDE
from visft_ds.evals.judge.shift import SEARCHED
from visft_ds.evals.judge.variants import Variant
from visft_ds.monitor.console import Section

CROPS = 640_000  #: that a published head learns from
_BATCH = 4  # images whose time is taken
_SEARCHES = 6  # measurements until a control has its shift


def rehearsal(comparison: Comparison, *, best: bool) -> list[Section]:
    """What the comparison consists of, and how long its encoding takes.

    Args:
        best: layers are chosen, and noise and half come by themselves.
    """
    variants = [comparison.base, *comparison.tuned, *comparison.named]
    models = []
    for variant in variants:
        for spec in variant.models:
            models.append([spec.label, _blocks(variant, best), str(spec)])
    data = []
    images = 0  # of quick benchmarks
    published = 0
    for benchmark in comparison.benchmarks:
        sizes = ", ".join(f"{len(part)} {name}" for name, part in benchmark.sets.items())
        data.append([benchmark.label, sizes, ", ".join(benchmark.names)])
        if benchmark.published is None:
            images += _images(comparison, benchmark, best=best)
        else:
            published += 1

    settings = comparison.settings
    times = list[list[str]]()
    if images:
        hours = seconds_of(comparison.origin, settings) * images / 3600
        times.append(["encoding", f"{images:,} images", f"{hours:.2g} hours on {settings.device}"])
    if published:
        heads = published * scored_models(sum(len(variant.models) for variant in variants), best=best)
        hours = hours_of(comparison.origin, heads, settings)
        times.append(["published heads", f"{heads} or more", f"{hours:,.2g} hours on {settings.device}"])
    return [
        Section("models", models, ["", "layers", ""]),
        Section("data, images and numbers", data),
        Section("primary number, which decides", [[comparison.primary]]),
        Section("time, by one batch; probes and heads of quick numbers come on top", times),
    ]


def scored_models(models: int, *, best: bool) -> int:
    """How many models are scored where so many are named: noise and half come by themselves."""
    return 3 * models if best else models


def _blocks(variant: Variant, best: bool) -> str:
    if best and variant.has_choice:
        return f"best of {next(iter(variant.blocks))} to {variant.last}"
    return variant.last


def _images(comparison: Comparison, benchmark: Benchmark, *, best: bool) -> int:
    """How many images of a benchmark are encoded: for layers, for shifts and for scores."""
    for_scores = sum(map(len, benchmark.sets.values()))
    of_model = for_scores
    if best and benchmark.layer_choice is not None:
        of_model += len(benchmark.layer_choice.images)
    of_control = for_scores
    if comparison.primary in benchmark.full_names:
        of_control += _SEARCHES * min(SEARCHED, len(benchmark.training_images))
    total = of_model
    for variant in comparison.tuned:
        of_seed = of_model
        if variant.of_base:
            of_seed += len(comparison.named) * of_control
            if best:
                of_seed += of_control + for_scores  # noise and half
        total += len(variant.models) * of_seed
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
    return seconds_of(spec, settings) * (PUBLISHED_SIDE / side) ** 2 * CROPS * heads / 3600
