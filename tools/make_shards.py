import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""COCO -> shards that any WebDataset reader opens, checked and reproducible.

    python tools/make_shards.py build --images train2017 --instances instances_train2017.json \\
        --captions captions_train2017.json --out shards --split train
    python tools/make_shards.py verify shards
    python tools/make_shards.py info shards --categories
    python tools/make_shards.py repair shards --split train
    python tools/make_shards.py diff shards/train elsewhere/train
    python tools/make_shards.py export shards --split train --out coco
    python tools/make_shards.py which shards --split train --step 1000 --batch-size 32

Exit status: 0 fine, 1 problems or differences found, 2 wrong usage or unusable input, 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from visft_ds.conversion.build_command import add_build_parser
from visft_ds.conversion.commands import PARSERS
from visft_ds.data.manifest import Manifest
from visft_ds.data.plan import Plan, StepPlan, TaskPlan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nmake_shards: interrupted; run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make_shards.py", description="COCO -> checked, reproducible shards")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_build_parser(commands)
    for add_parser in PARSERS:
        add_parser(commands)
    which = commands.add_parser("which", help="the images of a training step")
    which.add_argument("--step", type=int, required=True, metavar="N")
    which.add_argument("--batch-size", type=int, required=True, metavar="G", help="global batch of a task")
    which.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the run (default 0)")
    which.add_argument(
        "--task",
        action="append",
        metavar="NAME[:RATIO[:BATCH[:HAVING]]]",
        help="repeat for a mixture; HAVING is any, annotations or captions (default detection:1:G:any)",
    )
    which.add_argument("--dp-size", type=int, metavar="N", help="show the part of each data-parallel rank ...")
    which.add_argument("--accumulation", type=int, default=1, metavar="N", help="... and micro-batch")
    which.set_defaults(run=_which)
    which.add_argument("folder", type=Path, metavar="DIR")
    which.add_argument("--split", required=True, metavar="NAME")
    which.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _which(options: argparse.Namespace) -> int:
    manifest = Manifest.load(options.folder, options.split)
    texts = options.task or ["detection"]
    plan = Plan(dict(_task(text, options.batch_size, manifest) for text in texts), options.seed)
    whole = plan.step(options.step)
    parts = {"all": whole}
    if options.dp_size is not None:
        parts = {
            f"rank {rank} micro-batch {micro}": part
            for rank in range(options.dp_size)
            for micro, part in enumerate(plan.split(whole, rank, options.dp_size, options.accumulation))
        }
    images = {name: _image_ids(manifest, part) for name, part in parts.items()}
    if options.json:
        facts = {"step": whole.step, "task": whole.task, "epoch": whole.epoch, "position": whole.position}
        _print_json({**facts, "image_ids": images})
        return 0
    print(f"step {whole.step}: {whole.task}, step {whole.position} of this task, epoch {whole.epoch}")
    for name, ids in images.items():
        print(f"  {name}: {' '.join(map(str, ids))}")
    return 0


def _image_ids(manifest: Manifest, part: StepPlan) -> list[int]:
    return [int(image_id) for image_id in manifest.index["image_id"][part.indices]]


def _task(text: str, batch_size: int, manifest: Manifest) -> tuple[str, TaskPlan]:
    name, ratio, batch, having, *rest = [*text.split(":"), *[""] * max(0, 3 - text.count(":"))]
    if rest or not name:
        raise ValueError(f"--task {text!r} is not of the form NAME[:RATIO[:BATCH[:HAVING]]]")
    samples = manifest.select(having or "any")
    return name, TaskPlan(samples, int(batch or batch_size), float(ratio or 1))


def _print_json(content: Any) -> None:
    print(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())


if __name__ == "__main__":
    sys.exit(main())
