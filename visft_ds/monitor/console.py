"""Console output: tables, the line of a training step, and the progress of other work (tqdm's).

No line is longer than WIDTH, unless a path or a command in it is: those stay whole, to be copied.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

#: Columns that lines are made to fit in where no terminal says how wide it is.
WIDTH = 100
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
    if enabled:
        lines = [f"== {title}", *(line for section in sections for line in _table(section))]
        print("\n".join(lines), file=stream or sys.stdout, flush=True)


def _table(section: Section) -> list[str]:
    """Lines of a table; the last column is not padded, and a long text in it goes on below itself."""
    rows = [list(row) for row in ([section.columns] if section.columns else []) + list(section.rows)]
    depth = max(map(len, rows), default=1) - 1
    widths = [max(len(row[i]) for row in rows if len(row) > i + 1) for i in range(depth)]
    lines = wrapped("-- ", section.title)
    for row in rows:
        cells = [f"{cell.ljust(width)}  " for cell, width in zip(row[:-1], widths, strict=False)]
        lines += wrapped("   " + "".join(cells), row[-1])
    return lines


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
    peak_memory: int  #: bytes of this process


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
        self._recent: deque[StepLine] = deque(maxlen=WINDOW)
        self._losses, self._seen = dict[str, float](), dict[str, int]()
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
        self._recent.append(line)
        for task, loss in line.losses.items():
            self._seen[task] = self._seen.get(task, 0) + 1
            share = max(SMOOTHING, 1 / self._seen[task])
            self._losses[task] = loss if share == 1 else (1 - share) * self._losses[task] + share * loss
        text = self._text(line)
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

    def _text(self, last: StepLine) -> str:
        """The newest step; what does not fit the width is shortened or left out, since metrics.jsonl has all of it."""
        seconds = max(sum(line.seconds for line in self._recent), 1e-9)
        losses = sorted(self._losses.items())
        left = (self.total - last.step) * seconds / len(self._recent)
        parts = {
            "step": f"step {last.step}/{self.total}",
            "losses": "  ".join(f"{task} {loss:.4g}" for task, loss in losses),
            "lr": f"lr {last.learning_rate:.2e}",
            "norm": f"norm {last.gradient_norm:.3g}",
            "speed": f"{sum(line.images for line in self._recent) / seconds:.3g} img/s",
            "wait": f"wait {100 * sum(line.wait_seconds for line in self._recent) / seconds:.0f}%",
            "peak": f"peak {last.peak_memory / 2**30:.2f} GiB",
            "left": f"left {tqdm.format_interval(left)}",
        }
        short = "  ".join(f"{task[:3]} {loss:.3g}" for task, loss in losses)
        for name, instead in (("losses", short), ("lr", ""), ("peak", ""), ("wait", ""), ("norm", "")):
            if len("  ".join(filter(None, parts.values()))) > self._width:
                parts[name] = instead
        return "  ".join(filter(None, parts.values()))


def gauge(
    what: str, total: float, unit: str = "", items: Iterable[Any] | None = None, *, enabled: bool = True
) -> tqdm[Any]:
    """A tqdm bar on stderr for any work but training, silent for five seconds; in a log a line every half minute."""
    live = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        items,
        desc=what,
        total=total,
        unit=f" {unit}",
        disable=not enabled,
        delay=5,
        mininterval=0.2 if live else 30,
        bar_format=None if live else "{desc}: {n:.0f}/{total:.0f}{unit}, left {remaining}\n",
        leave=False,
        dynamic_ncols=live,
    )
