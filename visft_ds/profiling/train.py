"""Measuring every task of a session, in order: warm-up, plain and hooked steps in turn, then one step that is counted.

Plain steps give the speed. Hooked steps in between give the split, so that a machine whose speed drifts does so for
both; their difference is the cost of looking. The last step is slow and is not timed: it counts operations and bytes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from visft_ds.config import ResolvedConfig
from visft_ds.costs.counting import FlopMeter
from visft_ds.costs.flops import Flops
from visft_ds.costs.hardware import DTYPES, reference_rate
from visft_ds.costs.ledger import KINDS, TRANSIENT, Ledger
from visft_ds.monitor.console import Section
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import StepReport
from visft_ds.prepare.model import stage_of
from visft_ds.profiling.harness import circumstances, measured_on, spread, synchronize
from visft_ds.profiling.memory import note_gradients, note_residents, step_watched
from visft_ds.profiling.session import Session, make_step, open_session
from visft_ds.profiling.timing import (
    BACKBONE,
    BACKWARD,
    CRITERION,
    HEAD,
    MATCHER,
    PARTS,
    MeasuredStep,
    Stopwatch,
    divide,
    measure_communication,
    metered,
    typical_parts,
)
from visft_ds.resilience.host_memory import peak_memory
from visft_ds.run.operations import StepFormula, formula_of
from visft_ds.run.start_report import describe_attention

FORMAT, VERSION = "visft_ds profile", 1
_MIB = 2**20


def measure_train(config: ResolvedConfig, steps: int, warmup: int, *, synthetic: bool) -> dict[str, Any] | None:
    """Every stream of a configuration on every rank; the record on the main process, None on the others.

    Args:
        steps, warmup: numbers of timed optimiser steps of each stream, and of those before.

    Raises:
        ValueError: one of them is below 1; as `open_session` and `measure_stream`.
    """
    if steps < 1 or warmup < 1:
        raise ValueError(
            f"--steps {steps} and --warmup {warmup}: both must be at least 1 (the first step is never a typical one: "
            "memory is allocated, the optimizer makes its state)"
        )
    with open_session(config, synthetic=synthetic) as session:
        measured = {name: measure_stream(session, name, steps, warmup) for name in session.config.visft.streams()}
        ranks = distributed.gather_objects(measured)
        record = make_record(session, ranks) if ranks is not None else None
    distributed.close()
    return record


def measure_stream(session: Session, stream: str, count: int, warmup: int) -> dict[str, Any]:
    """Everything about one stream on this rank, as JSON values. Collective: every rank measures the same steps.

    Raises:
        OutOfMemory: the step does not fit into memory; says what would.
    """
    engine, micro = session.engine, session.batches.micro[stream]
    device, loader = engine.device, session.loader_of(stream)
    reference = reference_rate(device, session.precision)
    # Behind the counted step as much is read ahead as in training.
    steps = loader.steps(0, warmup + 2 * count + 2 + session.config.visft.data.prefetch_steps)
    reports: list[StepReport] = []
    images = 0

    def timed(watch: Stopwatch | None = None) -> tuple[MeasuredStep, Flops | None]:
        """The next step, exactly as the training loop makes it, timed from asking for the data; its operations."""
        nonlocal images
        synchronize(device)
        began = time.perf_counter()
        step_plan, batches = next(steps)
        wait, images = loader.wait_seconds, len(step_plan.indices)
        reports.append(make_step(session, step_plan.step, batches))
        synchronize(device)
        step = divide(time.perf_counter() - began, wait, watch.seconds() if watch else {})
        return step, formula_of(session.engine, session.config, session.precision, batches).total

    with session.memory.watched(f"a step of {stream}", stream, lambda: f"micro-batches of {micro}"):
        for _ in range(warmup):
            timed()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        plain, hooked, flops = list[MeasuredStep](), list[MeasuredStep](), list[Flops | None]()
        watch = Stopwatch(device)
        for _ in range(count):
            step, operations = timed()
            plain.append(step)
            flops.append(operations)
            with metered(engine, watch):
                hooked.append(timed(watch)[0])
        peak, made = peak_memory(device), list(reports)
        several = distributed.world_size() > 1
        communication = asdict(measure_communication(timed, device)) if several else None

        # The last step: operations by part, counted and by formula, and bytes by kind.
        step_plan, batches = next(steps)
        ledger, meter, optimizer = Ledger(device.type), FlopMeter(), engine.deepspeed.optimizer
        note_residents(ledger, engine)
        ledger.forget_peaks()
        with (
            torch.compiler.set_stance("force_eager"),  # compiled kernels do not say what they compute
            metered(engine, _AtBackward(meter, ledger, optimizer)),
            meter.counting(),
            step_watched(ledger, engine.module, optimizer),
        ):
            make_step(session, step_plan.step, batches)
        steps.close()  # type: ignore[attr-defined]  # ends the loader's threads

    # Largest values of any micro-batch: mean number of objects per image, ids of the longest caption.
    content: dict[str, float] = {}
    for targets in (targets for batch in batches for targets in batch.targets.values()):
        if hasattr(targets, "counts"):
            content["objects"] = max(content.get("objects", 0), float(targets.counts.float().mean()))
        if hasattr(targets, "tokens"):
            content["caption_ids"] = max(content.get("caption_ids", 0), targets.tokens.shape[1])
    formula = formula_of(session.engine, session.config, session.precision, batches)
    known, seconds = [count for count in flops if count is not None], [step.seconds for step in plain]
    # Operations a second: "model" leaves out what activation checkpointing computes again, "hardware" includes it.
    model, hardware = None, meter.total / statistics.median(seconds)  # of a head without a formula the count stands
    if len(known) == len(flops):
        model = statistics.median((f.forward + f.backward) / s for f, s in zip(known, seconds, strict=True))
        hardware = statistics.median(f.all / s for f, s in zip(known, seconds, strict=True))
    rate = reference.flops_per_second
    first = [*made[:warmup], *made[warmup::2]]  # those without hooks
    return {
        "batch": {
            "images": images,
            "micro": micro,
            "accumulation": session.batches.accumulation,
            "shapes": [list(batch.images.shape) for batch in batches],
            "content": content,
        },
        "steps": {
            "measured": count,
            "warmup": warmup,
            "skipped": sum(report.skipped for report in made[warmup:]),
        },
        "losses": [dict(report.losses)["loss"] for report in first[:2]],
        "images_per_second": spread(images / step_seconds for step_seconds in seconds),
        "step_seconds": spread(seconds),
        "parts_seconds": typical_parts(hooked),
        "hooked_step_seconds": spread(step.seconds for step in hooked),
        "overhead": spread(h.seconds / p.seconds - 1 for p, h in zip(plain, hooked, strict=True)),
        "communication": communication,
        "memory_bytes": {"at_peak": ledger.at_peak, "highest": ledger.highest, "process_peak": peak},
        "flops": {
            "counted": {**meter.parts, "total": meter.total},
            "formula": _by_part(formula),
            "ratio": meter.total / formula.total.all if formula.total else None,
            "model_per_second": model,
            "hardware_per_second": hardware,
            "model_utilisation": None if model is None else model / rate,
            "hardware_utilisation": hardware / rate,
        },
        "reference": asdict(reference),
    }


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


def _by_part(formula: StepFormula) -> dict[str, int | None]:
    """Under the names of the parts of a step; "recomputed" is a part of the backward pass."""
    total = formula.total
    return {
        BACKBONE: formula.backbone.forward if formula.backbone else None,
        HEAD: formula.head.forward if formula.head else None,
        BACKWARD: total.backward + total.recompute if total else None,
        "recomputed": formula.backbone.recompute if formula.backbone else None,
        "total": total.all if total else None,
    }


# ------------------------------------------------------------------------------------------------------ record


def make_record(session: Session, ranks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that was measured; `ranks` holds task -> measurement of each rank."""
    config, device = session.config, session.engine.device
    tasks = {}
    for task in ranks[0]:
        measured = [rank[task] for rank in ranks]
        slowest = max(range(len(measured)), key=lambda rank: measured[rank]["step_seconds"]["median"])
        fullest = max(range(len(measured)), key=lambda rank: sum(measured[rank]["memory_bytes"]["at_peak"].values()))
        tasks[task] = {"slowest_rank": slowest, "fullest_rank": fullest, "ranks": measured}
    # Speed of a run that does every task as often as its ratio says.
    streams = config.visft.streams()
    all_shares = sum(stream.share for stream in streams.values())
    images = sum(s.share / all_shares * _slowest(tasks[name])["batch"]["images"] for name, s in streams.items())
    seconds = sum(s.share / all_shares * _slowest(tasks[name])["step_seconds"]["median"] for name, s in streams.items())
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(None, device),
        "world_size": distributed.world_size(),
        "stage": config.visft.stage,
        "trains": stage_of(config.visft).name,
        "model": config.visft.model.name,
        "engine": f"ZeRO-{session.engine.stage}",
        "precision": f"{session.precision} ({session.precision_reason})",
        "attention": describe_attention(session.engine.module.backbone, device, DTYPES[session.precision]),
        "differs_from_training": list(session.notes),
        "config": config.to_dict(),
        "tasks": tasks,
        "mix": {"step_seconds": seconds, "images_per_second": images / seconds},
    }


def _slowest(task: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = task["ranks"][task["slowest_rank"]]
    return found


# ------------------------------------------------------------------------------------------------------- tables


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record. Of several ranks the slowest one's times and the fullest one's memory are shown."""
    tasks, processes = record["tasks"], record["world_size"]
    count = f"{processes} process{'es' if processes > 1 else ''}"
    title = f"profile: stage {record['stage']} ({record['trains']}), {record['model']}, {record['engine']}, {count}"
    first = _slowest(next(iter(tasks.values())))
    rows = [
        *measured_on(record),
        ("precision", record["precision"]),
        ("attention", record["attention"]),
        ("recompute", record["config"]["visft"]["model"]["recompute"]),
        ("compared with", f"{first['reference']['flops_per_second'] / 1e12:.4g} TFLOP/s: {first['reference']['text']}"),
        *(("not as in training", note) for note in record["differs_from_training"]),
    ]
    sections = [Section("measured on", rows)]
    for name, task in tasks.items():
        fullest = task["ranks"][task["fullest_rank"]]
        numbers = _slowest(task)
        ranks = f" (rank {task['slowest_rank']}, the slowest)" if len(task["ranks"]) > 1 else ""
        sections += [
            Section(f"{name}: speed{ranks}", _speed_rows(numbers, processes)),
            Section(f"{name}: time of a step{ranks}", _time_rows(numbers), ("part", "ms", "share", "")),
            Section(f"{name}: memory of a process", _memory_rows(fullest), ("kind", "MiB at the peak", "most at once")),
            Section(f"{name}: operations of a process", _flop_rows(numbers), ("part", "counted", "formula", "ratio")),
        ]
    if len(tasks) > 1:
        mix = record["mix"]
        text = f"{mix['images_per_second']:.4g} images/s, {1000 * mix['step_seconds']:.4g} ms a step on average"
        sections.append(Section("all tasks in their ratios", [("speed", text)]))
    return title, sections


def _speed_rows(numbers: Mapping[str, Any], processes: int) -> list[tuple[str, str]]:
    batch, steps, flops = numbers["batch"], numbers["steps"], numbers["flops"]
    shapes = ", ".join(sorted({"x".join(map(str, shape)) for shape in batch["shapes"]}))
    equation = f"{processes} processes x {batch['accumulation']} accumulation x {batch['micro']}"
    reference = "the measured rate" if numbers["reference"]["measured"] else "the peak"
    hardware = f"{_rate(flops['hardware_per_second'])}, {100 * flops['hardware_utilisation']:.1f} % of {reference}"
    rows = [
        ("batch", f"{batch['images']} images = {equation}; at once {shapes}"),
        ("images/s", _spread(numbers["images_per_second"], 1, "")),
        ("step", _spread(numbers["step_seconds"], 1000, " ms")),
    ]
    if flops["model_per_second"] is None:
        rows.append(("FLOP/s", f"{hardware} (counted; backbone or head has no formula)"))
    elif flops["model_per_second"] == flops["hardware_per_second"]:
        rows.append(("FLOP/s, MFU", hardware))
    else:
        model = f"{_rate(flops['model_per_second'])}, {100 * flops['model_utilisation']:.1f} % of {reference}"
        rows += [("FLOP/s, MFU", f"{model} (without recomputation)"), ("with recomputation", hardware)]
    rows.append(("cost of looking", f"{_spread(numbers['overhead'], 100, ' %')} of hooked over plain steps"))
    if steps["skipped"]:
        rows.append(("skipped", f"{steps['skipped']} steps overflowed in 16 bit and did not update"))
    return rows


_MEANING = {
    "data wait": "until the batch was there",
    "optimizer": "clipping and update; ZeRO: gathering what other processes updated",
    BACKWARD: "with recomputation, if any; ZeRO: averaging gradients",
    "rest": "copies to the device, pixel normalisation, agreement of the ranks, Python",
}


def _time_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    parts = numbers["parts_seconds"]
    total = sum(parts[part] for part in PARTS)
    rows = [(part, parts[part], _MEANING.get(part, "")) for part in PARTS]
    rows.insert(1 + PARTS.index(CRITERION), (f"  of it {MATCHER}", parts[MATCHER], ""))
    rows.append(("whole", total, "mean of the middle half of the hooked steps"))
    found = numbers["communication"]
    if found is not None:
        calls = ", ".join(f"{count} {name}" for name, count in sorted(found["calls"].items())) or "no call"
        text = f"inside the parts above, from one other step ({found['backend']}: {calls})"
        rows.append(("communication", found["seconds"], text))
    return [
        (name, f"{1000 * seconds:9.2f}", f"{100 * seconds / total:5.1f} %", meaning) for name, seconds, meaning in rows
    ]


def _memory_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    memory = numbers["memory_bytes"]
    # Much of what is transient gets its name a moment later, so that its own maximum would count that twice.
    most = {kind: "" if kind == TRANSIENT else f"{memory['highest'][kind] / _MIB:11.2f}" for kind in KINDS}
    total = sum(memory["at_peak"].values())
    return [
        *((kind, f"{memory['at_peak'][kind] / _MIB:11.2f}", most[kind]) for kind in KINDS),
        ("whole", f"{total / _MIB:11.2f}", ""),
        ("process at its peak", f"{memory['process_peak'] / _MIB:11.2f}", ""),
    ]


def _flop_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    counted, formula = numbers["flops"]["counted"], numbers["flops"]["formula"]
    rows = []
    for part in (*(part for part in PARTS if part in counted or part in formula), "total", "recomputed"):
        ours, theirs = counted.get(part), formula.get(part)
        if part == "recomputed" and not theirs:
            continue
        ratio = f"{ours / theirs:.4f}" if ours and theirs else ""
        name = "  of backward recomputed" if part == "recomputed" else part
        if ours or theirs:
            rows.append((name, _operations(ours), _operations(theirs), ratio))
    return rows


def _spread(numbers: Mapping[str, Any], scale: float, unit: str) -> str:
    """Median, quartiles, extremes and n."""
    median, low, high, least, most = (scale * numbers[key] for key in ("median", "low", "high", "least", "most"))
    return (
        f"{median:.4g}{unit}  (quartiles {low:.4g} .. {high:.4g}, all {least:.4g} .. {most:.4g}, n {numbers['count']})"
    )


def _operations(number: int | None) -> str:
    return "" if number is None else f"{number / 1e9:12.3f} GFLOP"


def _rate(number: float) -> str:
    return f"{number / 1e12:.4g} TFLOP/s" if number >= 1e12 else f"{number / 1e9:.4g} GFLOP/s"
