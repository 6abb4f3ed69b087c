"""Log of a run: lines on the console, numbers in metrics.jsonl and TensorBoard, a trace of chosen steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, profile

from visft_ds.config import ResolvedConfig
from visft_ds.config.task_schema import SHARED
from visft_ds.data.plan import StepPlan
from visft_ds.monitor.callbacks import Callback
from visft_ds.monitor.console import Progress
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import StepReport
from visft_ds.planner.hardware import peak_rate
from visft_ds.planner.memory import PlannedRun, model_operations
from visft_ds.redaction import redacted_values
from visft_ds.resilience.guard import is_finite
from visft_ds.resilience.memory import peak_memory
from visft_ds.resilience.stop import StopFlag


@dataclass
class RunLog:
    """The log of a run; only the main process writes."""

    writer: MetricsWriter
    progress: Progress
    end_of_step: Callable[[], None] = lambda: None
    tasks: Sequence[str] = ()
    at_peak: Mapping[str, float] = field(default_factory=dict)  #: stream -> seconds of its step at the GPU's peak

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.message(text)

    def step(
        self, step_plan: StepPlan, report: StepReport, *, seconds: float, wait_seconds: float, device: torch.device
    ) -> None:
        """Record a finished step.

        Args:
            seconds: since the step before.
            wait_seconds: of these, waiting for data.
        """
        step, images = step_plan.step + 1, len(step_plan.indices)
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        values |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
        if report.loss_scale is not None:
            values["loss_scale"] = report.loss_scale
        values |= {
            "grad_norm": report.gradient_norm,
            "images_per_second": images / seconds,
            # Tasks that share a step share its images.
            **{f"images_per_second/{one}": images / seconds for one in self.tasks if step_plan.task in (one, SHARED)},
            "memory/peak_gib": peak_memory(device) / 2**30,
            "data_wait_seconds": wait_seconds,
            "skipped": float(report.skipped),
            "refused": float(bool(report.refused)),
            "not_finite": float(not is_finite(report)),
        }
        if step_plan.task in self.at_peak:
            values["mfu"] = self.at_peak[step_plan.task] / seconds
        losses = {task: value for task, value in report.losses.items() if task in self.tasks}
        self.progress.update(step, losses, values, images)
        self.writer.step(step, values)
        self.end_of_step()


@contextmanager
def open_log(
    config: ResolvedConfig, start: int, planned: PlannedRun, callbacks: Sequence[Callback], stop: StopFlag
) -> Iterator[RunLog]:
    """The log of a run that is resumed after `start` of its steps.

    Args:
        planned: of the run, for the MFU.
        callbacks: listeners to what is recorded.
        stop: is told when nobody reads the console any more.
    """
    main, run = distributed.is_main(), config.visft.run
    out = Path(run.out or "")
    with ExitStack() as stack:
        if main and run.track is not None:
            from visft_ds.monitor.track import Tracker  # few runs have one

            tracker = Tracker(out, redacted_values(config.identity()))
            stack.callback(tracker.close)
            callbacks = [*callbacks, tracker]
        progress = stack.enter_context(
            Progress(config.total_steps, start=start, log_every=run.log_every, enabled=main, gone=stop.output_gone)
        )
        trace = stack.enter_context(traced(out, run.trace, start, progress.message) if run.trace else nullcontext())
        writer = stack.enter_context(MetricsWriter(out, resume_step=start, enabled=main, callbacks=callbacks))
        settings = json.dumps(redacted_values(config.to_dict()), indent=2).splitlines()
        writer.text(start, "configuration", "".join(f"    {line}\n" for line in settings))  # code, in Markdown
        log = RunLog(writer, progress, tasks=tuple(config.visft.tasks.enabled()))
        log.end_of_step = trace.step if trace else log.end_of_step
        if main and config.visft.features is None:  # whose backbone does not run in every step
            log.at_peak = seconds_at_peak(planned)
        yield log


def seconds_at_peak(run: PlannedRun) -> dict[str, float]:
    """Stream -> seconds of a step at the peak of this GPU; empty where its peak is not known."""
    rate, streams = peak_rate(run.device, run.precision), run.config.visft.streams()
    return {name: model_operations(run, stream) / rate for name, stream in streams.items()} if rate else {}


@contextmanager
def traced(out: Path, steps: tuple[int, int], start: int, tell: Callable[[str], None]) -> Iterator[profile | None]:
    """Trace steps (first, last) of a run that is resumed after `start`, into OUT/trace-FIRST-LAST-rankN.json.gz.

    Perfetto (ui.perfetto.dev) and chrome://tracing show it. The step before the first one warms the profiler up. A
    trace that cannot be written is told, and the run continues. Yields what has to `step` at the end of each step.
    """
    first, last = steps
    path = out / f"trace-{first}-{last}-rank{distributed.rank()}.json.gz"

    def write(profiler: torch.profiler.profile) -> None:
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            tell(f"warning: no trace in {path}: {error}; training continues")
        else:
            tell(f"wrote {path}: open it at https://ui.perfetto.dev")

    def action(done: int) -> ProfilerAction:
        step = start + 1 + done
        if first <= step <= last:
            return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == first - 1 else ProfilerAction.NONE

    if start >= first:
        tell(f"no trace: step {first}, its first one, was done before this start")
        yield None
    else:
        # acc_events: there is one cycle, and without it torch warns that those before would be lost.
        with profile(schedule=action, on_trace_ready=write, acc_events=True) as profiler:
            yield profiler
