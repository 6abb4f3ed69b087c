"""Comparison that `visft judge` makes: models at their best blocks, and controls that moved features as far.

Of one architecture two arms come by themselves: `noise` in every parameter that training changed, at the shift of the
tuned model, and `half` of its change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch

from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.kept import load_classifier
from visft_ds.evals.judge.layers import blocks_of, chosen, levels_of, read_after
from visft_ds.evals.judge.models import HALF, NOISE, ModelSpec, alike, load_encoder, weights_of
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.scoring import Settings, forward, remembered, score, shared
from visft_ds.evals.judge.shift import ShiftMeter
from visft_ds.evals.judge.table import Results, Trial

CROPS = 640_000  #: that a published head learns from
SIDE = 512  #: pixels of images in published protocols, as many as are whole patches


@dataclass(frozen=True)
class Arm:
    """Models of one recipe, and the blocks that they are read after."""

    name: str
    models: Sequence[ModelSpec]
    alike: bool  #: of BASE's architecture
    blocks: Mapping[str, int]  #: of which it is read after the best or the last; bytes of an image's map
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)  #: number -> its block, and numbers of all
    shift: float | None = None  #: how far it moved BASE's features

    def block(self, number: str) -> str:
        """The block that it is read after for a number."""
        return str(self.layers[number]["chosen"]) if number in self.layers else self.last

    @property
    def last(self) -> str:
        """The last block."""
        return list(self.blocks)[-1]


class Judging:
    """Arms of a comparison and their scores."""

    def __init__(
        self,
        given: Mapping[str, Sequence[ModelSpec]],
        tuned: int,
        benchmarks: Sequence[Benchmark],
        primary: str,
        settings: Settings,
        *,
        best: bool,
    ) -> None:
        """
        Args:
            given: BASE, so many tuned arms, controls.
            best: models are read at their best blocks; otherwise at the last.

        Raises:
            ValueError: controls of another architecture, a shift that no mixture reaches, and what is wrong with models
                and data.
        """
        self.benchmarks, self.primary, self.settings, self.best = benchmarks, primary, settings, best
        self._loaded: tuple[ModelSpec, Encoder] | None = None
        self._meters: dict[str, ShiftMeter] = {}
        (self.origin,) = next(iter(given.values()))
        (self._deciding,) = (one for one in benchmarks if primary in one.names)
        self.notes: list[str] = []
        self.layers: dict[str, dict[str, Any]] = {}  #: number -> arm -> how its block was chosen
        arms = [self._arm(name, models) for name, models in given.items()]
        controls = arms[1 + tuned :]
        if controls and not all(arm.alike for arm in [arms[1], *controls]):
            raise ValueError(f"--control: {', '.join(arm.name for arm in arms)} are not of one architecture")
        self.compared = [self._up_to(arms[0], arms[1 : 1 + tuned]), *arms[1 : 1 + tuned]]
        if best:
            self._choose_layers()
        self.arms, self.trials = [self.compared[0]], list[Trial]()
        for arm in self.compared[1:]:
            self._add(arm, controls if arm is arms[1] else [])

    def _arm(self, name: str, models: Sequence[ModelSpec]) -> Arm:
        def facts(spec: ModelSpec) -> tuple[bool, dict[str, int]]:
            own = self._load(spec)
            base = own if spec is self.origin else load_encoder(self.origin, self.settings.precision)
            return alike(weights_of(own), weights_of(base)), blocks_of(own, self.settings)

        known = [
            remembered({"facts": [one.identity, self.origin.identity]}, self.settings, partial(facts, one))
            for one in models
        ]
        return Arm(name, models, all(same for same, _ in known), known[0][1])

    def _up_to(self, base: Arm, tuned: Sequence[Arm]) -> Arm:
        """BASE without the blocks behind the last one of a tuned model."""
        for arm in tuned:
            own, all_of_base = list(arm.blocks), list(base.blocks)
            if arm.alike and own == all_of_base[: len(own)] != all_of_base:
                base = replace(base, blocks={name: base.blocks[name] for name in own})
                self.notes.append(f"{arm.name} ends after {arm.last}: {base.name} is compared up to there.")
        return base

    def _choose_layers(self) -> None:
        """Choose the block after which each arm is read, for every number of a data set with training images."""
        asked = [arm for arm in self.compared if len(arm.blocks) > 1 and arm.models[0].block is None]
        ranked: dict[str, list[str]] = {}
        for benchmark in [one for one in self.benchmarks if one.held_out]:
            calls = [
                partial(self._levels, spec, benchmark, arm.blocks, ranked.get(arm.name, ()))
                for arm in asked
                for spec in arm.models
            ]
            levels = iter(shared(calls))
            for arm in asked:
                choices = chosen([next(levels) for _ in arm.models], benchmark)
                for name, choice in choices.items():
                    arm.layers[name] = self.layers.setdefault(name, {})[arm.name] = choice
                held = next(iter(choices.values()))["held_out"]
                ranked.setdefault(arm.name, sorted(held, key=lambda name: -held[name]))

    def _levels(
        self, spec: ModelSpec, benchmark: Benchmark, blocks: Mapping[str, int], ranked: Sequence[str], own: bool
    ) -> dict[str, dict[str, float]]:
        what = {"levels": spec.identity, "blocks": list(blocks), "ranked": list(ranked)}
        what |= {"images": benchmark.sets["train"].fingerprint, "benchmark": benchmark.settings}

        def make() -> dict[str, dict[str, float]]:
            said = f"{spec.label}, all blocks: {benchmark.label}"
            return levels_of(self._load(spec), benchmark, blocks, ranked, self.settings, said)

        return remembered(what, self.settings, make, own)

    # ---------------------------------------------------------------------------------------------------------- shifts

    def _add(self, arm: Arm, controls: Sequence[Arm]) -> None:
        """Add a tuned arm and those that it is judged by, brought to its shift."""
        if not arm.alike:
            self.arms.append(arm)
            self.trials.append(Trial(arm.name))
            return
        shifts = [self._measured(arm, one)[1] for one in arm.models]
        shift, of = fmean(shifts), "" if len(self.compared) == 2 else f" of {arm.name}"
        self.arms.append(replace(arm, shift=shift))
        beside = {one.name: one.models for one in controls}
        if moved := self.best and shift > 0:
            beside = {f"{NOISE}{of}": [replace(one, noise=seed) for seed, one in enumerate(arm.models)], **beside}
        found = {
            name: [self._measured(arm, models[seed % len(models)], wanted) for seed, wanted in enumerate(shifts)]
            for name, models in beside.items()
        }
        if moved:
            found[f"{HALF}{of}"] = [self._measured(arm, replace(one, scale=one.scale / 2)) for one in arm.models]
        for name, pairs in found.items():
            labels = [name] if len(pairs) == 1 else [f"{name} {number}" for number in range(1, len(pairs) + 1)]
            models = [replace(spec, label=label) for (spec, _), label in zip(pairs, labels, strict=True)]
            self.arms.append(replace(arm, name=name, models=models, shift=fmean(shift for _, shift in pairs)))
        self.trials.append(Trial(arm.name, tuple(beside), f"{HALF}{of}" if moved else None, shift))

    def _measured(self, arm: Arm, spec: ModelSpec, wanted: float | None = None) -> tuple[ModelSpec, float]:
        """A model and its shift where an arm is read; with the wanted shift, if one is given."""
        benchmark, block = self._deciding, arm.block(self.primary)
        images = {name: images.fingerprint for name, images in benchmark.sets.items()}
        what = {"shift": spec.identity, "goal": wanted, "base": self.origin.identity, "block": block, "images": images}

        def make() -> tuple[float, float]:
            if block not in self._meters:
                self._meters = {block: ShiftMeter(self.origin, block, benchmark, self.settings)}
            return self._meters[block].measure(spec, wanted)

        scale, shift = remembered({**what, "kinds": list(benchmark.kinds)}, self.settings, make)
        return replace(spec, scale=scale), shift

    # ---------------------------------------------------------------------------------------------------------- scores

    def scores(self) -> tuple[Results, Results]:
        """(scores of all models, the primary one of BASE and tuned models at their last blocks)."""
        asked: list[tuple[ModelSpec, str, Benchmark, Sequence[str]]] = []
        for arm in self.arms:
            for benchmark in self.benchmarks:
                numbers: dict[str, list[str]] = {}
                for number, name in zip(benchmark.numbers, benchmark.names, strict=True):
                    numbers.setdefault(arm.block(name), []).append(number)
                asked += [(spec, block, benchmark, wanted) for spec in arm.models for block, wanted in numbers.items()]
        number = self.primary.removeprefix(f"{self._deciding.label} ")
        ends = [
            (spec, arm.last, self._deciding, [number])
            for arm in self.compared
            if arm.block(self.primary) != arm.last
            for spec in arm.models
        ]
        found = shared([partial(self._scores, *one) for one in [*asked, *ends]])
        results: dict[str, dict[str, Score]] = {}
        for (spec, *_), scores in zip(asked, found, strict=False):
            results.setdefault(spec.label, {}).update(scores)
        for (name,) in [one.names for one in self.benchmarks if one.agrees]:  # whose values are the predictions
            first = results[self.origin.label][name].values
            for of in results.values():
                of[name] = replace(of[name], values=(of[name].values == first).astype(float))
        if mute := [label for label, of in results.items() if self.primary not in of]:
            raise ValueError(f"--primary {self.primary}: {mute[0]} has no such number")
        last = {spec.label: results[spec.label] for arm in self.compared for spec in arm.models}
        last |= {spec.label: scores for (spec, *_), scores in zip(ends, found[len(asked) :], strict=True)}
        return results, {label: {self.primary: of[self.primary]} for label, of in last.items()}

    def _scores(
        self, spec: ModelSpec, block: str, benchmark: Benchmark, wanted: Sequence[str], own: bool
    ) -> dict[str, Score]:
        def read() -> Encoder:
            if benchmark.agrees:
                return load_classifier(spec, self.origin)
            encoder = self._load(spec)
            if benchmark.published is not None and (backbone := getattr(encoder.module, "backbone", None)):
                encoder = replace(encoder, side=SIDE // backbone.patch_size * backbone.patch_size)
            return read_after(encoder, block)

        key = {"of": spec.identity, **({"classifier": self.origin.identity} if benchmark.agrees else {"block": block})}
        scores = score(read, key, benchmark, wanted, self.settings, spec.label, own)
        return {f"{benchmark.label} {one.name}": one for one in scores}

    def _load(self, spec: ModelSpec) -> Encoder:
        """A model; the last one stays in memory."""
        if self._loaded is None or self._loaded[0] != spec:
            self._loaded = None
            self._loaded = spec, load_encoder(spec, self.settings.precision)
        return self._loaded[1]


def hours_of(spec: ModelSpec, heads: int, settings: Settings) -> float:
    """Hours that so many heads of published protocols take, by the time of one image."""
    encoder = load_encoder(spec, settings.precision)
    began = time.perf_counter()
    forward(encoder, torch.zeros(1, 3, encoder.side, encoder.side), ("patches",), settings)
    return (time.perf_counter() - began) * (SIDE / encoder.side) ** 2 * CROPS * heads / 3600
