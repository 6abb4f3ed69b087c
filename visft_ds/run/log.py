"""Log of a run: lines on the console, numbers in metrics.jsonl and TensorBoard, a trace of chosen steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.profiler import ProfilerAction, profile

from visft_ds.config import ResolvedConfig
from visft_ds.config.task_schema import SHARED
from visft_ds.data.plan import StepPlan
from visft_ds.monitor.callbacks import Callback
from visft_ds.monitor.console import Progress
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import StepReport
from visft_ds.redaction import redacted_values
from visft_ds.resilience.guard import is_finite
from visft_ds.resilience.memory import peak_memory
from visft_ds.resilience.stop import StopFlag


@dataclass
class RunLog:
    """The log of a run; only the main process writes."""

    writer: MetricsWriter
    progress: Progress
    tasks: Sequence[str] = ()
    profiler: profile | None = None  #: of every process

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.message(text)

    def step(self, plan: StepPlan, report: StepReport, seconds: float, waiting: float) -> None:
        """Record a finished step, which took so many seconds, some of them waiting for data."""
        images = len(plan.indices)
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        values |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
        if report.loss_scale is not None:
            values["loss_scale"] = report.loss_scale
        values |= {
            "grad_norm": report.gradient_norm,
            "images_per_second": images / seconds,
            # Tasks that share a step share its images.
            **{f"images_per_second/{task}": images / seconds for task in self.tasks if plan.task in (task, SHARED)},
            "memory/peak_gib": peak_memory(distributed.local_device()) / 2**30,
            "data_wait_seconds": waiting,
            "skipped": float(report.skipped),
            "refused": float(bool(report.refused)),
            "not_finite": float(not is_finite(report)),
        }
        losses = {task: value for task, value in report.losses.items() if task in self.tasks}
        self.progress.update(plan.step + 1, losses, values, images)
        self.writer.step(plan.step + 1, values)
        if self.profiler is not None:
            self.profiler.step()


@contextmanager
def open_log(config: ResolvedConfig, start: int, callbacks: Sequence[Callback], stop: StopFlag) -> Iterator[RunLog]:
    """The log of a run that is resumed after `start` of its steps. `stop` hears when nobody reads the console."""
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
        profiler = stack.enter_context(traced(out, run.trace, start, progress.message)) if run.trace else None
        writer = stack.enter_context(MetricsWriter(out, resume_step=start, enabled=main, callbacks=callbacks))
        settings = json.dumps(redacted_values(config.to_dict()), indent=2).splitlines()
        writer.text(start, "configuration", "".join(f"    {line}\n" for line in settings))  # code, in Markdown
        yield RunLog(writer, progress, tuple(config.visft.tasks.enabled()), profiler)


@contextmanager
def traced(out: Path, steps: tuple[int, int], start: int, tell: Callable[[str], None]) -> Iterator[profile | None]:
    """Trace steps (first, last) of a run that is resumed after `start`, into OUT/trace-FIRST-LAST-rankN.json.gz.

    Perfetto (ui.perfetto.dev) and chrome://tracing show it. The step before the first one warms the profiler up. A
    trace that cannot be written is told, and the run continues. Yields what has to `step` at the end of each step.
    """
    first, last = steps
    path = out / f"trace-{first}-{last}-rank{distributed.rank()}.json.gz"

    def write(profiler: profile) -> None:
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
