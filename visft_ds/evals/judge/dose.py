"""Equal dose: a control at the scale at which it moves features as far as the model that it is a control of.

Arms that moved features by different amounts cannot be compared: the one that moved further gains and loses more. The
dose is |f - f0| / |f0 - mean of f0|, on the first test images of a benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from scipy.optimize import brentq

from visft_ds.evals.judge.models import ModelSpec, load_encoder
from visft_ds.evals.judge.protocol import Benchmark
from visft_ds.evals.judge.scoring import MOVED, SAMPLE, Settings, forward, moved, pictures, sample_of
from visft_ds.evals.model import adapter_for
from visft_ds.models.lora import lora_parameters
from visft_ds.parallel import distributed

WITHIN = 0.01  #: share of the wanted dose by which it may be missed
_FURTHEST = 8.0  # scale


def at_dose(
    control: Sequence[ModelSpec], tuned: Sequence[ModelSpec], benchmark: Benchmark, settings: Settings
) -> tuple[ModelSpec, ...]:
    """Each control at the dose of its model, seed by seed.

    Raises:
        ValueError: models without an adapter, one that moves nothing, or a dose that no scale reaches.
    """
    count, found = max(len(control), len(tuned)), []
    for number in range(count):
        spec, like = control[number % len(control)], tuned[number % len(tuned)]
        wanted = measure(like, benchmark, settings)(like.scale)
        if not wanted:
            raise ValueError(f"{like.label} moves no feature: there is no dose to bring {spec.label} to")
        scale = distributed.from_all_ranks(scale_for(measure(spec, benchmark, settings), wanted))[0]
        label = spec.label if len(control) == count else f"{spec.label} {number + 1}"
        found.append(replace(spec, label=label, scale=scale))
    return tuple(found)


def measure(spec: ModelSpec, benchmark: Benchmark, settings: Settings) -> Callable[[float], float]:
    """A function: scale of the model's adapter -> how far it moves the features of the first images.

    Raises ValueError for a model without adapter, or if the benchmark reads none of MOVED.
    """
    if spec.adapter is None:
        raise ValueError(f"{spec.label} has no adapter whose dose could be measured")
    adapter = adapter_for(Path(spec.name), spec.adapter)
    encoder = load_encoder(spec, settings.precision)
    images = benchmark.sets.get("test") or next(iter(benchmark.sets.values()))
    encoder.module.to(settings.device)
    batch = next(pictures(encoder, images, [range(min(SAMPLE, len(images)))], settings.threads))
    read = [kind for kind in MOVED if kind in encoder.kinds and kind in benchmark.kinds]
    if not read:
        raise ValueError(f"{benchmark.label} reads no {', '.join(MOVED)} of {spec.label}: give another --on")
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
