"""Traces of chosen steps by torch.profiler, which Perfetto (ui.perfetto.dev) and chrome://tracing show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerAction, profile

from visft_ds.parallel import distributed


@contextmanager
def traced(
    out: Path, steps: tuple[int, int] | None, start: int, tell: Callable[[str], None]
) -> Iterator[Callable[[], None]]:
    """Trace steps (first, last) of a run that goes on after `start`, into OUT/trace-FIRST-LAST-rankN.json.gz.

    The step before the first one warms the profiler up. Yields a function to call at the end of each step. A trace that
    cannot be written is told, and the run goes on; `steps` None: nothing is traced.
    """
    if steps is None or start >= steps[0]:
        if steps is not None:
            tell(f"no trace: step {steps[0]}, its first one, was done before this start")
        yield lambda: None
        return
    first, last = steps
    path = out / f"trace-{first}-{last}-rank{distributed.rank()}.json.gz"

    def write(profiler: torch.profiler.profile) -> None:
        try:
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            tell(f"warning: no trace in {path}: {error}; training goes on")
        else:
            tell(f"wrote {path}: open it at https://ui.perfetto.dev")

    def action(done: int) -> ProfilerAction:
        step = start + 1 + done
        if first <= step <= last:
            return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == first - 1 else ProfilerAction.NONE

    # acc_events: there is one cycle, and without it torch warns that those before would be lost.
    with profile(schedule=action, on_trace_ready=write, acc_events=True) as profiler:
        yield profiler.step
