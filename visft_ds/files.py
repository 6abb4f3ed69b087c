"""The door for files from outside: parsers' errors become one ValueError, reads are bounded, pictures are upright RGB.

Names of files that stand in other files may not lead out of their folder; what a user has put there under such a name,
a link to another disk among it, is followed. Letters: H W pixels.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pydantic import ValidationError

#: More than a photograph of 50 megapixels, and below what Pillow warns of.
MAX_PIXELS = 80_000_000
#: Largest file that is read whole, bytes: twice the annotation file of Objects365.
MAX_BYTES = 12 * 2**30
#: Pillow's names of the formats that are decoded. Others (EPS calls Ghostscript) are refused whatever they are called.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
#: A progressive JPEG has about ten scans; each one decodes the whole image again.
_MAX_SCANS = 200


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a parser raises about a file's content into one ValueError: path, what it should be, cause.

    Errors of the operating system (no such file, no permission) pass as they are: they name the file themselves.

    Args:
        path: the file, or an address.
        what: what it should be, with its article: "a COCO annotation file".
    """
    try:
        yield
    except Exception as error:  # foreign parsers raise anything: KeyError, struct.error, RecursionError
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if isinstance(error, ValueError) and str(error).startswith(str(path)):
            raise
        known = isinstance(error, ValueError | Warning) or (isinstance(error, OSError | SyntaxError) and str(error))
        found = str(error) if known else f"{type(error).__name__} {error}"
        if isinstance(error, ValidationError):
            found = _refused(error)
        raise ValueError(f"{path}: cannot be read as {what}: {' '.join(found.split())[:400]}") from error


def _refused(error: ValidationError) -> str:
    """The first problems that a schema has with a value, as `key: problem`, with short values."""
    clauses: list[str] = []
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        given = repr(problem["input"])
        if problem["type"] in ("contradictions", "json_invalid", "missing", "extra_forbidden") or len(given) > 40:
            clause = problem["msg"]
        else:
            clause = f"{problem['msg']}, not {given}"
        clauses.append(f"{key}: {clause}" if key else clause)
    return "; ".join(clauses[:3])


@contextmanager
def open_regular(path: Path | str, most: int = MAX_BYTES) -> Iterator[BinaryIO]:
    """A regular file, open for reading.

    Raises:
        ValueError: a pipe or device, or more than `most` bytes.
        OSError: it is not there, is a folder, or may not be read.
    """
    # Without O_NONBLOCK, opening a pipe waits for whoever writes into it.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path}: not a regular file")
        if found.st_size > most:
            raise ValueError(f"{path}: {found.st_size:,} bytes; at most {most:,} are read")
        yield file


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk; without it a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: Path | str, most: int = MAX_BYTES) -> bytes:
    """Content of a regular file. Raises what `open_regular` raises."""
    with open_regular(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # read(n) allocates n bytes at once


def open_image(source: Path | str | bytes, name: str | None = None, *, upright: bool = True) -> Image.Image:
    """Decode a picture to RGB; of several frames, the first.

    Grey, 16-bit, palette and CMYK pictures are converted, transparency is dropped. EXIF that cannot be read turns
    nothing.

    Args:
        source: the file, or its bytes.
        name: how messages call it, if not by its path.
        upright: apply the EXIF orientation.

    Returns:
        Picture of mode RGB, loaded.

    Raises:
        ValueError: not one of `FORMATS`, damaged or cut, of more than `MAX_PIXELS` pixels, or not a regular file.
        OSError: it is not there, or may not be read.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    with _opened(io.BytesIO(data), source, name) as image:
        if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > _MAX_SCANS:  # a JPEG, where a scan begins
            raise ValueError(f"a JPEG of more than {_MAX_SCANS} scans")
        image.load()
        turn, rgb = _orientation(image) if upright else 1, to_rgb(image)
    if turn == 1:
        return rgb
    rgb.getexif()[ExifTags.Base.Orientation] = turn
    return ImageOps.exif_transpose(rgb)


class Frame(NamedTuple):
    """Facts in the header of a picture."""

    height: int  #: as stored
    width: int
    orientation: int  #: of EXIF, 1 to 8
    format: str  #: Pillow's name

    @property
    def upright(self) -> tuple[int, int]:
        """(H, W) of the picture as it is shown."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def image_frame(source: Path | str | bytes, name: str | None = None) -> Frame:
    """The frame of a picture; no pixel is decoded. Arguments and errors are those of `open_image`."""
    with nullcontext(io.BytesIO(source)) if isinstance(source, bytes) else open_regular(source) as file:
        with _opened(file, source, name) as image:
            return Frame(image.height, image.width, _orientation(image), image.format or "")


@contextmanager
def _opened(file: BinaryIO, source: Path | str | bytes, name: str | None) -> Iterator[Image.Image]:
    """A picture whose header has been read; what goes wrong with it here or later is one ValueError."""
    name = name or ("a picture" if isinstance(source, bytes) else str(source))
    with reading(name, "a picture (JPEG, PNG, WebP, BMP, GIF or TIFF)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF and metadata that are odd; damaged pixels are errors
        try:
            opened = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            file.seek(0)
            start = file.read(12)
            raise ValueError(f"it begins with {start!r}" if start else "the file is empty") from None
        with opened as image:
            if not 0 < image.width * image.height <= MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; allowed are 1 to {MAX_PIXELS:,} in all")
            yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode of Pillow as RGB; transparency is dropped.

    Pixels of 16 bits keep their upper 8; wider ones and floats are scaled from their own range, as they state none.
    """
    if image.mode.startswith(("I", "F")):
        image = image.convert("I") if image.mode.startswith("I;16") else image
        low, high = (float(value) for value in np.asarray(image.getextrema()))
        if image.mode == "I" and low >= 0 and high < 2**16:  # PNGs of 16 bits come as these
            low, high = 0.0, 255 * 256.0
        scale = 255 / (high - low) if high > low else 0.0
        image = image.point(lambda value: value * scale + -low * scale).convert("L")
    # Through RGBA, because Pillow warns about palettes that carry transparency otherwise.
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if it cannot be read."""
    try:
        # Not image.getexif(): for a PNG it decodes all pixels again to find what may stand behind them.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  damaged EXIF raises anything, and says nothing about the orientation
        return 1
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def wrong_name(name: str) -> str | None:
    """Reason why a name, with folders divided by "/", may not be used; None for a good one."""
    if not name or not name.isprintable():
        return "it is empty or has control characters"
    return "it leads out of its folder" if name.startswith("/") or ".." in name.split("/") else None


def checked_name(name: str, where: object) -> str:
    """The name, which stands in the file `where`. Raises ValueError, naming both, as `wrong_name` says."""
    if reason := wrong_name(name):
        raise ValueError(f"{where}: the file name {name[:80]!r} is not allowed: {reason}")
    return name


def shown_name(name: str) -> str:
    """The name for a message: signs that would end its line or move a terminal's cursor are written as escapes."""
    return name if name.isprintable() else repr(name)
