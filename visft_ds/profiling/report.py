"""The result of a measurement, as a record of JSON values and as tables made from that record."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from visft_ds.costs.hardware import DTYPES, describe
from visft_ds.costs.ledger import KINDS, TRANSIENT
from visft_ds.monitor.console import Section
from visft_ds.monitor.metrics import git_revision, versions
from visft_ds.ops.attention import attention_backend
from visft_ds.parallel import distributed
from visft_ds.prepare.model import stage_of
from visft_ds.profiling.record import REPOSITORY
from visft_ds.profiling.session import Session
from visft_ds.profiling.timing import BACKWARD, CRITERION, MATCHER, PARTS

FORMAT, VERSION = "visft_ds profile", 1
_MIB = 2**20


def make_record(session: Session, ranks: Sequence[Mapping[str, Any]], command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured; `ranks` holds task -> measurement of each rank."""
    config, device = session.config, session.engine.device
    tasks = {}
    for task in ranks[0]:
        measured = [rank[task] for rank in ranks]
        slowest = max(range(len(measured)), key=lambda rank: measured[rank]["step_seconds"]["median"])
        fullest = max(range(len(measured)), key=lambda rank: sum(measured[rank]["memory_bytes"]["at_peak"].values()))
        tasks[task] = {"slowest_rank": slowest, "fullest_rank": fullest, "ranks": measured}
    return {
        "format": FORMAT,
        "version": VERSION,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": list(command),
        "versions": versions(),
        "git": git_revision(REPOSITORY),
        "hardware": describe(device),
        "world_size": distributed.world_size(),
        "stage": config.visft.stage,
        "trains": stage_of(config.visft).name,
        "model": config.visft.model.name,
        "engine": f"ZeRO-{session.engine.stage}",
        "precision": f"{session.precision} ({session.precision_reason})",
        "attention": ": ".join(attention_backend(device, DTYPES[session.precision])),
        "differs_from_training": list(session.notes),
        "config": config.to_dict(),
        "tasks": tasks,
        "mix": _mix(config.visft.streams(), tasks),
    }


def _mix(tasks: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, float]:
    """Speed of a run that does every task as often as its ratio says."""
    total = sum(task.share for task in tasks.values())
    images = seconds = 0.0
    for name, task in tasks.items():
        numbers = _slowest(measured[name])
        images += task.share / total * numbers["batch"]["images"]
        seconds += task.share / total * numbers["step_seconds"]["median"]
    return {"step_seconds": seconds, "images_per_second": images / seconds}


def _slowest(task: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = task["ranks"][task["slowest_rank"]]
    return found


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: stage, what trains, model, engine and number of processes."""
    stage, processes = record["stage"], record["world_size"]
    count = f"{processes} process{'es' if processes > 1 else ''}"
    return f"profile: stage {stage} ({record['trains']}), {record['model']}, {record['engine']}, {count}"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables. Of several ranks the slowest one's times and the fullest one's memory are shown."""
    hardware, tasks = record["hardware"], record["tasks"]
    first = _slowest(next(iter(tasks.values())))
    rows = [
        ("device", f"{hardware['device']}, {hardware['threads']} CPU threads of {hardware['cores']} cores"),
        ("precision", record["precision"]),
        ("attention", record["attention"]),
        ("compared with", f"{first['reference']['flops_per_second'] / 1e12:.4g} TFLOP/s: {first['reference']['text']}"),
        *(("not as in training", note) for note in record["differs_from_training"]),
    ]
    sections = [Section("measured on", rows)]
    for name, task in tasks.items():
        fullest = task["ranks"][task["fullest_rank"]]
        numbers = _slowest(task)
        ranks = f" (rank {task['slowest_rank']}, the slowest)" if len(task["ranks"]) > 1 else ""
        sections += [
            Section(f"{name}: speed{ranks}", _speed_rows(numbers, record["world_size"])),
            Section(f"{name}: time of a step{ranks}", _time_rows(numbers), ("part", "ms", "share", "")),
            Section(f"{name}: memory of a process", _memory_rows(fullest), ("kind", "MiB at the peak", "most at once")),
            Section(f"{name}: operations of a process", _flop_rows(numbers), ("part", "counted", "formula", "ratio")),
        ]
    if len(tasks) > 1:
        mix = record["mix"]
        text = f"{mix['images_per_second']:.4g} images/s, {1000 * mix['step_seconds']:.4g} ms a step on average"
        sections.append(Section("all tasks in their ratios", [("speed", text)]))
    return sections


def _speed_rows(numbers: Mapping[str, Any], processes: int) -> list[tuple[str, str]]:
    batch, steps, flops = numbers["batch"], numbers["steps"], numbers["flops"]
    equation = f"{processes} processes x {batch['accumulation']} accumulation x {batch['micro']}"
    reference = "the measured rate" if numbers["reference"]["measured"] else "the peak"
    hardware = f"{_rate(flops['hardware_per_second'])}, {100 * flops['hardware_utilisation']:.1f} % of {reference}"
    rows = [
        ("batch", f"{batch['images']} images = {equation}; at once {_shapes(batch['shapes'])}"),
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
    whole = sum(parts[part] for part in PARTS)
    rows = []
    for part in PARTS:
        rows.append(_time_row(part, parts[part], whole, _MEANING.get(part, "")))
        if part == CRITERION:
            rows.append(_time_row("  of it " + MATCHER, parts[MATCHER], whole, ""))
    rows.append(_time_row("whole", whole, whole, "mean of the middle half of the hooked steps"))
    found = numbers["communication"]
    if found is not None:
        calls = ", ".join(f"{count} {name}" for name, count in sorted(found["calls"].items())) or "no call"
        text = f"inside the parts above, from one other step ({found['backend']}: {calls})"
        rows.append(_time_row("communication", found["seconds"], whole, text))
    return rows


def _time_row(name: str, seconds: float, whole: float, meaning: str) -> tuple[str, str, str, str]:
    return name, f"{1000 * seconds:9.2f}", f"{100 * seconds / whole:5.1f} %", meaning


def _memory_rows(numbers: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    memory = numbers["memory_bytes"]
    # Much of what is transient gets its name a moment later, so that its own maximum would count that twice.
    most = {kind: "" if kind == TRANSIENT else f"{memory['highest'][kind] / _MIB:11.2f}" for kind in KINDS}
    rows = [(kind, f"{memory['at_peak'][kind] / _MIB:11.2f}", most[kind]) for kind in KINDS]
    whole = sum(memory["at_peak"].values()) / _MIB
    return [
        *rows,
        ("whole", f"{whole:11.2f}", ""),
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


def _shapes(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(sorted({"x".join(map(str, shape)) for shape in shapes}))


def _operations(number: int | None) -> str:
    return "" if number is None else f"{number / 1e9:12.3f} GFLOP"


def _rate(number: float) -> str:
    return f"{number / 1e12:.4g} TFLOP/s" if number >= 1e12 else f"{number / 1e9:.4g} GFLOP/s"
