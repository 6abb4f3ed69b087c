"""Shards -> ordinary COCO files again, so that nobody is locked in.

Nothing is held in memory but one label at a time: the files are written piece by piece.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from visft_ds.data.labels import parse_label
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader


@dataclass(frozen=True)
class Export:
    """What was written."""

    instances: Path
    captions: Path | None  #: None: the split has no captions
    images: Path | None  #: folder of the image files; None: not asked for
    counts: Mapping[str, int]  #: images, annotations, captions


def export(
    manifest: Manifest,
    out: Path,
    *,
    images: bool = False,
    on_sample: Callable[[int], None] = lambda index: None,
) -> Export:
    """Write instances_NAME.json and, where there are any, captions_NAME.json; with `images` the image files in NAME/.

    Images come in the order of the shards. Annotations are as stored; captions get ids from 1, because shards do not
    keep the old ones.

    Raises:
        ValueError: one of the files exists; a damaged sample; an image whose name would lead out of its folder.
    """
    instances = out / f"instances_{manifest.split}.json"
    captions = out / f"captions_{manifest.split}.json" if manifest.counts.get("captions") else None
    folder = out / manifest.split if images else None
    for path in (instances, captions, folder):
        if path is not None and path.exists():
            raise ValueError(f"{path} exists; give another --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    categories = [{"id": one.coco_id, "name": one.name} for one in manifest.categories]
    with ShardReader(manifest) as reader:
        if folder is not None:
            _write_images(reader, folder, on_sample)
        lists = {"images": lambda: _images(reader), "annotations": lambda: _annotations(reader)}
        counts = _write_lists(instances, {"categories": lambda: iter(categories), **lists})
        if captions is not None:
            lists["annotations"] = lambda: _captions(reader)
            counts["captions"] = _write_lists(captions, lists)["annotations"]
    return Export(instances, captions, folder, counts)


def _labels(reader: ShardReader) -> Iterator[dict[str, Any]]:
    for index in range(len(reader)):
        data = reader.read(index, "labels")[1] or b""
        try:
            yield parse_label(data)
        except ValueError as error:
            raise ValueError(f"{reader.describe(index)}: the label cannot be used: {error}") from error


def _images(reader: ShardReader) -> Iterator[dict[str, Any]]:
    for label in _labels(reader):
        rest = {name: value for name, value in label.items() if name not in ("image_id", "annotations", "captions")}
        yield {"id": label["image_id"], **rest}


def _annotations(reader: ShardReader) -> Iterator[dict[str, Any]]:
    for label in _labels(reader):
        for annotation in label["annotations"]:
            yield {**annotation, "image_id": label["image_id"]}


def _captions(reader: ShardReader) -> Iterator[dict[str, Any]]:
    number = 0
    for label in _labels(reader):
        for caption in label["captions"]:
            number += 1
            yield {"id": number, "image_id": label["image_id"], "caption": caption}


def _write_lists(path: Path, lists: Mapping[str, Callable[[], Iterator[Mapping[str, Any]]]]) -> dict[str, int]:
    """Write {name: [entries]}; returns how many entries each has. The file gets its name when it is complete."""
    counts = dict.fromkeys(lists, 0)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for place, (name, entries) in enumerate(lists.items()):
                file.write((b",\n" if place else b"{") + orjson.dumps(name) + b": [")
                for entry in entries():
                    file.write((b",\n" if counts[name] else b"\n") + orjson.dumps(entry))
                    counts[name] += 1
                file.write(b"]")
            file.write(b"}\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def _write_images(reader: ShardReader, folder: Path, on_sample: Callable[[int], None]) -> None:
    folder.mkdir()
    for index in range(len(reader)):
        image, data = reader.read(index)
        name = parse_label(data or b"")["file_name"]
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or "\0" in name or not relative.parts:
            raise ValueError(f"{reader.describe(index)}: file name {name!r} would lead out of {folder}")
        target = folder / relative
        if target.exists():
            raise ValueError(f"{reader.describe(index)}: two images are named {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(image or b"")
        on_sample(index)
