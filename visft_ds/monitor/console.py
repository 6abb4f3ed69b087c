"""Console output: tables, the line of a training step, and the progress of other work.

No line is longer than WIDTH, unless a path or a command in it is: those stay whole, to be copied.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TextIO, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

#: Columns that lines are made to fit in where no terminal says how wide it is.
WIDTH = 100
#: Share of a new loss in its smoothed value once ten steps of that task were seen; before, all count the same.
SMOOTHING = 0.1
#: Steps over which speed and waiting are averaged.
WINDOW = 50
_SHORT = 3  # letters of a task where its whole name does not fit
#: Seconds that work may take before it is spoken of, and between two lines where no terminal shows a bar.
_FIRST, _RARELY = 5.0, 30.0


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
    print(f"== {title}", file=stream)
    for section in sections:
        print("\n".join(_table(section)), file=stream)
    stream.flush()


def _table(section: Section) -> list[str]:
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
    """The progress of a training; a context manager. On a terminal a last line shows the newest numbers.

    Args:
        total: optimiser steps of the whole run.
        start: steps that were done before (a resumed run).
        log_every: print a line that stays whenever the step is a multiple, and for the first and last step.
        enabled: False on every process but the main one: prints nothing.
        stream: where to; stdout by default.
        gone: called when nobody reads the stream any more; None: that is an error.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        log_every: int = 20,
        enabled: bool = True,
        stream: TextIO | None = None,
        gone: Callable[[], None] | None = None,
    ) -> None:
        self.total, self.start, self.log_every, self.enabled = total, start, log_every, enabled
        self._stream, self._gone = stream or sys.stdout, gone
        self._window = _Window()
        live = enabled and self._stream.isatty()
        self._width = shutil.get_terminal_size((WIDTH, 24)).columns - 1 if live else WIDTH
        self._bar = tqdm(file=self._stream, bar_format="{desc}", leave=False) if live else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, line: StepLine) -> None:
        """Show a finished step."""
        if not self.enabled:
            return
        self._window.add(line)
        text = self._window.text(self.total, self._width)
        if line.step % self.log_every == 0 or line.step in (self.start + 1, self.total):
            self.message(text)
        if self._bar is not None:
            self._bar.set_description_str(text)

    def message(self, text: str) -> None:
        """Print a line of its own, e.g. that a checkpoint was saved."""
        if not self.enabled:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)
        except BrokenPipeError:
            if self._gone is None:
                raise
            self._gone()


class Gauge:
    """Progress of any work but training, with the time left, on stderr; a context manager. Silent for five seconds.

    Args:
        what: a name for the work, e.g. "encoding digits".
        total: how much there is to do; 0 where nobody knows yet.
        unit: of `total`.
        enabled: False on every process but the main one, or for --quiet: prints nothing.
        tell: prints a line instead, where another one stands already, e.g. `Progress.message`.
    """

    def __init__(
        self,
        what: str,
        total: float = 0,
        unit: str = "",
        *,
        enabled: bool = True,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.what, self.total, self.unit, self._enabled, self._tell = what, total, unit, enabled, tell
        self._lock = threading.Lock()  # work is done in threads
        self._bar = self._begin(0)

    def __enter__(self) -> Gauge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def phase(self, what: str, total: float, unit: str, done: float = 0) -> None:
        """Go on with other work, of which a part may be done already."""
        self._bar.close()
        self.what, self.total, self.unit = what, total, unit
        self._bar = self._begin(done)

    def add(self, amount: float = 1) -> None:
        """So much more is done; from any thread."""
        with self._lock:
            self._bar.update(amount)

    def show(self, done: float, note: str = "") -> None:
        """So much is done in all; `note` says more, e.g. a second number."""
        self._bar.set_postfix_str(note.lstrip(", "), refresh=False)
        self.add(done - self._bar.n)

    @property
    def done(self) -> float:
        """So much is done."""
        return float(self._bar.n)

    def _begin(self, done: float) -> tqdm:
        live = sys.stderr is not None and sys.stderr.isatty() and self._tell is None
        return tqdm(
            desc=self.what,
            total=self.total or None,
            initial=done,
            unit=f" {self.unit}" if self.unit else "",
            disable=not self._enabled,
            delay=_FIRST,
            mininterval=0.2 if live else _RARELY,
            bar_format=None if live else "{desc}: {n:.0f}/{total}{unit}{postfix}, left {remaining}\n",
            file=sys.stderr if self._tell is None else _Lines(self._tell),
            leave=False,
            dynamic_ncols=live,
        )


class _Lines:
    """A stream for tqdm that hands on whole lines."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            self._tell(line)

    def flush(self) -> None:
        """There is nothing to flush."""


def gauged(items: Iterable[Item], what: str, total: float, unit: str = "", *, enabled: bool = True) -> Iterator[Item]:
    """Yield items, with a gauge of how many were worked on."""
    with Gauge(what, total, unit, enabled=enabled) as gauge:
        for item in items:
            yield item
            gauge.add()
