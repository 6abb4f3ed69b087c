"""The command line of visft train: few flags, everything else has a place in ds_configs/."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visft_ds import program
from visft_ds.config import own
from visft_ds.config.backbones import model_of, named
from visft_ds.config.preflight import (
    folder_of_run,
    number_of_images,
    run_of,
    tasks_without_labels,
    without_classes_of_data,
)
from visft_ds.config.records import parse_json
from visft_ds.config.resolve import AnyPath, ResolvedConfig, available, display, resolve, with_engine
from visft_ds.config.validate import nearest
from visft_ds.files import read_bytes
from visft_ds.pretrained import fetch, local, on_hub

DEFAULT_MODEL, DEFAULT_ENGINE = "eva_e", "zero1"
BACKBONE_HELP = "other weights: a file, timm:NAME, hf-hub:ORG/NAME, a name of ds_configs/models, a folder for timm"
DOWNLOAD_HELP = "fetch weights that have a name and are not here, from the Hugging Face hub"

_EPILOG = """examples:
  visft train --num_gpus 8 --stage 1
  visft train --num_gpus 8 --stage 2                                 through deepspeed, on this machine
  deepspeed --num_gpus 8 --module visft_ds.launch --stage 2          on the machines of a hostfile, too
  visft train --stage 1 --backbone timm:vit_base_patch16_dinov3.lvd1689m --download
  visft train --stage 2 --model debug --engine zero2 --steps 50 --dry-run
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser; it raises `argparse.ArgumentError` instead of leaving the process."""
    parser = argparse.ArgumentParser(
        prog=program("train"),
        description="Train one stage of ViSFT.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add(
        "--stage", metavar="{1,2}", help="1: heads on a frozen backbone; 2: LoRA in the backbone (with --data alone: 1)"
    )
    add(
        "--model",
        metavar="NAME|FILE",
        help=f"file in ds_configs/models: {', '.join(available('models'))} ({DEFAULT_MODEL}), or a .json of yours",
    )
    add(
        "--backbone",
        metavar="NAME|FILE",
        help=BACKBONE_HELP,
    )
    add("--download", action="store_true", help=DOWNLOAD_HELP)
    add(
        "--engine",
        metavar="NAME|FILE",
        help=f"file in ds_configs/engines: {', '.join(available('engines'))} ({DEFAULT_ENGINE}), or a .json of yours",
    )
    add("--tasks", metavar="NAME,NAME", help="tasks that take part (those of the stage that the data has labels for)")
    add(
        "--from",
        dest="start",
        metavar="RUN|ADAPTER",
        help="begin with the values, and of a RUN also the settings, of this run, checkpoint or adapter",
    )
    add(
        "--reset-heads",
        action="store_const",
        const="reset",
        help="with --from RUN: draw its heads anew, e.g. for other categories",
    )
    add("--heads", metavar="FOLDER", help="stage 2: trained heads, e.g. RUN/export (visft.heads.path)")
    add("--steps", type=int, metavar="N", help="optimiser steps of the run (scheduler.params.total_num_steps)")
    add("--epochs", type=int, metavar="N", help="passes through the training images, instead of --steps")
    add("--batch-size", type=int, metavar="N", help="images of a step on all GPUs (visft.tasks.<task>.batch_size)")
    add("--lr", type=float, metavar="X", help="learning rate (optimizer.params.lr)")
    add("--data", metavar="FOLDER", help="shards made by visft shards build (visft.data.root)")
    add("--out", metavar="FOLDER", help="run folder (runs/stage<N>-<model>)")
    add("--track", metavar="wandb", help="send the numbers there as well (visft.run.track)")
    add("--trace", metavar="FIRST:LAST", help="trace these steps for Perfetto, into the run folder (visft.run.trace)")
    add("--resume", default="auto", metavar="{auto,must,no}", help="auto: from the newest checkpoint, if there is one")
    add("--dry-run", action="store_true", help="print the plan and what is missing (exit status 2), start nothing")
    add("--json", action="store_true", help="with --dry-run: print only the resolved configuration, as JSON")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set one dotted key, e.g. visft.seed=1; repeatable",
    )
    add("--deepspeed_config", metavar="FILE", help="one complete configuration of your own instead of ds_configs/")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher may add it
    return parser


def resolve_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, ResolvedConfig]:
    """Parse the command line (None: the process's own) and resolve the configuration it names.

    Returns:
        The arguments, with `stage`, `model` and `engine` filled in (the last two None with --deepspeed_config), and
        the configuration.

    Raises:
        ValueError: an unknown flag (with the nearest one) or value, or an invalid configuration (all errors at once).
    """
    parser = build_parser()
    try:
        arguments, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}; see visft train --help") from error
    if unknown:
        # What stands behind an unknown flag is not repeated: it may be a secret.
        flags = [text.partition("=")[0] for text in unknown if text.startswith("-")]
        raise ValueError("\n".join(_unknown(parser, text) for text in flags or unknown))
    if arguments.stage not in (None, "1", "2"):
        raise ValueError(f"--stage {arguments.stage}: must be 1 (heads) or 2 (the backbone's adapters)")
    if arguments.json and not arguments.dry_run:
        raise ValueError("--json prints what a dry run finds: give it with --dry-run")
    arguments.stage = arguments.stage and int(arguments.stage)
    check_resume(arguments.resume)
    if arguments.reset_heads is not None and arguments.start is None:
        raise ValueError("--reset-heads says what becomes of the heads of --from RUN: give that, too")
    if arguments.steps is not None and arguments.epochs is not None:
        raise ValueError("--steps and --epochs both set the length of the run: leave out one of them")
    backbone = dict[str, tuple[str, Any]]()
    fork = None if arguments.start is None else fork_of(arguments.start, arguments.out)
    if arguments.reset_heads is not None and fork is None:
        raise ValueError(f"--reset-heads is for --from RUN: {arguments.start} is an adapter, which has no heads")
    if fork is not None:
        doubled = [name for name in ("model", "backbone", "deepspeed_config") if getattr(arguments, name) is not None]
        if doubled:
            raise ValueError(f"--from {arguments.start} has its own settings: leave out --{doubled[0]}")
        recorded = fork[0]["visft"].get("stage")
        if arguments.stage not in (None, recorded):
            raise ValueError(
                f"--stage {arguments.stage}: {arguments.start} is of stage {recorded}, and --from goes on in the same; "
                f"stage 2 learns from the heads of stage 1 by --heads {arguments.start}/export"
            )
    elif arguments.deepspeed_config is not None:
        doubled = [f"--{name}" for name in ("model", "backbone", "engine") if getattr(arguments, name) is not None]
        if doubled:
            raise ValueError(f"--deepspeed_config is a complete configuration: leave out {' and '.join(doubled)}")
    else:
        if arguments.stage is None and (arguments.model not in (None, own.MODEL) or arguments.data is None):
            raise ValueError(
                "--stage is missing: 1 trains the heads, 2 the backbone's adapters; --data FOLDER alone trains heads "
                "for photographs of your own"
            )
        if arguments.stage is None:
            arguments.stage, arguments.model = 1, own.MODEL
        if arguments.backbone is not None:
            found = named(arguments.backbone, download=arguments.download)
            arguments.model, backbone = model_of(found, arguments.model)
        stated = backbone or any(text.startswith("visft.model.weights=") for text in arguments.set)
        absent = arguments.model == own.LITE0 and not stated and not own.LITE0_FILE.exists()
        if arguments.model == own.MODEL or absent:
            backbone |= own.of_backbone(backbone)
        arguments.model = arguments.model or DEFAULT_MODEL
        arguments.engine = arguments.engine or DEFAULT_ENGINE
    config = resolve_with_data(
        stage=arguments.stage,
        recorded=fork and (with_engine(fork[0], arguments.engine), fork[1]),
        engine=arguments.engine or DEFAULT_ENGINE,
        model=arguments.model or DEFAULT_MODEL,
        file=arguments.deepspeed_config,
        settings=arguments.set,
        flags=backbone
        | _start_flags(arguments, fork is not None)
        | folder_flags(arguments.data, arguments.out)
        | _value_flags(arguments),
        tasks=arguments.tasks,
        batch_size=arguments.batch_size,
        epochs=arguments.epochs,
    )
    arguments.stage = config.visft.stage
    if arguments.download and not arguments.dry_run:
        fetch_weights(config)
    return arguments, config


def fetch_weights(config: ResolvedConfig) -> None:
    """Fetch base weights that are not here and have a name on the hub. Raises ValueError as `pretrained.fetch`."""
    weights = config.visft.model.weights
    name = None if weights is None or local(weights).is_file() else on_hub(weights)
    if name is not None:
        fetch(name)


def resolve_with_data(*, batch_size: int | None = None, epochs: int | None = None, **given: Any) -> ResolvedConfig:
    """`resolve`, without the tasks of the recipe that the data has no labels for; named ones stay.

    Args:
        batch_size: of every task that takes part.
        epochs: passes of every task through the training images; they set the length of the run.

    Raises:
        ValueError: as `resolve`; epochs of data whose number of images is not known yet.
    """
    config = resolve(**given)
    named = given.get("tasks") or any(text.startswith("visft.tasks=") for text in given.get("settings", ()))
    given["idle"] = {} if named else tasks_without_labels(config)
    given["flags"] = dict(given.get("flags") or {})
    photographs = given.get("model") == own.MODEL and not given.get("recorded") and not given.get("file")
    if photographs:
        given["flags"] = own.chosen(resolve(**given)) | given["flags"]
        config = resolve(**given)
    tasks = [name for name in config.visft.tasks.enabled() if name not in given["idle"]]
    if batch_size is not None:
        sized = {f"visft.tasks.{name}" for name in tasks} | ({"visft.shared"} if config.visft.shared else set())
        given["flags"] |= {f"--batch-size ({key})": (f"{key}.batch_size", batch_size) for key in sorted(sized)}
    if given["idle"] or batch_size is not None:
        config = resolve(**given)
    if epochs is not None:
        images = number_of_images(config)
        for stream in config.visft.streams().values():
            steps = math.ceil(epochs * images / min(stream.batch_size, images))
            given["flags"] |= {f"--epochs ({name})": (f"visft.tasks.{name}.updates", steps) for name in stream.tasks}
        given["flags"]["--epochs"] = ("scheduler.params.total_num_steps", None)
        config = resolve(**given)
        if photographs:
            given["flags"] |= own.chosen(config)
            config = resolve(**given)
    return config


def fork_of(source: str, out: str | None) -> tuple[dict[str, Any], str] | None:
    """(configuration, where it is recorded) of the run that a place is or belongs to; None for an adapter.

    A run that --out names, or that lies in RUN-fork, goes on without the run or adapter that it came from.

    Raises:
        ValueError: nothing there, or no readable record.
    """
    run, place = run_of(Path(source)), folder_of_run(Path(source))
    if run is None and Path(source).exists():
        return None
    record = (Path(out or f"{place}-fork") if run is None else run) / "run.json"
    content = parse_json(read_bytes(record, 1 << 26), str(record)) if record.is_file() else {}
    if run is None:  # gone: only what began with it goes on
        parent = content.get("parent") if isinstance(content, dict) else None
        before = str(parent.get("path")) if isinstance(parent, dict) else ""
        if not isinstance(parent, dict) or folder_of_run(Path(before)) != Path(os.path.abspath(place)):
            raise ValueError(f"--from {source}: there is no such run, checkpoint or adapter")
        if parent.get("step") is None:  # an adapter
            return None
    values = content.get("config") if isinstance(content, dict) else None
    if not isinstance(values, dict) or not isinstance(values.get("visft"), dict):
        raise ValueError(f"--from {source}: {record} holds no readable run record")
    return without_classes_of_data(values), display(record)


def _start_flags(arguments: argparse.Namespace, fork: bool) -> dict[str, tuple[str, Any]]:
    """What a run starts with, and of a fork its folder."""
    if arguments.start is None:
        return {}
    out = {"--from (folder)": ("visft.run.out", f"{folder_of_run(Path(arguments.start))}-fork")} if fork else {}
    return {**out, "--from": ("visft.start", {"path": arguments.start, "heads": arguments.reset_heads or "keep"})}


def folder_flags(data: AnyPath | None, out: AnyPath | None) -> dict[str, tuple[str, str]]:
    """Flag -> (dotted key, value) of the folders that were given, as `resolve` takes them."""
    given = {"--data": ("visft.data.root", data), "--out": ("visft.run.out", out)}
    return {flag: (key, os.fspath(value)) for flag, (key, value) in given.items() if value is not None}


def _value_flags(arguments: argparse.Namespace) -> dict[str, tuple[str, Any]]:
    """Flag -> (dotted key, value) of the flags that are a word for one key."""
    keys = {"heads": "visft.heads.path", "steps": "scheduler.params.total_num_steps", "lr": "optimizer.params.lr"}
    keys |= {"track": "visft.run.track", "trace": "visft.run.trace"}
    given = {name: value for name in keys if (value := getattr(arguments, name)) is not None}
    if "trace" in given:
        first, _, last = given["trace"].partition(":")
        if not (first.isdecimal() and last.isdecimal()):
            raise ValueError(f"--trace {given['trace']}: give the first and the last step, such as 20:25")
        given["trace"] = [int(first), int(last)]
    return {f"--{name}": (keys[name], value) for name, value in given.items()}


def check_resume(how: str) -> None:
    """Raise ValueError for a way to resume that there is not."""
    if how not in ("auto", "must", "no"):
        raise ValueError(f"--resume {how}: must be auto (if there is a checkpoint), must, or no")


def _unknown(parser: argparse.ArgumentParser, text: str) -> str:
    if not text.startswith("-"):
        return f"{text}: unknown argument; flags begin with --, lists in --set need quotes"
    flags = [flag for flag in parser._option_string_actions if flag.startswith("--") and flag != "--local_rank"]
    return f"{text}: unknown flag{nearest(text.replace('_', '-'), flags)}, or --set KEY=VALUE"
