"""Log of a run: lines on the console, numbers in metrics.jsonl and TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from visft_ds import distributed
from visft_ds.config import ResolvedConfig
from visft_ds.data.plan import StepPlan
from visft_ds.monitor.console import Progress
from visft_ds.monitor.metrics import Callback, MetricsWriter
from visft_ds.parallel.engine import StepReport
from visft_ds.redaction import redacted_values
from visft_ds.resilience.memory import peak_memory
from visft_ds.resilience.stop import StopFlag
from visft_ds.settings.task_schema import SHARED


@dataclass
class RunLog:
    """The log of a run; only the main process writes."""

    writer: MetricsWriter
    progress: Progress
    tasks: Sequence[str] = ()

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
            **{
                f"images_per_second/{task}": images / seconds
                for task in self.tasks
                if plan.task in (task, SHARED)
            },
            "memory/peak_gib": peak_memory(distributed.local_device()) / 2**30,
            "data_wait_seconds": waiting,
            "skipped": float(report.skipped),
        }
        losses = {task: value for task, value in report.losses.items() if task in self.tasks}
        self.progress.update(plan.step + 1, losses, values, images)
        self.writer.step(plan.step + 1, values)


@contextmanager
def open_log(
    config: ResolvedConfig, start: int, callbacks: Sequence[Callback], stop: StopFlag
) -> Iterator[RunLog]:
    """The log of a run that is resumed after `start` of its steps. `stop` hears when nobody reads the
    console.
    """
    main = distributed.is_main()
    run = config.visft.run
    out = Path(run.out or "")
    with ExitStack() as stack:
        if main and run.track is not None:
            from visft_ds.monitor.track import Tracker  # few runs have one

            tracker = stack.enter_context(closing(Tracker(out, redacted_values(config.identity()))))
            callbacks = [*callbacks, tracker]
        progress = stack.enter_context(
            Progress(
                config.total_steps, start=start, log_every=run.log_every, enabled=main, gone=stop.output_gone
            )
        )
        writer = stack.enter_context(MetricsWriter(out, resume_step=start, enabled=main, callbacks=callbacks))
        yield RunLog(writer, progress, tuple(config.visft.tasks.enabled()))
