"""Console output: the plan at the start and one line of progress; a bar on a terminal, else plain text."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

#: Share of a new loss in its smoothed value once ten steps of that task were seen; before, all count the same.
SMOOTHING = 0.1
#: Steps over which speed and waiting are averaged.
WINDOW = 50


@dataclass(frozen=True)
class Section:
    """Table of the plan: rows of texts; `columns` names them, or is empty for name-value pairs."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()


def print_plan(title: str, sections: Sequence[Section], *, enabled: bool = True, stream: TextIO | None = None) -> None:
    """Print what is about to run. `enabled` is False on every process but the main one."""
    if not enabled:
        return
    stream = stream or sys.stdout
    console = Console(file=stream)
    if console.is_terminal:
        console.rule(f"[bold]{escape(title)}", align="left")
        for section in sections:
            console.print(_rich_table(section))
        return
    print(f"== {title}", file=stream)
    for section in sections:
        print("\n".join(_plain_table(section)), file=stream)
    stream.flush()


def _rich_table(section: Section) -> Table:
    title = f"[bold]{escape(section.title)}"
    table = Table(title=title, title_justify="left", box=None, show_header=bool(section.columns), pad_edge=False)
    width = max((len(row) for row in section.rows), default=len(section.columns))
    for name in [*section.columns, *[""] * (width - len(section.columns))]:
        table.add_column(escape(name), overflow="fold")
    for row in section.rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _plain_table(section: Section) -> list[str]:
    rows = [list(section.columns), *section.rows] if section.columns else list(section.rows)
    # The last column is not padded, so that long texts do not widen the whole table.
    widths: dict[int, int] = {}
    for row in rows:
        for index, cell in enumerate(row[:-1]):
            widths[index] = max(widths.get(index, 0), len(cell))
    lines = ("  ".join([*(cell.ljust(widths[i]) for i, cell in enumerate(row[:-1])), *row[-1:]]) for row in rows)
    return [f"-- {section.title}", *(f"   {line}".rstrip() for line in lines)]


@dataclass(frozen=True)
class StepLine:
    """Finished optimiser step, as the progress line needs it."""

    step: int  #: counts from 1
    losses: Mapping[str, float]  #: task -> weighted loss of this step; only tasks that took part
    learning_rate: float
    gradient_norm: float  #: before clipping
    images: int  #: over all processes
    seconds: float  #: wall time of the step, waiting included
    wait_seconds: float  #: of it, waiting for data
    peak_memory: int | None = None  #: bytes of the fullest device since the start; None where it is not known


@dataclass
class _Window:
    """Recent steps and smoothed losses."""

    recent: deque[StepLine] = field(default_factory=lambda: deque(maxlen=WINDOW))
    losses: dict[str, float] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, line: StepLine) -> None:
        self.recent.append(line)
        for task, loss in line.losses.items():
            self.seen[task] = self.seen.get(task, 0) + 1
            share = max(SMOOTHING, 1 / self.seen[task])
            self.losses[task] = loss if share == 1 else (1 - share) * self.losses[task] + share * loss

    def text(self, total: int) -> str:
        """Everything but the step number."""
        last = self.recent[-1]
        seconds = max(sum(line.seconds for line in self.recent), 1e-9)
        parts = [f"{task} {loss:.4g}" for task, loss in sorted(self.losses.items())]
        parts += [f"lr {last.learning_rate:.2e}", f"norm {last.gradient_norm:.3g}"]
        parts.append(f"{sum(line.images for line in self.recent) / seconds:.3g} img/s")
        parts.append(f"wait {100 * sum(line.wait_seconds for line in self.recent) / seconds:.0f}%")
        if last.peak_memory is not None:
            parts.append(f"peak {last.peak_memory / 2**30:.2f} GiB")
        parts.append(f"left {clock((total - last.step) * seconds / len(self.recent))}")
        return "  ".join(parts)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:03; days where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


class Progress:
    """The progress line; a context manager.

    Args:
        total: optimiser steps of the whole run.
        start: steps that were done before (a resumed run).
        log_every: without a terminal, print a line whenever the step is a multiple, and for the first and last step.
        enabled: False on every process but the main one: prints nothing.
        stream: where to; stdout by default.
    """

    def __init__(
        self, total: int, *, start: int = 0, log_every: int = 20, enabled: bool = True, stream: TextIO | None = None
    ) -> None:
        self.total, self.start, self.log_every, self.enabled = total, start, log_every, enabled
        self._stream = stream or sys.stdout
        self._window = _Window()
        self._bar: Bar | None = None
        console = Console(file=self._stream)
        if enabled and console.is_terminal:
            # One column for all numbers, so that a narrow terminal wraps it instead of cutting it off.
            text = TextColumn(
                "{task.completed:.0f}/{task.total:.0f}  {task.description}", table_column=Column(overflow="fold")
            )
            self._bar = Bar(BarColumn(12), text, console=console)
            self._task = self._bar.add_task("", total=total, completed=start)

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, line: StepLine) -> None:
        """Show a finished step."""
        if not self.enabled:
            return
        self._window.add(line)
        if self._bar is not None:
            self._bar.update(self._task, completed=line.step, description=escape(self._window.text(self.total)))
        elif line.step % self.log_every == 0 or line.step in (self.start + 1, self.total):
            self.message(f"step {line.step}/{self.total}  {self._window.text(self.total)}")

    def message(self, text: str) -> None:
        """Print a line of its own, e.g. that a checkpoint was saved."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(escape(text), highlight=False)
        else:
            print(text, file=self._stream, flush=True)
