"""Comparison that `visft judge` makes, in three steps: choose layers, match feature shifts, score.

1. `choose_layers`: BASE and every tuned variant are read after the block that is best on held-out training
   images.
2. `match_shifts`: each tuned variant gets controls that move BASE's features as far as it does: `noise` in
   every parameter that training changed, and all that `--control` names. Controls choose their own best block
   for the primary number. `half` is half of the change, at its own shift.
3. `score`: all numbers of all variants. The primary number is also taken at last blocks, and of BASE without
   the blocks behind the end of a tuned variant that ends earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

from visft_ds.evals.judge.benchmark import Benchmark, Number
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.in_domain import trained_on
from visft_ds.evals.judge.layers import Choice, Levels, best_first, chosen, levels_of
from visft_ds.evals.judge.model_text import HALF, NOISE, ModelSpec
from visft_ds.evals.judge.scoring import Named, Work, remembered, score, shared
from visft_ds.evals.judge.shift import Match, ShiftMeter
from visft_ds.evals.judge.table import Results, Trial
from visft_ds.evals.judge.variants import Models, Variant, check_controls, check_needs, up_to_the_end_of


@dataclass(frozen=True)
class Scores:
    """Scores of all models."""

    chosen: Results  #: model -> number -> score, at the blocks that were chosen
    #: Model of BASE or a tuned variant -> the primary number at its last block, if others were looked for.
    last: Results
    #: Tuned variant that ends before BASE -> BASE's primary number at the best block that both have.
    cut: Results


class Comparison:
    """BASE, tuned variants, their controls; and the scores of all."""

    def __init__(
        self,
        variants: Mapping[str, Sequence[ModelSpec]],
        tuned: int,
        benchmarks: Sequence[Benchmark],
        primary: str,
        settings: Settings,
        best: bool,
    ) -> None:
        """
        Args:
            variants: BASE, so many tuned variants, controls.
            best: layers are chosen, and noise and half come by themselves.

        Raises:
            ValueError: controls of another architecture or that end too early, and what is wrong with models.
        """
        self.benchmarks = benchmarks
        self.primary = primary
        self.settings = settings
        self.best = best
        self.notes = [note for benchmark in benchmarks for note in benchmark.notes]
        self.layers: dict[str, dict[str, Choice]] = {}  #: number -> variant -> how its block was chosen
        self.trials: list[Trial] = []
        self._deciding = next(benchmark for benchmark in benchmarks if primary in benchmark.full_names)
        self._number = self.numbers[primary]
        self._ranked: dict[str, list[str]] = {}  # variant -> its blocks, the best first
        self._meters: dict[str, ShiftMeter] = {}
        #: (label of a model, label of a data set) -> block -> scores
        self._made: dict[tuple[str, str], dict[str, Named]] = {}

        self.origin = next(iter(variants.values()))[0]
        self._models = Models(self.origin, settings)
        opened = [self._models.open(name, models) for name, models in variants.items()]
        self.base = opened[0]
        self.variants = [self.base]  #: and behind it, once shifts match, tuned variants with their controls
        self.tuned = opened[1 : 1 + tuned]
        self.named = opened[1 + tuned :]
        check_controls(self.base, self.tuned, self.named)
        check_needs(opened, benchmarks)
        for benchmark in benchmarks:
            if benchmark.check_base is not None:
                benchmark.check_base(self._models.load(self.origin))
        #: Tuned variant -> the blocks of BASE up to its end, for those that end before BASE does.
        self._cuts: dict[str, Variant] = {}
        for variant in self.tuned:
            cut = up_to_the_end_of(variant, self.base)
            if cut is not None:
                self._cuts[variant.name] = cut

    @property
    def members(self) -> dict[str, list[str]]:
        """Variant -> labels of its models."""
        return {variant.name: [spec.label for spec in variant.models] for variant in self.variants}

    @property
    def numbers(self) -> dict[str, Number]:
        """Full name -> number, of all benchmarks."""
        return {
            benchmark.full_name(number): number
            for benchmark in self.benchmarks
            for number in benchmark.numbers
        }

    # ------------------------------------------------------------------------------------------------ layers

    def choose_layers(self) -> None:
        """Choose the blocks after which BASE and tuned variants are read, for every number that has training
        images.
        """
        variants = [variant for variant in [self.base, *self.tuned] if variant.has_choice]
        for benchmark in self.benchmarks:
            if benchmark.layer_choice is not None:
                self._choose(variants, benchmark, _choosing(benchmark), benchmark.full_names)
        for cut in self._cuts.values():
            self._choose_cut(cut)

    def _choose(
        self,
        variants: Sequence[Variant],
        benchmark: Benchmark,
        numbers: Sequence[Number],
        full_names: Sequence[str],
    ) -> None:
        """Choose the blocks of variants.

        Args:
            numbers: of the benchmark, measured on held-out training images.
            full_names: of the numbers that are then read there; those that were not measured are read where
                the first one is.
        """
        calls = [
            partial(self._levels, spec, variant, benchmark, numbers)
            for variant in variants
            for spec in variant.models
        ]
        levels = iter(shared(calls, f"layers: {benchmark.label}"))
        for variant in variants:
            choices = chosen([next(levels) for _ in variant.models])
            first = choices[numbers[0].name]
            for full_name in full_names:
                name = full_name.removeprefix(f"{benchmark.label} ")
                self._take(variant, full_name, choices.get(name, first))
            self._ranked.setdefault(variant.name, best_first(first["held_out"]))

    def _take(self, variant: Variant, full_name: str, choice: Choice) -> None:
        variant.layers[full_name] = choice
        self.layers.setdefault(full_name, {})[variant.name] = choice

    def _choose_primary(self, variants: Sequence[Variant]) -> None:
        """Choose the blocks of variants for the primary number alone, as those of BASE were chosen."""
        if self.primary not in self.base.layers:
            return
        numbers = _choosing(self._deciding)
        choosing = self._number if self._number in numbers else numbers[0]
        measured = [number for number in numbers if not number.trained or number == choosing]
        having_choice = [variant for variant in variants if variant.has_choice]
        self._choose(having_choice, self._deciding, measured, [self.primary])

    def _choose_cut(self, cut: Variant) -> None:
        if self.primary not in self.base.layers:
            return
        of_base = self.base.layers[self.primary]["held_out"]
        if cut.blocks.keys() <= of_base.keys():
            held_out = {name: of_base[name] for name in cut.blocks}
            self._take(cut, self.primary, {"chosen": best_first(held_out)[0], "held_out": held_out})
        else:  # heads were trained for some blocks of BASE only, which may lie behind the end
            self._choose_primary([cut])

    def _levels(
        self,
        spec: ModelSpec,
        variant: Variant,
        benchmark: Benchmark,
        numbers: Sequence[Number],
        own: bool,
    ) -> Levels:
        """Number -> block -> the number on held-out training images, by one model of a variant."""
        assert benchmark.layer_choice is not None
        ranked = self._ranked.get(variant.name, [])
        key = {
            "levels": spec.identity,
            "blocks": list(variant.blocks),
            "ranked": ranked,
            "numbers": [number.name for number in numbers],
            "images": benchmark.layer_choice.images.fingerprint,
            "benchmark": benchmark.settings,
        }
        settings = self._models.settings_of(spec)

        def make() -> Levels:
            label = f"{spec.label}, all blocks: {benchmark.label}"
            encoder = self._models.load(spec)
            return levels_of(encoder, benchmark, variant.blocks, ranked, numbers, settings, label)

        return remembered(key, settings, make, own)

    # ------------------------------------------------------------------------------------------------ shifts

    def match_shifts(self) -> None:
        """Bring controls of every tuned variant of BASE's architecture to its feature shift."""
        for variant in self.tuned:
            was_chosen = self.primary in variant.layers or not variant.has_choice
            trial = Trial(
                variant.name,
                compared=self.primary in self.base.layers and was_chosen,
                named=None if variant.has_choice else variant.last,
                cut=variant.last if variant.name in self._cuts else None,
                trained_on=tuple(trained_on(variant.models, self.benchmarks)),
            )
            beside: list[Variant] = []
            if variant.of_base:
                trial, beside = self._matched(trial, variant)
            self.trials.append(trial)
            self.variants += [replace(variant, shift=trial.shift), *beside]

    def _matched(self, trial: Trial, variant: Variant) -> tuple[Trial, list[Variant]]:
        """The trial of a tuned variant with its shift, and its controls and its half."""
        suffix = "" if len(self.tuned) == 1 else f" of {variant.name}"
        shifts = [self._match(variant, spec, None).shift for spec in variant.models]
        trial = replace(trial, shift=fmean(shifts))
        candidates = {control.name: control for control in self.named}
        has_moved = self.best and trial.shift != 0
        if has_moved:
            noises = [replace(spec, noise=seed) for seed, spec in enumerate(variant.models)]
            candidates = {NOISE: replace(variant, models=noises), **candidates}

        controls: list[Variant] = []
        missed: dict[str, float] = {}
        layers = dict(variant.layers)
        layers.pop(self.primary, None)  # controls have their own
        for name, control in candidates.items():
            name += suffix
            models = [control.models[seed % len(control.models)] for seed in range(len(shifts))]
            matches = [self._match(variant, spec, goal) for spec, goal in zip(models, shifts, strict=True)]
            shift = fmean(match.shift for match in matches)
            if not all(match.is_near for match in matches):
                missed[name] = shift
                continue
            scales = [match.scale for match in matches]
            models = _scaled(name, models, scales)
            controls.append(replace(control, name=name, models=models, layers=dict(layers), shift=shift))
        self._choose_primary(controls)
        trial = replace(trial, controls=tuple(control.name for control in controls), missed=missed)
        if not has_moved:
            return trial, controls

        name = f"{HALF}{suffix}"
        models = _scaled(name, variant.models, [spec.scale / 2 for spec in variant.models])
        shift = fmean(self._match(variant, spec, None).shift for spec in models)
        half = replace(variant, name=name, models=models, shift=shift)
        return replace(trial, half=name), [*controls, half]

    def _match(self, variant: Variant, spec: ModelSpec, goal: float | None) -> Match:
        """A model at the scale whose shift is the goal where a variant is read; None: at its own scale."""
        block = variant.block(self.primary)
        key = {
            "shift": spec.identity,
            "goal": goal,
            "base": self.origin.identity,
            "block": block,
            "images": {name: images.fingerprint for name, images in self._deciding.sets.items()},
            "kinds": list(self._deciding.kinds),
            "texts": list(self._deciding.texts),
        }

        def make() -> Match:
            if block not in self._meters:  # one at a time: it holds a model and images
                self._meters = {block: ShiftMeter(self.origin, block, self._deciding, self.settings)}
            meter = self._meters[block]
            return meter.measure(spec) if goal is None else meter.match(spec, goal)

        return Match(*remembered(key, replace(self.settings, precision="fp32"), make))

    # ------------------------------------------------------------------------------------------------ scores

    def score(self) -> Scores:
        """Scores of all models. Raises ValueError if one has no primary number."""
        plan = self._plan()
        calls = []
        for work in plan.values():
            load = partial(self._models.encoder, work.spec, work.benchmark)
            calls.append(partial(score, work, load, self._models.settings_of(work.spec)))
        self._made = dict(zip(plan, shared(calls, "scores"), strict=True))
        chosen: dict[str, Named] = {}
        for variant in self.variants:
            chosen |= {spec.label: self._of_model(spec, variant) for spec in variant.models}
        last: dict[str, Named] = {}
        if self.best:
            for variant in [self.base, *self.tuned]:
                last |= {spec.label: self._primary_of(spec, variant.last) for spec in variant.models}
        cut = {
            name: self._primary_of(self.origin, base.block(self.primary)) for name, base in self._cuts.items()
        }
        return Scores(chosen, last, cut)

    def _plan(self) -> dict[tuple[str, str], Work]:
        """(label of a model, label of a data set) -> what is to be scored there, encoded together."""
        asked: list[tuple[ModelSpec, Variant, Benchmark, Number, str]] = []
        for variant in self.variants:
            for spec in variant.models:
                for benchmark in self.benchmarks:
                    for number in benchmark.numbers:
                        block = variant.block(benchmark.full_name(number))
                        asked.append((spec, variant, benchmark, number, block))
        for variant in [self.base, *self.tuned]:
            for spec in variant.models:
                asked.append((spec, variant, self._deciding, self._number, variant.last))
        for cut in self._cuts.values():
            asked.append((self.origin, self.base, self._deciding, self._number, cut.block(self.primary)))
        plan: dict[tuple[str, str], Work] = {}
        for spec, variant, benchmark, number, block in asked:
            work = Work(spec, benchmark, variant.blocks)
            work = plan.setdefault((spec.label, benchmark.label), work)
            work.numbers[block].add(number.name)
        return plan

    def _of_model(self, spec: ModelSpec, variant: Variant) -> Named:
        """Full name -> score of a model at the blocks that were chosen; without numbers that it lacks."""
        scores: Named = {}
        for benchmark in self.benchmarks:
            for name in benchmark.full_names:
                at_block = self._at(spec, benchmark, variant.block(name))
                if name in at_block:
                    scores[name] = at_block[name]
        if self.primary not in scores:
            raise ValueError(f"--primary {self.primary}: {spec.label} has no such number")
        return scores

    def _primary_of(self, spec: ModelSpec, block: str) -> Named:
        return {self.primary: self._at(spec, self._deciding, block)[self.primary]}

    def _at(self, spec: ModelSpec, benchmark: Benchmark, block: str) -> Named:
        """Scores of a model on a data set; of answers of the classifier, whether they are those of BASE."""
        scores = self._made[spec.label, benchmark.label][block]
        if not benchmark.asks_classifier:
            return scores
        of_base = self._made[self.origin.label, benchmark.label][self.base.last]
        agreeing: Named = {}
        for name, answers in scores.items():
            agrees = answers.values == of_base[name].values
            agreeing[name] = replace(answers, values=agrees.astype(float))
        return agreeing


def _choosing(benchmark: Benchmark) -> list[Number]:
    """The numbers that choose layers: those that are asked for, or else the first one that was left out."""
    asked = [number for number in benchmark.numbers if number.chooses_layer]
    return asked or [number for number in benchmark.left_out if number.chooses_layer][:1]


def _scaled(name: str, models: Sequence[ModelSpec], scales: Sequence[float]) -> list[ModelSpec]:
    """The models of a variant at other scales, with labels by its name."""
    labels = [name] if len(models) == 1 else [f"{name} {number}" for number in range(1, len(models) + 1)]
    scaled = zip(models, labels, scales, strict=True)
    return [replace(spec, label=label, scale=scale) for spec, label, scale in scaled]
