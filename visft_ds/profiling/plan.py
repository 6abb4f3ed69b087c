"""Plan of a configuration on a cluster that need not be there: what fits, with which settings, how long it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from visft_ds.config import resolve
from visft_ds.monitor.console import Section
from visft_ds.planner.cluster import parse_cluster
from visft_ds.planner.search import SearchArm, fewer_are_faster, forecast, scaling, search, with_batches

FORMAT, VERSION = "visft_ds plan", 2
_GIB = 2**30
#: Of the configured images a step, in the table of `--scaling`.
FACTORS = (1, 4, 16, 64, 256)


def make_plans(
    text: str,
    models: Sequence[str],
    stages: Sequence[int],
    engine: str | None,
    settings: Sequence[str],
    network: str | None = None,
    *,
    scales: bool = False,
    backbone: Mapping[str, tuple[str, Any]] | None = None,
) -> dict[str, Any]:
    """Plans of all models and stages on a cluster; returns a record of JSON values.

    Args:
        text: names the cluster, or its file.
        engine: planned as it is configured; None: the fastest settings of each one are searched.
        network: of a machine, as `--network`; None: as the cluster's kind of machine has it.
        scales: instead of plans, what more GPUs and more images a step are worth.
        backbone: flags for `resolve` that replace the models' own.

    Raises:
        ValueError: what a user can mend.
    """
    cluster = parse_cluster(text, network)
    plans: list[dict[str, Any]] = []
    for model in models:
        for stage in stages:
            config = resolve(stage=stage, model=model, engine=engine or "zero1", settings=settings, flags=backbone)
            plan: dict[str, Any] = {"model": model, "stage": stage, "arms": [], "scaling": [], "fewer": None}
            plans.append(plan)
            if scales:
                images = min(stream.batch_size for stream in config.visft.streams().values())
                plan["scaling"] = [
                    {"images": images * factor, "factor": factor, "gpus": arm.count, **_arm_record(arm)}
                    for factor, arm in scaling(config, cluster, FACTORS)
                ]
                continue
            arms = [forecast(config, cluster, (f"--engine {engine}",))] if engine else search(config, cluster)
            plan["arms"] = [_arm_record(arm) for arm in arms]
            if fewer := fewer_are_faster(config, cluster, arms[0] if arms else None):
                larger = with_batches(fewer, cluster, cluster.count // fewer.count)
                plan["fewer"] = {"gpus": fewer.count, **_arm_record(fewer), "larger": _arm_record(larger)}
    hardware = {"count": cluster.count, "per_node": cluster.per_node, **asdict(cluster.gpu), "network": cluster.network}
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
        if plan["scaling"]:
            sections.append(_scaling_table(name, plan["scaling"]))
            continue
        if not plan["arms"]:
            why = "no engine divides these batches over so many GPUs and fits"
            sections.append(Section(name, [("nothing", why)]))
            sections += _fewer_section(name, cluster, plan)
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
        sections += _fewer_section(name, cluster, plan)
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
    over = f" in machines of {cluster['per_node']} with a network of {cluster['network'] / 1e9:g} GB/s"
    where = over if cluster["count"] > cluster["per_node"] else ""
    return f"plan: {cluster['count']}x{cluster['name']}{where}, predicted", sections


def _fewer_section(name: str, cluster: Mapping[str, Any], plan: Mapping[str, Any]) -> list[Section]:
    """Fewer GPUs that do more than all of them, and batches that would use all; empty where there are none."""
    if (fewer := plan["fewer"]) is None:
        return []
    all_gpus, larger = cluster["count"], fewer["larger"]
    rate = f"{plan['arms'][0]['images_per_second']:.4g}" if plan["arms"] and plan["arms"][0]["fits"] else "no"
    rows = [
        (f"{all_gpus} GPUs", f"{rate} images/s: the batches are too small for so many"),
        (f"{fewer['gpus']} of them", f"{fewer['images_per_second']:.4g} images/s ({fewer['engine']})"),
        (
            f"{all_gpus // fewer['gpus']} times the images a step",
            f"{larger['images_per_second']:.4g} images/s on all {all_gpus}; learning rates belong to the old batches",
        ),
        ("visft train", " ".join(larger["flags"])),
    ]
    return [Section(f"{name}: fewer GPUs are faster", rows)]


def _scaling_table(name: str, arms: Sequence[Mapping[str, Any]]) -> Section:
    """Images a second, and hours for as many images as the schedule has, by GPUs, engine and images a step."""
    cells: dict[tuple[int, str], dict[int, Mapping[str, Any]]] = {}
    for arm in arms:
        row = cells.setdefault((arm["gpus"], arm["engine"].partition(" ")[0]), {})
        row[arm["images"]] = max(row.get(arm["images"], arm), arm, key=lambda one: one["images_per_second"])
    sizes = sorted({arm["images"] for arm in arms})
    rows = []
    for (gpus, engine), row in sorted(cells.items()):
        texts = [
            f"{row[size]['images_per_second']:.4g} ({row[size]['hours'] / row[size]['factor']:.3g} h)"
            if size in row
            else "-"
            for size in sizes
        ]
        rows.append((str(gpus), engine, *texts))
    head = ("GPUs", "engine", *(f"{size} a step" for size in sizes))
    return Section(f"{name}: images/s (hours for the schedule's images)", rows, head)
