"""Comparison that `visft judge` makes: models at their best blocks, and controls that moved features as far.

Of one architecture two arms come by themselves: `noise` in every parameter that training changed, at the dose of the
tuned model, and `half` of its change.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from visft_ds.evals.judge.dose import Dosimeter
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.kept import load_classifier
from visft_ds.evals.judge.layers import END, blocks_of, chosen, levels_of, read_after
from visft_ds.evals.judge.models import HALF, NOISE, ModelSpec, alike, load_encoder, weights_of
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.scoring import Settings, forward, remembered, score
from visft_ds.evals.judge.table import Trial

CROPS = 640_000  #: that a published head learns from
SIDE = 512  #: pixels of images in published protocols, as many as are whole patches
Results = dict[str, dict[str, Score]]  #: model -> name -> score


class Judging:
    """Arms of a comparison, where they are read, how far they moved features, and their scores. All collective."""

    def __init__(
        self,
        arms: Mapping[str, Sequence[ModelSpec]],
        tuned: Sequence[str],
        benchmarks: Sequence[Benchmark],
        primary: str,
        settings: Settings,
        *,
        best: bool,
    ) -> None:
        """
        Args:
            arms: BASE, the tuned ones, controls.
            best: models are read at their best blocks; otherwise at the end.

        Raises:
            ValueError: controls of another architecture, and what is wrong with models and data.
        """
        self.base = next(iter(arms))
        (self.origin,) = arms[self.base]
        self.given, self.benchmarks, self.primary, self.settings, self.best = arms, benchmarks, primary, settings, best
        self.arms: dict[str, Sequence[ModelSpec]] = {self.base: arms[self.base]}  #: in the order of the table
        self.doses: dict[str, float] = {}
        self.layers: dict[str, dict[str, Any]] = {}  #: number -> arm -> how its block was chosen
        self.notes: list[str] = []
        self._of = {arm: arm for arm in (self.base, *tuned)}  # arm -> the one whose blocks it is read after
        self._loaded: tuple[ModelSpec, Encoder] | None = None
        self._meter: tuple[str, Dosimeter] | None = None
        self._answers: dict[str, list[Score]] = {}
        self._pairs = {arm: [self._pair(one) for one in arms[arm]] for arm in tuned}
        for arm in [name for name in arms if name not in self._of]:
            if not all(pair["alike"] for pair in [*self._pairs[tuned[0]], *map(self._pair, arms[arm])]):
                raise ValueError(f"--control {arm}: it, {tuned[0]} and {self.base} are not of one architecture")
        self._place()

    # ---------------------------------------------------------------------------------------------------------- blocks

    def _pair(self, spec: ModelSpec) -> dict[str, Any]:
        """Say whether a model is of BASE's architecture, and list the blocks of both."""

        def make() -> dict[str, Any]:
            own, base = (load_encoder(one, self.settings.precision) for one in (spec, self.origin))
            return {
                "alike": alike(weights_of(own), weights_of(base)),
                "own": blocks_of(own, self.settings),
                "base": blocks_of(base, self.settings),
            }

        return remembered({"pair": [spec.identity, self.origin.identity]}, self.settings, make)

    def _place(self) -> None:
        """Choose the block after which each arm is read, for every number."""
        base = dict(next(iter(self._pairs.values()))[0]["base"])
        self._ends = {self.base: list(base)[-1]}
        for arm, pairs in self._pairs.items():
            own = pairs[0]["own"]
            if pairs[0]["alike"] and list(own) == list(base)[: len(own)] != list(base):
                base = {name: base[name] for name in own}
                self.notes.append(f"{arm} ends after {list(base)[-1]}: {self.base} is compared up to there.")
            self._ends[arm] = list(own)[-1]
        sizes = self._sizes = {self.base: base, **{arm: pairs[0]["own"] for arm, pairs in self._pairs.items()}}
        if not self.best:
            return
        ranked: dict[str, list[str]] = {}
        for benchmark in (one for one in self.benchmarks if one.held_out):
            for arm in sizes:
                if len(sizes[arm]) == 1 or self.given[arm][0].block is not None:
                    continue
                levels = [self._levels(one, benchmark, sizes[arm], ranked.get(arm, ())) for one in self.given[arm]]
                of = chosen(levels, benchmark)
                held = next(iter(of.values()))["held_out"]
                ranked.setdefault(arm, sorted(held, key=lambda name: -held[name]))
                for number, choice in of.items():
                    self.layers.setdefault(f"{benchmark.label} {number}", {})[arm] = choice

    def _levels(
        self, spec: ModelSpec, benchmark: Benchmark, sizes: Mapping[str, int], ranked: Sequence[str]
    ) -> dict[str, dict[str, float]]:
        what = {"levels": spec.identity, "blocks": list(sizes), "ranked": list(ranked)}
        what |= {"images": benchmark.sets["train"].fingerprint, "benchmark": benchmark.settings}
        said = f"{spec.label}, all blocks: {benchmark.label}"

        def make() -> dict[str, dict[str, float]]:
            return levels_of(self._load(spec), benchmark, sizes, ranked, self.settings, said)

        return remembered(what, self.settings, make)

    def _name(self, arm: str, number: str) -> str:
        """The block that an arm is read after for a number."""
        of = self._of[arm]
        return str(self.layers.get(number, {}).get(of, {}).get("chosen", list(self._sizes[of])[-1]))

    def _block(self, arm: str, number: str) -> str:
        """The same, END where that is all of the model."""
        name, of = self._name(arm, number), self._of[arm]
        is_read = any(one.held_out and number.startswith(f"{one.label} ") for one in self.benchmarks)
        return END if not is_read or name == self._ends[of] else name

    # ----------------------------------------------------------------------------------------------------------- doses

    def dosed(self, arm: str, controls: Sequence[str]) -> Trial:
        """Add a tuned arm and those that it is judged by, brought to its dose.

        Raises:
            ValueError: a dose that no mixture reaches.
        """
        self.arms[arm] = tuned = self.given[arm]
        if not all(pair["alike"] for pair in self._pairs[arm]):
            return Trial(arm)
        doses = [self._measured(arm, one)[1] for one in tuned]
        self.doses[arm] = sum(doses) / len(doses)
        of = "" if len(self._pairs) == 1 else f" of {arm}"
        themselves = self.best and self.doses[arm] > 0
        beside = (
            {f"{NOISE}{of}": [replace(one, noise=number) for number, one in enumerate(tuned)]} if themselves else {}
        )
        beside |= {name: list(self.given[name]) for name in controls}
        for name, models in beside.items():
            pairs = [(models[number % len(models)], wanted) for number, wanted in enumerate(doses)]
            self._add(name, arm, [(one, self._measured(arm, one, wanted)) for one, wanted in pairs])
        half = f"{HALF}{of}" if themselves else None
        if half is not None:
            self._add(half, arm, [(one, self._measured(arm, replace(one, scale=one.scale / 2))) for one in tuned])
        return Trial(arm, tuple(beside), half, self.doses[arm])

    def _add(self, name: str, arm: str, models: Sequence[tuple[ModelSpec, tuple[float, float]]]) -> None:
        """Add an arm of mixtures, each with (A, its dose), that is read where another arm is."""
        labels = [name] if len(models) == 1 else [f"{name} {number + 1}" for number in range(len(models))]
        pairs = zip(models, labels, strict=True)
        self.arms[name] = [replace(one, label=label, scale=scale) for (one, (scale, _)), label in pairs]
        self.doses[name] = sum(dose for _, (_, dose) in models) / len(models)
        self._of[name] = arm

    def _measured(self, arm: str, spec: ModelSpec, wanted: float | None = None) -> tuple[float, float]:
        """(A, dose) of a model where an arm is read, or the A that gives the wanted dose."""
        benchmark = self._deciding
        block = self._name(arm, self.primary) if benchmark.held_out else END
        images = {name: images.fingerprint for name, images in benchmark.sets.items()}
        what = {"dose": spec.identity, "wanted": wanted, "base": self.origin.identity, "block": block}

        def make() -> tuple[float, float]:
            if self._meter is None or self._meter[0] != block:
                self._meter = block, Dosimeter(self.origin, block, benchmark, self.settings)
            meter = self._meter[1]
            return (spec.scale, meter.of(spec)) if wanted is None else meter.scale_of(spec, wanted)

        scale, dose = remembered({**what, "kinds": list(benchmark.kinds), "images": images}, self.settings, make)
        return scale, dose

    @cached_property
    def _deciding(self) -> Benchmark:
        """The data set of the primary number."""
        (found,) = (one for one in self.benchmarks if self.primary in [f"{one.label} {name}" for name in one.numbers])
        return found

    # ---------------------------------------------------------------------------------------------------------- scores

    def scores(self) -> tuple[Results, Results]:
        """(scores of all models, the primary one of BASE and tuned models at their ends), on the main process."""
        results: Results = {}
        last: Results = {}
        for arm, models in self.arms.items():
            for spec in models:
                found = results[spec.label] = {}
                for benchmark in self.benchmarks:
                    numbers: dict[str, list[str]] = {}
                    for number in benchmark.numbers:
                        numbers.setdefault(self._block(arm, f"{benchmark.label} {number}"), []).append(number)
                    for block, wanted in numbers.items():
                        found |= self._scores(spec, block, benchmark, wanted)
                if self._of[arm] != arm:
                    continue
                last_name = list(self._sizes[arm])[-1]
                block, end = self._block(arm, self.primary), END if last_name == self._ends[arm] else last_name
                number = self.primary.removeprefix(f"{self._deciding.label} ")
                at_end = found if block == end else self._scores(spec, end, self._deciding, [number])
                last[spec.label] = {name: at_end[name] for name in at_end if name == self.primary}
        return results, last

    def _scores(self, spec: ModelSpec, block: str, benchmark: Benchmark, wanted: Sequence[str]) -> dict[str, Score]:
        key: dict[str, Any]
        if benchmark.answers:
            key = {"of": spec.identity, "classifier": self.origin.identity}
            model = partial(load_classifier, spec, self.origin)
        else:
            key, model = {"of": spec.identity, "block": block}, partial(self._read_after, spec, block, benchmark)
        scores = score(model, key, benchmark, wanted, self.settings, spec.label)
        if benchmark.answers:  # scores are the answers themselves
            said = self._answers.setdefault(benchmark.label, scores)
            pairs = zip(scores, said, strict=True)
            scores = [replace(one, values=(one.values == of.values).astype(float)) for one, of in pairs]
        return {f"{benchmark.label} {one.name}": one for one in scores}

    def _read_after(self, spec: ModelSpec, block: str, benchmark: Benchmark) -> Encoder:
        encoder = self._load(spec)
        if benchmark.published is not None and (backbone := getattr(encoder.module, "backbone", None)):
            encoder = replace(encoder, side=SIDE // backbone.patch_size * backbone.patch_size)
        return read_after(encoder, block)

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
