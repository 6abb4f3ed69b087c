"""`visft plan`: does a configuration fit a cluster that need not be here, and how long does it take?

Exit status: 0 planned, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from visft_ds.flags import Command
from visft_ds.resilience.errors import tell

_GIB = 2**30
_EPILOG = """--cluster takes COUNTxNAME[-MEMORY] (machines of 8) or MACHINESxGPUSxNAME[-MEMORY].

examples:
  visft plan --cluster 8xV100-32GB
  visft plan --cluster 8x4090 --model eva_g --stage 2
  visft plan --cluster 8xA100-80GB --stage 2 --engine zero1 --set visft.model.recompute=block
  visft plan --cluster 8x8xH100 --network 25
"""


def build_parser() -> Command:
    """The parser."""
    parser = Command("plan", "Predict memory and time of both stages, and find the fastest settings that fit.", _EPILOG)
    add = parser.add_argument
    add("--cluster", metavar="SPEC", required=True, help="such as 8xA100-80GB, 8x8xH100 (machines x GPUs), 8x4090")
    add("--network", type=float, metavar="GB/s", help="of a machine, one way (as machines with such GPUs are sold)")
    add("--model", metavar="NAME|FILE", help="as in visft train (eva_e and eva_g)")
    add("--backbone", metavar="NAME|FILE", help="as in visft train; of its files only config.json is needed")
    add("--download", action="store_true", help="fetch that from the hub")
    add("--stage", type=int, choices=(1, 2), help="(both)")
    add("--engine", metavar="NAME|FILE", help="plan this one as configured, search nothing")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in visft train")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, print, write; returns the exit status."""
    try:
        options = build_parser().parse_args(arguments)
        record = make_plans(options)
        print(render(record), flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        return tell(error)
    return 0


def make_plans(options: argparse.Namespace) -> dict[str, Any]:
    """Plans of all models and stages on a cluster, as JSON values. Raises ValueError: what a user can mend."""
    from visft_ds.config import resolve  # these import torch, which costs seconds
    from visft_ds.config.backbones import model_of, named
    from visft_ds.planner.hardware import parse_cluster
    from visft_ds.planner.search import forecast, search

    cluster = parse_cluster(options.cluster, options.network)
    model, flags = options.model, None
    if options.backbone is not None:
        model, flags = model_of(named(options.backbone, download=options.download), model)
    plans: list[dict[str, Any]] = []
    for name in [model] if model else ["eva_e", "eva_g"]:
        for stage in [options.stage] if options.stage else [1, 2]:
            engine = options.engine or "zero1"
            config = resolve(stage=stage, model=name, engine=engine, settings=options.set, flags=flags)
            arms = [forecast(config, cluster, (f"--engine {engine}",))] if options.engine else search(config, cluster)
            plans.append({"model": name, "stage": stage, "arms": [asdict(arm) for arm in arms]})
    return {"cluster": asdict(cluster), "plans": plans}


def render(record: dict[str, Any]) -> str:
    """For each model and stage: the engines, and of the fastest one the memory and the time of each kind of step."""
    cluster = record["cluster"]
    network = f" in machines of {cluster['per_node']} with {cluster['network']:g} GB/s between them"
    several = network if cluster["count"] > cluster["per_node"] else ""
    lines = [f"{cluster['count']}x{cluster['gpu']['name']}{several}, predicted"]
    for plan in record["plans"]:
        lines += ["", f"{plan['model']}, stage {plan['stage']}"]
        if not plan["arms"]:
            lines.append("  no engine divides these batches over so many GPUs and fits")
            continue
        lines.append(
            f"  {'engine':24}{'recomputed':>12}{'accumulation':>14}{'fits':>6}{'GiB':>8}{'images/s':>10}{'hours':>8}"
            f"{'of peak':>9}"
        )
        for arm in plan["arms"]:
            fits = "yes" if arm["needed"] <= arm["capacity"] else "NO"
            lines.append(
                f"  {arm['engine']:24}{arm['recomputed']:>12}{arm['accumulation']:14}{fits:>6}"
                f"{arm['needed'] / _GIB:8.1f}{arm['images_per_second']:10.4g}{arm['hours']:8.1f}{arm['of_limit']:9.0%}"
            )
        best = plan["arms"][0]
        lines.append(f"  {best['engine']}: GiB by part (at most {best['capacity'] / _GIB:.1f}), seconds by part")
        for name, stream in best["streams"].items():
            memory = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in stream["memory"].items() if size)
            seconds = ", ".join(f"{part} {spent:.3g}" for part, spent in stream["seconds"].items() if spent)
            lines.append(f"    {name}: {stream['images']} images a step, {stream['micro']} at once on a GPU")
            lines += [f"      {memory}", f"      {seconds}"]
        lines.append(f"  visft train {' '.join(best['flags'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
