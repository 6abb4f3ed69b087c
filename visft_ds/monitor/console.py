"""Console output: tables, the line of a training step, and the progress of other work (tqdm's)."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TextIO

from tqdm import tqdm

#: Columns of a table; paths and commands that are longer stay whole, to be copied.
WIDTH = 100
_GAP = "\0"  #: between the words of a command while lines are broken


@dataclass(frozen=True)
class Section:
    """Table of the plan: rows of texts; `columns` names them, or is empty for name-value pairs."""

    title: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()


def print_plan(title: str, sections: Sequence[Section]) -> None:
    """Print what is about to run as tables, whose last column is not padded; none without rows."""
    lines = [f"== {title}"]
    for section in sections:
        if not section.rows:
            continue
        lines += _wrapped("-- ", section.title)
        rows = [section.columns, *section.rows] if section.columns else section.rows
        columns = max((len(row) for row in rows), default=1)
        widths = []
        for column in range(columns - 1):
            widths.append(max(len(row[column]) for row in rows if len(row) > column + 1))
        for row in rows:
            padded = [f"{cell.ljust(width)}  " for cell, width in zip(row[:-1], widths, strict=False)]
            lines += _wrapped("   " + "".join(padded), row[-1])
    print("\n".join(lines), flush=True)


def _wrapped(before: str, text: str) -> list[str]:
    """Lines with a hanging indent; words, such as paths, are not cut, nor commands at the end."""
    whole = re.sub(r"(?<=: )visft .+$", lambda command: command[0].replace(" ", _GAP), text)
    lines = textwrap.wrap(
        whole,
        max(WIDTH, len(before) + 30),
        initial_indent=before,
        subsequent_indent=" " * len(before),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_GAP, " ") for line in lines] or [before.rstrip()]


@dataclass
class Progress(AbstractContextManager["Progress"]):
    """The progress of a training; a context manager. On a terminal a last line shows the newest numbers."""

    total: int  #: optimiser steps of the whole run
    start: int = 0  #: steps that were done before (a resumed run)
    #: a line stays whenever the step is a multiple, and for the first and last step
    log_every: int = 20
    enabled: bool = True  #: False on every process but the main one: prints nothing
    stream: TextIO = field(default_factory=lambda: sys.stdout)
    gone: Callable[[], None] = lambda: None  #: called when the stream is closed at its other end

    def __post_init__(self) -> None:
        #: Images, seconds, seconds of waiting for data of the newest steps, which are averaged.
        self._recent: deque[tuple[int, float, float]] = deque(maxlen=50)
        self._losses = dict[str, float]()  # the newest of each task
        self._bar: tqdm[Any] | None = None
        if self.enabled and self.stream.isatty():
            self._bar = tqdm(file=self.stream, bar_format="{desc}", leave=False)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(
        self, step: int, losses: Mapping[str, float], values: Mapping[str, float], images: int
    ) -> None:
        """Show a finished step.

        Args:
            losses: task -> weighted loss of the step; only tasks that took part.
            values: numbers of the step by their names in metrics.jsonl.
            images: over all processes.
        """
        if not self.enabled:
            return
        self._recent.append((images, images / values["images_per_second"], values["data_wait_seconds"]))
        self._losses.update(losses)
        text = self._text(step, values)
        if step % self.log_every == 0 or step in (self.start + 1, self.total):
            self.message(text)
        if self._bar is not None:  # a line that is wrapped would leave a copy of itself at each refresh
            self._bar.set_description_str(text[: shutil.get_terminal_size().columns - 1])

    def message(self, text: str) -> None:
        """Print a line of its own, e.g. that a checkpoint was saved."""
        if not self.enabled:
            return
        try:
            with tqdm.external_write_mode(self.stream):
                print(text, file=self.stream, flush=True)
        except BrokenPipeError:
            self.gone()

    def _text(self, step: int, values: Mapping[str, float]) -> str:
        images, seconds, waiting = (sum(column) for column in zip(*self._recent, strict=True))
        left = tqdm.format_interval((self.total - step) * seconds / len(self._recent))
        rates = [value for name, value in values.items() if name.startswith("lr/")]
        lr = f"{min(rates):.2e}"
        if max(rates) > min(rates):  # parameter groups differ
            lr += f" to {max(rates):.2e}"
        parts = [
            f"step {step}/{self.total}",
            f"eta {left}",
            *(f"{task} {loss:.4g}" for task, loss in sorted(self._losses.items())),
            f"{images / seconds:.3g} img/s",
            f"lr {lr}",
            f"grad_norm {values['grad_norm']:.3g}",
            f"data {100 * waiting / seconds:.0f}%",
            f"mem {values['memory/peak_gib']:.2f} GiB",
        ]
        return "  ".join(parts)


class _Lines(tqdm):
    """A bar in a log: each state is a line, and nothing is wiped out at its end."""

    @staticmethod
    def status_printer(file: TextIO) -> Callable[[str], object]:
        """Called by tqdm with the text to show."""
        return file.write


def gauge(what: str, total: float, unit: str = "", items: Iterable[Any] | None = None) -> tqdm[Any]:
    """A tqdm bar on stderr for any work but training, silent for five seconds; in a log a line every half
    minute.
    """
    live = sys.stderr is not None and sys.stderr.isatty()
    bar = tqdm if live else _Lines
    return bar(
        items,
        desc=what,
        total=total,
        unit=f" {unit}",
        disable=os.environ.get("RANK", "0") != "0",  # the main process tells for all
        delay=5,
        mininterval=0.2 if live else 30,
        miniters=1,  # otherwise tqdm's watcher prints old numbers again
        bar_format=None if live else "{desc}: {n:.0f}/{total:.0f}{unit}, eta {remaining}\n",
        leave=False,
        dynamic_ncols=live,
    )
