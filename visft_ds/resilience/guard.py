"""Guard of the loss: NaN, infinity and spikes are reported and counted; too many end the run on every rank."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from visft_ds.config.schema import RunConfig
from visft_ds.data.plan import Plan, StepPlan
from visft_ds.data.samples import Batch
from visft_ds.model import LossDenominators
from visft_ds.monitor.metrics import METRICS_FILE, read_metrics
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine, StepReport
from visft_ds.resilience.errors import Diverged
from visft_ds.resilience.nan_debug import not_finite, watched

#: Losses of a task that have to be known before one can be a spike.
FEWEST = 20
#: Median absolute deviation of a normal distribution, in standard deviations.
_MEDIAN_DEVIATION = 0.6745
#: Overflows whose loss scales are listed when the scale has collapsed: from the first one at 65,536 down to 1.
_FALLS = 17
#: Modules and ranks that are listed with them.
_SHOWN = 3
#: An overflow at this loss scale of fp16 or a lower one stops the run: every further step would be skipped.
LEAST_SCALE = 1.0
#: A task whose losses hardly differ: deviations below this share of the median do not count.
_FLAT = 1e-3


@dataclass(frozen=True)
class Past:
    """Step in the history of a run."""

    task: str
    loss: float
    refused: bool  #: no update was made
    finite: bool = True  #: loss and gradient were
    overflow: tuple[int, float] | None = None  #: step and loss scale where the gradient overflowed in fp16


def robust_score(past: Iterable[float], loss: float) -> float:
    """Standard deviations by which a loss lies above the median of others, by their median absolute deviation.

    Unlike mean and standard deviation, neither is moved by a few spikes among the past losses.
    """
    known = list(past)
    median = statistics.median(known)
    deviation = statistics.median(abs(value - median) for value in known)
    return _MEDIAN_DEVIATION * (loss - median) / max(deviation, _FLAT * abs(median), 1e-12)


class LossGuard:
    """Guard of a run: keeps the recent losses of each task, and judges every step by them.

    Args:
        settings: `skip_bad_steps`, `spike_threshold`, `spike_window`.
        past: earlier steps, the oldest first.
    """

    def __init__(self, settings: RunConfig, past: Iterable[Past] = ()) -> None:
        self._settings = settings
        self._losses: dict[str, deque[float]] = {}
        self.bad = 0  #: steps in a row without an update because loss or gradient was not finite
        self._falls: deque[tuple[int, float]] = deque(maxlen=_FALLS)
        self.collapsed = False  #: no loss scale that is allowed keeps the gradient of the last step finite
        for step in past:
            self._note(step)

    def observe(self, step_plan: StepPlan, report: StepReport) -> str:
        """Record a finished step. Returns the message for the log, "" for none."""
        loss = report.losses["loss"]
        overflow = (step_plan.step + 1, report.loss_scale or 1.0) if report.skipped else None
        now = Past(step_plan.task, loss, bool(report.refused), is_finite(report), overflow)
        known, threshold = self._known(now.task), self._settings.spike_threshold
        where = f"step {step_plan.step + 1} ({step_plan.task})"
        message = ""
        if threshold is not None and now.finite and len(known) >= min(FEWEST, self._settings.spike_window):
            score = robust_score(known, loss)
            if score > threshold:
                skipped = "no update was made: the gradient overflows in fp16"
                message = (
                    f"{where}: loss {loss:.4g} leaps: {score:.1f} robust standard deviations above the median "
                    f"{statistics.median(known):.4g} of the last {len(known)}; "
                    f"{skipped if report.skipped else 'the update was made all the same'}"
                )
        self._note(now)
        if report.refused:
            what = "the gradient is not finite" if report.refused == "gradient" else f"the loss is {loss}"
            found = "".join(f"\n  rank {rank}: {text}" for rank, texts in report.faults.items() for text in texts[:3])
            message = f"{where}: {what}, no update was made on any rank{found}"
        if overflow is not None and overflow[1] <= LEAST_SCALE:
            self.collapsed = True
            falls = ", ".join(f"{scale:g} (step {step})" for step, scale in self._falls)
            message = (
                f"{where}: the gradient overflows in fp16 at a loss scale of {overflow[1]:g}, which may not fall below "
                f"{LEAST_SCALE:g}; it overflowed at {falls}"
            )
        return message

    @property
    def event(self) -> str:
        """Kind of the last step's event, where `observe` returned a message."""
        return "bad step" if self.bad else "loss scale" if self.collapsed else "loss leaps"

    def check(self, message: str, saved: int) -> None:
        """Stop where more steps in a row went wrong than may be skipped.

        Args:
            message: of the last step.
            saved: step of the newest checkpoint, 0 for none.

        Raises:
            Diverged: on every rank.
        """
        allowed = self._settings.skip_bad_steps
        if self.bad <= allowed and not self.collapsed:
            return
        after = f" after {allowed} others in a row (visft.run.skip_bad_steps)" if self.bad and allowed else ""
        good = f"the last good checkpoint is that of step {saved}" if saved else "nothing was saved yet"
        advice = "A smaller learning rate or a longer warm-up usually helps"
        if self.collapsed:
            advice = (
                "bf16 and fp32 hold such gradients (visft.model.precision), or smaller loss weights give smaller ones"
            )
        raise Diverged(f"{message}\nstopped{after}; {good}. {advice}")

    def _known(self, task: str) -> deque[float]:
        return self._losses.setdefault(task, deque(maxlen=self._settings.spike_window))

    def _note(self, step: Past) -> None:
        self.bad = self.bad + 1 if step.refused and not step.finite else 0
        if step.overflow is not None:
            self._falls.append(step.overflow)
        if not step.refused:
            self._known(step.task).append(step.loss)


def is_finite(report: StepReport) -> bool:
    """Return True if loss and gradient of a step were finite; overflows of fp16 do not count."""
    return math.isfinite(report.losses["loss"]) and report.refused != "gradient"


def resumed_guard(settings: RunConfig, out: Path, plan: Plan, start: int) -> LossGuard:
    """The guard of a run that resumes after `start` steps, as it was then, from the run's metrics. Collective."""
    past = list(_past(out / METRICS_FILE, plan, start)) if distributed.is_main() and start else []
    return LossGuard(settings, distributed.broadcast_object(past))


def _past(path: Path, plan: Plan, start: int) -> Iterator[Past]:
    for record in read_metrics(path) if path.is_file() else ():
        if record.get("kind") == "step" and record["step"] <= start and "loss/loss" in record:
            refused, finite = bool(record.get("refused", 0.0)), not record.get("not_finite", 0.0)
            overflow = (record["step"], float(record.get("loss_scale", 1.0))) if record.get("skipped") else None
            yield Past(plan.task_of(record["step"] - 1), float(record["loss/loss"]), refused, finite, overflow)


def find_overflow(
    engine: Engine, step: int, batches: Sequence[Batch], loss_denominators: LossDenominators, report: StepReport
) -> str:
    """Repeat a step whose gradient has overflowed, without an update, and find where it does. Collective.

    It runs through the engine, at the loss scale of that step, so that every rank and pipeline stage sees what it saw.
    The run has to stop afterwards: the engine's counters are not right any more.

    Returns:
        For each rank the first modules and parameters, in the order of the backward pass; the same on every rank.
    """
    found: dict[str, str] = {}

    def note(what: str, tensor: Tensor) -> None:
        if what not in found and (fault := not_finite(what, tensor)) is not None:
            found[what] = fault.text()

    engine.should_update = lambda loss: False
    engine.loss_scale.restore({**engine.loss_scale.state(), "scale": report.loss_scale or 1.0})
    with watched(engine.module, note):
        engine.train_step(step, batches, loss_denominators)
    everyone: list[list[str]] = distributed.broadcast_object(distributed.gather_objects(list(found.values())[:_SHOWN]))
    lines = [f"\n  rank {rank}: it begins with the {'; '.join(texts)}" for rank, texts in enumerate(everyone) if texts]
    more = [f"\n  and on {len(lines) - _SHOWN} more ranks"] if len(lines) > _SHOWN else []
    return "".join(lines[:_SHOWN] + more) or "\n  made again, nothing overflows: faulty hardware?"
