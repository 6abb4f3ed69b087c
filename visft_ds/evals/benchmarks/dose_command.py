"""The sub-command `dose` of visft evaluate: an adapter at the scale at which it moves features as far as another one.

Arms that moved features by different amounts cannot be compared: the one that moved further gains and loses more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from visft_ds import program
from visft_ds.evals.benchmarks.command import add_flags, settings_of
from visft_ds.evals.benchmarks.encoding import forward, pictures
from visft_ds.evals.benchmarks.kinds import parse_benchmarks
from visft_ds.evals.benchmarks.models import ModelSpec, load_encoder, parse_model
from visft_ds.evals.benchmarks.protocol import ImageSet
from visft_ds.evals.benchmarks.run import Settings, moved, worker_of
from visft_ds.evals.benchmarks.scales import Scales
from visft_ds.evals.model import adapter_for
from visft_ds.flags import Parser, check_least
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import tower_in
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.towers import open_tower
from visft_ds.interop.writing import write_text
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel import distributed
from visft_ds.resilience.errors import tell

RECORD = "dose.json"
#: Share of the wanted dose by which it may be missed, and forwards that finding it may take.
WITHIN, MOST = 0.01, 40
_FURTHEST = 1024.0  # scale
_KINDS = ("patches", "pooled", "clip")
USAGE = """An adapter at the scale at which it moves features as far as another one: arms are compared at equal dose.

    visft evaluate dose --model RUN --like REFERENCE --benchmark dense=coco --out ADAPTER
    visft evaluate dose --like REFERENCE --noise 0 --benchmark dense=coco --out ADAPTER

The dose is |f - f0| / |f0 - mean of f0|, measured on the first images that the benchmark's probes learn from. With
--noise the adapter is Gaussian noise in place of what REFERENCE learnt, as large in every tensor: a control.
"""


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 fine, 2 wrong usage or unusable input."""
    given = _parser().parse_args(arguments)
    try:
        settings = settings_of(given)
        if distributed.world_size() > 1:
            raise ValueError(f"the dose is measured by one process, and {distributed.world_size()} were started")
        check_least(given, images=2)
        if given.out.exists():
            raise ValueError(f"{given.out} is there already and nothing is overwritten; name a new folder")
        if (given.model is None) == (given.noise is None):
            raise ValueError("give either --model, whose adapter is scaled, or --noise SEED")
        like = _with_adapter(given.like)
        spec = like if given.model is None else _with_adapter(given.model)
        benchmark, *others = parse_benchmarks(given.benchmark)
        if others:
            raise ValueError(f"--benchmark {given.benchmark[1]}: the dose is measured on the images of one")
        images = benchmark.sets.get("train") or next(iter(benchmark.sets.values()))
        reference = Moving(like, images, given.images, settings)
        wanted = reference(like.scale)
        if not wanted:
            raise ValueError(f"--like {given.like}: its adapter moves no feature")
        noise = None if given.noise is None else as_noise(reference.adapter, given.noise)
        other = reference if noise else Moving(spec, images, given.images, settings)
        other.adapter = noise or other.adapter
        scale = scale_for(other, wanted)
        tower = None if other.adapter.model else tower_in(*open_tower(spec.name))
        save_peft_adapter(other.adapter.scaled(scale), given.out, tower)
        record = {"scale": scale, "dose": other(scale), "wanted": wanted, "images": other.count}
        write_text(given.out / RECORD, json.dumps(record, indent=1) + "\n")
    except (ValueError, OSError, RuntimeError) as error:
        return tell(error, "evaluate")
    rows = [(name, f"{value:.4g}") for name, value in record.items()]
    print_plan("visft_ds dose", [Section(str(given.out), rows)])
    return 0


class Moving:
    """Distance that a model's adapter moves the features of some images, by its scale."""

    def __init__(self, spec: ModelSpec, images: ImageSet, most: int, settings: Settings) -> None:
        assert spec.adapter is not None
        self.adapter = adapter_for(Path(spec.name), spec.adapter)
        encoder = load_encoder(spec, settings.load)
        self._scales = Scales(encoder.module, [self.adapter.scaled(0.0).tensors])
        self._worker = worker_of(encoder, spec.label, settings)
        self._kinds = next(([kind] for kind in _KINDS if kind in encoder.kinds), encoder.kinds[:1])
        self.count = min(most, len(images))
        self._batch = next(pictures(self._worker, images, [range(self.count)]))
        self._base = self._features(0)

    def __call__(self, scale: float) -> float:
        return moved(self._base, self._features(self._scales.add(self.adapter.scaled(scale).tensors)))

    def _features(self, number: int) -> Tensor:
        return forward(replace(self._worker, before=partial(self._scales.use, number)), self._batch, self._kinds)[
            self._kinds[0]
        ]


def scale_for(dose: Callable[[float], float], wanted: float) -> float:
    """The scale at which a dose is as wanted, by false position (Illinois).

    Raises:
        ValueError: no scale was found.
    """
    low, high, below, above = 0.0, 1.0, -wanted, dose(1.0) - wanted
    while above < 0 and high < _FURTHEST:
        low, below, high = high, above, 2 * high
        above = dose(high) - wanted
    for _ in range(MOST if above >= 0 else 0):
        scale = (low * above - high * below) / (above - below)
        at = dose(scale) - wanted
        if abs(at) <= WITHIN * wanted:
            return scale
        if at < 0:
            low, below, above = scale, at, above / 2
        else:
            high, above, below = scale, at, below / 2
    raise ValueError(f"no scale up to {high:g} was found that moves features by {wanted:.4g}")


def as_noise(adapter: Adapter, seed: int) -> Adapter:
    """Gaussian noise in place of an adapter, as large in every tensor."""
    generator = torch.Generator().manual_seed(seed)
    tensors: Mapping[str, Tensor] = {
        name: torch.randn(value.shape, generator=generator) * value.float().square().mean().sqrt()
        for name, value in adapter.tensors.items()
    }
    return replace(adapter, tensors=dict(tensors))


def _with_adapter(text: str) -> ModelSpec:
    spec = parse_model(text)
    if spec.adapter is None:
        raise ValueError(f"{text} has no adapter whose dose could be measured")
    return spec


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{program('evaluate')} dose", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="MODEL", help="RUN or FILE+ADAPTER, whose adapter is scaled")
    parser.add_argument("--noise", type=int, metavar="SEED", help="scale noise instead")
    parser.add_argument("--like", required=True, metavar="MODEL", help="RUN or FILE+ADAPTER, whose dose is wanted")
    how = add_flags(parser)
    how.add_argument("--images", type=int, default=48, metavar="N", help="to measure on (default %(default)s)")
    return parser
