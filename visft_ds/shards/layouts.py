"""Layouts of data sets: what a folder is, and its splits as inputs of a build.

A layout is recognised by the names of its files alone. A folder of two layouts is refused: nobody knows which
annotations are meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from visft_ds.files import checked_name, read_bytes, reading
from visft_ds.shards.common import SPLITS, Exif, FolderSplit, Json, is_split_name, listed_image
from visft_ds.shards.maps import map_layouts, read_maps
from visft_ds.shards.yolo import read_yolo

_YEAR = re.compile(r"^(train|val|test)\d{4}$")
_COCO_FILE = re.compile(r"(?:(instances|maps|captions)_)?(.+)\.json")
#: Names of files beside the images of a split, or in its folder.
_ROBOFLOW = ("_annotations.coco.json",)
_CAPTIONS = ("metadata.jsonl", "captions.jsonl")
_LOOKED_FOR = """looked for
  COCO      instances_SPLIT.json, captions_SPLIT.json or SPLIT.json, here or in annotations/;
            images in SPLIT/ or images/
  Roboflow  SPLIT/_annotations.coco.json beside the images
  YOLO      data.yaml (names, train, val), images/ and labels/; give the path of one of another name
  captions  metadata.jsonl or captions.jsonl (file_name, text) beside the images, here or in SPLIT/
  maps      classes.txt, images/SPLIT, labels/SPLIT; ADE20k's and Cityscapes' own folders
or name the files: visft shards build --images DIR --instances FILE --out OUT --split train"""
_SHOWN = 8  # names in a message


def recognise(
    source: Path, only: str | None = None, exif: Exif = None, void: int | None = None
) -> tuple[str, list[FolderSplit], list[Path]]:
    """(layout, its splits, annotations that are not read) of a folder, or of the data.yaml of one.

    `only` is the name of the only split to look for. `exif` is for annotations that state no sizes: those of
    the pictures as stored ("ignore"), or upright. `void` is the number that means no class in label maps.

    Raises:
        ValueError: nothing that is known, or two things; no split of the name; the files of the layout are
            wrong.
    """
    if source.is_dir():
        layouts = dict(_layouts(source))
    elif source.is_file() and source.suffix in (".yaml", ".yml"):
        layouts = {"YOLO": [source]}
    else:
        raise ValueError(f"{source} is neither a folder nor a data.yaml")
    if not layouts:
        content = sorted(f"{path.name}/" if path.is_dir() else path.name for path in source.iterdir())
        raise ValueError(
            f"{source} is not a data set of a known layout; {_LOOKED_FOR}\nfound {_few(content)}"
        )
    shown = []
    for layout, files in layouts.items():
        names = [str(path.relative_to(source)) for path in files]
        shown.append(f"{layout}: {_few(names)}")
    if len(layouts) > 1:
        remedy = (
            "name the data.yaml of one, or the files by --images, --instances, --captions, --out and --split"
        )
        raise ValueError(f"{source} fits {len(layouts)} layouts, {'; '.join(shown)}; {remedy}")
    match layout:
        case "COCO":
            splits = _coco(source, only)
        case "YOLO":
            splits = read_yolo(files[0], only, exif)
        case "Roboflow" | "captions":
            splits = _beside_images(source, layout, files, only, exif)
        case _:
            splits = read_maps(layout, source, only, void)
    if not splits:
        raise ValueError(f"{source} has no split {only!r}; it is {shown[0]}")
    unread = [path for path in source.glob("annotations/*.json") if path not in files]
    return layout, splits, sorted(unread)


def _few(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _layouts(folder: Path) -> Iterator[tuple[str, list[Path]]]:
    """(layout, files by which it was recognised) of each data set that a folder holds."""
    coco = [file.path for file in _coco_files(folder)]
    if coco:
        yield "COCO", coco
    folders = [folder, *(folder / split for split in SPLITS)]
    for layout, names in (("Roboflow", _ROBOFLOW), ("captions", _CAPTIONS)):
        paths = [each / name for name in names for each in folders]
        files = [path for path in paths if path.is_file()]
        if files:
            yield layout, files
    if (folder / "data.yaml").is_file():
        yield "YOLO", [folder / "data.yaml"]
    yield from map_layouts(folder)


def _split_of(name: str) -> str:
    """Name among the shards of a split that is called `name` in a folder; "" if no split may have it."""
    name = _YEAR.sub(r"\1", name)
    return SPLITS.get(name, name if is_split_name(name) else "")


@dataclass(frozen=True)
class _CocoFile:
    """An annotation file of COCO."""

    path: Path
    role: str  #: instances, maps or captions
    split: str
    images: Path | None  #: folder of its images


def _coco_files(folder: Path) -> Iterator[_CocoFile]:
    """The annotation files of COCO in a folder, by their names and those of the folders of images."""
    for path in sorted((*folder.glob("*.json"), *folder.glob("annotations/*.json"))):
        match = _COCO_FILE.fullmatch(path.name)
        if match is None:
            continue
        role, name = match.groups()
        split = _split_of(name)
        candidates = [name, f"images/{name}", f"{name}/images"]
        if split:
            candidates += [split, f"images/{split}", f"{split}/images"]
        folders = [folder / each for each in (*candidates, "images") if (folder / each).is_dir()]
        images = folders[0] if folders else None
        if role:
            yield _CocoFile(path, role, split, images)
        elif name in SPLITS and images:
            yield _CocoFile(path, "instances", split, images)


def _coco(folder: Path, only: str | None) -> list[FolderSplit]:
    """The splits of a folder of COCO."""
    splits = dict[str, dict[str, Path]]()
    for file in _coco_files(folder):
        if only not in (None, file.split):
            continue
        if not file.split or file.images is None:
            remedy = "--split NAME makes only another split"
            raise ValueError(f"{file.path}: there is no folder of its images; {remedy}")
        files_of = splits.setdefault(file.split, {"images": file.images})
        if file.role in files_of or files_of["images"] != file.images:
            others = _few(list(map(str, files_of.values())))
            raise ValueError(f"{folder} has more than one {file.split!r}: {file.path.name}, {others}")
        files_of[file.role] = file.path
    inputs = list[FolderSplit]()
    for name, files_of in splits.items():
        instances, captions, maps = (files_of.get(role) for role in ("instances", "captions", "maps"))
        inputs.append(FolderSplit(name, files_of["images"], instances, captions, maps))
    return inputs


def _beside_images(
    folder: Path, layout: str, files: Sequence[Path], only: str | None, exif: Exif
) -> list[FolderSplit]:
    """The splits of files that lie beside their images: Roboflow's, or captions."""
    splits = dict[str, FolderSplit]()
    for path in files:
        name = "train" if path.parent == folder else _split_of(path.parent.name)
        if name in splits:
            raise ValueError(f"{folder} has two files of the split {name!r}, one is {path}")
        if only not in (None, name):
            continue
        if layout == "Roboflow":
            splits[name] = FolderSplit(name, path.parent, instances=path)
        else:
            splits[name] = FolderSplit(name, path.parent, captions=read_captions(path, exif))
    return list(splits.values())


def read_captions(path: Path, exif: Exif = None) -> Json:
    """JSON lines of `file_name` and `text`, as image folders of the Hugging Face Hub have them
    (metadata.jsonl), as a COCO file. `caption` or `captions` do as well, each a text or a list of texts;
    images lie beside the file.
    """
    numbers = dict[str, int]()
    captions = list[Json]()
    with reading(path, 'lines such as {"file_name": "a.jpg", "text": "A dog."}'):
        for number, line in enumerate(read_bytes(path).removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
            if line.strip():
                with reading(f"line {number}", "a caption"):
                    name, texts = _parse_caption(line)
                image_id = numbers.setdefault(name, len(numbers) + 1)
                captions += [{"id": number, "image_id": image_id, "caption": text} for text in texts]
        if not numbers:
            raise ValueError("it has no line")
    images = [listed_image(path.parent, name, number, exif) for name, number in numbers.items()]
    return {"images": images, "annotations": captions}


def _parse_caption(line: bytes) -> tuple[str, list[str]]:
    """(file name, captions) of a line."""
    entry = orjson.loads(line)
    values = [entry[key] for key in ("text", "caption", "captions") if key in entry]
    texts = []
    for value in values:
        texts += value if isinstance(value, list) else [value]
    if not values or not all(isinstance(text, str) for text in texts):
        raise ValueError("it has no text")
    return checked_name(entry["file_name"], "it"), texts
