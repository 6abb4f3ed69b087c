"""From the results of steps to the numbers of a question: one before and one after of each arm, metric and seed.

Every seed gives one difference, both sides of which share all that seed decided. Their mean has Student's t interval:
it assumes that differences are about normal, and with three seeds it is wide (4.3 standard errors either way), as it
should be. Resampling three numbers would pretend to know more.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from visft_ds.evals.benchmarks.command import RECORD
from visft_ds.evals.compare import MAIN, METRICS
from visft_ds.experiments.ablations.plan import AFTER, BEFORE, AblationPlan, Trial
from visft_ds.experiments.ablations.run import Failure
from visft_ds.experiments.ablations.scales import HOME
from visft_ds.experiments.ablations.steps import Step
from visft_ds.monitor.console import Section

LEVEL = 0.95
#: Differences below which there is no interval.
FEWEST = 2
_NO_WIDTH = 1e-9
#: Of the numbers of a benchmark, those that tables and charts show; the others are in the record.
_SHOWN = re.compile(
    r" (top1|(knn|linear)( mIoU)?|answers kept|image to text R@1|text to image R@1|words|.*, (text top1|probe))$"
)


@dataclass(frozen=True)
class Estimate:
    """The mean of some numbers, and where the mean of all seeds would lie."""

    values: tuple[float, ...]  #: one of each seed
    mean: float
    low: float | None  #: None: too few seeds for an interval
    high: float | None

    @property
    def sure(self) -> bool:
        """Return True if there is an interval with a width, and it excludes zero.

        Shares of a few hundred items change in steps: seeds that happen to agree on one predict nothing about others.
        """
        if self.low is None or self.high is None or self.high - self.low < _NO_WIDTH:
            return False
        return self.low > 0 or self.high < 0


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and t interval (LEVEL) of at least one finite number."""
    assert values and all(map(math.isfinite, values)), values
    count = len(values)
    mean = math.fsum(values) / count
    if count < FEWEST:
        return Estimate(tuple(values), mean, None, None)
    margin = float(stats.t.ppf((1 + LEVEL) / 2, count - 1) * stats.sem(values))
    return Estimate(tuple(values), mean, mean - margin, mean + margin)


@dataclass(frozen=True)
class Pair:
    """Number of a trial before and after stage 2, times 100."""

    before: float
    after: float

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before


@dataclass(frozen=True)
class Metric:
    """A number that all arms are compared by."""

    name: str
    in_domain: bool  #: on images like those that were trained on


@dataclass(frozen=True)
class ArmResult:
    """Results of an arm."""

    name: str
    numbers: Mapping[str, Mapping[int, Pair]]  #: metric -> seed -> numbers
    failures: Sequence[str]  #: why trials are missing, one line each

    def change(self, metric: str) -> Estimate | None:
        """After minus before, over seeds; None without any."""
        found = self.numbers.get(metric, {})
        return estimate([found[seed].change for seed in sorted(found)]) if found else None

    def against(self, other: ArmResult, metric: str) -> Estimate | None:
        """After minus that of another arm, over the seeds that both have."""
        ours, theirs = self.numbers.get(metric, {}), other.numbers.get(metric, {})
        seeds = sorted(ours.keys() & theirs.keys())
        return estimate([ours[seed].after - theirs[seed].after for seed in seeds]) if seeds else None

    def mean(self, metric: str, side: str) -> float | None:
        """Mean over seeds of "before" or "after"."""
        found = self.numbers.get(metric, {})
        return estimate([getattr(pair, side) for pair in found.values()]).mean if found else None


@dataclass(frozen=True)
class Outcome:
    """All that a question came to."""

    name: str
    asks: str
    note: str
    seeds: tuple[int, ...]
    metrics: Sequence[Metric]
    arms: Sequence[ArmResult]  #: the first is the reference
    said: Sequence[str] = ()  #: verdicts, which stand above all
    tables: Sequence[Section] = ()  #: beside those of the numbers of arms


def collect(plan: AblationPlan, steps: Mapping[str, Step], failures: Mapping[str, Failure]) -> Outcome:
    """Read the results of a plan that was run.

    Args:
        failures: stem -> why there is no result.
    """
    metrics: dict[str, Metric] = {}
    arms = []
    for arm in plan.question.arms:
        numbers: dict[str, dict[int, Pair]] = {}
        missing = []
        for trial in (trial for trial in plan.trials if trial.arm == arm.name):
            missing += _why(trial, steps, failures)
            for metric, pair in _numbers(trial):
                metrics.setdefault(metric.name, metric)
                numbers.setdefault(metric.name, {})[trial.seed] = pair
        arms.append(ArmResult(arm.name, numbers, tuple(dict.fromkeys(missing))))
    seeds = tuple(dict.fromkeys(trial.seed for trial in plan.trials))
    ordered = sorted(metrics.values(), key=lambda metric: not metric.in_domain)
    return Outcome(plan.name, plan.question.asks, plan.question.note, seeds, ordered, arms)


def _why(trial: Trial, steps: Mapping[str, Step], failures: Mapping[str, Failure]) -> list[str]:
    """The first causes of what is missing of a trial."""
    causes: dict[str, str] = {}

    def follow(stem: str) -> None:
        if stem in failures:
            before = [need for need in steps[stem].needs if need in failures]
            for need in before:
                follow(need)
            if not before:
                causes[stem] = f"seed {trial.seed}: {steps[stem].title}: {failures[stem].reason}"

    for step in (trial.before, trial.after, trial.benchmarks):
        follow(step.stem)
    return list(causes.values())


def _numbers(trial: Trial) -> list[tuple[Metric, Pair]]:
    found = []
    if trial.before.marker.is_file() and trial.after.marker.is_file():
        before, after = (_read(step.out / METRICS)["metrics"] for step in (trial.before, trial.after))
        for name in MAIN.values():
            # -1 is COCO's mark for "there is nothing of this kind to find".
            if before.get(name, -1) >= 0 and after.get(name, -1) >= 0:
                found.append((Metric(name, True), Pair(100 * before[name], 100 * after[name])))
    if trial.benchmarks.marker.is_file():
        for row in _read(trial.benchmarks.out / RECORD)["rows"]:
            values = row["values"]
            if _SHOWN.search(row["name"]) and values.keys() >= {BEFORE, AFTER}:
                pair = Pair(100 * values[BEFORE]["value"], 100 * values[AFTER]["value"])
                found.append((Metric(row["name"], HOME in row["name"]), pair))
    return found


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
