"""`visft plan`: does a configuration fit a cluster that need not be here, and how long does it take?

Exit status: 0 planned, 2 wrong usage, or a stage that does not fit with any engine.
"""

from __future__ import annotations

import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from visft_ds.config import ResolvedConfig, changed, resolve
from visft_ds.config.backbones import model_of, named
from visft_ds.config.batches import larger_batches, rate_for
from visft_ds.errors import tell
from visft_ds.flags import Command
from visft_ds.monitor.console import Section, print_plan
from visft_ds.planner.hardware import parse_cluster

if TYPE_CHECKING:
    from visft_ds.config.resolve import Flags
    from visft_ds.planner.hardware import Cluster
    from visft_ds.planner.search import Forecast

_GIB = 2**30
_RATE = "optimizer.params.lr"
_COLUMNS = ("engine", "recomputed", "accumulation", "fits", "GiB", "images/s", "hours", "MFU")
_EPILOG = """--cluster takes COUNTxNAME[-MEMORY] (machines of 8) or MACHINESxGPUSxNAME[-MEMORY].

examples:
  visft plan --cluster 8xV100-32GB
  visft plan --cluster 8x4090 --model eva_g --stage 2
  visft plan --cluster 8xA100-80GB --stage 2 --engine zero1 --set visft.model.activation_checkpointing=block
  visft plan --cluster 8x8xH100 --network 25 --stage 2 --batch-size 64

It tries every engine and prints the command that trains with the fastest one that fits.
Exit status: 0 planned, 2 a stage does not fit with any engine, or wrong usage.
"""


def build_parser() -> Command:
    """The parser."""
    parser = Command(
        "plan", "Predict memory and time of both stages, and find the fastest settings that fit.", _EPILOG
    )
    add = parser.add_argument
    add(
        "--cluster",
        metavar="SPEC",
        required=True,
        help="such as 8xA100-80GB, 8x8xH100 (machines x GPUs), 8x4090",
    )
    add(
        "--network",
        type=float,
        metavar="GB/s",
        help="bandwidth of a machine, one way (default: usual for the GPU)",
    )
    add("--model", metavar="NAME|FILE", help="as in visft train (eva_e and eva_g)")
    add("--backbone", metavar="NAME|FILE", help="as in visft train; of its files only config.json is needed")
    add("--download", action="store_true", help="download config.json from the hub")
    add("--stage", type=int, choices=(1, 2), help="stage to plan (both)")
    add("--engine", metavar="NAME|FILE", help="plan this engine as configured, without a search")
    add("--batch-size", type=int, metavar="N", help="as in visft train; the learning rate follows (--lr)")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="as in visft train")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan and print; returns the exit status."""
    fits = True
    try:
        options = build_parser().parse_args(arguments)
        cluster = parse_cluster(options.cluster, options.network)
        model = options.model
        flags: Flags = {}
        if options.backbone is not None:
            model, flags = model_of(named(options.backbone, download=options.download), model)
        models = [model] if model else ["eva_e", "eva_g"]
        stages = [options.stage] if options.stage else [1, 2]
        for model, stage in product(models, stages):
            config, of_batch = _configuration(options, stage, model, flags)
            fits &= _plan(options, model, config, of_batch, cluster)
    except (ValueError, OSError) as error:
        return tell(error)
    return 0 if fits else 2


def _configuration(
    options: Namespace, stage: int, model: str, flags: Flags
) -> tuple[ResolvedConfig, list[str]]:
    """(configuration, words of visft train for its batch): with --batch-size also the learning rate that goes
    with it, unless --set states one.
    """
    made = partial(resolve, stage=stage, model=model, engine=options.engine, settings=options.set)
    config = made(flags=flags, batch_size=options.batch_size)
    if options.batch_size is None:
        return config, []
    words = ["--batch-size", str(options.batch_size)]
    sizes = {stream.key: stream.batch_size for stream in config.visft.streams().values()}
    rate, _ = rate_for(made(flags=flags), sizes)
    if rate is None or float(rate) == config.optimizer.params.lr or config.sources.get(_RATE) == "--set":
        return config, words
    flags = {**flags, _RATE: (float(rate), "--lr")}
    return made(flags=flags, batch_size=options.batch_size), [*words, "--lr", rate]


def _plan(
    options: Namespace, model: str, config: ResolvedConfig, of_batch: Sequence[str], cluster: Cluster
) -> bool:
    """Plan a stage of a model and print it. Returns False if nothing fits."""
    from visft_ds.planner.search import forecast, search

    words = _words_of(options, model, config.visft.stage)
    sections = list[Section]()
    # Engines without a pipeline need a share of each batch for every GPU.
    dp = max(1, cluster.count // config.pipeline_stages)
    uneven = [stream.batch_size for stream in config.visft.streams().values() if stream.batch_size % dp]
    if uneven:
        larger = larger_batches(config, dp * config.pipeline_stages)
        config = changed(config, larger.settings)
        of_batch = larger.flags if larger.flags[0] == "--batch-size" else (*of_batch, *larger.flags)
        among = f"{dp} GPUs" if config.pipeline_stages == 1 else f"{dp} pipelines"
        title = f"the batch is the limit: {min(uneven)} images cannot be divided among {among}"
        sections.append(Section(title, [("planned with", f"{shlex.join(larger.flags)} ({larger.rule})")]))

    if options.engine is None:
        forecasts = search(config, cluster)
    else:
        forecasts = [forecast(config, cluster, ["--engine", options.engine])]
    where = f"{cluster.count}x{cluster.gpu.name}"
    if cluster.count > cluster.per_node:
        where += f" in machines of {cluster.per_node} with {cluster.network:g} GB/s between them"
    print_forecasts(f"{model}, stage {config.visft.stage}, as predicted on {where}", sections, forecasts)
    if not forecasts[0].fits:
        helps = "plan without --engine to try all of them" if options.engine else "take GPUs with more memory"
        smaller = "smaller images (visft.tasks.<task>.image), or a smaller --model"
        print(f"nothing fits: {helps}, {smaller}", flush=True)
        return False
    for launcher in launchers(cluster):
        print(f"{launcher} {shlex.join([*words, *of_batch, *forecasts[0].flags])}", flush=True)
    return True


def _words_of(options: Namespace, model: str, stage: int) -> list[str]:
    """Words of visft train for what was planned."""
    words = ["--stage", str(stage)]
    if options.backbone:
        words += ["--backbone", options.backbone]
    if options.model or not options.backbone:
        words += ["--model", options.model or model]
    for setting in options.set:
        words += ["--set", setting]
    return words


def launchers(cluster: Cluster) -> list[str]:
    """Beginnings of the commands that train on the cluster: on one machine, or with a hostfile and under
    SLURM.
    """
    if cluster.count == 1:
        return ["visft train"]
    if cluster.count <= cluster.per_node:
        return [f"visft train --num_gpus {cluster.count}"]
    machines, rest = divmod(cluster.count, cluster.per_node)
    lines = ["deepspeed --hostfile hostfile --module visft_ds.launch"]
    if rest == 0:
        flags = f"--nodes {machines}"
        if cluster.per_node != 8:  # launchers/slurm.sbatch is for machines of 8
            flags += f" --ntasks-per-node {cluster.per_node} --gres gpu:{cluster.per_node}"
        lines.append(f"sbatch {flags} launchers/slurm.sbatch")
    return lines


def print_forecasts(title: str, sections: Sequence[Section], forecasts: Sequence[Forecast]) -> None:
    """Print the engines; of the first one memory and time of each kind of step."""
    rows = [
        (
            option.engine,
            option.run.config.visft.model.activation_checkpointing,
            str(option.run.batches.accumulation),
            "yes" if option.fits else "NO",
            f"{option.needed / _GIB:.1f}",
            f"{option.images_per_second:.4g}",
            f"{option.hours:.1f}",
            f"{option.mfu:.0%}",
        )
        for option in forecasts
    ]
    best = forecasts[0]
    capacity = f"engines, with at most {best.capacity / _GIB:.1f} GiB of a GPU"
    steps = f"hours of {best.run.config.total_steps:,} steps (expect 1.1 to 1.6 times as many)"
    tables = [*sections, Section(f"{capacity}; {steps}", rows, _COLUMNS)]
    for stream, images in best.run.batches.batch_size.items():
        at_once = best.run.batches.micro[stream]
        memory = {part: size / _GIB for part, size in asdict(best.memory[stream]).items()}
        seconds = asdict(best.seconds[stream])
        tables.append(
            Section(
                f"{stream} with {best.engine}: {images} images a step, {at_once} at once on a GPU",
                [("GiB", _parts(memory, ".2f")), ("seconds", _parts(seconds, ".3g"))],
            )
        )
    print_plan(title, tables)


def _parts(values: Mapping[str, float], form: str) -> str:
    """`weights 8.35, optimizer 0.04`, without what is zero."""
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items() if value)
