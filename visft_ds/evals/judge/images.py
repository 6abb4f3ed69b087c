"""Image files as sets of images; the hash that identifies a set; lists and annotations beside them.

Files are identified by name, size and modification time, so that a set of millions is not read twice to be
known.
"""

from __future__ import annotations

import csv
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.files import open_image, read_bytes, reading

#: The parts that models are judged on, the first one that a data set has.
PARTS = ("val", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
_MOST_TEXT = 2**28  # bytes of a list of names and texts


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    found = (Path(entry.path) for entry in os.scandir(folder) if entry.is_file())
    return sorted(path for path in found if path.suffix.lower() in SUFFIXES)


def digest(parts: Iterable[str | bytes]) -> str:
    """sha256 over texts, so that no two lists run into each other."""
    total = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def stamp(path: Path) -> str:
    """Size and modification time of a file, to detect changes."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that are not blank, without spaces around them."""
    with reading(path, "a text file"):
        text = read_bytes(path, _MOST_TEXT).decode("utf-8-sig")  # ICDAR's begin with a byte order mark
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_json(path: Path) -> Any:
    """Content of a JSON file."""
    return orjson.loads(read_bytes(path))


def from_files(paths: Sequence[Path], root: Path) -> ImageSet:
    """Image files below a folder. Raises ValueError for one that is not there."""
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise ValueError(f"{len(missing)} images that are named are not there, first {missing[0]}")
    names = [str(path.relative_to(root)) for path in paths]
    parts = (text for path, name in zip(paths, names, strict=True) for text in (name, stamp(path)))
    # As stored: annotations and published protocols ignore EXIF orientation.
    return ImageSet(names, lambda place: open_image(paths[place], upright=False), digest(parts), stored=paths)


def changed(images: ImageSet, change: Callable[[int, Image.Image], Image.Image], how: str) -> ImageSet:
    """The same images after something was done to each; `how` states all that it depends on."""
    return replace(
        images,
        read=lambda place: change(place, images.read(place)),
        fingerprint=digest((images.fingerprint, how)),
    )


def chosen(images: ImageSet, places: Sequence[int]) -> ImageSet:
    """Some of the images, in the given order; one may come several times."""
    return replace(
        images,
        names=[images.names[place] for place in places],
        stored=[images.stored[place] for place in places] if images.stored else (),
        groups=None if images.groups is None else images.groups[np.asarray(places, dtype=np.int64)],
        read=lambda number: images.read(places[number]),
        fingerprint=digest((images.fingerprint, np.asarray(places, dtype=np.int64).tobytes())),
    )


def grouped(images: ImageSet, by: str) -> ImageSet:
    """The images with the groups that they come from, such as patients or videos.

    Args:
        by: `FILE.csv:COLUMN`, whose first column has the images' names; or a regular expression that is found
        in each
            name, of which the first pair of parentheses, or else all that it finds, is the group.

    Raises:
        ValueError: no such file or column, no regular expression, or an image without a group.
    """
    path, _, column = by.rpartition(":")
    named = _column(Path(path), column) if path.endswith(".csv") else None
    try:
        pattern = re.compile(by)
    except re.error as error:
        raise ValueError(
            f"groups={by}: neither FILE.csv:COLUMN nor a regular expression ({error})"
        ) from error
    groups = []
    for name in images.names:
        if named is not None:
            group = named.get(name, named.get(Path(name).name, named.get(Path(name).stem)))
        else:
            match = pattern.search(name)
            group = match and match[1 if pattern.groups else 0]
        if group is None:
            raise ValueError(f"groups={by}: it gives no group for {name}")
        groups.append(group)
    numbers = np.unique(groups, return_inverse=True)[1].astype(np.int64)
    return replace(images, groups=numbers, fingerprint=digest((images.fingerprint, numbers.tobytes())))


def _column(path: Path, column: str) -> dict[str, str]:
    """First column of a CSV file -> another one."""
    with reading(path, "a CSV file with a line of names of columns"):
        lines = csv.reader(read_bytes(path, _MOST_TEXT).decode("utf-8-sig").splitlines())
        names = next(lines, [])
        if column not in names[1:]:
            raise ValueError(
                f"it has no column {column!r} after the first; its columns: {', '.join(names) or 'none'}"
            )
        place = names.index(column, 1)
        return {row[0]: row[place] for row in lines if row}
