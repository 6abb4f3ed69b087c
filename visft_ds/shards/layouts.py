"""Layouts of data sets: what a folder is, and its splits as inputs of a build.

A layout is recognised by the names of its files alone. A folder that is two things is refused: nobody knows which
annotations are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from visft_ds.shards.caption_lines import read_lines
from visft_ds.shards.source import CocoFile
from visft_ds.shards.yolo import SPLITS, read_description, read_mapping, read_yolo

_YEAR = re.compile(r"(train|val|test)\d{4}")
_COCO_FILE = re.compile(r"(?:(instances|captions)_)?(.+)\.json")
_ROBOFLOW = "_annotations.coco.json"
_CAPTION_FILES = ("metadata.jsonl", "captions.jsonl")
_LOOKED_FOR = """looked for
  COCO      instances_SPLIT.json, captions_SPLIT.json or SPLIT.json, here or in annotations/; images in SPLIT/, images/
  Roboflow  SPLIT/_annotations.coco.json beside the images
  YOLO      data.yaml (names, train, val), images/ and labels/
  captions  metadata.jsonl or captions.jsonl (file_name, text) beside the images, here or in SPLIT/"""
_SHOWN = 8  # names in a message


@dataclass(frozen=True)
class FolderSplit:
    """Inputs of a build that a folder has for a split."""

    name: str
    images: Path | str
    instances: CocoFile | None
    captions: CocoFile | None


def recognise(place: Path, wanted: str | None = None) -> tuple[str, list[FolderSplit], list[Path]]:
    """(kind of the data set, its splits, annotations that are not read) of a folder, or of the data.yaml of one.

    Args:
        wanted: only the split of this name.

    Raises:
        ValueError: nothing that is known, or two things; no split of the name; what the files of the layout say is
            wrong. Says what was looked for and what was found.
    """
    if place.suffix in (".yaml", ".yml") and place.is_file():
        found = [("YOLO", [place])]
    elif not place.is_dir():
        raise ValueError(f"{place} is neither a folder nor a data.yaml")
    else:
        found = list(_layouts(place))
    if not found:
        raise ValueError(f"{place} is no data set of a known layout; {_LOOKED_FOR}\nfound {_content(place)}")
    if len(found) > 1:
        listed = "".join(f"\n  {kind}: {_names(files, place)}" for kind, files in found)
        raise ValueError(
            f"{place} is {len(found)} things:{listed}\nname the data.yaml of one, or the files: visft shards build "
            "--images DIR --instances FILE --captions FILE --out DIR --split NAME"
        )
    kind, files = found[0]
    splits = {"COCO": _coco, "Roboflow": _roboflow, "YOLO": _yolo, "captions": _captioned}[kind](place, files, wanted)
    if not splits:
        raise ValueError(f"{place} has no split {wanted!r}; it is {kind}: {_names(files, place)}")
    left = [path for path in place.glob("annotations/*.json") if path not in files]
    return kind, splits, sorted(left)


def _layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(kind, files by which it was recognised) of each data set that a folder holds."""
    coco = [path for path in _json_files(folder) if _of_coco(folder, path)]
    roboflow = _here_and_below(folder, _ROBOFLOW)
    captions = [path for name in _CAPTION_FILES for path in _here_and_below(folder, name)]
    yield from (one for one in (("COCO", coco), ("Roboflow", roboflow), ("captions", captions)) if one[1])
    yield from (("YOLO", [path]) for path in _descriptions(folder))


def _json_files(folder: Path) -> list[Path]:
    return sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json")))


def _here_and_below(folder: Path, name: str) -> list[Path]:
    """The files of a name in a folder and in those of its splits."""
    tried = (folder / name, *(folder / split / name for split in SPLITS))
    return [path for path in tried if path.is_file()]


def _descriptions(folder: Path) -> list[Path]:
    """The YAML files that describe a YOLO data set: data.yaml, or all that have its keys."""
    if (folder / "data.yaml").is_file():
        return [folder / "data.yaml"]
    found = []
    for path in sorted((*folder.glob("*.yaml"), *folder.glob("*.yml"))):
        try:
            values = read_mapping(path)
        except ValueError:  # of something else: it stands among what was found
            continue
        if "names" in values and any(key in values for key in SPLITS):
            found.append(path)
    return found


def _split_of(name: str) -> str:
    """Name among the shards of a split that is called `name` in a folder; "" for one that no split may have."""
    year = _YEAR.fullmatch(name)
    name = year[1] if year else name
    return SPLITS.get(name, name if all(sign.isalnum() or sign in "-_" for sign in name) else "")


def _of_coco(folder: Path, path: Path) -> bool:
    found = _COCO_FILE.fullmatch(path.name)
    plain = found is not None and found[1] is None  # any other JSON file might be called so
    return found is not None and (not plain or (found[2] in SPLITS and _images(folder, found[2]) is not None))


def _images(folder: Path, name: str) -> Path | None:
    """The folder of the images of a split, None where there is none."""
    short = _split_of(name)
    tried = (name, f"images/{name}", f"{name}/images", short, f"images/{short}", f"{short}/images", "images")
    return next((folder / one for one in tried if one and (folder / one).is_dir()), None)


def _coco(folder: Path, files: Sequence[Path], wanted: str | None) -> list[FolderSplit]:
    found: dict[str, dict[str, Path]] = {}
    for path in files:
        match = _COCO_FILE.fullmatch(path.name)
        assert match is not None  # as it was recognised
        role, split, images = match[1] or "instances", _split_of(match[2]), _images(folder, match[2])
        if wanted not in (None, split):
            continue
        if not split or images is None:
            raise ValueError(
                f"{path}: its images are in none of {match[2]}/, images/{match[2]}/, images/: put them there, or make "
                "the other splits alone (--split NAME)"
            )
        parts = found.setdefault(split, {"images": images})
        if role in parts or parts["images"] != images:
            raise ValueError(
                f"{folder} has more than one {split!r}: {path.name} and {', '.join(map(str, parts.values()))}; give "
                "one by --images, --instances, --captions, --out and --split"
            )
        parts[role] = path
    return [FolderSplit(name, p["images"], p.get("instances"), p.get("captions")) for name, p in found.items()]


def _roboflow(folder: Path, files: Sequence[Path], wanted: str | None) -> list[FolderSplit]:
    return [FolderSplit(name, path.parent, path, None) for name, path in _by_folder(folder, files, wanted)]


def _captioned(folder: Path, files: Sequence[Path], wanted: str | None) -> list[FolderSplit]:
    return [FolderSplit(name, path.parent, None, read_lines(path)) for name, path in _by_folder(folder, files, wanted)]


def _by_folder(folder: Path, files: Sequence[Path], wanted: str | None) -> Iterator[tuple[str, Path]]:
    """(split, file) of files that lie in the folders of splits; one that lies in no such folder is of "train"."""
    found: dict[str, Path] = {}
    for path in files:
        split = "train" if path.parent == folder else _split_of(path.parent.name)
        if split in found:
            raise ValueError(
                f"{folder} has two files of the split {split!r}: {found.get(split)} and {path}; move one away"
            )
        found[split] = path
    yield from ((split, path) for split, path in found.items() if wanted in (None, split))


def _yolo(place: Path, files: Sequence[Path], wanted: str | None) -> list[FolderSplit]:
    description = read_description(files[0], wanted)
    return [FolderSplit(name, *read_yolo(description, name), None) for name in description.images]


def _names(files: Sequence[Path], folder: Path) -> str:
    names = [path.name if path == folder else str(path.relative_to(folder)) for path in files[:_SHOWN]]
    return ", ".join(names) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")


def _content(folder: Path) -> str:
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    if any((folder / one).is_dir() for one in ("labels", "train/labels")):
        shown += "; labels of YOLO need a data.yaml with the names of the classes"
    return shown or "nothing in it"
