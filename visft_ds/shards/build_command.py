"""The sub-command `build` of `visft shards`: its flags, progress and report."""

from __future__ import annotations

import argparse
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config.preflight import is_url
from visft_ds.data.decode import MAX_PIXELS
from visft_ds.data.shards import manifest_path, splits_in
from visft_ds.flags import check_least, parse_size
from visft_ds.monitor.console import Gauge
from visft_ds.redaction import redacted
from visft_ds.shards.build import Options, build
from visft_ds.shards.finish import BuildReport, left_out
from visft_ds.shards.images import CHECK_LEVELS
from visft_ds.shards.layouts import FolderSplit, recognise
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.workers import BuildProgress

_EPILOG = """images and JSON files may be URLs that fsspec knows (http, s3, gs, hf ... with visft_ds[remote] installed).

examples:
  visft shards build MYFOLDER               all splits that it has, into MYFOLDER-shards
  visft shards build --images train2017 --instances instances_train2017.json \\
      --captions captions_train2017.json --out shards --split train
  visft shards build --images s3://bucket/val2017 --instances s3://bucket/instances_val2017.json \\
      --out shards --split val
  visft shards build ... --dry-run          what would be made; nothing is written
"""


def add_build_parser(commands: Any, summary: str) -> None:
    """Add the sub-command that makes shards."""
    parser = commands.add_parser(
        "build",
        help=summary,
        description="Make shards, index and manifest of a data set; goes on where it was interrupted. A folder is "
        "recognised by its files: COCO, Roboflow's COCO export, YOLO (data.yaml), or images with captions (jsonl).",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("folder", nargs="?", metavar="FOLDER", help="a data set, or its data.yaml; instead of the three flags below")
    add("--images", metavar="DIR|URL", help="folder of the image files")
    add("--instances", metavar="FILE|URL", help="instances_*.json of COCO")
    add("--captions", metavar="FILE|URL", help="captions_*.json of COCO; at least one of the two")
    add("--out", metavar="DIR", help="where the shards go (of a FOLDER: FOLDER-shards)")
    add("--split", metavar="NAME", help="name of the split, first part of all file names (of a FOLDER: only this one)")
    size, reencoding = (partial(_parsed, parse) for parse in (parse_size, Reencoding.parse))
    shards = parser.add_argument_group("shards")
    shards.add_argument("--max-size", type=size, default="256MB", metavar="SIZE", help="of a shard (default 256MB)")
    shards.add_argument("--max-count", type=int, metavar="N", help="samples in a shard (default: no limit)")
    shards.add_argument("--seed", type=_seed, default=0, metavar="N|none", help="order of samples; none: by image id")
    chosen = parser.add_argument_group("what is taken")
    add = chosen.add_argument
    add("--limit", type=int, metavar="N", help="only the first N images of the order")
    add("--ids", metavar="FILE|URL", help="only these images: one image id or file name a line")
    add("--license", type=_licenses, metavar="ID,ID", help="only images with one of these licence ids")
    add("--empty", choices=("keep", "drop"), default="keep", help="images with neither annotation nor caption (keep)")
    add("--crowd", choices=("keep", "drop"), default="keep", help="crowd annotations (default keep)")
    add(
        "--categories",
        default="keep",
        metavar="keep|coco80|FILE",
        help='as in the JSON; COCO\'s 80; or a JSON file of {"name or id": {"id": .., "name": ..} or null, "*": null}',
    )
    add(
        "--allow-drops",
        action="store_true",
        help="go on where more than a tenth of the annotations cannot be used or contradict their masks (else exit 3)",
    )
    images = parser.add_argument_group("images")
    add = images.add_argument
    add("--check", choices=CHECK_LEVELS, default="decode", help="how far to look into each file (default decode)")
    add("--bad", choices=("quarantine", "fail"), default="quarantine", help="unusable images: leave out, or stop")
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"largest image (default {MAX_PIXELS:,})")
    add("--reencode", type=reencoding, metavar="qQ[:SIDE]", help="as JPEG of this quality, short side at most SIDE")
    running = parser.add_argument_group("how it runs")
    add = running.add_argument
    add("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: cores)")
    add("--replace", action="store_true", help="throw away a split of this name built otherwise, or of more images")
    add("--dry-run", action="store_true", help="check the JSON files and plan, write nothing")
    add("--json", action="store_true", help="print JSON")
    add("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run_build)


def run_build(options: argparse.Namespace) -> int:
    """Build and print the report. Returns the exit status. Raises what `build` raises."""
    check_least(options, workers=1)
    inputs = ("images", "instances", "captions")
    if options.folder is None:
        missing = [f"--{name}" for name in ("images", "out", "split") if getattr(options, name) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing; give a FOLDER that is recognised, or these")
        reports = [
            _build(options, options.out, FolderSplit(options.split, *(getattr(options, name) for name in inputs)))
        ]
    else:
        doubled = [f"--{name}" for name in inputs if getattr(options, name) is not None]
        if doubled:
            raise ValueError(f"{options.folder} has its own files: leave out {', '.join(doubled)}, or the folder")
        if is_url(options.folder):
            raise ValueError(
                f"{redacted(options.folder)}: only local folders are recognised; give --images and the files"
            )
        reports = list(_build_folder(options, Path(os.path.abspath(options.folder))))
    if options.json:
        told = [asdict(report) for report in reports]
        print(orjson.dumps(told if options.folder else told[0], option=orjson.OPT_INDENT_2).decode())
    return 0


def _build_folder(options: argparse.Namespace, place: Path) -> Iterator[BuildReport]:
    """Build every split of a folder that is recognised; all are read before the first is written."""
    kind, splits, left = recognise(place, options.split)
    out = options.out or f"{place.parent if place.is_file() else place}-shards"
    if not options.json:
        print(f"{options.folder}: {kind}, {', '.join(split.name for split in splits)}")
        for path in left:
            print(f"  not read: {path.relative_to(place)}")
    for split in splits:
        if not options.json:
            print(f"{split.name}:")
        yield _build(options, out, split)
    if not options.json and not options.dry_run:
        there = splits_in(Path(out))
        if "train" in there:
            without = "" if "val" in there else " --set visft.run.eval_every=0"
            print(f"train on it: visft train --stage 1 --data {out}{without}")
        else:
            print("visft train looks for a split train; --set visft.data.train=NAME takes another one")


def _build(options: argparse.Namespace, out: str, split: FolderSplit) -> BuildReport:
    settings = Options(
        images=split.images,
        instances=split.instances,
        captions=split.captions,
        out=out,
        split=split.name,
        max_size=options.max_size,
        max_count=options.max_count,
        seed=options.seed,
        fail_on_bad=options.bad == "fail",
        keep_crowd=options.crowd == "keep",
        limit=options.limit,
        categories=options.categories,
        keep_empty=options.empty == "keep",
        ids=options.ids,
        licenses=options.license,
        check=options.check,
        reencode=options.reencode,
        max_pixels=options.max_pixels,
        allow_drops=options.allow_drops,
    )
    began = time.perf_counter()
    with Gauge("reading annotations", enabled=not options.quiet) as gauge:
        report = build(
            settings,
            workers=options.workers,
            dry_run=options.dry_run,
            replace=options.replace,
            on_progress=partial(show_progress, gauge),
        )
    if not options.json:
        _print_report(report, time.perf_counter() - began)
    return report


def show_progress(gauge: Gauge, progress: BuildProgress) -> None:
    """Show how far a build is."""
    if progress.total_images and progress.phase != gauge.what:
        gauge.phase(progress.phase, progress.total_images, "images", progress.images)
    gauge.show(progress.images, f", {progress.shards}/{progress.total_shards} shards" if progress.total_shards else "")


def _print_report(report: BuildReport, seconds: float) -> None:
    verb = "would make" if report.dry_run else "made"
    kept = f" ({report.shards_kept} were there already)" if report.shards_kept else ""
    print(f"{verb} {report.shards} shards{kept}, {report.bytes / 1e6:.1f} MB, in {report.out}, {seconds:.1f} s")
    print("  " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in report.counts.items()))
    for finding in report.findings:
        print(f"  {finding['count']:>7} x {finding['kind']}: {finding['action']}")
        for example in finding["examples"]:
            print(f"            {example}")
    if report.quarantine:
        place = "--json" if report.dry_run else f"{report.out.rstrip('/')}/{manifest_path(Path(), report.split).name}"
        print(f"  images left out ({place} lists all, under 'quarantine'):")
        for line in left_out(report.quarantine):
            print(f"    {line}")
    if report.fingerprint:
        print(f"  fingerprint {report.fingerprint}")


def _seed(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer from 0 nor 'none'")
    return int(text)


def _licenses(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of licence ids; write for instance 4,5")
    return tuple(int(part) for part in text.split(","))


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
