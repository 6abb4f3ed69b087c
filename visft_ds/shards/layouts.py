"""Layouts of data sets: what a folder is, and its splits as inputs of a build.

A layout is recognised by the names of its files alone. A folder of two layouts is refused: nobody knows which
annotations are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson

from visft_ds.files import checked_name, read_bytes, reading
from visft_ds.shards.coco import FolderSplit
from visft_ds.shards.maps import map_layouts, read_maps
from visft_ds.shards.yolo import SPLITS, Exif, listed_image, read_yolo

_YEAR = re.compile(r"^(train|val|test)\d{4}$")
_COCO_FILE = re.compile(r"(?:(instances|maps|captions)_)?(.+)\.json")
_BESIDE_IMAGES = {"Roboflow": ("_annotations.coco.json",), "captions": ("metadata.jsonl", "captions.jsonl")}
_LOOKED_FOR = """looked for
  COCO      instances_SPLIT.json, captions_SPLIT.json or SPLIT.json, here or in annotations/; images in SPLIT/, images/
  Roboflow  SPLIT/_annotations.coco.json beside the images
  YOLO      data.yaml (names, train, val), images/ and labels/; give the path of one of another name
  captions  metadata.jsonl or captions.jsonl (file_name, text) beside the images, here or in SPLIT/
  maps      classes.txt, images/SPLIT, labels/SPLIT; ADE20k's and Cityscapes' own folders"""
_SHOWN = 8  # names in a message


def recognise(
    place: Path, wanted: str | None = None, exif: Exif = None, void: int | None = None
) -> tuple[str, list[FolderSplit], list[Path]]:
    """(kind of the data set, its splits, annotations that are not read) of a folder, or of the data.yaml of
    one.

    `wanted` is the name of the only split to look for. `exif` is for annotations that state no sizes: those
    of the pictures as stored ("ignore"), or upright. `void` is the number of places without a class in label
    maps.

    Raises:
        ValueError: nothing that is known, or two things; no split of the name; the files of the layout are
        wrong.
    """
    yaml = place.suffix in (".yaml", ".yml") and place.is_file()
    if not yaml and not place.is_dir():
        raise ValueError(f"{place} is neither a folder nor a data.yaml")
    found = [("YOLO", [place])] if yaml else list(_layouts(place))
    if not found:
        content = sorted(f"{path.name}/" if path.is_dir() else path.name for path in place.iterdir())
        raise ValueError(f"{place} is not a data set of a known layout; {_LOOKED_FOR}\nfound {_few(content)}")
    told = [f"{kind}: {_few([str(path.relative_to(place)) for path in files])}" for kind, files in found]
    if len(found) > 1:
        remedy = (
            "name the data.yaml of one, or the files by --images, --instances, --captions, --out and --split"
        )
        raise ValueError(f"{place} fits {len(found)} layouts, {'; '.join(told)}; {remedy}")
    kind, files = found[0]
    if kind == "COCO":
        splits = _coco(place, files, wanted)
    elif kind == "YOLO":
        splits = read_yolo(files[0], wanted, exif)
    elif kind not in _BESIDE_IMAGES:
        splits = read_maps(kind, place, wanted, void)
    else:
        splits = []
        for path in files:
            split = "train" if path.parent == place else _split_of(path.parent.name)
            if any(split == other.name for other in splits):
                raise ValueError(f"{place} has two files of the split {split!r}, one is {path}")
            if wanted in (None, split):
                both = (path, None) if kind == "Roboflow" else (None, read_captions(path, exif))
                splits.append(FolderSplit(split, path.parent, *both))
    if not splits:
        raise ValueError(f"{place} has no split {wanted!r}; it is {told[0]}")
    return kind, splits, sorted(path for path in place.glob("annotations/*.json") if path not in files)


def read_captions(path: Path, exif: Exif = None) -> dict[str, Any]:
    """JSON lines of `file_name` and `text`, as image folders of the Hugging Face Hub have them
    (metadata.jsonl), as a COCO file. `caption` or `captions` do as well, each a text or a list of texts;
    images lie beside the file.
    """
    numbers: dict[str, int] = {}
    captions: list[dict[str, Any]] = []
    with reading(path, 'lines such as {"file_name": "a.jpg", "text": "A dog."}'):
        for place, line in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
            if line.strip():
                with reading(f"line {place}", "a caption"):
                    entry = orjson.loads(line)
                    name = checked_name(entry["file_name"], "it")
                    given = [entry[key] for key in ("text", "caption", "captions") if key in entry]
                    texts = [text for one in given for text in (one if isinstance(one, list) else [one])]
                    if not given or not all(isinstance(text, str) for text in texts):
                        raise ValueError("it has no text")
                image = numbers.setdefault(name, len(numbers) + 1)
                captions += [{"id": place, "image_id": image, "caption": text} for text in texts]
        if not numbers:
            raise ValueError("it has no line")
    images = [listed_image(path.parent, name, number, exif) for name, number in numbers.items()]
    return {"images": images, "annotations": captions}


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more


def _layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(kind, files by which it was recognised) of each data set that a folder holds."""
    json_files = sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json")))
    if coco := [path for path in json_files if _of_coco(folder, path)[0]]:
        yield "COCO", coco
    for kind, names in _BESIDE_IMAGES.items():
        tried = [part / name for name in names for part in (folder, *(folder / split for split in SPLITS))]
        if beside := [path for path in tried if path.is_file()]:
            yield kind, beside
    if (folder / "data.yaml").is_file():
        yield "YOLO", [folder / "data.yaml"]
    yield from map_layouts(folder)


def _split_of(name: str) -> str:
    """Name among the shards of a split that is called `name` in a folder; "" for one that no split may
    have.
    """
    name = _YEAR.sub(r"\1", name)
    return SPLITS.get(name, name if all(sign.isalnum() or sign in "-_" for sign in name) else "")


def _of_coco(folder: Path, path: Path) -> tuple[str, str, Path | None]:
    """(role, split, folder of the images) of an annotation file of COCO; the role is "" for any other
    file.
    """
    found = _COCO_FILE.fullmatch(path.name)
    if found is None or (found[1] is None and found[2] not in SPLITS):
        return "", "", None
    name, short = found[2], _split_of(found[2])
    tried = (name, f"images/{name}", f"{name}/images", short, f"images/{short}", f"{short}/images", "images")
    images = next((folder / one for one in tried if one and (folder / one).is_dir()), None)
    return found[1] or ("instances" if images else ""), short, images


def _coco(folder: Path, files: Sequence[Path], wanted: str | None) -> list[FolderSplit]:
    found: dict[str, dict[str, Path]] = {}
    for path in files:
        role, split, images = _of_coco(folder, path)
        if wanted not in (None, split):
            continue
        if not split or images is None:
            raise ValueError(
                f"{path}: there is no folder of its images; --split NAME makes only another split"
            )
        parts = found.setdefault(split, {"images": images})
        if role in parts or parts["images"] != images:
            raise ValueError(
                f"{folder} has more than one {split!r}: {path.name}, {_few([*map(str, parts.values())])}"
            )
        parts[role] = path
    return [
        FolderSplit(name, p["images"], *map(p.get, ("instances", "captions", "maps")))
        for name, p in found.items()
    ]
