"""The sub-command `plan` of `visft profile`: a configuration on a cluster that need not be there."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visft_ds.config import ResolvedConfig, resolve
from visft_ds.config.resolve import available
from visft_ds.monitor.console import Section
from visft_ds.profiling.command import _check_all_known, _check_folder, _command, _show

FORMAT, VERSION = "visft_ds plan", 1
_GIB = 2**30

_EPILOG = """--cluster takes COUNTxNAME[-MEMORY] of the GPUs that are known, or a JSON file (docs/planner.md).

examples:
  visft plan --cluster 8xV100-32GB
  visft plan --cluster 8x4090 --model eva_g --stage 2
  visft plan --cluster 8xA100-80GB --stage 2 --engine zero1 --set visft.model.checkpoint_every=1
  visft plan --validate
  deepspeed --num_gpus 2 --module visft_ds plan --validate
"""


def add_plan_parser(commands: Any) -> None:
    """Add the sub-command that plans."""
    parser = _command(
        commands,
        "plan",
        help="memory and time on a cluster one does not have: what fits, with which settings, how long it takes",
        description="Predict memory by part and time of both stages, and find the fastest settings that fit.",
        epilog=_EPILOG,
    )
    parser.add_argument("--cluster", metavar="SPEC", help="such as 8xA100-80GB, 1xH100, 8x4090, or FILE.json")
    parser.add_argument("--model", choices=available("models"), help="(eva_e and eva_g)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="(both)")
    parser.add_argument("--engine", choices=available("engines"), help="plan this one as configured, search nothing")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in visft train")
    parser.add_argument("--validate", action="store_true", help="compare predictions with measurements on this machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.set_defaults(run=profile_plan)


def profile_plan(options: argparse.Namespace, rest: Sequence[str], command: Sequence[str]) -> int:
    """Plan or validate, print, write. Returns 1 where a prediction of memory is off by more than 10 %, else 0.

    Raises:
        ValueError: what a user can mend.
    """
    _check_all_known(rest, options)
    _check_folder(options.json)
    if options.validate == bool(options.cluster):
        raise ValueError("plan: give --cluster SPEC, or --validate")
    if options.validate:
        return _validate(options.json, command)
    from visft_ds.planner.cluster import parse_cluster
    from visft_ds.planner.search import SearchArm, forecast, search

    cluster = parse_cluster(options.cluster)
    plans = []
    for model in [options.model] if options.model else ["eva_e", "eva_g"]:
        for stage in [options.stage] if options.stage else [1, 2]:
            config = resolve(stage=stage, model=model, engine=options.engine or "zero1", settings=options.set)
            arms: list[SearchArm] = (
                [forecast(config, cluster, (f"--engine {options.engine}",))]
                if options.engine
                else search(config, cluster)
            )
            plans.append({"model": model, "stage": stage, "arms": [_arm_record(config, arm) for arm in arms]})
    record = {
        "format": FORMAT,
        "version": VERSION,
        "command": list(command),
        "cluster": {"count": cluster.count, "link": cluster.link, **asdict(cluster.gpu)},
        "plans": plans,
    }
    _show(record, make_title, make_sections, options.json)
    return 0


def _validate(file: Path | None, command: Sequence[str]) -> int:
    from visft_ds.parallel import distributed
    from visft_ds.profiling import plan_validation

    record = plan_validation.validate()
    distributed.close()
    if record is None:
        return 0
    _show(record | {"command": list(command)}, plan_validation.make_title, plan_validation.make_sections, file)
    return 0 if record["largest_error"] <= plan_validation.TOLERANCE else 1


def _arm_record(config: ResolvedConfig, arm: Any) -> dict[str, Any]:
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
                "images": one.images,
                "micro": one.micro,
                "memory": {**asdict(one.memory), "total": one.memory.total},
                "seconds": {**asdict(one.time), "total": one.time.total},
                "images_per_second": one.images_per_second,
                "limit_seconds": one.limit,
            }
            for name, one in arm.streams.items()
        },
    }


def make_title(record: Mapping[str, Any]) -> str:
    """Title of the tables: number and name of the GPUs."""
    cluster = record["cluster"]
    return f"plan: {cluster['count']}x{cluster['name']}, predicted"


_ARM_HEAD = ("engine", "computed again", "accumulation", "fits", "fullest", "images/s", "hours", "of the peak")
_MEMORY_HEAD = ("step", "weights", "grads", "optimizer", "buckets", "gathered", "activations", "transient", "GiB")
_TIME_HEAD = ("step", "images", "at once", "seconds", "communication", "waiting", "images/s", "of the peak")


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """For each model and stage: the arms, and of the best one memory by part and time of each kind of step."""
    sections = []
    for plan in record["plans"]:
        name = f"{plan['model']}, stage {plan['stage']}"
        if not plan["arms"]:
            sections.append(Section(name, [("nothing", "no engine divides these batches over so many GPUs")]))
            continue
        best = plan["arms"][0]
        sections.append(Section(name, [_arm_row(arm) for arm in plan["arms"]], _ARM_HEAD))
        title = f"{name}, {best['engine']}: GiB of a GPU by part ({best['capacity'] / _GIB:.1f} may be filled)"
        sections.append(Section(title, [_memory_row(*pair) for pair in best["streams"].items()], _MEMORY_HEAD))
        rows = [_time_row(*pair) for pair in best["streams"].items()]
        rows.append(("mix", "", "", f"{best['step_seconds']:.3f}", "", "", f"{best['images_per_second']:.4g}", ""))
        sections.append(Section(f"{name}, {best['engine']}: time", rows, _TIME_HEAD))
        sections.append(Section(f"{name}, {best['engine']}: flags", [("visft train", " ".join(best["flags"]))]))
    return sections


def _arm_row(arm: Mapping[str, Any]) -> tuple[str, ...]:
    fullest = max(one["memory"]["total"] for one in arm["streams"].values())
    return (
        arm["engine"],
        arm["recomputed"],
        str(arm["accumulation"]),
        "yes" if arm["fits"] else "NO",
        f"{fullest / _GIB:.1f} GiB",
        f"{arm['images_per_second']:.4g}",
        f"{arm['hours']:.1f}",
        f"{100 * arm['of_limit']:.0f} %",
    )


def _memory_row(name: str, stream: Mapping[str, Any]) -> tuple[str, ...]:
    return name, *(f"{size / _GIB:.2f}" for size in stream["memory"].values())


def _time_row(name: str, stream: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = stream["seconds"]
    return (
        name,
        str(stream["images"]),
        str(stream["micro"]),
        f"{seconds['total']:.3f}",
        f"{seconds['communication']:.3f}",
        f"{seconds['waiting']:.3f}",
        f"{stream['images_per_second']:.4g}",
        f"{100 * stream['limit_seconds'] / seconds['total']:.0f} %",
    )
