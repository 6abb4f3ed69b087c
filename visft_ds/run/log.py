"""Log of a run: lines on the console, numbers in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

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
from visft_ds.tasks import shown_metrics


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


#: Settings that TensorBoard compares runs by, besides those that flags set.
_COMPARED = (
    "visft.stage",
    "visft.seed",
    "visft.mode",
    "visft.lora.rank",
    "visft.lora.alpha",
    "visft.*.batch_size",
    "optimizer.params.lr",
    "optimizer.params.weight_decay",
    "scheduler.params.total_num_steps",
    "scheduler.params.warmup_num_steps",
)
_BEGINNING = re.compile(r"(optimizer|scheduler)\.params\.|visft\.")


def _hyperparameters(config: ResolvedConfig) -> dict[str, Any]:
    """Settings that tell runs apart, by the end of their keys: TensorBoard has narrow columns."""
    chosen: dict[str, Any] = {"model": config.visft.model.name}
    for key, value in redacted_values(config.identity()).items():
        of_flag = config.sources.get(key, "").startswith("--")
        if value is not None and (of_flag or any(fnmatch(key, glob) for glob in _COMPARED)):
            chosen[_BEGINNING.sub("", key)] = value
    return chosen


@contextmanager
def open_log(
    config: ResolvedConfig, start: int, callbacks: Sequence[Callback], stop: StopFlag
) -> Iterator[RunLog]:
    """The log of a run that is resumed after `start` of its steps. `stop` hears when nobody reads the
    console.
    """
    main = distributed.is_main()
    run = config.visft.run
    tasks = config.visft.tasks.enabled()
    out = Path(run.out or "")
    with ExitStack() as stack:
        progress = stack.enter_context(
            Progress(
                config.total_steps, start=start, log_every=run.log_every, enabled=main, gone=stop.output_gone
            )
        )
        writer = stack.enter_context(MetricsWriter(out, resume_step=start, enabled=main, callbacks=callbacks))
        if main:
            text = json.dumps(redacted_values(config.to_dict()), indent=2)
            beside = ["loss/loss", "images_per_second"]
            if run.eval_every:
                measured = {name for task in tasks.values() for name in task.measured()}
                metrics = [f"val/{name}" for name in shown_metrics(tasks) if name in measured]
                beside = [*metrics, *beside]
            writer.describe(text, _hyperparameters(config), beside)
        yield RunLog(writer, progress, tuple(tasks))
