"""The sub-commands of `tools/make_shards.py` for finished shards: their flags, and what they print.

Each returns the exit status: 0 fine, 1 problems or differences found. What a user must mend is raised as ValueError.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import orjson

from visft_ds.data.manifest import Manifest, splits_in
from visft_ds.shards.compare_source import compare_source, load_coco
from visft_ds.shards.diff import LabelChange, SplitDifference, diff, report
from visft_ds.shards.export import export
from visft_ds.shards.info import describe
from visft_ds.shards.problem import Problem, some
from visft_ds.shards.remote import is_url, local_path
from visft_ds.shards.repair import repair
from visft_ds.shards.verify import VerifyProgress, repair_hint, traces_of_splits, verify

_SHOWN = 20


def add_verify_parser(commands: Any) -> None:
    """Add the sub-command that looks for everything that may be wrong."""
    parser = commands.add_parser("verify", help="read every byte and list what is wrong")
    parser.add_argument("folder", type=_folder, metavar="DIR")
    parser.add_argument("--split", action="append", metavar="NAME", help="may be repeated (default: all in the folder)")
    parser.add_argument("--decode", action="store_true", help="also decode every image")
    parser.add_argument(
        "--against", type=Path, metavar="JSON", help="compare with the instances_*.json it was made from"
    )
    parser.add_argument("--captions", type=Path, metavar="JSON", help="compare with the captions_*.json")
    parser.add_argument(
        "--limit", type=int, default=_SHOWN, metavar="N", help="problems shown of a split (%(default)s)"
    )
    _add_reading_flags(parser)
    parser.set_defaults(run=run_verify)


def add_info_parser(commands: Any) -> None:
    """Add the sub-command that describes splits."""
    parser = commands.add_parser("info", help="what a folder holds")
    parser.add_argument("folder", type=_place, metavar="DIR")
    parser.add_argument("--split", metavar="NAME", help="one of them (default: all)")
    parser.add_argument("--categories", action="store_true", help="table of the categories, counted in the labels")
    parser.add_argument("--shards", action="store_true", help="table of the shards")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_info)


def add_repair_parser(commands: Any) -> None:
    """Add the sub-command that makes index and manifest anew."""
    parser = commands.add_parser(
        "repair",
        help="make index and manifest anew from the shards alone",
        description="Make index and manifest anew from the shards alone, also from those that another program wrote: "
        "NAME-000000.tar, ... of KEY.jpg, KEY.json pairs. Every shard must be whole.",
    )
    parser.add_argument("folder", type=_folder, metavar="DIR")
    parser.add_argument("--split", required=True, metavar="NAME")
    parser.add_argument("--instances", type=Path, metavar="JSON", help="COCO file with the names of the categories")
    parser.add_argument("--replace", action="store_true", help="write over a good manifest that describes other shards")
    parser.add_argument("--dry-run", action="store_true", help="read and report, write nothing")
    _add_reading_flags(parser)
    parser.set_defaults(run=run_repair)


def add_diff_parser(commands: Any) -> None:
    """Add the sub-command that compares two splits."""
    parser = commands.add_parser("diff", help="what differs between two splits")
    parser.add_argument("first", type=_place, metavar="DIR/SPLIT")
    parser.add_argument("second", type=_place, metavar="DIR/SPLIT")
    parser.add_argument(
        "--limit", type=int, default=_SHOWN, metavar="N", help="entries shown of each list (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_diff)


def add_export_parser(commands: Any) -> None:
    """Add the sub-command that writes COCO files."""
    parser = commands.add_parser("export", help="shards -> ordinary COCO JSON files, and images")
    parser.add_argument("folder", type=_place, metavar="DIR")
    parser.add_argument("--split", required=True, metavar="NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--images", action="store_true", help="the image files as well, in FOLDER/NAME")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_export)


def _place(text: str) -> Path | str:
    """A folder, or the URL of one."""
    return text if is_url(text) else local_path(text)


def _folder(text: str) -> Path:
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; every byte is read, so fetch the shards to a folder first")
    return local_path(text)


def _add_reading_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="threads (default: cores)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def run_verify(options: argparse.Namespace) -> int:
    """Verify splits; 1 if there are problems."""
    _check_positive(workers=options.workers, limit=options.limit)
    splits = options.split or traces_of_splits(options.folder)
    if not splits:
        raise ValueError(f"{options.folder} holds nothing of any split")
    if len(splits) > 1 and (options.against or options.captions):
        raise ValueError(f"--against and --captions belong to one split; give --split with one of {', '.join(splits)}")
    found: dict[str, list[Problem]] = {}
    for split in splits:
        with _Line("read", options.quiet) as line:
            found[split] = verify(
                options.folder, split, decode=options.decode, workers=options.workers, on_progress=line.bytes
            )
        if options.against or options.captions:
            found[split] += _against(options, split)
    if options.json:
        _print_json({split: [asdict(problem) for problem in problems] for split, problems in found.items()})
    else:
        for split, problems in found.items():
            _print_problems(split, problems, options.limit)
    return 1 if any(found.values()) else 0


def _against(options: argparse.Namespace, split: str) -> list[Problem]:
    try:
        manifest = Manifest.load(options.folder, split)
    except ValueError as error:
        message = f"not compared with the JSON files, because the split does not open: {error}"
        return [Problem(f"{split}.manifest.json", message, fix=repair_hint(options.folder, split))]
    return compare_source(manifest, options.against, options.captions)


def _print_problems(split: str, problems: Sequence[Problem], limit: int) -> None:
    if not problems:
        print(f"{split}: every byte is as it was made")
        return
    for problem in problems[:limit]:
        print(f"{problem.file}: {problem.message}")
    if len(problems) > limit:
        print(f"... and {len(problems) - limit} more: --limit or --json shows them")
    shards = sorted({problem.file for problem in problems})
    print(f"{split}: {len(problems)} problems in {some(shards)}")
    for fix in dict.fromkeys(problem.fix for problem in problems if problem.fix):
        print(f"  {fix}")


def run_info(options: argparse.Namespace) -> int:
    """Describe splits."""
    if not options.split and isinstance(options.folder, str):
        raise ValueError(f"--split is needed with the URL {options.folder}: not every server lists its files")
    splits = [options.split] if options.split else splits_in(options.folder)
    if not splits:
        raise ValueError(f"{options.folder} holds no finished split")
    described = [
        describe(Manifest.load(options.folder, split), categories=options.categories, shards=options.shards)
        for split in splits
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


def run_repair(options: argparse.Namespace) -> int:
    """Repair a split; 1 if it cannot be, because shards are damaged or a good manifest describes others."""
    _check_positive(workers=options.workers)
    categories = []
    if options.instances is not None:
        categories = load_coco(options.instances, ("categories",))["categories"]
        if not all(type(one.get("id")) is int and isinstance(one.get("name"), str) for one in categories):
            raise ValueError(f"{options.instances}: every category needs an integer 'id' and a string 'name'")
    with _Line("read", options.quiet) as line:
        done = repair(
            options.folder,
            options.split,
            categories=categories,
            dry_run=options.dry_run,
            replace_good=options.replace,
            workers=options.workers,
            on_progress=line.bytes,
        )
    if options.json:
        _print_json(asdict(done))
        return 1 if done.problems else 0
    if done.problems:
        _print_problems(options.split, done.problems, _SHOWN)
        print(f"{options.split}: nothing was written")
        return 1
    verb = "would write" if options.dry_run else "wrote"
    what = f"{verb} {' and '.join(done.written)}" if done.written else "nothing to repair"
    print(f"{options.split}: {done.images} images in {done.shards} shards are whole; {what}")
    if done.original:
        print("  index and manifest are those of the build, byte for byte")
    for note in done.notes:
        print(f"  {note}")
    return 0


def run_diff(options: argparse.Namespace) -> int:
    """Compare two splits; 1 if their content differs."""
    _check_positive(limit=options.limit)
    manifests = [_open(path) for path in (options.first, options.second)]
    difference = diff(*manifests)
    if options.json:
        print(orjson.dumps(report(difference), option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS).decode())
    else:
        _print_difference(difference, options.limit)
    return 0 if difference.same_content else 1


def _open(path: Path | str) -> Manifest:
    """DIR/SPLIT, or DIR that holds one split alone."""
    if isinstance(path, str):
        folder, _, split = path.rstrip("/").rpartition("/")
        return Manifest.load(folder, split)
    if path.is_dir():
        splits = splits_in(path)
        if len(splits) != 1:
            raise ValueError(f"{path} holds the splits {', '.join(splits) or 'none'}; write {path}/SPLIT")
        return Manifest.load(path, splits[0])
    return Manifest.load(path.parent, path.name)


def _print_difference(difference: SplitDifference, limit: int) -> None:
    for kind in ("options", "counts"):
        for name, (first, second) in getattr(difference, kind).items():
            print(f"{kind.removesuffix('s')} {name.replace('_', ' ')}: {first} -> {second}")
    lists = {
        "categories only in the first": [f"{number} {name}" for number, name in difference.categories_removed],
        "categories only in the second": [f"{number} {name}" for number, name in difference.categories_added],
        "images only in the first": difference.only_first,
        "images only in the second": difference.only_second,
        "images with other pixels": difference.pixels,
    }
    for title, entries in lists.items():
        if entries:
            print(f"{title} ({len(entries)}): {_listed(entries, limit)}")
    if difference.labels:
        print(f"images with other labels ({len(difference.labels)}):")
        for change in difference.labels[:limit]:
            print(f"  {change.image_id}: {_change_text(change, limit)}")
        if len(difference.labels) > limit:
            print(f"  and {len(difference.labels) - limit} more")
    if difference.order:
        print("the images that both have come in another order")
    if difference.shards:
        print("cut into shards otherwise")
    print("same content" if difference.same_content else "the content differs")


def _listed(entries: Sequence[Any], limit: int) -> str:
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return ", ".join(str(entry) for entry in entries[:limit]) + more


def _change_text(change: LabelChange, limit: int) -> str:
    changed = [f"{number} ({', '.join(names)})" for number, names in change.annotations_changed.items()]
    parts = {
        "annotations added": change.annotations_added,
        "annotations removed": change.annotations_removed,
        "annotations changed": changed,
        "captions added": [repr(text) for text in change.captions_added],
        "captions removed": [repr(text) for text in change.captions_removed],
        "fields changed": change.fields_changed,
    }
    texts = [f"{title} {_listed(entries, limit)}" for title, entries in parts.items() if entries]
    return "; ".join(texts) or "the same in another order or another writing"


def run_export(options: argparse.Namespace) -> int:
    """Write COCO files."""
    done = export(Manifest.load(options.folder, options.split), options.out, images=options.images)
    if options.json:
        facts = {name: value if name == "counts" else value and str(value) for name, value in vars(done).items()}
        _print_json(facts)
        return 0
    print(f"wrote {done.instances}: {done.counts['images']} images, {done.counts['annotations']} annotations")
    if done.captions is not None:
        print(f"wrote {done.captions}: {done.counts['captions']} captions")
    if done.images is not None:
        print(f"wrote {done.images}: {done.counts['images']} image files")
    return 0


class _Line:
    """One line of progress on stderr, rewritten on a terminal, repeated every ten seconds elsewhere."""

    def __init__(self, verb: str, quiet: bool) -> None:
        self._verb, self._quiet = verb, quiet
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and not self._quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def bytes(self, progress: VerifyProgress) -> None:
        """Show how many bytes were read."""
        now = time.monotonic()
        if self._quiet or now - self._shown < (0.2 if self._terminal else 10):
            return
        self._shown = now
        rate = progress.bytes / max(now - self._began, 1e-9)
        left = (progress.total_bytes - progress.bytes) / rate if rate else float("inf")
        line = f"{self._verb} {progress.bytes / 1e6:.0f} of {progress.total_bytes / 1e6:.0f} MB, {rate / 1e6:.0f} MB/s"
        start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
        print(f"{start}{line}, {left:.0f} s left", end=end, file=sys.stderr, flush=True)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name} {number} is not allowed: give at least 1")


def _print_json(content: Any) -> None:
    print(orjson.dumps(content, option=orjson.OPT_INDENT_2).decode())


#: Of the tool, in the order of its help.
PARSERS: Sequence[Callable[[Any], None]] = (
    add_verify_parser,
    add_info_parser,
    add_repair_parser,
    add_diff_parser,
    add_export_parser,
)
