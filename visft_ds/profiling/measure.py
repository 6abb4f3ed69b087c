"""Measuring every task of a session, in order: warm-up, plain and hooked steps in turn, then one step that is counted.

Plain steps give the speed. Hooked steps in between give the split, so that a machine whose speed drifts does so for
both; their difference is the cost of looking. The last step is slow and is not timed: it counts operations and bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from visft_ds.config.task_schema import SHARED
from visft_ds.costs.counting import FlopMeter
from visft_ds.costs.flops import Flops
from visft_ds.costs.hardware import reference_rate
from visft_ds.costs.ledger import Ledger
from visft_ds.data.plan import StepPlan
from visft_ds.data.samples import Batch
from visft_ds.parallel import distributed
from visft_ds.profiling.communication import measure_communication
from visft_ds.profiling.formula import formula_of
from visft_ds.profiling.memory import note_gradients, note_residents, step_watched
from visft_ds.profiling.session import Session, StreamRun, make_step
from visft_ds.profiling.timing import (
    BACKWARD,
    MeasuredStep,
    Spread,
    Stopwatch,
    divide,
    metered,
    synchronize,
    typical_parts,
)
from visft_ds.resilience.host_memory import peak_memory

Steps = Iterator[tuple[StepPlan, list[Batch]]]


@dataclass(frozen=True)
class Lengths:
    """Numbers of measured and of warm-up steps, in optimiser steps of each task. Raises ValueError below 1."""

    steps: int = 10
    warmup: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 1:
            raise ValueError(
                f"--steps {self.steps} and --warmup {self.warmup}: both must be at least 1 (the first step is never a "
                "typical one: memory is allocated, the optimizer makes its state)"
            )


@dataclass(frozen=True)
class _Timed:
    """A step that was run."""

    time: MeasuredStep
    images: int  #: over all processes
    flops: Flops | None  #: of this process, by formula
    losses: dict[str, float]
    skipped: bool


def measure_stream(session: Session, stream: str, lengths: Lengths) -> dict[str, Any]:
    """Everything about one stream on this rank, as JSON values. Collective: every rank measures the same steps.

    Raises:
        ValueError: the step does not fit into memory.
    """
    run = session.of_stream(stream)
    device = run.engine.device
    reference = reference_rate(device, session.precision)
    # Behind the counted step as much is read ahead as in training.
    total = lengths.warmup + 2 * lengths.steps + 2 + session.config.visft.data.prefetch_steps
    steps = run.loader.steps(0, total)
    with out_of_memory_explained(run, stream):
        first = [_timed_step(session, run, steps) for _ in range(lengths.warmup)]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        plain, hooked = [], []
        watch = Stopwatch(device)
        for _ in range(lengths.steps):
            plain.append(_timed_step(session, run, steps))
            with metered(run.engine, watch):
                hooked.append(_timed_step(session, run, steps, watch))
        peak = peak_memory(device)
        communication = None
        if distributed.world_size() > 1:
            found = measure_communication(lambda: _timed_step(session, run, steps), device)
            communication = asdict(found)
        counted = _counted_step(session, run, steps)
    seconds = [step.time.seconds for step in plain]
    return {
        "batch": {
            "images": plain[0].images,
            "micro": run.batches.micro[stream],
            "accumulation": run.batches.accumulation,
            "shapes": counted.pop("shapes"),
            "content": counted.pop("content"),
        },
        "steps": {"measured": len(plain), "warmup": len(first), "skipped": sum(s.skipped for s in (*plain, *hooked))},
        "losses": [step.losses["loss"] for step in (*first, *plain)][:2],
        "images_per_second": asdict(Spread.of([step.images / step.time.seconds for step in plain])),
        "step_seconds": asdict(Spread.of(seconds)),
        "parts_seconds": typical_parts([step.time for step in hooked]),
        "hooked_step_seconds": asdict(Spread.of([step.time.seconds for step in hooked])),
        "overhead": asdict(
            Spread.of([h.time.seconds / p.time.seconds - 1 for p, h in zip(plain, hooked, strict=True)])
        ),
        "communication": communication,
        "memory_bytes": {**counted.pop("memory"), "process_peak": peak},
        "flops": {**counted, **_rates(plain, counted, reference.flops_per_second)},
        "reference": asdict(reference),
    }


def _timed_step(session: Session, run: StreamRun, steps: Steps, watch: Stopwatch | None = None) -> _Timed:
    """The next step, exactly as the training loop makes it; the clock runs from asking for the data to the end."""
    device = run.engine.device
    synchronize(device)
    began = time.perf_counter()
    step_plan, batches = next(steps)
    wait = run.loader.wait_seconds
    report = make_step(run, step_plan.step, batches)
    synchronize(device)
    seconds = time.perf_counter() - began
    return _Timed(
        divide(seconds, wait, watch.seconds() if watch else {}),
        len(step_plan.indices),
        formula_of(session, batches).total,
        dict(report.losses),
        report.skipped,
    )


def _counted_step(session: Session, run: StreamRun, steps: Steps) -> dict[str, Any]:
    """The last step: operations by part, counted and by formula, and bytes by kind."""
    step_plan, batches = next(steps)
    ledger, meter = Ledger(run.engine.device.type), FlopMeter()
    note_residents(ledger, run.engine)
    ledger.forget_peaks()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # compiled kernels do not say what they compute
        stack.enter_context(metered(run.engine, _AtBackward(meter, ledger, run.engine.deepspeed.optimizer)))
        stack.enter_context(meter.counting())
        stack.enter_context(step_watched(ledger, run.engine.module, run.engine.deepspeed.optimizer))
        make_step(run, step_plan.step, batches)
    steps.close()  # type: ignore[attr-defined]  # ends the loader's threads
    formula = formula_of(session, batches)
    whole_formula = formula.total
    return {
        "shapes": [list(batch.images.shape) for batch in batches],
        "content": _content(batches),
        "memory": {"at_peak": ledger.at_peak, "highest": ledger.highest},
        "counted": {**meter.parts, "total": meter.total},
        "formula": formula.by_part(),
        "ratio": meter.total / whole_formula.all if whole_formula else None,
    }


def _content(batches: Sequence[Batch]) -> dict[str, float]:
    """Largest values of any micro-batch: mean number of objects per image, ids of the longest caption."""
    found: dict[str, float] = {}
    for batch in batches:
        for targets in batch.targets.values():
            if hasattr(targets, "counts"):
                found["objects"] = max(found.get("objects", 0), float(targets.counts.float().mean()))
            if hasattr(targets, "tokens"):
                found["caption_ids"] = max(found.get("caption_ids", 0), targets.tokens.shape[1])
    return found


@dataclass(frozen=True)
class _AtBackward:
    """A meter that also names DeepSpeed's gradients when the backward pass has made them."""

    meter: FlopMeter
    ledger: Ledger
    optimizer: Any

    def start(self, part: str) -> None:
        self.meter.start(part)

    def stop(self, part: str) -> None:
        self.meter.stop(part)
        if part == BACKWARD:
            note_gradients(self.ledger, self.optimizer)


def _rates(plain: Sequence[_Timed], counted: dict[str, Any], rate: float) -> dict[str, float | None]:
    """Operations a second of the plain steps, and the share of the reference rate.

    "model" leaves out what activation checkpointing computes again, "hardware" includes it.
    """
    steps = [(step.flops, step.time.seconds) for step in plain]
    if all(flops is not None for flops, _ in steps):
        model = statistics.median((f.forward + f.backward) / s for f, s in steps if f is not None)
        hardware = statistics.median(f.all / s for f, s in steps if f is not None)
    else:  # a head without a formula: the counted step stands for all
        hardware = counted["counted"]["total"] / statistics.median(seconds for _, seconds in steps)
        model = None
    return {
        "model_per_second": model,
        "hardware_per_second": hardware,
        "model_utilisation": None if model is None else model / rate,
        "hardware_utilisation": hardware / rate,
    }


@contextmanager
def out_of_memory_explained(run: StreamRun, stream: str) -> Iterator[None]:
    """Turn the allocator's error into one that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not full:
            raise
        micro = run.batches.micro[stream]
        key = "visft.shared" if stream == SHARED else f"visft.tasks.{stream}"
        explained = ValueError(
            f"a step of {stream} does not fit into memory with {micro} images at once ({_first_line(error)}). Less "
            f"at once: --set {key}.micro_batch={max(1, micro // 2)}; fewer activations: --set "
            "visft.model.checkpoint_every=1; divided weights: --engine zero3 on more GPUs"
        )
        explained.of_one_rank = True  # type: ignore[attr-defined]  # the others wait for it and do not know why
        raise explained from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or ["out of memory"])[0]
