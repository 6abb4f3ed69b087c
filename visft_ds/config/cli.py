"""The command line of visft train: few flags, everything else has a place in ds_configs/."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from visft_ds.config import own
from visft_ds.config.backbones import model_of, named, on_this_machine
from visft_ds.config.preflight import tasks_without_labels, training_sets
from visft_ds.config.resolve import Flags, ResolvedConfig, available, load_json, resolve
from visft_ds.files import read_bytes, reading
from visft_ds.flags import Command
from visft_ds.run_files import folder_of_run, run_of

DEFAULT_MODEL, DEFAULT_ENGINE = "eva_e", "zero1"
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
  deepspeed --hostfile hostfile --module visft_ds.launch --stage 2 --batch-size 64 --lr 2.8e-5    several machines
  visft train --stage 1 --backbone timm:vit_base_patch16_dinov3.lvd1689m --download
  visft train --stage 2 --model debug --engine zero2 --steps 50 --dry-run
"""


def build_parser() -> Command:
    """The parser."""
    parser = Command("train", "Train one stage of ViSFT.", _EPILOG)
    add, length = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    models, engines = (f"{', '.join(available(folder))}" for folder in ("models", "engines"))
    stages = "1: heads on a frozen backbone; 2: LoRA in the backbone (with --data alone: 1)"
    add("--stage", type=int, choices=(1, 2), help=stages)
    add("--model", metavar="NAME|FILE", help=f"model settings: {models} ({DEFAULT_MODEL}), or your own .json")
    add("--backbone", metavar="NAME|FILE", help=BACKBONE_HELP)
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    engine = f"engine settings: {engines} ({DEFAULT_ENGINE}), or your own .json"
    add("--engine", metavar="NAME|FILE", help=engine)
    add("--tasks", metavar="NAME,NAME", help="tasks to train (default: all that the data has labels for)")
    start = "start from the weights, and of a RUN also the settings, of this run, checkpoint or adapter"
    add("--from", dest="start", metavar="RUN|ADAPTER", help=start)
    reset = "with --from RUN: initialise its heads anew, e.g. for other categories"
    add("--reset-heads", action="store_const", const="reset", help=reset)
    add("--heads", metavar="FOLDER", help="stage 2: trained heads, e.g. RUN/export (visft.heads.path)")
    length(
        "--steps", type=int, metavar="N", help="optimiser steps of the run (scheduler.params.total_num_steps)"
    )
    length("--epochs", type=int, metavar="N", help="passes through the training images, instead of --steps")
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
    resume = "auto: from the newest checkpoint, if any; must: requires one; no: requires a new folder (%(default)s)"
    add("--resume", default="auto", choices=("auto", "must", "no"), help=resume)
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


def resolve_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ResolvedConfig]:
    """Parse the command line (None: the process's own) and resolve the configuration it names.

    Raises:
        ValueError: an unknown flag (with the nearest one) or value, or an invalid configuration (all errors
        at once).
        OSError: a file of the user's own that cannot be read.
    """
    given = build_parser().parse_args(argv)
    flags, fork, whole = Flags(), None, None
    if given.start is not None:
        flags["visft.start"] = {"path": given.start, "heads": given.reset_heads or "keep"}, "--from"
        fork = whole = _fork_of(given.start, given.out)
    if fork is not None:
        flags["visft.run.out"] = f"{folder_of_run(Path(given.start))}-fork", "--from"
    elif given.deepspeed_config is not None:
        whole = load_json(Path(given.deepspeed_config)), given.deepspeed_config
    if given.reset_heads is not None and fork is None:
        raise ValueError("--reset-heads needs --from RUN, whose heads it initialises anew")
    if whole is not None:
        others = ["model", "backbone", *([] if fork is None else ["deepspeed_config"])]
        if doubled := [f"--{name}" for name in others if getattr(given, name) is not None]:
            raise ValueError(f"{whole[1]} is a complete configuration: leave out {' and '.join(doubled)}")
    flags |= {
        key: (value, f"--{name}") for name, key in KEYS.items() if (value := getattr(given, name)) is not None
    }
    config = _with_data(given, flags, whole)
    if given.download and not given.dry_run and config.visft.model.weights is not None:
        on_this_machine(config.visft.model.weights, download=True)
    return given, config


def _with_data(
    given: argparse.Namespace, flags: Flags, whole: tuple[dict[str, Any], str] | None
) -> ResolvedConfig:
    """`resolve` with what backbone and data decide: the model, the recipe for photographs, the tasks, the
    length.

    Tasks of the recipe that the data has no labels for take no part, but for those that are named. Raises
    ValueError as `resolve`, and for epochs of data whose number of images is not known yet.
    """
    stage, model, of_backbone = given.stage, given.model, Flags()
    settings = [*([f"visft.tasks={given.tasks}"] if given.tasks is not None else []), *given.set]
    if whole is None and stage is None:
        if model not in (None, own.MODEL) or "visft.data.root" not in flags:
            raise ValueError(
                "--stage is missing: 1 trains heads, 2 adapters; --data FOLDER alone: heads for it"
            )
        stage, model = 1, own.MODEL
    if given.backbone is not None:
        model, of_backbone = model_of(named(given.backbone, download=given.download), model)
    if whole is None:
        of_recipe = own.of_backbone(model, of_backbone, settings) if model in (own.MODEL, own.DEMO) else {}
        flags = {**of_backbone, **of_recipe, **flags}
    model = model or DEFAULT_MODEL
    resolved = partial(resolve, stage=stage, model=model, engine=given.engine, whole=whole, settings=settings)
    config = resolved(flags=flags)
    if not any(text.startswith("visft.tasks=") for text in settings):
        flags |= tasks_without_labels(config)
        config = resolved(flags=flags)
    if given.batch_size is not None:
        flags |= batch_flags(config, given.batch_size)
        config = resolved(flags=flags)
    if given.epochs is not None:
        images = sum(map(len, training_sets(config)))
        if not images:
            raise ValueError("--epochs needs shards in a folder of this machine: give --steps")
        flags["scheduler.params.total_num_steps"] = None, "--epochs"
        for stream in config.visft.streams().values():
            updates = math.ceil(given.epochs * images / min(stream.batch_size, images))
            flags |= {f"visft.tasks.{name}.updates": (updates, "--epochs") for name in stream.tasks}
        config = resolved(flags=flags)
    if model == own.MODEL and whole is None:
        config = resolved(flags={**own.chosen(config), **flags})
    return config


def batch_flags(config: ResolvedConfig, size: int) -> Flags:
    """What `--batch-size` sets: the batch of every task that trains, and the one that they share."""
    streams = [f"visft.tasks.{name}" for name in config.visft.tasks.enabled()]
    streams += ["visft.shared"] if config.visft.shared else []
    return {f"{stream}.batch_size": (size, "--batch-size") for stream in streams}


def _fork_of(source: str, out: str | None) -> tuple[dict[str, Any], str] | None:
    """(configuration, where it is recorded) of the run that a place is or belongs to; None for an adapter.

    A run that --out names, or that lies in RUN-fork, continues without the run or adapter that it came from.
    Numbers of classes are left out: they are those of the data. Raises ValueError: nothing there, or no
    readable record.
    """
    run, place = run_of(Path(source)), folder_of_run(Path(source))
    if run is None and Path(source).exists():
        return None
    record = (run or Path(out or f"{place}-fork")) / "run.json"
    with reading(record, "the record of a run"):
        content = json.loads(read_bytes(record, 1 << 26)) if run or record.is_file() else {}
        if run is None:  # gone: only what began with it continues
            parent = content.get("parent") or {}
            if folder_of_run(Path(parent.get("path", ""))) != Path(os.path.abspath(place)):
                raise ValueError(
                    f"{source} is no run, checkpoint or adapter, and {record} did not start from it"
                )
            if parent["step"] is None:  # an adapter
                return None
        for task in content["config"]["visft"]["tasks"].values():
            (task or {}).get("head", {}).pop("num_classes", None)
        return content["config"], str(record)
