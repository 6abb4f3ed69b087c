"""Which images a training step works on, without a GPU and without training: `tools/make_shards.py which`.

The tool's other commands must not wait for torch, so what a run consists of is imported where it is asked for.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from visft_ds.data.manifest import Manifest
from visft_ds.data.plan import StepPlan
from visft_ds.data.shards import ShardReader

if TYPE_CHECKING:
    from visft_ds.config.schema import VisftConfig

_EPILOG = """three questions:
  which --step N --run runs/stage2-eva_e          the images of a step of that run, here or wherever its shards are
  which --step N --stage 2 --model eva_e --set visft.seed=1      of a run by the flags of launchers/train.py
  which FOLDER --split train --key 493652         where a sample lies: shard, offsets, sizes, digests
"""


def add_which_parser(commands: Any) -> None:
    """Add the sub-command; it leaves the flags of launchers/train.py alone."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "which",
        usage="%(prog)s --step N (--run FOLDER | flags of launchers/train.py) | DIR --split NAME --key IMAGE_ID",
        help="the images of a training step, or the place of a sample",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--step", type=int, metavar="N", help="steps count from 0")
    parser.add_argument(
        "--run",
        type=Path,
        dest="run_folder",
        metavar="FOLDER",
        help="a run folder, instead of the flags of its command",
    )
    parser.add_argument("--data", metavar="FOLDER", help="shards of the run, if they have moved")
    parser.add_argument("--dp-size", type=int, metavar="N", help="show the part of each data-parallel rank ...")
    parser.add_argument("--accumulation", type=int, default=1, metavar="N", help="... and micro-batch")
    parser.add_argument("--split", metavar="NAME", help="with --key")
    parser.add_argument("--key", type=int, metavar="IMAGE_ID", help="an image id")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=which)


def which(options: argparse.Namespace) -> int:
    """Print what is asked for; returns the exit status. `options.rest` has the flags of a run, or with --key DIR.

    Raises:
        ValueError: neither a step nor a key, or what the configuration or the shards do not have.
    """
    if (options.step is None) == (options.key is None):
        raise ValueError("which needs either --step N (of a run) or --key IMAGE_ID (in DIR --split NAME)")
    if options.key is not None:
        return _print_place(options)
    from visft_ds.prepare.datasets import open_training_data
    from visft_ds.prepare.streams import plan_of

    config = _configuration(options)
    sets = open_training_data(config, check_shards=False)
    plan = plan_of(config, sets)
    step_plan = plan.step(options.step)
    parts = {"all": step_plan}
    if options.dp_size is not None:
        plan.check_split(options.dp_size, options.accumulation)
        parts = {
            f"rank {rank} micro-batch {micro}": part
            for rank in range(options.dp_size)
            for micro, part in enumerate(plan.split(step_plan, rank, options.dp_size, options.accumulation))
        }
    manifest = sets[step_plan.dataset].manifest
    images = {name: _image_ids(manifest, part) for name, part in parts.items()}
    if options.json:
        facts = {name: getattr(step_plan, name) for name in ("step", "task", "dataset", "position", "epoch")}
        facts |= {
            "split": f"{manifest.root}/{manifest.split}",
            "state": plan.state(step_plan.step),
            "image_ids": images,
        }
        print(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return 0
    print(
        f"step {step_plan.step}: {step_plan.task}, step {step_plan.position} of this task, epoch {step_plan.epoch} of "
        f"{manifest.root}/{manifest.split}"
    )
    for name, ids in images.items():
        print(f"  {name}: {' '.join(map(str, ids))}")
    return 0


def _configuration(options: argparse.Namespace) -> VisftConfig:
    if options.run_folder is not None and options.rest:
        raise ValueError(f"{options.rest[0]}: with --run, the run folder says everything but --data")
    from visft_ds.config import resolve_arguments
    from visft_ds.run.folder import recorded_config

    moved = [] if options.data is None else ["--data", options.data]
    if options.run_folder is None:
        return resolve_arguments([*options.rest, *moved])[1].visft
    recorded = recorded_config(options.run_folder)
    if options.data is None:
        return recorded.visft
    data = recorded.visft.data.model_copy(update={"root": options.data})
    return replace(recorded, visft=recorded.visft.model_copy(update={"data": data})).visft


def _image_ids(manifest: Manifest, part: StepPlan) -> list[int]:
    return [int(image_id) for image_id in manifest.index["image_id"][part.indices]]


def _print_place(options: argparse.Namespace) -> int:
    if options.split is None or len(options.rest) != 1:
        raise ValueError("which --key needs DIR and --split NAME, and nothing else")
    folder = options.rest[0]
    manifest = Manifest.load(folder, options.split, check_shards=False)
    found = (manifest.index["image_id"] == options.key).nonzero()[0]
    if not len(found):
        left_out = [bad for bad in manifest.quarantine if bad["image_id"] == options.key]
        why = f": left out, {left_out[0]['reason']} ({left_out[0]['detail']})" if left_out else ""
        raise ValueError(f"{folder}/{options.split} has no image {options.key}{why}")
    index = int(found[0])
    row = ShardReader(manifest).row(index)
    facts = {"index": index, "name": manifest.shards[row["shard"]].name, **row}
    if options.json:
        print(orjson.dumps(facts, option=orjson.OPT_INDENT_2).decode())
        return 0
    print(f"image {options.key}: sample {index}, shard {facts['name']}")
    for part in ("image", "label"):
        offset, size, crc = (row[f"{part}_{name}"] for name in ("offset", "size", "crc32"))
        print(f"  {part}: bytes {offset} to {offset + size - 1}, crc32 {crc:08x}")
    print(
        f"  {row['width']} x {row['height']} pixels, {row['num_annotations']} objects, {row['num_captions']} captions"
    )
    return 0
