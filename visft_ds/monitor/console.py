"""Console output: tables, the line of a training step, and what is left of other work; a bar on a terminal, else text.

No line is longer than WIDTH, unless a path or a command in it is: those stay whole, to be copied.
"""

from __future__ import annotations

import sys
import textwrap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

Item = TypeVar("Item")

#: Columns that lines are made to fit in where no terminal says how wide it is.
WIDTH = 100
#: Share of a new loss in its smoothed value once ten steps of that task were seen; before, all count the same.
SMOOTHING = 0.1
#: Steps over which speed and waiting are averaged.
WINDOW = 50
_SHORT = 3  # letters of a task where its whole name does not fit
_BAR = 12  # columns of a bar
#: Seconds that work may take before it is spoken of, and between two lines: more of them the longer it takes.
_FIRST, _RARELY = 5.0, 60.0


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
    # The last column is not padded, so that long texts do not widen the whole table; they go on below themselves.
    widths: dict[int, int] = {}
    for row in rows:
        for index, cell in enumerate(row[:-1]):
            widths[index] = max(widths.get(index, 0), len(cell))
    lines = []
    for row in rows:
        before = "".join(["   ", *(f"{cell.ljust(widths[i])}  " for i, cell in enumerate(row[:-1]))])
        lines += wrapped(before, "".join(row[-1:]))
    return [*wrapped("-- ", section.title), *lines]


def wrapped(before: str, text: str) -> list[str]:
    """Lines of `before` and a text with a hanging indent; words, such as paths, are not cut."""
    room = max(WIDTH - len(before), 30)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) if len(text) > room else [text]
    return [f"{' ' * len(before) if number else before}{line}".rstrip() for number, line in enumerate(lines)]


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

    def text(self, total: int, width: int) -> str:
        """The newest step in at most `width` columns. What does not fit is left out: metrics.jsonl has all of it."""
        last = self.recent[-1]
        seconds = max(sum(line.seconds for line in self.recent), 1e-9)
        losses = sorted(self.losses.items())
        short = [f"{task[:_SHORT]} {loss:.3g}" for task, loss in losses]
        parts = {
            "step": f"step {last.step}/{total}",
            "losses": "  ".join(f"{task} {loss:.4g}" for task, loss in losses),
            "lr": f"lr {last.learning_rate:.2e}",
            "norm": f"norm {last.gradient_norm:.3g}",
            "speed": f"{sum(line.images for line in self.recent) / seconds:.3g} img/s",
            "wait": f"wait {100 * sum(line.wait_seconds for line in self.recent) / seconds:.0f}%",
            "peak": "" if last.peak_memory is None else f"peak {last.peak_memory / 2**30:.2f} GiB",
            "left": f"left {clock((total - last.step) * seconds / len(self.recent))}",
        }
        for name, instead in [("losses", "  ".join(short)), *((name, "") for name in ("lr", "peak", "wait", "norm"))]:
            if len("  ".join(filter(None, parts.values()))) > width:
                parts[name] = instead
        return "  ".join(filter(None, parts.values()))


def clock(seconds: float) -> str:
    """Hours, minutes and seconds, e.g. 1:02:03; days where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


class Progress:
    """The progress of a training; a context manager. On a terminal a bar shows the newest numbers.

    Args:
        total: optimiser steps of the whole run.
        start: steps that were done before (a resumed run).
        log_every: print a line that stays whenever the step is a multiple, and for the first and last step.
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
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            # A file that stderr was sent to keeps its lines.
            self._bar = Bar(BarColumn(_BAR), text, console=console, redirect_stderr=sys.stderr.isatty())
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
            width = self._bar.console.width - _BAR - 1
            self._bar.update(self._task, completed=line.step, description=escape(self._window.text(self.total, width)))
        if line.step % self.log_every == 0 or line.step in (self.start + 1, self.total):
            self.message(self._window.text(self.total, WIDTH if self._bar is None else self._bar.console.width))

    def message(self, text: str) -> None:
        """Print a line of its own, e.g. that a checkpoint was saved."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(escape(text), highlight=False)
        else:
            print(text, file=self._stream, flush=True)


class Gauge:
    """Progress of any work but training, with the time left, on stderr; a context manager. Silent for five seconds.

    On a terminal it is a bar, which is gone at the end; elsewhere lines that become rarer the longer it takes.

    Args:
        what: a name for the work, e.g. "encoding digits".
        total: how much there is to do; 0 where nobody knows yet.
        unit: of `total`.
        enabled: False on every process but the main one, or for --quiet: prints nothing.
        tell: prints a line instead, where a bar stands already, e.g. `Progress.message`.
        seconds: a clock.
    """

    def __init__(
        self,
        what: str,
        total: float = 0,
        unit: str = "",
        *,
        enabled: bool = True,
        tell: Callable[[str], None] | None = None,
        seconds: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, f" {unit}" if unit else "", 0.0
        self._seconds, self._tell, self._enabled = seconds, tell or self._print, enabled
        self._lock = threading.Lock()  # work is done in threads
        self._bar: Bar | None = None
        console = Console(stderr=True)
        self._width = console.width - _BAR - 1
        if enabled and tell is None and console.is_terminal:
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True))
            shared = sys.stdout.isatty()  # else what is printed goes elsewhere, and has to
            self._bar = Bar(BarColumn(_BAR), text, console=console, transient=True, redirect_stdout=shared)
            self._task = self._bar.add_task("")
        self._began = self._at_start = self._next = 0.0
        self._start(0)

    def __enter__(self) -> Gauge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def phase(self, what: str, total: float, unit: str, done: float = 0) -> None:
        """Go on with other work, of which a part may be done already."""
        self.what, self.total, self.unit = what, total, f" {unit}"
        self._start(done)

    def add(self, amount: float = 1) -> None:
        """So much more is done; from any thread."""
        with self._lock:
            self.show(self.done + amount)

    def show(self, done: float, note: str = "") -> None:
        """So much is done in all; `note` says more, e.g. a second number."""
        self.done, now = done, self._seconds()
        if not self._enabled or now < self._next:
            return
        taken = max(now - self._began, 1e-9)
        self._next = now + (0.2 if self._bar is not None else min(max(_FIRST, taken / 2), _RARELY))
        text = self._text(taken, note)
        if self._bar is None:
            self._tell(text)
            return
        self._bar.start()
        self._bar.update(self._task, total=self.total or None, completed=done, description=escape(text[: self._width]))

    def _text(self, taken: float, note: str) -> str:
        rate = (self.done - self._at_start) / taken
        if not self.total:
            return f"{self.what}: {self.done:.0f}{self.unit}{note}" if self.done else f"{self.what} ..."
        left = f", {rate:.3g}/s, left {clock((self.total - self.done) / rate)}" if rate > 0 else ""
        return f"{self.what}: {self.done:.0f}/{self.total:.0f}{self.unit}{note}{left}"

    def _start(self, done: float) -> None:
        self._began = self._seconds()
        self._next = self._began + _FIRST
        self.done = self._at_start = done

    @staticmethod
    def _print(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def gauged(items: Iterable[Item], what: str, total: float, unit: str = "", *, enabled: bool = True) -> Iterator[Item]:
    """Yield items, with a gauge of how many were worked on."""
    with Gauge(what, total, unit, enabled=enabled) as gauge:
        for item in items:
            yield item
            gauge.add()
