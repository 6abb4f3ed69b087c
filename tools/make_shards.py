import sys, os.path as o; sys.path[:] = [o.dirname(o.dirname(o.realpath(__file__)))] + [p for p in sys.path if o.realpath(p) != o.dirname(o.realpath(__file__))]  # noqa: E401, E501, E702, I001  # fmt: skip
"""COCO -> shards that any WebDataset reader opens, checked and reproducible.

    python tools/make_shards.py build --images train2017 --instances instances_train2017.json \\
        --captions captions_train2017.json --out shards --split train
    python tools/make_shards.py verify shards --split train
    python tools/make_shards.py info shards
    python tools/make_shards.py which shards --split train --step 1000 --batch-size 32

Exit status: 0 fine, 1 `verify` found problems, 2 wrong usage or unusable input, 130 interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from visft_ds.conversion.build_command import add_build_parser
from visft_ds.conversion.verify import verify
from visft_ds.data.manifest import Manifest, splits_in
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
    check = commands.add_parser("verify", help="read every byte and list what is wrong")
    check.set_defaults(run=_verify)
    info = commands.add_parser("info", help="what a folder holds")
    info.set_defaults(run=_info)
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
    for command in (check, info, which):
        command.add_argument("folder", type=Path, metavar="DIR")
        command.add_argument("--split", required=command is not info, metavar="NAME")
    for command in (check, info, which):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify(options: argparse.Namespace) -> int:
    problems = verify(options.folder, options.split)
    if options.json:
        _print_json([vars(problem) for problem in problems])
    else:
        for problem in problems:
            print(f"{problem.file}: {problem.message}")
        print(f"{len(problems)} problems" if problems else "every byte is as it was made")
    return 1 if problems else 0


def _info(options: argparse.Namespace) -> int:
    splits = [options.split] if options.split else splits_in(options.folder)
    if not splits:
        raise ValueError(f"{options.folder} holds no finished split")
    described = [_describe(Manifest.load(options.folder, split)) for split in splits]
    if options.json:
        _print_json(described)
        return 0
    for split in described:
        print(f"{split['split']}:")
        for name, value in split.items():
            shown = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, dict) else value
            print(f"  {name.replace('_', ' ')}: {shown}")
    return 0


def _describe(manifest: Manifest) -> dict[str, Any]:
    return {
        "split": manifest.split,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "counts": dict(manifest.counts),
        "categories": len(manifest.categories),
        "words": len(manifest.vocabulary),
        "options": dict(manifest.options),
        "sources": {role: file["name"] for role, file in manifest.sources.items()},
        "quarantine": {bad["file_name"]: bad["reason"] for bad in manifest.quarantine},
        "fingerprint": manifest.fingerprint,
    }


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
