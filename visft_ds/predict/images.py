"""Pictures of every kind that people have -> RGB pixels: files, folders, patterns, Pillow images, arrays,
tensors.

Letters: H W pixels.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from torch import Tensor

from visft_ds.files import open_image, reading, to_rgb

Pixels = npt.NDArray[np.uint8]
ImageInput = str | Path | Image.Image | npt.NDArray[np.uint8] | Tensor

#: Endings of files that are taken from a folder; HEIC and AVIF cannot be read, and are named rather than
#: overlooked.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")
_ALLOWED = "give a path, a Pillow image, uint8 in an array (H, W, 3) or (H, W) or a tensor (3, H, W), or a list of them"


class OpenedImage(NamedTuple):
    """Decoded picture, upright."""

    pixels: Pixels  #: (H, W, 3) RGB
    path: Path | None


def printable(path: str | Path) -> str:
    """A path, or a text with one; bytes that are no UTF-8 become their numbers."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_images(given: Sequence[str | Path], *, outside: Path | None = None) -> dict[str, Path]:
    """Name -> file: files as they are; of folders and patterns those that end as images do, sorted. Links to
    folders and hidden files are passed over. A name is the path below the folder that all of them lie in.

    Args:
        given: files, folders with all below them, and patterns with *, ?, [...] or ** for any folders.
        outside: folder whose files are left out: predictions are no input.

    Raises:
        ValueError: nothing there by that name, or no image in a folder or among what a pattern matches.
    """
    files: dict[str, Path] = {}
    roots = []
    for place in map(Path, given):
        if glob.has_magic(str(place)) and not place.exists():
            root = next(path for path in place.parents if not glob.has_magic(str(path)))
            found = _images(root, str(place.relative_to(root)))
        elif place.is_dir():
            root, found = place, _images(place, "**/*")
        elif place.exists():
            root, found = place.parent, [place]
        else:
            raise ValueError(f"{place}: no such file or folder")
        if outside is not None:
            found = [path for path in found if not path.resolve().is_relative_to(outside.resolve())]
        if not found:
            raise ValueError(f"{place}: no image there (files that end in {', '.join(SUFFIXES)})")
        files |= {os.path.abspath(path): path for path in found}
        roots.append(os.path.abspath(root))
    root = Path(os.path.commonpath(roots))
    return {printable(Path(path).relative_to(root).as_posix()): file for path, file in files.items()}


def _images(root: Path, pattern: str) -> list[Path]:
    pattern += "/*" if pattern.endswith("**") else ""  # which alone gives folders
    below = ((path, path.relative_to(root).parts) for path in sorted(root.glob(pattern)))
    shown = (path for path, parts in below if not any(part.startswith(".") for part in parts))
    return [path for path in shown if path.suffix.lower() in SUFFIXES and path.is_file()]


def opened(images: ImageInput | Iterable[ImageInput]) -> tuple[list[OpenedImage], bool]:
    """All pictures that a user gave, and whether it was a single one rather than a list, folder or pattern.

    Raises ValueError for what is no picture, by its path or its place in the list.
    """
    alone = isinstance(images, str | Path | Image.Image | np.ndarray | Tensor) or not isinstance(
        images, Iterable
    )
    every: list[OpenedImage] = []
    for place, image in enumerate([images] if alone else cast(Iterable[ImageInput], images)):
        if isinstance(image, str | Path):
            every += [open_file(file) for file in find_images([image]).values()]
        else:
            every.append(_of_memory(image, "the image" if alone else f"image {place} of the list"))
    return every, alone and not (isinstance(images, str | Path) and not Path(images).is_file())


def open_file(path: Path) -> OpenedImage:
    """Decode a file, of several pictures the first, upright by its EXIF.

    Raises ValueError naming a file that is no picture, damaged, too large, or not a regular one.
    """
    return OpenedImage(np.array(open_image(path)), path)  # torch asks for pixels that can be written to


def _of_memory(image: object, what: str) -> OpenedImage:
    if isinstance(image, Image.Image):
        with reading(what, "a picture"):
            return OpenedImage(np.array(to_rgb(ImageOps.exif_transpose(image))), None)
    array = image.detach().cpu().movedim(0, -1) if isinstance(image, Tensor) else image
    if not isinstance(array, Tensor | np.ndarray):
        raise ValueError(f"{what} is of type {type(image).__name__}: {_ALLOWED}")
    if isinstance(array, np.ndarray) and array.ndim == 2:
        array = np.stack([array] * 3, axis=-1)
    if not (
        str(array.dtype).endswith("uint8")
        and array.ndim == 3
        and array.shape[2] == 3
        and 0 not in array.shape
    ):
        raise ValueError(
            f"{what} has the shape {tuple(array.shape)} and numbers of {array.dtype}: {_ALLOWED}"
        )
    return OpenedImage(np.array(array.numpy() if isinstance(array, Tensor) else array, order="C"), None)
