"""Comparison that `visft judge` makes, in three steps: choose layers, match feature shifts, score.

1. `choose_layers`: BASE and every tuned arm are read after the block that is best on held-out training
  images.
2. `match_shifts`: each tuned arm gets controls that move BASE's features as far as it does: `noise` in every
  parameter
   that training changed, and all that `--control` names. Controls choose their own best block for the primary
   number. `half` is half of the change, at its own shift.
3. `score`: all numbers of all arms. The primary number is also taken at last blocks, and of BASE without the
  blocks
   behind the end of a tuned arm that ends earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from visft_ds.evals.judge.benchmark import Benchmark, Number, Score
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.in_domain import trained_on
from visft_ds.evals.judge.kept import check_classifier, load_classifier
from visft_ds.evals.judge.layers import best_first, blocks_of, chosen, levels_of, read_after
from visft_ds.evals.judge.models import HALF, NOISE, ModelSpec, alike, load_encoder, weights_of
from visft_ds.evals.judge.scoring import Settings, kinds_of, remembered, score, shared
from visft_ds.evals.judge.shift import ShiftMeter
from visft_ds.evals.judge.table import Results, Trial


@dataclass(frozen=True)
class Arm:
    """Models of one recipe, and the blocks that they are read after."""

    name: str
    models: Sequence[ModelSpec]
    alike: bool  #: of BASE's architecture
    blocks: Mapping[str, int]  #: that it may be read after; bytes of an image's map after each
    kinds: tuple[str, ...]  #: of features that its models have
    has_text: bool  #: a side that encodes texts
    layers: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  #: number -> its block, and numbers of all
    shift: float | None = None  #: how far it moved BASE's features

    def block(self, number: str) -> str:
        """The block that it is read after for a number."""
        block = self.layers[number]["chosen"] if number in self.layers else self.last
        return block if block in self.blocks else self.last

    @property
    def last(self) -> str:
        """The last block."""
        return list(self.blocks)[-1]

    @property
    def asked(self) -> bool:
        """Return True if there is a choice of blocks, which the command line has not made."""
        return len(self.blocks) > 1 and self.models[0].block is None


@dataclass(frozen=True)
class Scores:
    """What all models score."""

    chosen: Results  #: model -> number -> score, at the blocks that were chosen
    last: Results  #: model of BASE or a tuned arm -> the primary number at its last block
    cut: Results  #: tuned arm that ends before BASE -> BASE's primary number at the best block that both have


@dataclass(frozen=True)
class _Request:
    """Numbers of a benchmark, by a model that is read after a block."""

    spec: ModelSpec
    block: str
    benchmark: Benchmark
    numbers: tuple[str, ...]


class Comparison:
    """Arms of a comparison: BASE, tuned arms, their controls; and their scores."""

    def __init__(
        self,
        arms: Mapping[str, Sequence[ModelSpec]],
        tuned: int,
        benchmarks: Sequence[Benchmark],
        primary: str,
        settings: Settings,
    ) -> None:
        """
        Args:
            arms: BASE, so many tuned arms, controls.

        Raises:
            ValueError: controls of another architecture or that end too early, and what is wrong with models.
        """
        self.benchmarks = benchmarks
        self.primary = primary
        self.settings = settings
        self.notes = [note for benchmark in benchmarks for note in benchmark.notes]
        self.layers: dict[str, dict[str, Any]] = {}  #: number -> arm -> how its block was chosen
        self.trials: list[Trial] = []
        self._loaded: tuple[ModelSpec, Encoder] | None = None
        self._meters: dict[str, ShiftMeter] = {}
        self._deciding, self._number = _named(primary, benchmarks)
        self._ranked: dict[str, Sequence[str]] = {}  # arm -> its blocks, the best first
        self.origin = next(iter(arms.values()))[0]
        opened = [self._arm(name, models) for name, models in arms.items()]
        self.base = opened[0]
        self.tuned = opened[1 : 1 + tuned]
        self.named = opened[1 + tuned :]
        self._controls: list[Arm] = []  # and halves
        self._check_controls()
        self._check_needs(opened)
        #: Tuned arm -> the blocks of BASE up to its end, for those that end before BASE does.
        self._cuts = {arm.name: self._cut(arm) for arm in self.tuned if self._ends_early(arm)}

    def _arm(self, name: str, models: Sequence[ModelSpec]) -> Arm:
        def facts(spec: ModelSpec) -> dict[str, Any]:
            own = self._load(spec)
            base = own if spec is self.origin else load_encoder(self.origin, self._precise(spec).precision)
            return {
                "alike": alike(weights_of(own), weights_of(base)),
                "blocks": blocks_of(own, self._precise(spec)),
                "kinds": list(own.kinds),
                "text": own.text is not None,
            }

        known = []
        for spec in models:
            what = {"facts": [spec.identity, self.origin.identity]}
            known.append(remembered(what, self.settings, partial(facts, spec)))
        first = known[0]
        same = all(of_model["alike"] for of_model in known)
        return Arm(name, models, same, first["blocks"], tuple(first["kinds"]), first["text"])

    def _check_needs(self, arms: Sequence[Arm]) -> None:
        """Raise ValueError if a model lacks what a benchmark reads, before hours are spent on the others."""
        for benchmark in self.benchmarks:
            if benchmark.asks_classifier:
                check_classifier(self.origin)
            for arm in arms:
                if benchmark.asks_classifier:
                    if not arm.alike:
                        raise ValueError(
                            f"{benchmark.label}: {arm.name} cannot feed the classifier of {arms[0].name}"
                        )
                    continue
                if not kinds_of(arm, benchmark):
                    needed = " or ".join(benchmark.kinds)
                    raise ValueError(f"{benchmark.label} needs {needed}, which {arm.name} does not have")
                if benchmark.needs_text and not arm.has_text:
                    needed = f"which {benchmark.label} needs: give a whole CLIP file"
                    raise ValueError(f"{arm.name} has no text side, {needed}")

    def _check_controls(self) -> None:
        """Raise ValueError for controls that cannot be mixed with BASE, or not be read where a tuned arm
        is.
        """
        judged = [arm for arm in self.tuned if arm.alike]
        if self.named and not (judged and all(arm.alike for arm in self.named)):
            names = ", ".join(arm.name for arm in [self.base, *self.tuned, *self.named])
            raise ValueError(f"--control: {names} do not have the same architecture")
        for control in self.named:
            for arm in judged:
                if not arm.blocks.keys() <= control.blocks.keys():
                    raise ValueError(
                        f"--control {control.name} ends after {control.last}, before {arm.name}, which ends after "
                        f"{arm.last}: give a control that is as long"
                    )

    def _ends_early(self, arm: Arm) -> bool:
        own, all_of_base = list(arm.blocks), list(self.base.blocks)
        return arm.alike and len(own) < len(all_of_base) and own == all_of_base[: len(own)]

    def _cut(self, arm: Arm) -> Arm:
        """BASE without the blocks behind the last one of a tuned arm."""
        blocks = {name: self.base.blocks[name] for name in arm.blocks}
        return replace(self.base, name=f"{self.base.name} up to {arm.last}", blocks=blocks, layers={})

    @property
    def arms(self) -> list[Arm]:
        """BASE, and every tuned arm with its controls behind it."""
        found = [self.base]
        for arm, trial in zip(self.tuned, self.trials, strict=True):
            beside = [*trial.controls, trial.half]
            found += [arm, *(control for control in self._controls if control.name in beside)]
        return found

    # ---------------------------------------------------------------------------------------------------------- layers

    def choose_layers(self) -> None:
        """Choose the blocks after which BASE and tuned arms are read, for every number that has training
        images.
        """
        asked = [arm for arm in [self.base, *self.tuned] if arm.asked]
        for benchmark in self.benchmarks:
            if benchmark.layer_choice:
                self._choose(asked, benchmark, _choosing(benchmark), benchmark.full_names)
        for cut in self._cuts.values():
            if self.primary in self.base.layers:
                self._choose_cut(cut)

    def _choose(
        self, arms: Sequence[Arm], benchmark: Benchmark, numbers: Sequence[Number], names: Sequence[str]
    ) -> None:
        """Choose the blocks of arms.

        Args:
            numbers: of the benchmark, measured on held-out training images.
            names: full names of the numbers that are then read there; those that were not measured are read
            where the
                first one is.
        """
        calls = []
        for arm in arms:
            ranked = self._ranked.get(arm.name, ())
            calls += [
                partial(self._levels, spec, benchmark, arm.blocks, ranked, numbers) for spec in arm.models
            ]
        levels = iter(shared(calls, f"layers: {benchmark.label}"))
        for arm in arms:
            choices = chosen([next(levels) for _ in arm.models])
            first = next(iter(choices.values()))
            for name in names:
                self._take(arm, name, choices.get(name.removeprefix(f"{benchmark.label} "), first))
            self._ranked.setdefault(arm.name, best_first(first["held_out"]))

    def _take(self, arm: Arm, name: str, choice: dict[str, Any]) -> None:
        arm.layers[name] = choice
        self.layers.setdefault(name, {})[arm.name] = choice

    @property
    def _measured(self) -> list[Number]:
        """Numbers that choose the block of the primary one: itself or the first of its data set, and what
        ranks it.
        """
        numbers = _choosing(self._deciding)
        choosing = self._number if self._number in numbers else numbers[0]
        return [number for number in numbers if not number.trained or number == choosing]

    def _choose_primary(self, arms: Sequence[Arm]) -> None:
        """Choose the blocks of arms for the primary number alone."""
        if self.primary in self.base.layers:
            self._choose([arm for arm in arms if arm.asked], self._deciding, self._measured, [self.primary])

    def _choose_cut(self, cut: Arm) -> None:
        held_out = self.base.layers[self.primary]["held_out"]
        if cut.blocks.keys() <= held_out.keys():
            shared_blocks = {name: held_out[name] for name in cut.blocks}
            self._take(cut, self.primary, {"chosen": best_first(shared_blocks)[0], "held_out": shared_blocks})
        else:  # heads were trained for some blocks of BASE only, which may lie behind the end
            self._choose_primary([cut])

    def _levels(
        self,
        spec: ModelSpec,
        benchmark: Benchmark,
        blocks: Mapping[str, int],
        ranked: Sequence[str],
        numbers: Sequence[Number],
        own: bool,
    ) -> dict[str, dict[str, float]]:
        assert benchmark.layer_choice is not None
        what = {
            "levels": spec.identity,
            "blocks": list(blocks),
            "ranked": list(ranked),
            "numbers": [number.name for number in numbers],
            "images": benchmark.layer_choice.images.fingerprint,
            "benchmark": benchmark.settings,
        }

        def make() -> dict[str, dict[str, float]]:
            label = f"{spec.label}, all blocks: {benchmark.label}"
            return levels_of(self._load(spec), benchmark, blocks, ranked, numbers, self._precise(spec), label)

        return remembered(what, self._precise(spec), make, own)

    # ---------------------------------------------------------------------------------------------------------- shifts

    def match_shifts(self, noise: bool = True) -> None:
        """Bring controls of every tuned arm of BASE's architecture to its feature shift.

        Args:
            noise: the arms that come by themselves, noise and half, are there, too.
        """
        for arm in self.tuned:
            if arm.alike:
                self._match(arm, noise)
            else:
                self.trials.append(Trial(arm.name, compared=self._compared(arm), named=self._fixed(arm)))
        for number, arm in enumerate(self.tuned):
            seen = tuple(trained_on(arm.models, self.benchmarks))
            self.trials[number] = replace(self.trials[number], trained_on=seen)
            self.tuned[number] = replace(arm, shift=self.trials[number].shift)

    def _compared(self, arm: Arm) -> bool:
        """Return True if BASE's best block for the primary number was looked for, and the arm is read at its
        best.
        """
        return self.primary in self.base.layers and (self.primary in arm.layers or not arm.asked)

    def _fixed(self, arm: Arm) -> str | None:
        """The block of an arm that has no choice; None if it has one."""
        return None if arm.asked else arm.last

    def _match(self, arm: Arm, noise: bool) -> None:
        """Add the trial of a tuned arm, its controls and its half."""
        of_arm = "" if len(self.tuned) == 1 else f" of {arm.name}"
        shifts = [self._shift_of(arm, spec) for spec in arm.models]
        shift = fmean(shifts)
        moved = noise and shift > 0
        beside: dict[str, Arm] = {}
        if moved:
            noises = [replace(spec, noise=seed) for seed, spec in enumerate(arm.models)]
            beside[f"{NOISE}{of_arm}"] = replace(arm, models=noises)
        beside |= {f"{control.name}{of_arm}": control for control in self.named}
        reached: list[Arm] = []
        missed: dict[str, float] = {}
        for name, control in beside.items():
            pairs = []
            for seed, wanted in enumerate(shifts):
                pairs.append(self._scaled(arm, control.models[seed % len(control.models)], wanted))
            shift_of_control = fmean(moved_by for _, moved_by, _ in pairs)
            if all(near for _, _, near in pairs):
                models = _labelled(name, [spec for spec, _, _ in pairs])
                layers = {number: choice for number, choice in arm.layers.items() if number != self.primary}
                reached.append(
                    replace(control, name=name, models=models, layers=layers, shift=shift_of_control)
                )
            else:
                missed[name] = shift_of_control
        self._choose_primary(reached)
        half = f"{HALF}{of_arm}" if moved else None
        if half:
            models = _labelled(half, [replace(spec, scale=spec.scale / 2) for spec in arm.models])
            shift_of_half = fmean(self._shift_of(arm, spec) for spec in models)
            reached.append(replace(arm, name=half, models=models, shift=shift_of_half))
        self._controls += reached
        controls = tuple(control.name for control in reached if control.name != half)
        cut = arm.last if arm.name in self._cuts else None
        trial = Trial(arm.name, controls, half, shift, missed, self._compared(arm), cut, self._fixed(arm))
        self.trials.append(trial)

    def _shift_of(self, arm: Arm, spec: ModelSpec) -> float:
        """Shift of a model where an arm is read."""
        return float(self._remembered_shift(arm, spec, None)[1])

    def _scaled(self, arm: Arm, spec: ModelSpec, wanted: float) -> tuple[ModelSpec, float, bool]:
        """(the model scaled to the wanted shift where an arm is read, its shift, whether that is the wanted
        one).
        """
        scale, shift, near = self._remembered_shift(arm, spec, wanted)
        return replace(spec, scale=scale), shift, near

    def _remembered_shift(self, arm: Arm, spec: ModelSpec, wanted: float | None) -> tuple[float, float, bool]:
        block = arm.block(self.primary)
        what = {
            "shift": spec.identity,
            "goal": wanted,
            "base": self.origin.identity,
            "block": block,
            "images": {name: images.fingerprint for name, images in self._deciding.sets.items()},
            "kinds": list(self._deciding.kinds),
            "texts": list(self._deciding.texts),
        }

        def make() -> tuple[float, float, bool]:
            if block not in self._meters:
                self._meters = {block: ShiftMeter(self.origin, block, self._deciding, self.settings)}
            meter = self._meters[block]
            return meter.measure(spec) if wanted is None else meter.match(spec, wanted)

        return remembered(what, replace(self.settings, precision="fp32"), make)

    # ---------------------------------------------------------------------------------------------------------- scores

    def score(self) -> Scores:
        """Scores of all models. Raises ValueError if one has no primary number."""
        requests: list[_Request] = []
        for arm in self.arms:
            for benchmark in self.benchmarks:
                by_block: dict[str, list[str]] = {}
                for number in benchmark.numbers:
                    by_block.setdefault(arm.block(benchmark.full_name(number)), []).append(number.name)
                for spec in arm.models:
                    requests += [
                        _Request(spec, block, benchmark, tuple(of)) for block, of in by_block.items()
                    ]
        at_last = [arm for arm in [self.base, *self.tuned] if arm.block(self.primary) != arm.last]
        elsewhere = [self._primary_at(spec, arm.last) for arm in at_last for spec in arm.models]
        cuts = {}
        for name, cut in self._cuts.items():
            if cut.block(self.primary) != self.base.block(self.primary):
                cuts[name] = self._primary_at(self.origin, cut.block(self.primary))
        made = self._made([*requests, *elsewhere, *cuts.values()])
        results: dict[str, dict[str, Score]] = {}
        for request in requests:
            results.setdefault(request.spec.label, {}).update(made(request))
        self._count_agreement(results)
        silent = [label for label, of_model in results.items() if self.primary not in of_model]
        if silent:
            raise ValueError(f"--primary {self.primary}: {silent[0]} has no such number")
        labels = [spec.label for arm in [self.base, *self.tuned] for spec in arm.models]
        last: dict[str, Mapping[str, Score]] = {label: results[label] for label in labels}
        last |= {request.spec.label: made(request) for request in elsewhere}
        cut_scores: dict[str, Mapping[str, Score]] = dict.fromkeys(self._cuts, results[self.origin.label])
        cut_scores |= {name: made(request) for name, request in cuts.items()}
        return Scores(results, self._primary_of(last), self._primary_of(cut_scores))

    def _primary_at(self, spec: ModelSpec, block: str) -> _Request:
        return _Request(spec, block, self._deciding, (self._number.name,))

    def _primary_of(self, results: Results) -> Results:
        return {label: {self.primary: scores[self.primary]} for label, scores in results.items()}

    def _count_agreement(self, results: Mapping[str, dict[str, Score]]) -> None:
        """Turn predictions of classes into 1.0 where they are those of BASE."""
        for benchmark in self.benchmarks:
            if benchmark.asks_classifier:
                (name,) = benchmark.full_names
                predicted = results[self.origin.label][name].values
                for of_model in results.values():
                    agrees = (of_model[name].values == predicted).astype(float)
                    of_model[name] = replace(of_model[name], values=agrees)

    def _made(self, requests: Sequence[_Request]) -> Callable[[_Request], dict[str, Score]]:
        """Make what is requested, all numbers of a model on a data set at once, and return what looks them
        up.
        """
        groups: dict[tuple[str, str], list[_Request]] = {}
        for request in requests:
            groups.setdefault((request.spec.label, request.benchmark.label), []).append(request)
        calls = [partial(self._scores, group) for group in groups.values()]
        made = dict(zip(groups, shared(calls, "scores"), strict=True))

        def look_up(request: _Request) -> dict[str, Score]:
            scores = made[request.spec.label, request.benchmark.label][request.block]
            names = {f"{request.benchmark.label} {number}" for number in request.numbers}
            return {name: score for name, score in scores.items() if name in names}

        return look_up

    def _scores(self, requests: Sequence[_Request], own: bool) -> dict[str, dict[str, Score]]:
        """Block -> what is requested of it, by one model on one data set."""
        spec, benchmark = requests[0].spec, requests[0].benchmark
        wanted: dict[str, set[str]] = {}
        for request in requests:
            wanted.setdefault(request.block, set()).update(request.numbers)

        def read(*blocks: str) -> Encoder:
            if benchmark.asks_classifier:
                return load_classifier(spec, self.origin)
            encoder = self._load(spec)
            if benchmark.published is not None and (backbone := getattr(encoder.module, "backbone", None)):
                encoder = replace(encoder, side=Number.side // backbone.patch_size * backbone.patch_size)
            return read_after(encoder, *blocks)

        key: dict[str, Any] = {"of": spec.identity}
        if benchmark.asks_classifier:
            key["classifier"] = self.origin.identity
        sizes = self.base.blocks if spec is self.origin else self._blocks_of(spec)
        made = score(read, key, benchmark, wanted, sizes, self._precise(spec), spec.label, own)
        return {
            block: {f"{benchmark.label} {result.name}": _in_groups(result, benchmark) for result in results}
            for block, results in made.items()
        }

    def _blocks_of(self, spec: ModelSpec) -> Mapping[str, int]:
        """Blocks of the arm that a model belongs to."""
        return next(arm.blocks for arm in self.arms if spec.label in [model.label for model in arm.models])

    def _precise(self, spec: ModelSpec) -> Settings:
        """Settings of a model: fp32 for weights that are mixed, since 16 bits would round a small change
        away.
        """
        return replace(self.settings, precision="fp32") if spec.mixed else self.settings

    def _load(self, spec: ModelSpec) -> Encoder:
        """A model; the last one stays in memory."""
        if self._loaded is None or self._loaded[0] != spec:
            self._loaded = None
            self._loaded = spec, load_encoder(spec, self._precise(spec).precision)
        return self._loaded[1]


def _in_groups(found: Score, benchmark: Benchmark) -> Score:
    """A score whose items belong to the groups of their images."""
    images = benchmark.test_images
    if images.groups is None:
        return found
    return replace(found, groups=images.groups if found.groups is None else images.groups[found.groups])


def _named(primary: str, benchmarks: Sequence[Benchmark]) -> tuple[Benchmark, Number]:
    """The benchmark and the number of a full name."""
    for benchmark in benchmarks:
        for number in benchmark.numbers:
            if benchmark.full_name(number) == primary:
                return benchmark, number
    raise AssertionError(primary)


def _choosing(benchmark: Benchmark) -> list[Number]:
    """The numbers that choose layers: those that are asked for, or else the first one that was left out."""
    asked = [number for number in benchmark.numbers if number.chooses_layer]
    return asked or [number for number in benchmark.left_out if number.chooses_layer][:1]


def _labelled(name: str, models: Sequence[ModelSpec]) -> list[ModelSpec]:
    """The models of an arm with labels by its name."""
    if len(models) == 1:
        return [replace(models[0], label=name)]
    return [replace(spec, label=f"{name} {number}") for number, spec in enumerate(models, 1)]
