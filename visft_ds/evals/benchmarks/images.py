"""Sources of images: files, members of tar files, arrays; and the hash that identifies a set.

Files are identified by name, size and modification time, so that a set of millions is not read twice to be known;
arrays by their content.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from visft_ds.evals.benchmarks.protocol import ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff")


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


def decode(file: BinaryIO | Path, name: str) -> Image.Image:
    """An image as RGB. Raises ValueError that names it where it cannot be read whole."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's word for broken PNG
        raise ValueError(f"{name} cannot be read as an image: {error}") from error


def from_files(paths: Sequence[Path], root: Path) -> ImageSet:
    """Image files below a folder.

    Raises:
        ValueError: one that is not there.
    """
    missing = [str(path) for path in paths if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"images that are named but not there: {', '.join(missing[:3])}{more}")
    names = [str(path.relative_to(root)) for path in paths]
    parts = (text for path, name in zip(paths, names, strict=True) for text in (name, stamp(path)))
    return ImageSet(names, lambda place: decode(paths[place], str(paths[place])), digest(parts))


def from_tars(paths: Sequence[Path], label_suffix: str) -> tuple[ImageSet, list[bytes]]:
    """(images, their labels) of WebDataset shards: `KEY.jpg` (or another image) beside `KEY.<label_suffix>`.

    Raises:
        ValueError: a tar that is damaged, or an image without label or label without image.
    """
    members: dict[tuple[int, str], tuple[str, int, int]] = {}
    labels: dict[tuple[int, str], bytes] = {}
    for number, path in enumerate(paths):
        try:
            with tarfile.open(path, "r:") as tar:
                for member in (member for member in tar if member.isfile()):
                    stem, suffix = os.path.splitext(member.name)
                    if suffix.lower() in SUFFIXES:
                        members[number, stem] = (member.name, member.offset_data, member.size)
                    elif suffix == label_suffix:
                        file = tar.extractfile(member)
                        assert file is not None
                        labels[number, stem] = file.read()
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise ValueError(f"{path} is no whole tar: {error}; fetch it again") from error
    if alone := sorted(members.keys() ^ labels.keys()):
        number, stem = alone[0]
        lacks = "label" if alone[0] in members else "image"
        raise ValueError(f"{paths[number]}: {stem} has no {lacks} ({len(alone)} like this); pack the shards again")
    keys = sorted(members)
    names = [f"{paths[number].name}/{members[number, stem][0]}" for number, stem in keys]

    def read(place: int) -> Image.Image:
        number, stem = keys[place]
        _, offset, size = members[number, stem]
        with paths[number].open("rb") as file:  # a handle of its own: threads read at once
            file.seek(offset)
            return decode(io.BytesIO(file.read(size)), names[place])

    fingerprint = digest(text for path in paths for text in (path.name, stamp(path)))
    return ImageSet(names, read, fingerprint), [labels[key] for key in keys]


def from_arrays(pixels: npt.NDArray[np.uint8], name: str) -> ImageSet:
    """(n, H, W) grey levels from 0 to 255."""
    names = [f"{name} {place}" for place in range(len(pixels))]
    fingerprint = digest((str(pixels.shape), np.ascontiguousarray(pixels).tobytes()))
    return ImageSet(names, lambda place: Image.fromarray(pixels[place]).convert("RGB"), fingerprint)


def changed(images: ImageSet, change: Callable[[int, Image.Image], Image.Image], how: str) -> ImageSet:
    """The same images after something was done to each; `how` states all that it depends on."""
    return replace(
        images,
        read=lambda place: change(place, images.read(place)),
        fingerprint=digest((images.fingerprint, how)),
    )


def chosen(images: ImageSet, places: Sequence[int], names: Sequence[str] | None = None) -> ImageSet:
    """Some of the images, in the given order; one may come several times."""
    read = images.read
    return replace(
        images,
        names=[images.names[place] for place in places] if names is None else names,
        read=lambda number: read(places[number]),
        fingerprint=digest((images.fingerprint, np.asarray(places, dtype=np.int64).tobytes())),
    )
