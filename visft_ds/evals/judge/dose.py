"""`visft evaluate dose`: an adapter at the scale at which it moves features as far as another one.

Arms that moved features by different amounts cannot be compared: the one that moved further gains and loses more. The
dose is measured as the column of `visft evaluate benchmarks` is: on the first test images of a benchmark.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from scipy.optimize import brentq

from visft_ds.evals.judge.command import settings_of
from visft_ds.evals.judge.kinds import parse_benchmark
from visft_ds.evals.judge.models import ModelSpec, load_encoder, parse_model
from visft_ds.evals.judge.protocol import Benchmark
from visft_ds.evals.judge.scoring import MOVED, SAMPLE, Settings, forward, moved, pictures, sample_of
from visft_ds.evals.model import adapter_for
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.weights import write_text
from visft_ds.models.lora import lora_parameters
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel import distributed

RECORD = "dose.json"
WITHIN = 0.01  #: share of the wanted dose by which it may be missed
_FURTHEST = 1024.0  # scale


def run_dose(given: argparse.Namespace) -> None:
    """Find the scale and write the adapter.

    Raises:
        ValueError: wrong usage, models without an adapter, or a dose that no scale reaches.
    """
    settings = settings_of(given)
    if distributed.world_size() > 1:
        raise ValueError(f"the dose is measured by one process, and {distributed.world_size()} were started")
    if given.out.exists():
        raise ValueError(f"{given.out} is there already and nothing is overwritten; name a new folder")
    if (given.model is None) == (given.noise is None):
        raise ValueError("give either --model, whose adapter is scaled, or --noise SEED")
    like = _with_adapter(given.like)
    spec = like if given.model is None else _with_adapter(given.model)
    benchmark = parse_benchmark(given.benchmark)
    reference, adapter = _adapter(like), _adapter(spec)
    wanted = measure(like, reference, benchmark, settings)(like.scale)
    if not wanted:
        raise ValueError(f"--like {given.like}: its adapter moves no feature")
    if given.noise is not None:
        adapter = as_noise(reference, given.noise)
    dose = measure(spec, adapter, benchmark, settings)
    scale = scale_for(dose, wanted)
    adapter.scaled(scale).save(given.out)
    record = {"scale": scale, "dose": dose(scale), "wanted": wanted}
    write_text(given.out / RECORD, json.dumps(record, indent=1) + "\n")
    print_plan("visft_ds dose", [Section(str(given.out), [(name, f"{value:.4g}") for name, value in record.items()])])


def measure(spec: ModelSpec, adapter: Adapter, benchmark: Benchmark, settings: Settings) -> Callable[[float], float]:
    """A function: scale of an adapter on the model's base -> how far it moves the features of the first images.

    Raises ValueError if the benchmark reads none of MOVED.
    """
    encoder = load_encoder(spec, settings.precision)
    images = benchmark.sets.get("test") or next(iter(benchmark.sets.values()))
    encoder.module.to(settings.device)
    batch = next(pictures(encoder, images, [range(min(SAMPLE, len(images)))], settings.threads))
    read = [kind for kind in MOVED if kind in encoder.kinds and kind in benchmark.kinds]
    if not read:
        raise ValueError(f"{benchmark.label} reads no {', '.join(MOVED)} of {spec.label}: give another --benchmark")
    parameters = {name.partition(".")[2]: value for name, value in lora_parameters(encoder.module).items()}

    def features(scale: float) -> torch.Tensor:
        with torch.no_grad():
            for name, value in adapter.scaled(scale).tensors.items():
                if name in parameters:  # a tower may be cut behind some
                    parameters[name].copy_(value)
        return sample_of({"test": forward(encoder, batch, read[:1], settings)})

    base = features(0.0)
    return lambda scale: moved(base, features(scale))


def scale_for(dose: Callable[[float], float], wanted: float) -> float:
    """The scale at which a dose is as wanted, to WITHIN of it. Raises ValueError if no scale was found."""
    high = 1.0
    while (above := dose(high)) < wanted:
        high *= 2
        if high > _FURTHEST:
            raise ValueError(f"no scale up to {_FURTHEST:g} was found that moves features by {wanted:.4g}")

    def beyond(scale: float) -> float:
        """Zero within the tolerance, so that the search ends there."""
        by = (above if scale == high else dose(scale) if scale else 0.0) - wanted
        return 0.0 if abs(by) <= WITHIN * wanted else by

    return float(brentq(beyond, 0.0, high))


def as_noise(adapter: Adapter, seed: int) -> Adapter:
    """Gaussian noise in place of an adapter, as large in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    return replace(
        adapter,
        tensors={
            name: torch.randn(value.shape, generator=generator) * value.float().square().mean().sqrt()
            for name, value in adapter.tensors.items()
        },
    )


def _adapter(spec: ModelSpec) -> Adapter:
    assert spec.adapter is not None
    return adapter_for(Path(spec.name), spec.adapter)


def _with_adapter(text: str) -> ModelSpec:
    spec = parse_model(text)
    if spec.adapter is None:
        raise ValueError(f"{text} has no adapter whose dose could be measured")
    return spec
