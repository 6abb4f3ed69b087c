"""The flags of visft train, and how they set keys: few flags, everything else has a place in ds_configs/."""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from visft_ds.config.backbones import model_of, named
from visft_ds.config.record import RunFile, read_run
from visft_ds.config.resolve import (
    DEFAULT_ENGINE,
    DEFAULT_MODEL,
    Flags,
    available,
    merge,
)
from visft_ds.config.tree import Tree, load_json
from visft_ds.data.fetch import is_url
from visft_ds.files import reading
from visft_ds.flags import Command, add_num_gpus
from visft_ds.run_files import EXPORT, EXPORT_RECORD_FILE, RECORD_FILE, folder_of_run, run_of

#: File in ds_configs/models: the recipe for few photographs, which --data alone takes.
SMALL_DATA = "small_data"
BACKBONE_HELP = (
    "backbone: a file, timm:NAME, hf-hub:ORG/NAME, a name in ds_configs/models, or a folder for timm"
)
DOWNLOAD_HELP = "download missing weights from the Hugging Face hub"
#: Folder of the runs that no --out places elsewhere.
RUNS = Path("runs")
#: Flag -> the key that it is a word for.
KEYS = {
    "data": "visft.data.root",
    "out": "visft.run.out",
    "heads": "visft.heads.path",
    "steps": "scheduler.params.total_num_steps",
    "lr": "optimizer.params.lr",
}
_EPILOG = """examples:
  visft train --num_gpus 8 --stage 1
  visft train --num_gpus 8 --stage 2                                 through deepspeed, on this machine
  deepspeed --num_gpus 8 --module visft_ds.launch --stage 2
  deepspeed --hostfile hostfile --module visft_ds.launch --stage 2 --batch-size 64 --lr 2.8e-5
  visft train --stage 1 --backbone timm:vit_base_patch16_dinov3.lvd1689m --download
  visft train --stage 2 --model debug --engine zero2 --steps 50 --dry-run
"""


def build_parser() -> Command:
    """The parser of visft train."""
    parser = Command("train", "Train one stage of ViSFT.", _EPILOG)
    add = parser.add_argument
    models = ", ".join(available("models"))
    engines = ", ".join(available("engines"))
    add(
        "--stage",
        type=int,
        choices=(1, 2),
        help="1: heads on a frozen backbone; 2: LoRA in the backbone (with --data alone: 1)",
    )
    add_num_gpus(parser)
    add(
        "--model",
        metavar="NAME|FILE",
        help=f"model settings: {models}, or your own .json (default: {SMALL_DATA} for --data alone; in "
        f"stage 2 that of the stage 1 on --data; without --data {DEFAULT_MODEL})",
    )
    add("--backbone", metavar="NAME|FILE", help=BACKBONE_HELP)
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    add(
        "--engine",
        metavar="NAME|FILE",
        help=f"engine settings: {engines} ({DEFAULT_ENGINE}), or your own .json",
    )
    add("--tasks", metavar="NAME,NAME", help="tasks to train (default: all that the data has labels for)")
    add(
        "--from",
        dest="start",
        metavar="RUN|ADAPTER",
        help="start from the weights, and of a RUN also the settings, of this run, checkpoint or adapter",
    )
    add(
        "--reset-heads",
        action="store_const",
        const="reset",
        help="with --from RUN: initialise its heads anew, e.g. for other categories",
    )
    add("--heads", metavar="FOLDER", help="stage 2: trained heads, e.g. RUN/export (visft.heads.path)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="optimiser steps of the run (scheduler.params.total_num_steps)",
    )
    length.add_argument(
        "--epochs", type=int, metavar="N", help="passes through the training images, instead of --steps"
    )
    add(
        "--batch-size",
        type=int,
        metavar="N",
        help="images per step over all GPUs (visft.tasks.<task>.batch_size)",
    )
    add(
        "--tile",
        metavar="PIXELS",
        help="cut images into squares of this side, or none: take them whole (visft.<...>.image.tile; "
        f"default: none, but {SMALL_DATA} cuts large images of small objects)",
    )
    add("--lr", type=float, metavar="X", help="learning rate (optimizer.params.lr)")
    add("--data", metavar="FOLDER", help="shards made by visft shards build (visft.data.root)")
    add("--out", metavar="FOLDER", help="run folder (runs/stage<N>-<model>)")
    add(
        "--resume",
        default="auto",
        choices=("auto", "must", "no"),
        help="auto: from the newest checkpoint, if any; must: requires one; no: requires a new folder "
        "(%(default)s)",
    )
    add(
        "--dry-run",
        action="store_true",
        help="print the plan and missing files (exit status 2), start nothing",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one key, e.g. visft.seed=1; repeatable",
    )
    add(
        "--deepspeed_config",
        metavar="FILE",
        help="one complete configuration of your own instead of ds_configs/",
    )
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
    return parser


class FirstStage(NamedTuple):
    """Run of stage 1 on whose heads a stage 2 goes on."""

    run: Path
    record: RunFile


class Merged(NamedTuple):
    """Layers and flags of a command line, laid over each other."""

    tree: Tree
    model: str | None  #: file of ds_configs/models; None: one complete configuration instead
    backbone: Flags  #: what --backbone sets
    first: FirstStage | None  #: run that decides what no flag of this stage 2 says


def merge_arguments(options: argparse.Namespace) -> Merged:
    """Lay what a command line names over the files that it names.

    Raises:
        ValueError: flags that do not go together, or names of nothing.
        OSError: a file of the user's own that cannot be read.
    """
    flags = Flags()
    whole = None
    others = ["model", "backbone"]  # that a complete configuration decides
    if options.start is not None:
        flags["visft.init_from"] = {"path": options.start, "heads": options.reset_heads or "keep"}, "--from"
        whole = _record_of(options.start, options.out)
    if whole is not None:
        flags["visft.run.out"] = f"{folder_of_run(Path(options.start))}-fork", "--from"
        others.append("deepspeed_config")
    elif options.reset_heads is not None:
        raise ValueError("--reset-heads needs --from RUN, whose heads it initialises anew")
    elif options.deepspeed_config is not None:
        whole = load_json(Path(options.deepspeed_config)), options.deepspeed_config
    doubled = [f"--{name}" for name in others if getattr(options, name) is not None]
    if whole is not None and doubled:
        raise ValueError(f"{whole[1]} is a complete configuration: leave out {' and '.join(doubled)}")
    for name, key in KEYS.items():
        if getattr(options, name) is not None:
            flags[key] = getattr(options, name), f"--{name}"

    stage = options.stage
    model = options.model
    if whole is None and stage is None:
        if model not in (None, SMALL_DATA) or options.data is None:
            raise ValueError(
                "missing --stage 1 (heads) or --stage 2 (LoRA in the backbone); --data FOLDER alone takes "
                "the recipe for few images"
            )
        stage = 1
        model = SMALL_DATA
    backbone = options.backbone
    first = None
    if whole is None and model is None and backbone is None:
        if stage == 2:
            first = _first_stage_of(options.data, options.heads)
        if first is not None:
            model, backbone = _recipe_of(first)
        elif options.data is not None:
            raise ValueError(_without_model(stage, options.data, options.heads))
    of_backbone = Flags()
    if backbone is not None:
        model, of_backbone = model_of(named(backbone, download=options.download), model)
    if whole is None:
        model = model or DEFAULT_MODEL
        flags = {**of_backbone, **flags}
    settings = list(options.set)
    if options.tasks is not None:
        settings.insert(0, f"visft.tasks={options.tasks}")
    tree = merge(
        stage=stage,
        engine=options.engine,
        model=model or DEFAULT_MODEL,
        whole=whole,
        flags=flags,
        settings=settings,
        batch_size=options.batch_size,
    )
    return Merged(tree, None if whole else model, of_backbone, first)


def _without_model(stage: int | None, data: str, heads: str | None) -> str:
    """Message for data without a model: the paper's, of 4.4 billion parameters, is hardly meant."""
    recipe = f"visft train --data {quote(data)}"
    models = f"--model NAME (e.g. dinov3_b, or {DEFAULT_MODEL}, the paper's)"
    if stage == 1:
        return (
            f"--stage 1 with --data needs a model: add {models}, or take the recipe for few images: {recipe}"
        )
    if heads is not None and not Path(heads).exists():
        return f"--heads {heads}: no such folder"
    if heads is not None:
        return (
            f"--heads {heads} lies in no run of stage 1, which would say for which model it is: add {models}"
        )
    return (
        f"--stage 2 with --data goes on with a stage 1 on the same data, and {RUNS}/ has none: train it "
        f"({recipe}), or add {models}"
    )


def _first_stage_of(data: str | None, heads: str | None) -> FirstStage | None:
    """The run of stage 1 that `--heads` lies in; without that flag the one in `RUNS` on the same shards.

    A run that has not finished counts where no other one has. None: there is none. Raises ValueError for
    several.
    """
    if heads is not None:
        run = run_of(Path(heads).parent) or run_of(Path(heads))
        return None if run is None else _first_stage_in(run)
    if data is None:
        return None
    stages = list[FirstStage]()
    for path in sorted(RUNS.glob(f"*/{RECORD_FILE}")):
        with suppress(ValueError):  # the record of another release is nobody's heads
            first = _first_stage_in(path.parent)
            if first is not None and _is_same_folder(first.record.config["visft"]["data"]["root"], data):
                stages.append(first)
    stages = [first for first in stages if (first.run / EXPORT / EXPORT_RECORD_FILE).is_file()] or stages
    if len(stages) > 1:
        runs = ", ".join(str(first.run) for first in stages)
        flags = " or ".join(f"--heads {quote(f'{first.run}/{EXPORT}')}" for first in stages)
        raise ValueError(f"{len(stages)} runs of stage 1 trained heads on {data}: {runs}; add {flags}")
    return stages[0] if stages else None


def _first_stage_in(run: Path) -> FirstStage | None:
    """The run in a folder; None if it is not of stage 1. Raises ValueError as `read_run`."""
    record = read_run(run)
    with reading(run / RECORD_FILE, "the record of a run"):
        return FirstStage(run, record) if record.config["visft"]["stage"] == 1 else None


def _is_same_folder(recorded: str, data: str) -> bool:
    if is_url(recorded) or is_url(data):
        return recorded.rstrip("/") == data.rstrip("/")
    return os.path.realpath(recorded) == os.path.realpath(data)


def _recipe_of(first: FirstStage) -> tuple[str | None, str | None]:
    """(--model, --backbone) of the command that started a run.

    Raises ValueError where neither the command nor the name of its model says which file of settings it had.
    """
    words = first.record.command
    for program in (["visft", "train"], ["launchers/train.py"]):
        if words[: len(program)] != program:
            continue
        options = build_parser().parse_args(words[len(program) :])
        if options.start is None and options.deepspeed_config is None:
            if options.stage is None:
                return SMALL_DATA, options.backbone
            if options.model is None and options.backbone is None:
                return DEFAULT_MODEL, None
            return options.model, options.backbone
    name = first.record.config["visft"]["model"]["name"]
    if name not in available("models"):
        raise ValueError(f"{first.run} does not say which --model file it had: give --model and --heads")
    return name, None


def _record_of(source: str, out: str | None) -> tuple[dict[str, Any], str] | None:
    """(configuration, where it is recorded) of the run that a path is or belongs to; None for an adapter.

    A run that --out names, or that lies in RUN-fork, continues without the run or adapter that it came from.
    Numbers of classes are left out: they are those of the data. Raises ValueError: nothing there, or no
    readable record.
    """
    run = run_of(Path(source))
    folder = folder_of_run(Path(source))
    if run is None and Path(source).exists():
        return None
    recorded_in = run or Path(out or f"{folder}-fork")
    if run is None and not (recorded_in / RECORD_FILE).is_file():
        raise ValueError(f"--from {source}: no such run, checkpoint or adapter")
    record = read_run(recorded_in)
    path = recorded_in / RECORD_FILE
    if run is None:  # gone: only what began with it continues
        if record.parent is None or folder_of_run(Path(record.parent.path)) != Path(os.path.abspath(folder)):
            raise ValueError(f"--from {source}: no such run, checkpoint or adapter, nor the start of {path}")
        if record.parent.step is None:  # an adapter
            return None
    with reading(path, "the record of a run"):
        for task in record.config["visft"]["tasks"].values():
            if task is not None:
                task["head"].pop("num_classes", None)
    return record.config, str(path)
