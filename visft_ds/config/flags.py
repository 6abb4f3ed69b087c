"""The flags of visft train, and how they set keys: few flags, everything else has a place in ds_configs/."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

from visft_ds.config.backbones import model_of, named
from visft_ds.config.record import read_run
from visft_ds.config.resolve import (
    DEFAULT_ENGINE,
    DEFAULT_MODEL,
    Flags,
    Tree,
    available,
    load_json,
    merge,
)
from visft_ds.files import reading
from visft_ds.flags import Command
from visft_ds.run_files import RECORD_FILE, folder_of_run, run_of

#: File in ds_configs/models: the recipe for few photographs, which --data alone takes.
SMALL_DATA = "small_data"
BACKBONE_HELP = (
    "backbone: a file, timm:NAME, hf-hub:ORG/NAME, a name in ds_configs/models, or a folder for timm"
)
DOWNLOAD_HELP = "download missing weights from the Hugging Face hub"
#: Flag -> the key that it is a word for.
KEYS = {
    "data": "visft.data.root",
    "out": "visft.run.out",
    "heads": "visft.heads.path",
    "steps": "scheduler.params.total_num_steps",
    "lr": "optimizer.params.lr",
    "track": "visft.run.track",
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
    add(
        "--model",
        metavar="NAME|FILE",
        help=f"model settings: {models} ({DEFAULT_MODEL}), or your own .json",
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
    add("--lr", type=float, metavar="X", help="learning rate (optimizer.params.lr)")
    add("--data", metavar="FOLDER", help="shards made by visft shards build (visft.data.root)")
    add("--out", metavar="FOLDER", help="run folder (runs/stage<N>-<model>)")
    add("--track", metavar="wandb", help="also send metrics to Weights & Biases (visft.run.track)")
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


class Merged(NamedTuple):
    """Layers and flags of a command line, laid over each other."""

    tree: Tree
    model: str | None  #: file of ds_configs/models; None: one complete configuration instead
    backbone: Flags  #: what --backbone sets


def merge_arguments(options: argparse.Namespace) -> Merged:
    """Lay what a command line names over the files that it names.

    Raises:
        ValueError: flags that do not go together, or names of nothing.
        OSError: a file of the user's own that cannot be read.
    """
    flags = Flags()
    whole = None
    forks_run = False
    if options.start is not None:
        flags["visft.init_from"] = {"path": options.start, "heads": options.reset_heads or "keep"}, "--from"
        whole = _record_of(options.start, options.out)
        forks_run = whole is not None
    if forks_run:
        flags["visft.run.out"] = f"{folder_of_run(Path(options.start))}-fork", "--from"
    elif options.deepspeed_config is not None:
        whole = load_json(Path(options.deepspeed_config)), options.deepspeed_config
    if options.reset_heads is not None and not forks_run:
        raise ValueError("--reset-heads needs --from RUN, whose heads it initialises anew")
    if whole is not None:
        others = ["model", "backbone"]
        if forks_run:
            others.append("deepspeed_config")
        doubled = [f"--{name}" for name in others if getattr(options, name) is not None]
        if doubled:
            raise ValueError(f"{whole[1]} is a complete configuration: leave out {' and '.join(doubled)}")
    for name, key in KEYS.items():
        value = getattr(options, name)
        if value is not None:
            flags[key] = value, f"--{name}"

    stage = options.stage
    model = options.model
    if whole is None and stage is None:
        if model not in (None, SMALL_DATA) or options.data is None:
            raise ValueError(
                "--stage is missing: 1 trains heads, 2 adapters; --data FOLDER alone: heads for it"
            )
        stage = 1
        model = SMALL_DATA
    of_backbone = Flags()
    if options.backbone is not None:
        model, of_backbone = model_of(named(options.backbone, download=options.download), model)
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
    return Merged(tree, None if whole else model, of_backbone)


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
