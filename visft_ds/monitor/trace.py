"""Traces of chosen steps by torch.profiler, which Perfetto (ui.perfetto.dev) and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, profile

from visft_ds.parallel import distributed


@contextmanager
def traced(
    out: Path, steps: tuple[int, int] | None, start: int, tell: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Trace steps `first` to `last` of a run that goes on after `start`, into OUT/trace-FIRST-LAST-rankN.json.gz.

    The step before the first one warms the profiler up. Yields a function to call at the end of each step. A trace that
    cannot be written is said, and the run goes on.

    Args:
        steps: (first, last), counted from 1; None: nothing is traced.
        tell: prints a line.
    """
    if steps is None or start >= steps[0]:
        if steps is not None:
            tell(f"no trace: step {steps[0]}, its first one, was done before this start")
        yield lambda: None
        return
    first, last = steps
    path = out / f"trace-{first}-{last}-rank{distributed.rank()}.json.gz"
    # acc_events: there is one cycle, and without it torch 2.10 warns that those before would be lost.
    profiler = profile(schedule=partial(_action, first - 1 - start, last - 1 - start), acc_events=True)
    profiler.on_trace_ready = partial(_write, path, tell)
    with profiler:
        yield profiler.step


def _action(first: int, last: int, step: int) -> ProfilerAction:
    """Action of the profiler in a step of this start, counted from 0."""
    if first <= step <= last:
        return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.RECORD
    return ProfilerAction.WARMUP if step == first - 1 else ProfilerAction.NONE


def _write(path: Path, tell: Callable[[str], None], profiler: torch.profiler.profile) -> None:
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        tell(f"warning: no trace in {path}: {error}; training goes on")
    else:
        tell(f"wrote {path}: open it at https://ui.perfetto.dev")
