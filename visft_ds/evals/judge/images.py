"""Image files as sets of images; the hash that identifies a set; lists and annotations beside them.

Files are identified by name, size and modification time, so that a set of millions is not read twice to be
known.
"""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import torch
from PIL import Image
from torch import Tensor

from visft_ds.data.decode import bands_of, levels
from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.files import open_image, read_bands, read_bytes, reading
from visft_ds.settings.bands import Bands, in_words
from visft_ds.shards.division import group_in

#: The parts that models are judged on, the first one that a data set has.
PARTS = ("val", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")
_MOST_TEXT = 2**28  # bytes of a list of names and texts


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


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
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f"{len(missing)} images that are named are not there, first {missing[0]}")
    names = [str(path.relative_to(root)) for path in paths]
    facts: list[str] = []
    for name, path in zip(names, paths, strict=True):
        facts += [name, stamp(path)]

    def read(number: int) -> Image.Image:
        # As stored: annotations and published protocols ignore EXIF orientation.
        return open_image(paths[number], upright=False)

    return ImageSet(names, read, digest(facts), stored=paths)


def in_bands(images: ImageSet, bands: Bands | None) -> ImageSet:
    """The images as models see them that read bands (None: three colours of 8 bits).

    Raises ValueError for shards of other bands, and for images that are neither shards nor files.
    """
    if bands is not None and images.bands is None:
        paths = [path for path in images.stored if isinstance(path, Path)]
        if len(paths) == len(images):

            def read(number: int) -> Tensor:
                path = paths[number]
                return shares(bands_of(read_bands(path), bands, str(path)), bands)

            return replace(images, bands=bands, read_bands=read)
    if in_words(images.bands) != in_words(bands):
        raise ValueError(f"the images are of {in_words(images.bands)}, and the models read {in_words(bands)}")
    return images


def shares(values: npt.NDArray[Any], bands: Bands) -> Tensor:
    """Values (H, W, n) of the bands that are read -> (n, H, W) float32, shares of the range."""
    return torch.from_numpy(levels(values, bands) / 255).movedim(2, 0)


def changed(images: ImageSet, change: Callable[[int, Image.Image], Image.Image], how: str) -> ImageSet:
    """The same images after something was done to each; `how` states all that it depends on."""

    def read(number: int) -> Image.Image:
        return change(number, images.read(number))

    return replace(images, read=read, fingerprint=digest((images.fingerprint, how)))


def chosen(images: ImageSet, numbers: Sequence[int]) -> ImageSet:
    """Some of the images, in the given order; one may come several times."""
    indices = np.asarray(numbers, dtype=np.int64)
    of_bands = images.read_bands
    return replace(
        images,
        names=[images.names[number] for number in numbers],
        stored=[images.stored[number] for number in numbers] if images.stored else (),
        groups=None if images.groups is None else images.groups[indices],
        read=lambda index: images.read(numbers[index]),
        read_bands=None if of_bands is None else lambda index: of_bands(numbers[index]),
        fingerprint=digest((images.fingerprint, indices.tobytes())),
    )


def every(count: int, most: int) -> list[int]:
    """Every k-th of so many numbers, so that there are `most` of them or fewer."""
    step = max(1, math.ceil(count / most))
    return list(range(0, count, step))


def grouped(images: ImageSet, by: str) -> ImageSet:
    """The images with the groups that they come from, such as patients or videos.

    Args:
        by: `FILE.csv:COLUMN`, whose first column has the images' names; or a regular expression, see
            `group_in`.

    Raises:
        ValueError: no such file or column, no regular expression, or an image without a group.
    """
    path, _, column = by.rpartition(":")
    if path.endswith(".csv"):
        groups = _in_column(Path(path), column, images.names)
    else:
        with reading(f"groups={by}", "FILE.csv:COLUMN or a regular expression"):
            groups = [group_in(name, by) for name in images.names]
    if None in groups:
        raise ValueError(f"groups={by}: it gives no group for {images.names[groups.index(None)]}")
    numbers = np.unique(np.array(groups), return_inverse=True)[1].astype(np.int64)
    return replace(images, groups=numbers, fingerprint=digest((images.fingerprint, numbers.tobytes())))


def _in_column(path: Path, column: str, names: Sequence[str]) -> list[str | None]:
    """The groups of images in a column of a CSV file, by what stands in its first column."""
    with reading(path, "a CSV file with a line of names of columns"):
        rows = csv.DictReader(read_lines(path))
        columns = rows.fieldnames or ["none"]
        if column not in columns[1:]:
            raise ValueError(
                f"it has no column {column!r} after the first; its columns: {', '.join(columns)}"
            )
        group_of = {row[columns[0]]: row[column] for row in rows}
    groups = []
    for name in names:
        keys = (name, Path(name).name, Path(name).stem)
        groups.append(next((group_of[key] for key in keys if key in group_of), None))
    return groups
