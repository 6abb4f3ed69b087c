"""`visft plan`: does a configuration fit a cluster that need not be here, and how long does it take?

Exit status: 0 planned, 2 wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from visft_ds.config import resolve
from visft_ds.config.backbones import model_of, named
from visft_ds.flags import Command
from visft_ds.monitor.console import Section, print_plan
from visft_ds.resilience.errors import tell

if TYPE_CHECKING:
    from visft_ds.planner.search import SearchArm

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
    add("--network", type=float, metavar="GB/s", help="bandwidth of a machine, one way (default: usual for the GPU)")
    add("--model", metavar="NAME|FILE", help="as in visft train (eva_e and eva_g)")
    add("--backbone", metavar="NAME|FILE", help="as in visft train; of its files only config.json is needed")
    add("--download", action="store_true", help="download config.json from the hub")
    add("--stage", type=int, choices=(1, 2), help="stage to plan (both)")
    add("--engine", metavar="NAME|FILE", help="plan this engine as configured, without a search")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in visft train")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and print; returns the exit status."""
    try:
        options = build_parser().parse_args(arguments)
        from visft_ds.planner.hardware import parse_cluster  # these import torch, which costs seconds
        from visft_ds.planner.search import forecast, search

        cluster = parse_cluster(options.cluster, options.network)
        machines = f" in machines of {cluster.per_node} with {cluster.network:g} GB/s between them"
        where = f"{cluster.count}x{cluster.gpu.name}{machines if cluster.count > cluster.per_node else ''}"
        model, flags, engine = options.model, None, options.engine or "zero1"
        if options.backbone is not None:
            model, flags = model_of(named(options.backbone, download=options.download), model)
        for name in [model] if model else ["eva_e", "eva_g"]:
            for stage in [options.stage] if options.stage else [1, 2]:
                config = resolve(stage=stage, model=name, engine=engine, settings=options.set, flags=flags)
                stated = [f"--engine {engine}"]
                arms = [forecast(config, cluster, stated)] if options.engine else search(config, cluster)
                print_arms(f"{name}, stage {stage}, as predicted on {where}", arms)
    except (ValueError, OSError) as error:
        return tell(error)
    return 0


def print_arms(title: str, arms: Sequence[SearchArm]) -> None:
    """Print the engines; of the first one memory and time of each kind of step, and the command that trains with it."""
    if not arms:
        print_plan(title, [Section("no engine divides these batches over so many GPUs and fits", ())])
        return
    columns, rows = ("engine", "recomputed", "accumulation", "fits", "GiB", "images/s", "hours", "of peak"), []
    for arm in arms:
        fits, memory = "yes" if arm.fits else "NO", f"{arm.needed / _GIB:.1f}"
        speed = f"{arm.images_per_second:.4g}", f"{arm.hours:.1f}", f"{arm.of_limit:.0%}"
        recomputed, accumulation = arm.run.config.visft.model.recompute, str(arm.run.batches.accumulation)
        rows.append((arm.engine, recomputed, accumulation, fits, memory, *speed))
    best = arms[0]
    sections = [Section(f"engines, with at most {best.capacity / _GIB:.1f} GiB of a GPU", rows, columns)]
    for name, images in best.run.batches.batch_size.items():
        what = f"{name} with {best.engine}: {images} images a step, {best.run.batches.micro[name]} at once on a GPU"
        memory = ", ".join(f"{part} {size / _GIB:.2f}" for part, size in asdict(best.memory[name]).items() if size)
        seconds = ", ".join(f"{part} {spent:.3g}" for part, spent in asdict(best.seconds[name]).items() if spent)
        sections.append(Section(what, [("GiB", memory), ("seconds", seconds)]))
    print_plan(title, sections)
    print(f"visft train {' '.join(best.flags)}", flush=True)
