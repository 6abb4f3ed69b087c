"""Images of every kind that people have -> RGB pixels: files and their bytes, folders, patterns, Pillow
images, arrays.

Letters: H W pixels.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from visft_ds.data.decode import bands_of
from visft_ds.data.fetch import is_url
from visft_ds.files import (
    MAX_PIXELS,
    image_frame,
    open_image,
    read_bands,
    reading,
    refuse_beyond,
    to_rgb,
)
from visft_ds.predict.large import mapped_image, spooled_image
from visft_ds.redaction import redacted
from visft_ds.settings.bands import Bands, in_words

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
#: One image in memory: decoded, or a file's bytes.
ImageInMemory: TypeAlias = "Image.Image | Pixels | Tensor | bytes | BinaryIO"
ImageInput: TypeAlias = "str | Path | ImageInMemory"

#: Endings of files that are taken from a folder; HEIC and AVIF cannot be read, and are named rather than
#: overlooked.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif")
#: Pixels of a picture that is predicted by tiles, whose features are never held at once.
MOST_IN_TILES = 500_000_000
#: EXIF orientation -> quarter turns to the left, and whether the picture is mirrored after them.
_TURNS = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True)}
_TURNS |= {5: (3, True), 6: (3, False), 7: (1, True), 8: (1, False)}
_ALLOWED = (
    "give a path, the bytes of a file, a Pillow image, uint8 in an array (H, W, 3) or (H, W) or a tensor "
    "(3, H, W), or a list of them; floats from 0 to 1 become bytes by (255 * x).round()"
)
_IN_MEMORY = (Image.Image, np.ndarray, bytes, bytearray, memoryview, io.IOBase)  # and tensors


class OpenedImage(NamedTuple):
    """Decoded image, upright."""

    #: (H, W, 3) uint8, RGB; of a model that reads bands their values (H, W, n)
    pixels: npt.NDArray[Any]
    path: Path | None


def printable(path: str | Path) -> str:
    """A path, or a text with one; bytes that are no UTF-8 become their numbers."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_images(inputs: Sequence[str | Path], *, outside: Path | None = None) -> dict[str, Path]:
    """Name -> file: files as they are; of folders and patterns those that end as images do, sorted. Links to
    folders and hidden files are passed over. A name is the path below the folder that all of them lie in.

    Args:
        inputs: files, folders with all below them, and patterns with *, ?, [...] or ** for any folders.
        outside: folder whose files are left out: predictions are no input.

    Raises:
        ValueError: nothing there by that name, no image in a folder or among what a pattern matches, or a
            URL.
    """
    files: dict[str, Path] = {}  # by absolute path: each once
    roots = []
    for path in inputs:
        if is_url(path):
            raise ValueError(
                f"{redacted(path)}: URLs are not read: download the image first; in Python its bytes will do"
            )
        path = Path(path)
        root, matches = _matches(path)
        if outside is not None:
            folder = outside.resolve()
            matches = [match for match in matches if not match.resolve().is_relative_to(folder)]
        if not matches:
            endings = ", ".join(SUFFIXES)
            raise ValueError(f"{path}: no image there (files that end in {endings})")
        for match in matches:
            files[os.path.abspath(match)] = match
        roots.append(os.path.abspath(root))
    common = os.path.commonpath(roots)
    named = {}
    for path_of_file, file in files.items():
        below = Path(path_of_file).relative_to(common)
        named[printable(below.as_posix())] = file
    return named


def _matches(path: Path) -> tuple[Path, list[Path]]:
    """The folder of a file, folder or pattern, and the files that it stands for."""
    if glob.has_magic(str(path)) and not path.exists():
        root = next(parent for parent in path.parents if not glob.has_magic(str(parent)))
        return root, _images_below(root, str(path.relative_to(root)))
    if path.is_dir():
        return path, _images_below(path, "**/*")
    if path.exists():
        return path.parent, [path]
    raise ValueError(f"{path}: no such file or folder")


def _images_below(root: Path, pattern: str) -> list[Path]:
    if pattern.endswith("**"):  # which alone gives folders
        pattern += "/*"
    images = []
    for path in sorted(root.glob(pattern)):
        is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not is_hidden and path.suffix.lower() in SUFFIXES and path.is_file():
            images.append(path)
    return images


def opened(
    images: ImageInput | Iterable[ImageInput], most: int = MAX_PIXELS, bands: Bands | None = None
) -> tuple[list[OpenedImage], bool]:
    """All images that a user gave, and whether it was a single one rather than a list, folder or pattern;
    files have at most so many pixels. `bands` are those that the model reads.

    Raises ValueError for what is no image, by its path or its place in the list.
    """
    from torch import Tensor  # `visft predict` looks for its images before that, which takes seconds

    is_list = isinstance(images, Iterable) and not isinstance(images, (str, *_IN_MEMORY, Tensor, Mapping))
    listed = cast(Iterable[ImageInput], images if is_list else [images])
    every: list[OpenedImage] = []
    for index, image in enumerate(listed):
        if isinstance(image, str | Path):
            every += [open_file(file, most, bands) for file in find_images([image]).values()]
        else:
            label = f"image {index} of the list" if is_list else "the image"
            every.append(_from_memory(image, label, bands))
    single = Path(images).is_file() if isinstance(images, str | Path) else not is_list
    return every, single


def open_file(path: Path, most: int = MAX_PIXELS, bands: Bands | None = None) -> OpenedImage:
    """Decode a file, of several images the first, upright by its EXIF; or the bands of a file.

    Above MAX_PIXELS, where `most` allows it, no more memory is taken than a format needs: TIFFs that are not
    compressed, in strips, are read where one looks at them, others decoded to a temporary file.

    Raises ValueError naming a file that is no image, damaged, too large, or not a regular one.
    """
    if bands is not None:
        return OpenedImage(bands_of(read_bands(path), bands, str(path)), path)
    if most > MAX_PIXELS:
        frame = image_frame(path, most=most)
        if frame.height * frame.width > MAX_PIXELS:
            mapped = mapped_image(path, most)
            pixels = spooled_image(path, most) if mapped is None else mapped
            return OpenedImage(_upright(pixels, frame.orientation), path)
    return OpenedImage(np.array(open_image(path)), path)  # torch asks for pixels that can be written to


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """A view of stored pixels as EXIF says that they are seen."""
    turns, mirrored = _TURNS[orientation]
    turned = np.rot90(pixels, turns)
    return turned[:, ::-1] if mirrored else turned


def _from_memory(image: Any, label: str, bands: Bands | None) -> OpenedImage:
    import torch
    from torch import Tensor

    if isinstance(image, io.IOBase) and not isinstance(image, io.TextIOBase):
        if image.seekable():
            image.seek(0)  # as Pillow does: what was written last stands at the end
        image = image.read()
    if isinstance(image, bytes | bytearray | memoryview):
        if bands is not None:
            return OpenedImage(bands_of(read_bands(bytes(image), label), bands, label), None)
        return OpenedImage(np.array(open_image(bytes(image), label)), None)
    if isinstance(image, Image.Image) and bands is None:
        with reading(label, "an image"):
            refuse_beyond(image)
            return OpenedImage(np.array(to_rgb(ImageOps.exif_transpose(image))), None)
    kind = f"of type {type(image).__name__}"
    if isinstance(image, Tensor | np.ndarray):
        kind = f"{image.dtype} of shape {tuple(image.shape)}"
    if isinstance(image, Tensor) and image.ndim == 3 and image.dtype != torch.bfloat16:  # which NumPy lacks
        image = image.movedim(0, -1).numpy(force=True)
    is_array = isinstance(image, np.ndarray) and image.ndim in (2, 3) and image.size > 0
    if bands is not None:
        if is_array:
            return OpenedImage(bands_of(np.atleast_3d(image), bands, label), None)
        raise ValueError(
            f"{label} is {kind}, and the model reads {in_words(bands)}: give a path, the bytes of a file, "
            f"{bands.kind} in an array (H, W, {bands.count}) or a tensor ({bands.count}, H, W)"
        )
    if is_array and image.ndim == 2:
        image = np.stack([image] * 3, axis=-1)
    if is_array and image.dtype == np.uint8 and image.shape[2] == 3:
        return OpenedImage(np.array(image, order="C"), None)
    raise ValueError(f"{label} is {kind}: {_ALLOWED}")
