"""Log of a run: lines on the console, numbers in metrics.jsonl and TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from visft_ds.data.batches import Skipped
from visft_ds.data.plan import StepPlan
from visft_ds.monitor.callbacks import Callback
from visft_ds.monitor.console import Progress, StepLine
from visft_ds.monitor.metrics import MetricsWriter
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import StepReport
from visft_ds.prepare.data import Loader
from visft_ds.resilience.guard import is_finite
from visft_ds.resilience.host_memory import peak_memory


@dataclass
class RunLog:
    """Both parts of a log, written by the main process; another rank only prints which samples it replaced."""

    writer: MetricsWriter
    progress: Progress
    _reported: list[Skipped] = field(default_factory=list)

    def message(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.progress.message(text)

    def step(
        self,
        step_plan: StepPlan,
        report: StepReport,
        loader: Loader,
        *,
        tasks: Sequence[str],
        seconds: float,
        device: torch.device,
    ) -> None:
        """Record a finished step, and samples that were replaced in it.

        Args:
            tasks: whose losses the console shows.
            seconds: since the step before.
        """
        self._report_skipped(loader)
        step, images = step_plan.step + 1, len(step_plan.indices)
        self.progress.update(
            StepLine(
                step=step,
                losses={task: value for task, value in report.losses.items() if task in tasks},
                learning_rate=next(iter(report.learning_rates.values())),
                gradient_norm=report.gradient_norm,
                images=images,
                seconds=seconds,
                wait_seconds=loader.wait_seconds,
                peak_memory=peak_memory(device),
            )
        )
        values = {f"loss/{name}": value for name, value in report.losses.items()}
        values |= {f"lr/{name}": value for name, value in report.learning_rates.items()}
        if report.loss_scale is not None:
            values["loss_scale"] = report.loss_scale
        values |= {
            "gradient_norm": report.gradient_norm,
            "images_per_second": images / seconds,
            "data_wait_seconds": loader.wait_seconds,
            "data_skipped": float(len(loader.skipped)),
            **{f"data_seconds/{name}": spent.wall for name, spent in loader.spent().items()},
            "skipped": float(report.skipped),
            "refused": float(bool(report.refused)),
            "not_finite": float(not is_finite(report)),
        }
        self.writer.step(step, values)

    def _report_skipped(self, loader: Loader) -> None:
        for skipped in loader.skipped[len(self._reported) :]:
            self._reported.append(skipped)
            text = (
                f"step {skipped.step + 1}: sample {skipped.index} of {skipped.dataset} replaced by {skipped.instead} "
                f"({len(loader.skipped)} so far on rank {distributed.rank()}): {skipped.reason}"
            )
            if distributed.is_main():
                self.message(text)
            else:  # each rank sees the damage of its own samples
                print(text, file=sys.stderr, flush=True)


@contextmanager
def open_log(
    out: Path, start: int, total_steps: int, *, log_every: int, callbacks: Sequence[Callback]
) -> Iterator[RunLog]:
    """The log of a run in `out` that goes on after `start` of its steps.

    Args:
        log_every: lines that stay on the console, in steps.
        callbacks: listeners to what is recorded.
    """
    main = distributed.is_main()
    with (
        Progress(total_steps, start=start, log_every=log_every, enabled=main) as progress,
        MetricsWriter(out, resume_step=start, enabled=main, callbacks=callbacks) as writer,
    ):
        yield RunLog(writer, progress)
