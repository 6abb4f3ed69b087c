"""Log of a run: lines on the console, numbers in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from visft_ds.config import ResolvedConfig
from visft_ds.config.task_schema import SHARED
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import StepPlan
from visft_ds.data.samples import Batch
from visft_ds.monitor.callbacks import Callback
from visft_ds.monitor.console import Progress, StepLine
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.monitor.trace import traced
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import StepReport
from visft_ds.planner.hardware import peak_rate
from visft_ds.planner.memory import PlannedRun, model_operations
from visft_ds.redaction import redacted_values
from visft_ds.resilience.guard import is_finite
from visft_ds.resilience.host_memory import peak_memory


@dataclass
class RunLog:
    """Both parts of a log, written by the main process; another rank only prints which samples it replaced."""

    writer: MetricsWriter
    progress: Progress
    trace: Callable[[], None] = lambda: None  #: called at the end of each step
    at_peak: Mapping[str, float] = field(default_factory=dict)  #: stream -> seconds of its step at the GPU's peak

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.message(text)

    def step(
        self,
        step_plan: StepPlan,
        report: StepReport,
        batches: Sequence[Batch],
        loader: StepLoader,
        *,
        tasks: Sequence[str],
        seconds: float,
        device: torch.device,
    ) -> None:
        """Record a finished step.

        Args:
            batches: of this rank.
            tasks: of the run; whose losses the console shows.
            seconds: since the step before.
        """
        step, images, memory = step_plan.step + 1, len(step_plan.indices), peak_memory(device)
        self.progress.update(
            StepLine(
                step=step,
                losses={task: value for task, value in report.losses.items() if task in tasks},
                learning_rate=next(iter(report.learning_rates.values())),
                gradient_norm=report.gradient_norm,
                images=images,
                seconds=seconds,
                wait_seconds=loader.wait_seconds,
                peak_memory=memory,
            )
        )
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        values |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
        if report.loss_scale is not None:
            values["loss_scale"] = report.loss_scale
        values |= {
            "gradient_norm": report.gradient_norm,
            "images_per_second": images / seconds,
            # Tasks that share a step share its images.
            **{f"images_per_second/{task}": images / seconds for task in tasks if step_plan.task in (task, SHARED)},
            "memory/peak_gib": memory / 2**30,
            "data_wait_seconds": loader.wait_seconds,
            "skipped": float(report.skipped),
            "refused": float(bool(report.refused)),
            "not_finite": float(not is_finite(report)),
        }
        if step_plan.task in self.at_peak:
            values["mfu"] = self.at_peak[step_plan.task] / seconds
        self.writer.step(step, values)
        self.trace()


@contextmanager
def open_log(
    config: ResolvedConfig,
    start: int,
    *,
    planned: PlannedRun,
    keeps_features: bool,
    callbacks: Sequence[Callback],
    gone: Callable[[], None],
) -> Iterator[RunLog]:
    """The log of a run that goes on after `start` of its steps.

    Args:
        planned: of the run, for the MFU; `keeps_features`: the backbone is not run, so that there is none.
        callbacks: listeners to what is recorded.
        gone: called when nobody reads the console any more.
    """
    main, run = distributed.is_main(), config.visft.run
    out = Path(run.out or "")
    with ExitStack() as stack:
        hyper_parameters = redacted_values(config.identity())
        if main and run.track is not None:
            from visft_ds.monitor.track import Tracker  # few runs have one

            tracker = Tracker(out, hyper_parameters)
            stack.callback(tracker.close)
            callbacks = [*callbacks, tracker]
        progress = stack.enter_context(
            Progress(config.total_steps, start=start, log_every=run.log_every, enabled=main, gone=gone)
        )
        trace = stack.enter_context(traced(out, run.trace, start, progress.message))
        writer = stack.enter_context(MetricsWriter(out, resume_step=start, enabled=main, callbacks=callbacks))
        settings = json.dumps(redacted_values(config.to_dict()), indent=2).splitlines()
        writer.text(start, "configuration", "".join(f"    {line}\n" for line in settings))  # code, in Markdown
        yield RunLog(writer, progress, trace, {} if keeps_features or not main else seconds_at_peak(planned))


def seconds_at_peak(run: PlannedRun) -> dict[str, float]:
    """Stream -> seconds of a step at the peak of this GPU; empty where its peak is not known."""
    rate, streams = peak_rate(run.device, run.precision), run.config.visft.streams()
    return {name: model_operations(run, stream) / rate for name, stream in streams.items()} if rate else {}
