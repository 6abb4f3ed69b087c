"""The sub-commands of `visft shards` for finished shards: their flags, and what they print.

Each returns the exit status: 0 no problems, 1 problems found. Errors of the user are raised as ValueError.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config.preflight import is_url
from visft_ds.data.shards import Manifest, splits_in, verify
from visft_ds.shards.info import describe, describe_step

_SHOWN = 20


def add_verify_parser(commands: Any, summary: str) -> None:
    """Add the sub-command that checks finished shards byte by byte."""
    parser = commands.add_parser("verify", help=summary)
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--split", action="append", metavar="NAME", help="may be repeated (default: all in the folder)")
    parser.set_defaults(run=run_verify)


_INFO_EPILOG = """the images of a training step:
  info --step N --run runs/stage2-eva_e          of that run, here or wherever its shards are
  info --step N --stage 2 --model eva_e --set visft.seed=1      of a run by the flags of visft train
"""


def add_info_parser(commands: Any, summary: str) -> None:
    """Add the sub-command that describes splits and steps; it leaves DIR and the flags of visft train alone."""
    parser = commands.add_parser(
        "info",
        usage="%(prog)s DIR [--split NAME] [--categories] [--shards] [--json] | "
        "--step N (--run FOLDER | flags of visft train) [--json]",
        help=summary,
        epilog=_INFO_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--split", metavar="NAME", help="one of them (default: all)")
    parser.add_argument("--categories", action="store_true", help="table of the categories, counted in the labels")
    parser.add_argument("--shards", action="store_true", help="table of the shards")
    parser.add_argument("--json", action="store_true", help="print JSON")
    step = parser.add_argument_group("the images of a training step")
    step.add_argument("--step", type=int, metavar="N", help="steps count from 0")
    step.add_argument(
        "--run", type=Path, dest="run_folder", metavar="FOLDER", help="a run folder, instead of its command's flags"
    )
    step.add_argument("--data", metavar="DIR|URL", help="shards of the run, if they have moved")
    step.add_argument("--dp-size", type=int, metavar="N", help="show the part of each data-parallel rank ...")
    step.add_argument("--accumulation", type=int, default=1, metavar="N", help="... and micro-batch")
    parser.set_defaults(run=run_info)


def run_verify(options: argparse.Namespace) -> int:
    """Verify splits; 1 if there are problems."""
    if is_url(options.folder):
        raise ValueError(f"{options.folder} is a URL; every byte is read, so fetch the shards to a folder first")
    folder = Path(options.folder)
    splits = options.split or splits_in(folder)
    if not splits:
        raise ValueError(f"{folder} holds nothing of any split")
    status = 0
    for split in splits:
        damaged = verify(Manifest.load(folder, split))
        print(f"{split}: damaged: {', '.join(damaged)}" if damaged else f"{split}: every byte is as it was made")
        status |= bool(damaged)
    return status


def run_info(options: argparse.Namespace) -> int:
    """Describe splits, or a step; `options.rest` has DIR, or the flags of a run."""
    if options.step is not None:
        return _print_step(options)
    if len(options.rest) != 1 or options.rest[0].startswith("-"):
        given = " ".join(options.rest) or "nothing"
        raise ValueError(f"info needs one folder or URL of shards, or --step N; given: {given}")
    folder = options.rest[0] if is_url(options.rest[0]) else Path(options.rest[0])
    if not options.split and isinstance(folder, str):
        raise ValueError(f"--split is needed with the URL {folder}: not every server lists its files")
    splits = [options.split] if options.split else splits_in(folder)
    if not splits:
        raise ValueError(f"{folder} holds no finished split")
    described = [
        describe(Manifest.load(folder, split), categories=options.categories, shards=options.shards) for split in splits
    ]
    if options.json:
        _print_json(described)
        return 0
    for facts in described:
        print(f"{facts['split']}:")
        for name, value in facts.items():
            if name.endswith("_table"):
                _print_table(name.removesuffix("_table"), value)
            else:
                print(f"  {name.replace('_', ' ')}: {_shown(value)}")
    return 0


def _print_step(options: argparse.Namespace) -> int:
    if options.run_folder is not None:
        from visft_ds.run.folder import recorded_config

        total = recorded_config(options.run_folder).total_steps
        if not 0 <= options.step < total:
            raise ValueError(f"--step {options.step}: {options.run_folder} has the steps 0 to {total - 1}")
    facts = describe_step(
        options.step, options.rest, options.run_folder, options.data, options.dp_size, options.accumulation
    )
    if options.json:
        _print_json(facts)
        return 0
    print("step {step}: {task}, step {position} of this task, epoch {epoch} of {split}".format(**facts))
    for name, ids in facts["image_ids"].items():
        print(f"  {name}: {' '.join(map(str, ids))}")
    return 0


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = [f"{key} {entry}" for key, entry in list(value.items())[:_SHOWN]]
        more = f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
        return (", ".join(pairs) or "none") + more
    if isinstance(value, list):
        return "  ".join(f"{entry}" for entry in value) + "  (smallest, quartiles, largest)"
    return str(value)


def _print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(rows[0]) if rows else []
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    print(f"  {title}:")
    for row in cells:
        print("    " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_json(content: Any) -> None:
    print(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())
