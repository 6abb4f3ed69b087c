"""What one frozen forward for several heads is worth: steps of each task alone beside steps that all tasks share.

All kinds of steps are made by one engine, in turn, so that nothing but the step itself differs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from visft_ds.config import ResolvedConfig
from visft_ds.config.task_schema import SHARED
from visft_ds.costs.hardware import describe
from visft_ds.monitor.console import Section
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.profiling.session import Session, make_step, open_session
from visft_ds.profiling.timing import BACKBONE, Spread, Stopwatch, clock, metered, synchronize

FORMAT, VERSION = "visft_ds sharing profile", 1


def measure_sharing(config: ResolvedConfig, *, repeats: int, synthetic: bool) -> dict[str, Any] | None:
    """Seconds of an image in each kind of step; on the main process, None on the others.

    On a CPU they are processor time, which depends little on what else the machine does. Every kind works on one
    micro-batch, as large as the configuration's `micro_batch` of its stream.

    Raises:
        ValueError: fewer than two tasks, no settings of the shared kind, a stage that trains the backbone.
    """
    tasks = tuple(config.visft.tasks.enabled())
    if config.visft.stage != 1 or len(tasks) < 2 or config.visft.shared is None:
        raise ValueError(
            "sharing is measured in stage 1, with two tasks or more and visft.shared: give --stage 1 and, with a file "
            "of your own, these settings"
        )
    with open_session(_one_micro_batch(config), synthetic=synthetic) as session, ExitStack() as stack:
        kinds = {**_streams(session, "sampled"), **_streams(session, "shared")}
        steps = {name: kind.loader.steps(0) for name, kind in kinds.items()}
        for iterator in steps.values():
            stack.callback(iterator.close)  # ends the loader's threads
        device, made = session.engine.device, 0
        seconds: dict[str, list[float]] = {name: [] for name in kinds}
        backbone: dict[str, list[float]] = {name: [] for name in kinds}
        images = {name: 0 for name in kinds}
        for turn in range(repeats + 1):
            for name, iterator in steps.items():
                whole, batches = next(iterator)
                watch = Stopwatch(device)
                synchronize(device)
                began, before = time.perf_counter(), clock(device)
                with metered(session.engine, watch):
                    make_step(kinds[name], made, batches)
                synchronize(device)
                wall, busy = time.perf_counter() - began, clock(device) - before
                made += 1
                if turn:  # the first turn warms up
                    seconds[name].append(busy)
                    backbone[name].append(watch.seconds()[BACKBONE] / wall * busy)
                images[name] = len(whole.indices)
        record = _record(session, tasks, images, seconds, backbone)
    distributed.close()
    return record if distributed.is_main() else None


def _one_micro_batch(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration with one micro-batch to a step: accumulation is one number for an engine."""
    visft, world = config.visft, distributed.world_size()
    tasks = {
        name: None if task is None else task.model_copy(update={"batch_size": task.micro_batch * world})
        for name, task in ((name, getattr(visft.tasks, name)) for name in type(visft.tasks).model_fields)
    }
    assert visft.shared is not None
    shared = visft.shared.model_copy(update={"batch_size": visft.shared.micro_batch * world})
    update = {"tasks": visft.tasks.model_copy(update=tasks), "shared": shared, "mode": "sampled"}
    return replace(config, visft=visft.model_copy(update=update))


def _streams(session: Session, mode: str) -> dict[str, Any]:
    """The runs of all streams of a mode, on the session's engine."""
    visft = session.config.visft.model_copy(update={"mode": mode})
    as_if = replace(session, config=replace(session.config, visft=visft))
    return {name: as_if.of_stream(name) for name in visft.streams()}


def _record(
    session: Session,
    tasks: Sequence[str],
    images: Mapping[str, int],
    seconds: Mapping[str, Sequence[float]],
    backbone: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        name: {
            "images": images[name],
            "head_updates_per_forward": len(tasks) if name == SHARED else 1,
            "step_seconds": asdict(Spread.of(list(times))),
            "seconds_per_image": Spread.of(list(times)).median / images[name],
            "backbone_share": sum(backbone[name]) / sum(times),
        }
        for name, times in seconds.items()
    }
    alone = sum(kinds[task]["seconds_per_image"] for task in tasks)
    turns = zip(*(seconds[name] for name in (*tasks, SHARED)), strict=True)
    counts = [images[name] for name in (*tasks, SHARED)]
    ratios = [
        sum(one / count for one, count in zip(apart, counts[:-1], strict=True)) / (shared / counts[-1])
        for *apart, shared in turns
    ]
    return {
        "format": FORMAT,
        "version": VERSION,
        "hardware": describe(session.engine.device),
        "versions": versions(),
        "model": session.config.visft.model.name,
        "notes": list(session.notes),
        "tasks": list(tasks),
        "kinds": kinds,
        "seconds_apart": alone,
        "ratio": alone / kinds[SHARED]["seconds_per_image"],
        "ratios": asdict(Spread.of(ratios)),
        "clock": "processor time" if session.engine.device.type == "cpu" else "wall clock",
    }


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return f"profile: one forward for {len(record['tasks'])} heads, {record['model']}"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    rows = [
        (
            name,
            f"{kind['images']}",
            f"{kind['head_updates_per_forward']}",
            f"{1e3 * kind['step_seconds']['median']:.0f}",
            f"{1e3 * kind['seconds_per_image']:.1f}",
            f"{100 * kind['backbone_share']:.0f} %",
        )
        for name, kind in record["kinds"].items()
    ]
    head = ("steps", "images", "head updates per forward", "ms per step", "ms per image", "backbone")
    shared, spread = record["kinds"][SHARED]["seconds_per_image"], record["ratios"]
    text = (
        f"{1e3 * record['seconds_apart']:.1f} ms in {len(record['tasks'])} runs, {1e3 * shared:.1f} ms shared: "
        f"{record['ratio']:.2f} times as fast (turn by turn {spread['low']:.2f} .. {spread['high']:.2f}, "
        f"n {spread['count']}; {record['clock']})"
    )
    notes = [("-", note) for note in record["notes"]]
    sections = [Section("kinds of steps", rows, head), Section("every head taught by one image", [("cost", text)])]
    return [*sections, Section("notes", notes)] if notes else sections
