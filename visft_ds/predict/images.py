"""Pictures of every kind that people have -> RGB pixels: files, folders, patterns, Pillow images, arrays, tensors.

Letters: H W pixels.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor

from visft_ds import files

Pixels = npt.NDArray[np.uint8]
ImageInput = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor

#: Endings of files that are taken from a folder; HEIC and AVIF cannot be read, and are named rather than overlooked.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")


@dataclass(frozen=True)
class OpenedImage:
    """Decoded picture, upright."""

    pixels: Pixels  #: (H, W, 3) RGB
    path: Path | None


@dataclass(frozen=True)
class Found:
    """Image files that paths, folders and patterns name."""

    files: tuple[Path, ...]
    root: Path  #: absolute folder that all of them lie below

    def name(self, file: Path) -> str:
        """Path below the root, with slashes: no two files have the same."""
        return readable(Path(os.path.abspath(file)).relative_to(self.root).as_posix())


def readable(path: str | Path) -> str:
    """A path, or a text with one, that can be printed and stored: bytes that are no UTF-8 become their numbers."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_images(given: Sequence[str | Path], *, outside: Path | None = None) -> Found:
    """Files as they are; of folders (with all below them) and patterns those that end as images do, sorted.

    Args:
        given: paths; a pattern may have *, ?, [...] and ** for any folders. As in a shell, they pass over hidden files.
        outside: folder whose files are left out: predictions are no input.

    Raises:
        ValueError: nothing there by that name, no image in a folder or among what a pattern matches, or all of it in
            `outside`.
    """
    files: dict[str, Path] = {}
    roots = []
    for pattern in map(Path, given):
        if pattern.is_file():
            root, found = pattern.parent, [pattern]
        elif pattern.is_dir():
            root, found = pattern, _matching(f"{glob.escape(str(pattern))}/**")
        elif glob.has_magic(str(pattern)):
            root = next(path for path in pattern.parents if not glob.has_magic(str(path)))
            found = _matching(str(pattern))
        else:
            raise ValueError(f"{pattern}: no such file or folder")
        if not found:
            raise ValueError(f"{pattern}: no image there (files that end in {', '.join(SUFFIXES)})")
        if outside is not None:
            found = [path for path in found if not path.resolve().is_relative_to(outside.resolve())]
            if not found:
                raise ValueError(f"{pattern}: all of it lies in --out {outside}: choose another --out")
        files |= {os.path.abspath(path): path for path in found}
        roots.append(os.path.abspath(root))
    return Found(tuple(files.values()), Path(os.path.commonpath(roots)))


def _matching(pattern: str) -> list[Path]:
    paths = map(Path, sorted(glob.iglob(pattern, recursive=True)))
    return [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]


def opened(images: ImageInput | Iterable[ImageInput]) -> tuple[list[OpenedImage], bool]:
    """All pictures that a user gave, and whether it was a single one rather than a list, folder or pattern.

    Raises:
        ValueError: what is no picture, by its path or its place in the list.
    """
    if isinstance(images, str | Path):
        found = find_images([images])
        return [open_image(file) for file in found.files], Path(images).is_file()
    if isinstance(images, Image.Image | np.ndarray | Tensor):
        return [_of_memory(images, "the image")], True
    if not isinstance(images, Iterable):
        raise ValueError(f"{type(images).__name__} is no image: {_ALLOWED}")
    every: list[OpenedImage] = []
    for place, image in enumerate(images):
        if isinstance(image, str | Path):
            every += [open_image(file) for file in find_images([image]).files]
        else:
            every.append(_of_memory(image, f"image {place} of the list"))
    return every, False


def open_image(path: Path) -> OpenedImage:
    """Decode a picture (`files.open_image`), upright by its EXIF.

    Raises:
        ValueError: naming the file, which is not there or no picture.
    """
    try:
        return OpenedImage(np.array(files.open_image(path)), path)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


_ALLOWED = (
    "give a path, a Pillow image, an array (H, W, 3) or (H, W) or a tensor (3, H, W), both uint8, or a list of them"
)


def _of_memory(image: object, what: str) -> OpenedImage:
    if isinstance(image, Image.Image):
        with files.reading(what, "a picture"):
            if not 0 < image.height * image.width <= files.MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; at most {files.MAX_PIXELS:,} are allowed")
            image.load()
            return OpenedImage(np.array(files.upright_rgb(image)), None)
    if not isinstance(image, Tensor | np.ndarray):
        raise ValueError(f"{what} is of type {type(image).__name__}: {_ALLOWED}")
    dtype = str(image.dtype).removeprefix("torch.")
    if dtype != "uint8":  # NumPy has not all of torch's
        raise ValueError(f"{what} has numbers of {dtype}: give uint8, 0 to 255")
    if isinstance(image, Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"{what} is a tensor of shape {tuple(image.shape)}: {_ALLOWED}")
        array = image.detach().cpu().permute(1, 2, 0).numpy()
    else:
        array = np.stack([image] * 3, axis=-1) if image.ndim == 2 else image
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(f"{what} is an array of shape {image.shape}: {_ALLOWED}")
    return OpenedImage(np.array(array, order="C"), None)
