"""Plan of a configuration on a cluster that need not be there: what fits, with which settings, how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from visft_ds.config import resolve
from visft_ds.monitor.console import Section
from visft_ds.planner.cluster import parse_cluster
from visft_ds.planner.search import SearchArm, forecast, search

FORMAT, VERSION = "visft_ds plan", 1
_GIB = 2**30


def make_plans(
    text: str, models: Sequence[str], stages: Sequence[int], engine: str | None, settings: Sequence[str]
) -> dict[str, Any]:
    """Plans of all models and stages on a cluster; returns a record of JSON values.

    Args:
        text: names the cluster, or its file.
        engine: planned as it is configured; None: the fastest settings of each one are searched.

    Raises:
        ValueError: what a user can mend.
    """
    cluster = parse_cluster(text)
    plans = []
    for model in models:
        for stage in stages:
            config = resolve(stage=stage, model=model, engine=engine or "zero1", settings=settings)
            arms = [forecast(config, cluster, (f"--engine {engine}",))] if engine else search(config, cluster)
            plans.append({"model": model, "stage": stage, "arms": [_arm_record(arm) for arm in arms]})
    hardware = {"count": cluster.count, "link": cluster.link, **asdict(cluster.gpu)}
    return {"format": FORMAT, "version": VERSION, "cluster": hardware, "plans": plans}


def _arm_record(arm: SearchArm) -> dict[str, Any]:
    return {
        "flags": list(arm.flags),
        "engine": arm.engine,
        "recomputed": arm.policy,
        "accumulation": arm.accumulation,
        "fits": arm.fits,
        "capacity": arm.capacity,
        "images_per_second": arm.images_per_second,
        "step_seconds": arm.step_seconds,
        "steps": arm.steps,
        "hours": arm.hours,
        "of_limit": arm.of_limit,
        "streams": {
            name: {
                "images": stream.images,
                "micro": stream.micro,
                "memory": {**asdict(stream.memory), "total": stream.memory.total},
                "seconds": {**asdict(stream.time), "total": stream.time.total},
                "images_per_second": stream.images_per_second,
                "limit_seconds": stream.limit,
            }
            for name, stream in arm.streams.items()
        },
    }


_ARM_HEAD = ("engine", "recomputed", "accumulation", "fits", "fullest", "images/s", "hours", "of the peak")
_MEMORY_HEAD = ("step", "weights", "grads", "optimizer", "buckets", "gathered", "activations", "transient", "GiB")
_TIME_HEAD = ("step", "images", "at once", "seconds", "communication", "waiting", "images/s", "of the peak")


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, for each model and stage: the arms, and of the best one memory by part and time of each kind of step)."""
    sections, cluster = [], record["cluster"]
    for plan in record["plans"]:
        name = f"{plan['model']}, stage {plan['stage']}"
        if not plan["arms"]:
            sections.append(Section(name, [("nothing", "no engine divides these batches over so many GPUs")]))
            continue
        best = plan["arms"][0]
        rows: list[tuple[str, ...]] = [
            (
                arm["engine"],
                arm["recomputed"],
                str(arm["accumulation"]),
                "yes" if arm["fits"] else "NO",
                f"{max(stream['memory']['total'] for stream in arm['streams'].values()) / _GIB:.1f} GiB",
                f"{arm['images_per_second']:.4g}",
                f"{arm['hours']:.1f}",
                f"{100 * arm['of_limit']:.0f} %",
            )
            for arm in plan["arms"]
        ]
        sections.append(Section(name, rows, _ARM_HEAD))
        title = f"{name}, {best['engine']}: GiB of a GPU by part ({best['capacity'] / _GIB:.1f} may be filled)"
        rows = [
            (step, *(f"{size / _GIB:.2f}" for size in stream["memory"].values()))
            for step, stream in best["streams"].items()
        ]
        sections.append(Section(title, rows, _MEMORY_HEAD))
        rows = [
            (
                step,
                str(stream["images"]),
                str(stream["micro"]),
                f"{stream['seconds']['total']:.3f}",
                f"{stream['seconds']['communication']:.3f}",
                f"{stream['seconds']['waiting']:.3f}",
                f"{stream['images_per_second']:.4g}",
                f"{100 * stream['limit_seconds'] / stream['seconds']['total']:.0f} %",
            )
            for step, stream in best["streams"].items()
        ]
        rows.append(("mix", "", "", f"{best['step_seconds']:.3f}", "", "", f"{best['images_per_second']:.4g}", ""))
        sections.append(Section(f"{name}, {best['engine']}: time", rows, _TIME_HEAD))
        sections.append(Section(f"{name}, {best['engine']}: flags", [("visft train", " ".join(best["flags"]))]))
    return f"plan: {cluster['count']}x{cluster['name']}, predicted", sections
