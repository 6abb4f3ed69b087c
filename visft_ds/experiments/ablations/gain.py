"""The experiment to do before believing in stage 2: gain out of domain, at equal dose and with its price, and controls.

For every seed all arms train; each one's adapter is also brought to the scale at which it moves features as far as that
of the first arm. Every arm has a table of its own against the untouched base, by items and seeds together, and one
against the first arm. The claim stands if the primary number of the first arm is better than the base's, and better
than that of labels of other images at equal dose: both intervals leave zero out. A third style of drawings and shapes
that no training showed are looked at once, by the arms that matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from visft_ds.config.records import read_record
from visft_ds.data.shards import Manifest, manifest_path
from visft_ds.evals.benchmarks.command import RECORD
from visft_ds.evals.benchmarks.dense import Dense
from visft_ds.evals.benchmarks.intervals import Interval
from visft_ds.evals.benchmarks.kinds import label_of, parse_benchmarks
from visft_ds.evals.benchmarks.retention import KEPT
from visft_ds.evals.benchmarks.retrieval import ForeignRecord
from visft_ds.evals.benchmarks.run import Dose
from visft_ds.evals.benchmarks.table import Row
from visft_ds.experiments.ablations.collect import ArmResult, Metric, Outcome, Pair
from visft_ds.experiments.ablations.plan import Planner
from visft_ds.experiments.ablations.questions import GAIN, LAST, PERMUTED, Arm, Question
from visft_ds.experiments.ablations.run import Failure
from visft_ds.experiments.ablations.scales import HELD, HELD_OUT, THIRD
from visft_ds.experiments.ablations.steps import STEPS, Step
from visft_ds.monitor.console import Section
from visft_ds.run.folder import ADAPTER_FOLDER

BASE, EQUAL = "base", "at equal dose"
SCALE, SCALES = "scale", "0.25:1.5:0.25"  # label of the sweep, and its scales
#: Arms that train first, seed by seed; those of them beside the first are looked at on what was kept until the end.
MATTER = 4
SEEDS = 5  #: that the claim asks for
#: Gain in points that was seen on EfficientNet-Lite0 (docs/evaluation.md), and the share of answers that change.
EXPECTED, CHANGING = 3.2, 0.1
#: Images to learn from and objects to judge, below which nothing is run: 129 photographs moved features a tenth as far
#: as 1,000 drawings, and over fewer objects the interval of the expected gain has zero in it.
FEWEST_IMAGES = 500
FEWEST_OBJECTS = math.ceil((1.96 / EXPECTED * 100) ** 2 * CHANGING)


#: Seconds that steps took on a core, by the beginnings of their names; those of tables are for each model.
_SECONDS = {
    "images": 8,
    "weights": 4,
    "shards": 2,
    "permuted": 2,
    "stage1": 75,
    "stage2": 58,
    "dose": 17,
    "benchmarks": 45,
}


@dataclass(frozen=True)
class GainPlan:
    """All steps whose results are read, and what they are of."""

    name: str
    question: Question
    seeds: Sequence[int]
    primary: str  #: name of the number that decides
    against_base: Mapping[str, Step]  #: arm -> its table
    against_first: Mapping[str, Step]
    late: Step | None  #: the table of what was kept until the end

    @property
    def ends(self) -> list[Step]:
        """Steps whose results are read."""
        late = [self.late] if self.late else []
        return [*self.against_base.values(), *self.against_first.values(), *late]


@dataclass(frozen=True)
class _Subject:
    """Models of an arm: of each seed, or one of all; each with the steps that make it."""

    label: str
    end: str = ""  #: behind every model
    models: list[tuple[str, tuple[Step, ...]]] = field(default_factory=list)

    @property
    def word(self) -> str:
        """Value of --model of visft evaluate benchmarks."""
        return f"{self.label}={','.join(model for model, _ in self.models)}{self.end}"

    @property
    def needs(self) -> list[Step]:
        """The steps that make its models."""
        return [step for _, steps in self.models for step in steps]


class GainPlanner(Planner):
    """Plans the experiment beside other questions, into the same steps."""

    def plan_gain(self, question: Question, seeds: Sequence[int]) -> GainPlan:
        """Every arm with every seed: those that matter first, seed by seed.

        Raises:
            ValueError: a configuration that cannot be, or data that is too small to show anything.
        """
        if self.scale.heads:
            raise ValueError("--heads: the heads of every arm are trained here; leave it out")
        self._made, self._judges = self._toy.benchmarks() if self.scale.toy else ([], list(self.scale.benchmarks))
        primary = self._primary()
        if self._recipe(2).visft.model.until is None:  # all arms are read at the end of the network
            question = replace(question, arms=tuple(arm for arm in question.arms if arm.name != LAST))
        first, *others = question.arms
        self._base_run = self._stage1(first, seeds[0]).step
        base = f"{BASE}={self._base_run.out}"
        found: dict[str, list[_Subject]] = {arm.name: [] for arm in question.arms}
        for arms in (question.arms[:MATTER], question.arms[MATTER:]):
            for place in range(len(seeds)):
                for arm in arms:
                    try:
                        self._add(found[arm.name], arm, first, seeds, place)
                    except ValueError as error:
                        raise ValueError(f"{GAIN}, arm {arm.name!r}: {error}") from error
        tables, contrasts = {}, {}
        reference = found[first.name][0]
        for arm in question.arms:
            words = [subject.word for subject in found[arm.name]]
            needs = [step for subject in found[arm.name] for step in subject.needs]
            own = f"{BASE}={self._stage1(arm, seeds[0]).step.out}" if arm.both else base
            tables[arm.name] = self._table(f"{arm.name}, all seeds", [own, *words], needs, primary)
            if arm in others and not arm.both:
                title = f"{arm.name} beside {first.name}"
                # It reads the features of both tables, which would otherwise be computed twice at the same time.
                needs = [*reference.needs, *needs, tables[first.name], tables[arm.name]]
                judges = [text for text in self._judges if not text.startswith("retention=")]
                contrasts[arm.name] = self._table(title, [reference.word, *words], needs, primary, judges)
        matter = [reference, *(found[arm.name][-1] for arm in question.arms[1:MATTER] if not arm.both)]
        late = self._late(base, matter) if self.scale.toy else None
        return GainPlan(GAIN, question, seeds, primary, tables, contrasts, late)

    def _add(self, found: list[_Subject], arm: Arm, first: Arm, seeds: Sequence[int], place: int) -> None:
        """Add the models of one seed to those of an arm: as it trained, and at the dose of the first one."""
        seed, title = seeds[place], f"{GAIN}: {arm.name}, seed {seeds[place]}"
        like = self._stage2(f"{GAIN}: {first.name}, seed {seed}", first, seed).step
        if arm.made == "soup":
            if not place:
                runs = [self._stage2(f"{GAIN}: {first.name}, seed {each}", first, each).step for each in seeds]
                step = self._soup(runs)
                model = f"{self._base_run.out}+{step.out}"
                _take(found, 0, arm.name, model, step)
                _take(found, 1, f"{arm.name} {EQUAL}", *self._at_dose(title, like, ["--model", model], step))
        elif arm.made == "scales":
            _take(found, 0, SCALE, str(like.out), like, end=f"@{SCALES}")
        elif arm.made == "noise":
            _take(found, 0, f"{arm.name} {EQUAL}", *self._at_dose(title, like, ["--noise", str(seed)]))
        else:
            run = self._stage2(title, arm, seed).step
            _take(found, 0, arm.name, str(run.out), run)
            if arm is not first and not arm.both:
                _take(found, 1, f"{arm.name} {EQUAL}", *self._at_dose(title, like, ["--model", str(run.out)], run))

    def _at_dose(self, title: str, like: Step, words: Sequence[str], *needs: Step) -> tuple[str, Step]:
        """An adapter (or noise) at the dose of another one, and the step that scales it."""
        words = ["visft", "evaluate", "dose", "--like", str(like.out), *words, "--benchmark", self._dense[0]]
        needs = (like, *needs, *self._made, self._base_run)
        step = self.steps.add("dose", f"{title}: {EQUAL}", lambda out: [*words, "--out", str(out)], needs=needs)
        return f"{self._base_run.out}+{step.out}", step

    def _soup(self, runs: Sequence[Step]) -> Step:
        words = ["visft", "merge", "--format", "peft"]
        words += [part for run in runs for part in ("--adapter", str(run.out / "export" / ADAPTER_FOLDER))]
        words += ["--base", str(self._weights(0)[0] or self._recipe(2).visft.model.weights)]
        return self.steps.add("soup", "soup of all seeds", lambda out: [*words, "--out", str(out)], needs=runs)

    def _late(self, base: str, subjects: Sequence[_Subject]) -> Step:
        third = self._toy.dense("c")
        judges = [f"dense={third.out},name={THIRD}", f"dense={third.out},only={'+'.join(HELD)},name={HELD_OUT}"]
        words = [base, *(subject.word for subject in subjects)]
        needs = [third, *(step for subject in subjects for step in subject.needs)]
        return self._table("kept until the end", words, needs, f"dense/{THIRD} objects knn", judges)

    def _table(
        self,
        title: str,
        models: Sequence[str],
        needs: Sequence[Step],
        primary: str,
        judges: Sequence[str] | None = None,
    ) -> Step:
        words = ["visft", "evaluate", "benchmarks", "--images", "0", "--primary", primary]
        words += [part for model in models for part in ("--model", model)]
        words += [part for judge in (judges or self._judges) for part in ("--benchmark", judge)]
        words += ["--cache", str(self.steps.root / STEPS / "features")]
        needs = [self._base_run, *self._made, *needs]
        title = f"{GAIN}: {title}"
        return self.steps.add("benchmarks", title, lambda out: [*words, "--out", str(out)], needs=needs, resumes=True)

    def _primary(self) -> str:
        """Name of the number that decides. Raises ValueError for data that is too small to show anything."""
        self._dense = [text for text in self._judges if text.startswith("dense=")]
        if not self._dense:
            raise ValueError("gain is judged by patches and objects: give a --benchmark dense=SOURCE")
        primary = f"{label_of(self._dense[0])} objects knn"
        data = self._recipe(1).visft.data
        there = manifest_path(Path(data.root), data.train).is_file()  # else it is among what is missing
        if self.scale.toy or not there:
            return primary
        judge = parse_benchmarks(self._dense[:1])[0]
        assert isinstance(judge, Dense)
        images, objects = len(Manifest.load(data.root, data.train)), len(judge.test.labels)
        if images < FEWEST_IMAGES or objects < FEWEST_OBJECTS:
            raise ValueError(too_small(images, objects, judge.label))
        return primary


def predicted(step: Step) -> float:
    """Seconds of one core that a step of EfficientNet-Lite0 on drawings takes."""
    kind, models = step.stem.partition("-")[0], 0
    for word in step.command:
        models += word.count(f"/{STEPS}/stage1") + word.count(f"/{STEPS}/stage2") * (6 if SCALES in word else 1)
    if not any(word.startswith(f"{BASE}=") for word in step.command):
        models = 1  # features and scores of all of them are there
    return _SECONDS.get(kind, 1) * (models if kind == "benchmarks" else 1)


def _take(found: list[_Subject], number: int, label: str, model: str, *needs: Step, end: str = "") -> None:
    if len(found) == number:
        found.append(_Subject(label, end))
    found[number].models.append((model, needs))


def too_small(images: int, objects: int, judge: str) -> str:
    """Words on data from which nothing could be learnt or told."""
    return (
        f"{images} images to learn from and {objects} objects of {judge} to judge are too few to show anything, so "
        f"nothing was run: noise would be all there is to see. Needed are {FEWEST_IMAGES} images (129 photographs "
        f"moved features a tenth as far as 1,000 drawings did) and {FEWEST_OBJECTS} objects (of fewer, the interval of "
        f"{EXPECTED:+g} points, which is what was seen on EfficientNet-Lite0, has zero in it, as about a tenth of all "
        f"answers change)"
    )


# -------------------------------------------------------------------------------------------------------------- results


class GainFile(ForeignRecord):
    """Content of benchmarks.json, as far as it is told here; the first arm is what the others are compared with."""

    arms: dict[str, list[str]]
    rows: list[Row]
    doses: dict[str, dict[str, Dose]]

    def row(self, name: str) -> Row | None:
        """A number by its name."""
        return next((row for row in self.rows if row.name == name), None)

    def dose(self, arm: str) -> float | None:
        """Mean over seeds of how far features moved, of the first benchmark."""
        moved = [next(iter(self.doses[model].values())).change for model in self.arms[arm] if self.doses.get(model)]
        return fmean(moved) if moved else None


def collect_gain(plan: GainPlan, failures: Mapping[str, Failure]) -> Outcome:
    """Read the results of a plan that was run.

    Args:
        failures: stem -> why there is no result.
    """
    metrics: dict[str, Metric] = {}
    numbers: dict[str, dict[str, dict[int, Pair]]] = {}
    causes: dict[str, list[str]] = {}
    lines: list[list[str]] = []
    kept: list[str] = []
    for arm in plan.question.arms:
        table, contrast = _record(plan.against_base[arm.name]), _record(plan.against_first.get(arm.name))
        if table is None:
            stem = plan.against_base[arm.name].stem
            numbers[arm.name], causes[arm.name] = {}, [failures[stem].reason if stem in failures else "not run"]
            continue
        for label in list(table.arms)[1:]:
            _pairs(table, label, plan.seeds, metrics, numbers.setdefault(label, {}))
            lines.append(_line(plan.primary, table, contrast, label))
            kept = kept or [row.name for row in table.rows if row.name.endswith(KEPT)]
    late = _record(plan.late)
    if late is not None:
        for label in list(late.arms)[1:]:
            _pairs(late, label, plan.seeds, metrics, numbers.setdefault(label, {}))
    columns = ["", "moved", plan.primary, f"minus {plan.question.arms[0].name}", *kept]
    arms = [ArmResult(name, of, tuple(causes.get(name, ()))) for name, of in numbers.items()]
    asks, note = plan.question.asks, plan.question.note
    tables = (Section("by items and seeds together; * leaves zero out", lines, columns),)
    said = (verdict(plan),)
    return Outcome(plan.name, asks, note, tuple(plan.seeds), list(metrics.values()), arms, said, tables)


def verdict(plan: GainPlan) -> str:
    """Sentence on whether the claim stands."""
    first, control = plan.question.arms[0].name, f"{PERMUTED} {EQUAL}"
    own, other = _record(plan.against_base[first]), _record(plan.against_first.get(PERMUTED))
    gain = _difference(own, plan.primary, first)
    against = _difference(other, plan.primary, control)
    if gain is None or against is None:
        return f"The claim was not judged: it needs {first!r} and {PERMUTED!r}, and there is no result of one of them."
    more = Interval(-against.value, -against.high, -against.low)
    lacks = [name for name, one in (("over the base", gain), ("over labels of other images", more)) if one.low <= 0]
    few = f" {len(plan.seeds)} seeds of the {SEEDS} that it asks for." if len(plan.seeds) < SEEDS else ""
    said = [one.text(1, one.sure) for one in (gain, more)]
    return (
        f"{'The claim does not stand' if lacks else 'The claim stands'}: {first}, {plan.primary}, "
        f"{said[0]} over the base and {said[1]} over labels of other images at equal dose, by items and "
        f"seeds together" + (f"; zero is not excluded {' and '.join(lacks)}." if lacks else ".") + few
    )


def _record(step: Step | None) -> GainFile | None:
    return read_record(step.out / RECORD, GainFile) if step is not None and step.marker.is_file() else None


def _difference(record: GainFile | None, name: str, arm: str) -> Interval | None:
    row = record.row(name) if record else None
    return row.differences.get(arm) if row else None


def _pairs(
    record: GainFile, arm: str, seeds: Sequence[int], metrics: dict[str, Metric], found: dict[str, dict[int, Pair]]
) -> None:
    """Put the numbers of an arm before and after, of each seed."""
    base = next(iter(record.arms))
    for row in record.rows:
        if arm in row.differences and not row.name.startswith("price/"):  # a mean of others
            each = row.seeds[arm].each if arm in row.seeds else [row.differences[arm].value]
            of = seeds if len(each) > 1 else seeds[:1]  # the soup of all seeds is one model
            before = 100 * row.values[base].value
            metrics.setdefault(row.name, Metric(row.name, False))
            found[row.name] = {seed: Pair(before, before + 100 * one) for seed, one in zip(of, each, strict=True)}


def _line(primary: str, table: GainFile, contrast: GainFile | None, arm: str) -> list[str]:
    dose, kept = table.dose(arm), [row.name for row in table.rows if row.name.endswith(KEPT)]
    shown = [_difference(table, primary, arm), _difference(contrast, primary, arm)]
    shown += [_difference(table, name, arm) for name in kept]
    told = ("–" if one is None else one.text(1, one.sure) for one in shown)
    return [arm, "–" if dose is None else f"{dose:.3f}", *told]
