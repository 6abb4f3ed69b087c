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
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson

from visft_ds.conversion.build import Options, Progress, Report, build, report_dict
from visft_ds.conversion.commands import PARSERS
from visft_ds.data.manifest import Manifest
from visft_ds.data.plan import Plan, StepPlan, TaskPlan

_UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


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
    make = commands.add_parser("build", help="make shards, index and manifest; goes on where it was interrupted")
    make.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the image files")
    make.add_argument("--instances", type=Path, required=True, metavar="JSON", help="instances_*.json of COCO")
    make.add_argument("--captions", type=Path, metavar="JSON", help="captions_*.json of COCO")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the shards go")
    make.add_argument("--split", required=True, metavar="NAME", help="name of the split, first part of all file names")
    make.add_argument("--max-size", type=_size, default="256MB", metavar="SIZE", help="of a shard (default 256MB)")
    make.add_argument("--max-count", type=int, metavar="N", help="samples in a shard (default: no limit)")
    make.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: cores)")
    make.add_argument("--seed", type=_seed, default=0, metavar="N|none", help="order of samples; none: by image id")
    make.add_argument("--bad", choices=("quarantine", "fail"), default="quarantine", help="what to do with bad images")
    make.add_argument("--crowd", choices=("keep", "drop"), default="keep", help="crowd annotations (default keep)")
    make.add_argument("--limit", type=int, metavar="N", help="only the first N images of the order")
    make.add_argument("--replace", action="store_true", help="throw away a split of this name built otherwise")
    make.add_argument("--dry-run", action="store_true", help="check the JSON files and plan, write nothing")
    make.set_defaults(run=_build)
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
    for command in (make, which):
        command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _build(options: argparse.Namespace) -> int:
    if options.workers < 1:
        raise ValueError(f"--workers {options.workers} is not allowed: give at least 1")
    settings = Options(
        images=options.images,
        instances=options.instances,
        captions=options.captions,
        out=options.out,
        split=options.split,
        max_size=options.max_size,
        max_count=options.max_count,
        seed=options.seed,
        fail_on_bad=options.bad == "fail",
        keep_crowd=options.crowd == "keep",
        limit=options.limit,
    )
    began = time.perf_counter()
    report = build(
        settings,
        workers=options.workers,
        dry_run=options.dry_run,
        replace=options.replace,
        on_progress=_Line(),
    )
    if options.json:
        _print_json(report_dict(report))
    else:
        _print_report(report, time.perf_counter() - began)
    return 0


class _Line:
    """One line of progress, rewritten on a terminal, repeated every ten seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        finished = progress.shards == progress.total_shards
        if not self._terminal and now - self._shown < 10:
            return
        self._shown = now
        seconds = max(now - self._began, 1e-9)
        rate = progress.images / seconds
        left = (progress.total_images - progress.images) / rate if rate else float("inf")
        line = (
            f"{progress.images}/{progress.total_images} images, {progress.shards}/{progress.total_shards} shards, "
            f"{rate:.0f} images/s, {progress.bytes / seconds / 1e6:.1f} MB/s, {left:.0f} s left"
        )
        end = "\n" if finished or not self._terminal else ""
        print(f"\r\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)


def _print_report(report: Report, seconds: float) -> None:
    verb = "would make" if report.dry_run else "made"
    kept = f" ({report.shards_kept} were there already)" if report.shards_kept else ""
    print(f"{verb} {report.shards} shards{kept}, {report.bytes / 1e6:.1f} MB, in {report.out}, {seconds:.1f} s")
    print("  " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in report.counts.items()))
    for finding in report.findings:
        print(f"  {finding['count']:>7} x {finding['kind']}: {finding['action']}")
        for example in finding["examples"]:
            print(f"            {example}")
    if report.fingerprint:
        print(f"  fingerprint {report.fingerprint}")


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


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for instance 256MB ({', '.join(_UNITS)[2:]})")
    return int(float(found[1]) * _UNITS[found[2]])


def _seed(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer from 0 nor 'none'")
    return int(text)


def _print_json(content: Any) -> None:
    print(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())


if __name__ == "__main__":
    sys.exit(main())
