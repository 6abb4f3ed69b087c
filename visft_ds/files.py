"""The door for files from outside: parsers' errors become one ValueError, reads are bounded, pictures are
upright RGB.

Names of files that stand in other files may not lead out of their folder; what a user has put there under
such a name, a link to another disk among it, is followed. Letters: H W pixels.
"""

from __future__ import annotations

import io
import mmap
import os
import re
import stat
import sys
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError
from pydantic import ValidationError

#: More than a photograph of 50 megapixels, and below what Pillow warns of.
MAX_PIXELS = 80_000_000
#: Largest file that is read whole, bytes: twice the annotation file of Objects365.
MAX_BYTES = 12 * 2**30
#: Pillow's names of the formats that are decoded. Others (EPS calls Ghostscript) are refused whatever they
#: are called.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
#: A progressive JPEG has about ten scans; each one decodes the whole image again.
_MAX_SCANS = 200
#: Rows of a very large picture that are converted together.
_BAND = 256

#: What `open_image` does with a picture that has more than 8 bits a value, or more than colours and
#: transparency.
SCALED = "picture of more than 8 bits (scaled to 8: its smallest value is 0, its largest 255)"
UPPER_BITS = "picture of 16 bits with transparency or in CMYK (only the upper 8 bits are read)"
MORE_BANDS = "TIFF with bands beyond colour and transparency (not read)"
#: Colours of 16 bits as Pillow names them, by the order of the bytes of a value, of which it reads one.
_DEEP_COLOURS = re.compile("(RGB|RGBX|RGBA);16([LBN])")
_DEEP_VALUES = re.compile("[^;]+;(16|32)[A-Z]*")
#: Number of colours by photometric interpretation, of those TIFFs that Pillow reads; any other has one.
_TIFF_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
_TIFF_ALPHA = (1, 2)  # extra samples that mean transparency
_said = set[str]()  # notes about pictures that this process has printed


@contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Turn whatever a parser raises about a file's content into one ValueError: path, what it should be,
    cause.

    Errors of the operating system (no such file, no permission) pass as they are: they name the file
    themselves.

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
        if isinstance(error, ValidationError):
            cause = _refused(error)
        elif isinstance(error, ValueError | Warning) or (
            isinstance(error, OSError | SyntaxError) and str(error)
        ):
            cause = str(error)
        else:
            cause = f"{type(error).__name__} {error}"
        raise ValueError(f"{path}: cannot be read as {what}: {' '.join(cause.split())[:400]}") from error


def _refused(error: ValidationError) -> str:
    """The first problems that a schema has with a value, as `key: problem`, with short values."""
    clauses: list[str] = []
    for problem in error.errors(include_url=False):
        key = ".".join(map(str, problem["loc"]))
        value = repr(problem["input"])
        if (
            problem["type"] in ("contradictions", "json_invalid", "missing", "extra_forbidden")
            or len(value) > 40
        ):
            clause = problem["msg"]
        else:
            clause = f"{problem['msg']}, not {value}"
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
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path}: not a regular file")
        if status.st_size > most:
            raise ValueError(f"{path}: {status.st_size:,} bytes; at most {most:,} are read")
        yield file


def sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on disk; without it a power failure may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name when all of it is on disk, also before a power cut.

    It is written beside its name, synced and renamed; folders are made. What fails within leaves the old file
    and nothing else. Any number of processes and threads may write the same file: the last one to end wins.

    Raises:
        OSError: a full disk, a read-only folder; it names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file by `writing`."""
    with writing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text by `writing`."""
    write_bytes(path, text.encode())


def remove_unfinished(folder: Path, name: str = "*") -> None:
    """Remove what `writing` left below a folder where it was killed, of files of this name (a pattern)."""
    for path in folder.rglob(f".{name}.tmp-*"):
        path.unlink()


def read_bytes(path: Path | str, most: int = MAX_BYTES) -> bytes:
    """Content of a regular file. Raises what `open_regular` raises."""
    with open_regular(path, most) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # read(n) allocates n bytes at once


def open_image(
    source: Path | str | bytes,
    name: str | None = None,
    *,
    upright: bool = True,
    quiet: bool = False,
    most: int = MAX_PIXELS,
) -> Image.Image:
    """Decode a picture to RGB; of several frames, the first.

    Grey, palette and CMYK pictures are converted, transparency is dropped; more than 8 bits are scaled from
    the picture's own range. EXIF that cannot be read turns nothing.

    Args:
        source: the file, or its bytes.
        name: how messages call it, if not by its path.
        upright: apply the EXIF orientation.
        quiet: print no warning about what is lost (`Frame.notes`), which is otherwise printed once in a
            process.
        most: pixels that are decoded.

    Returns:
        Picture of mode RGB, loaded.

    Raises:
        ValueError: not one of `FORMATS`, damaged or cut, of more than `most` pixels, or not a regular file.
        OSError: it is not there, or may not be read.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    with _opened(io.BytesIO(data), source, name, most) as image:
        check_scans(data)
        notes = _notes(image)
        other_bytes = _other_bytes(image)
        image.load()
        turn = _orientation(image) if upright else 1
        if other_bytes:
            with Image.open(io.BytesIO(data), formats=FORMATS) as again:
                again.tile = other_bytes
                again.load()
                rgb = _deep_to_rgb(image, again)
        else:
            rgb = to_rgb(image)
    if not quiet:
        _say_once(notes, name or ("a picture" if isinstance(source, bytes) else str(source)))
    if turn == 1:
        return rgb
    rgb.getexif()[ExifTags.Base.Orientation] = turn
    return ImageOps.exif_transpose(rgb)


def check_scans(data: bytes) -> None:
    """Raise ValueError for a JPEG of more scans than any program writes: each decodes the whole image again.

    What follows the picture, such as the video of a phone, does not count. Other files pass.
    """
    if not data.startswith(b"\xff\xd8") or data.count(b"\xff\xda") <= _MAX_SCANS:
        return
    offset = 2
    scans = 0
    while scans <= _MAX_SCANS:
        offset = data.find(b"\xff", offset)
        marker = data[offset + 1] if 0 <= offset < len(data) - 1 else 0xD9
        if marker == 0xD9:  # the end of the picture
            return
        if marker == 0xFF:  # padding
            offset += 1
        elif marker <= 1 or 0xD0 <= marker <= 0xD8:  # within a scan, or without a segment
            offset += 2
        else:
            scans += marker == 0xDA
            offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    raise ValueError(f"a JPEG of more than {_MAX_SCANS} scans")


def _say_once(notes: Sequence[str], name: str) -> None:
    """Print what was done to a picture, each note once in a process; builds of shards count them instead."""
    for note in notes:
        if note not in _said:
            _said.add(note)
            print(f"warning: {shown_name(name)}: {note}; shown once", file=sys.stderr, flush=True)


class Frame(NamedTuple):
    """Facts in the header of a picture."""

    height: int  #: as stored
    width: int
    orientation: int  #: of EXIF, 1 to 8
    format: str  #: Pillow's name
    notes: tuple[str, ...]  #: what decoding to RGB loses: SCALED and the like

    @property
    def upright(self) -> tuple[int, int]:
        """(H, W) of the picture as it is shown."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def image_frame(source: Path | str | bytes, name: str | None = None, most: int = MAX_PIXELS) -> Frame:
    """The frame of a picture; no pixel is decoded. Arguments and errors are those of `open_image`."""
    with nullcontext(io.BytesIO(source)) if isinstance(source, bytes) else open_regular(source) as file:
        with _opened(file, source, name, most) as image:
            return Frame(image.height, image.width, _orientation(image), image.format or "", _notes(image))


def mapped_image(path: Path, most: int) -> npt.NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a TIFF that the file has as they are, row by row, of which only those that are
    looked at are read; None of any other picture. Errors are those of `open_image`.
    """
    with open_regular(path) as file, _opened(file, path, None, most) as image:
        parts = image.tile if image.format == "TIFF" and _is_plain(image) else []
        end = parts[0].offset if parts else -1
        for part in parts:
            left, top, right, bottom = part.extents or (0, 0, 0, 0)
            if (left, right, part.offset) != (0, image.width, end):
                return None
            end += (bottom - top) * (right - left) * 3
        if not 0 < end <= os.fstat(file.fileno()).st_size:
            return None
        shape = (image.height, image.width, 3)
        return np.memmap(path, np.uint8, "r", parts[0].offset, shape)


def spooled_image(path: Path, most: int) -> npt.NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a picture of 8 bits as it is stored, in a temporary file without a name, so that
    `release` gives their memory back; None of a picture of more bits. Errors are those of `open_image`.

    A TIFF that is not compressed is copied part by part, any other is decoded to Pillow's four bytes a pixel.
    """
    with open_regular(path) as file, _opened(file, path, None, most) as image:
        if SCALED in _notes(image):  # by a range that no part of it tells
            return None
        shape = (image.height, image.width, 3)
        with tempfile.TemporaryFile() as spool:
            pixels = np.memmap(spool, np.uint8, "w+", shape=shape)
        if image.format == "TIFF" and _is_plain(image):
            _copy_parts(image, np.memmap(path, np.uint8, "r"), pixels)
            return pixels
        image.load()
        for top in range(0, image.height, _BAND):
            bottom = min(top + _BAND, image.height)
            band = image.crop((0, top, image.width, bottom))
            pixels[top:bottom] = np.asarray(to_rgb(band))
            release(pixels)
        return pixels


def _is_plain(image: ImageFile.ImageFile) -> bool:
    """Return True if the file has all pixels as they are, in RGB."""
    if image.mode != "RGB":
        return False
    return all(part.codec_name == "raw" and _raw_mode(part) == "RGB" for part in image.tile)


def _copy_parts(
    image: ImageFile.ImageFile, stored: npt.NDArray[np.uint8], pixels: npt.NDArray[np.uint8]
) -> None:
    """Copy the strips or tiles of a picture from the bytes of its file to where they are seen."""
    for part in image.tile:
        left, top, right, bottom = part.extents or (0, 0, 0, 0)
        arguments: Any = part.args
        line = arguments[1] or 3 * (right - left)  # bytes from row to row
        end = part.offset + (bottom - top) * line
        if not 0 <= part.offset < end <= len(stored):
            raise ValueError("the file is cut off")
        rows = stored[part.offset : end].reshape(bottom - top, line)
        pixels[top:bottom, left:right] = rows[:, : 3 * (right - left)].reshape(bottom - top, -1, 3)
        if right == image.width:  # the last one of a row of tiles
            release(stored)
            release(pixels)


def release(pixels: npt.NDArray[np.uint8]) -> None:
    """Give back the memory of the file that pixels are read from; who looks at them reads them again."""
    base: object = pixels
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


@contextmanager
def _opened(
    file: BinaryIO, source: Path | str | bytes, name: str | None, most: int
) -> Iterator[ImageFile.ImageFile]:
    """A picture whose header has been read; what goes wrong with it here or later is one ValueError."""
    name = name or ("a picture" if isinstance(source, bytes) else str(source))
    with reading(name, "a picture (JPEG, PNG, WebP, BMP, GIF or TIFF)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF and metadata that are odd; damaged pixels are errors
        with _pillow_allows(most):
            try:
                opened = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                file.seek(0)
                start = file.read(12)
                raise ValueError(f"it begins with {start!r}" if start else "the file is empty") from None
            with opened as image:
                if not 0 < image.width * image.height <= most:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels; allowed are 1 to {most:,} in all"
                    )
                yield image


@contextmanager
def _pillow_allows(pixels: int) -> Iterator[None]:
    """Let Pillow open pictures of so many pixels, which refuses twice 89 million."""
    before = Image.MAX_IMAGE_PIXELS
    if before is not None:
        Image.MAX_IMAGE_PIXELS = max(before, pixels)
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode of Pillow as RGB; transparency is dropped.

    Values of more than 8 bits are scaled from their own range: files do not state how many of their bits are
    used.
    """
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    # Through RGBA, because Pillow warns about palettes that carry transparency otherwise.
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


def _eight_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Values scaled so that the smallest finite one becomes 0 and the largest 255; NaN becomes 0.

    If all are the same, they are taken for 16 bits.
    """
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if low == high:
        low = 0.0
        high = 65535.0
    if values.dtype.itemsize == 2:  # a table is faster than arithmetic on each value
        table = (np.arange(65536) - low) * (255 / (high - low))
        shades: npt.NDArray[np.uint8] = table.clip(0, 255).round().astype(np.uint8)
        return shades[values.astype(np.uint16)]
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)


def _raw_mode(tile: Any) -> str:
    """Pillow's name of how values lie in a part of a file."""
    first = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return first if isinstance(first, str) else ""


def _notes(image: ImageFile.ImageFile) -> tuple[str, ...]:
    """Changes that decoding to RGB makes to a picture whose header has been read."""
    notes = list[str]()
    modes = {_raw_mode(tile) for tile in image.tile}
    if image.mode.startswith(("I", "F")) or any(map(_DEEP_COLOURS.fullmatch, modes)):
        notes.append(SCALED)
    elif any(map(_DEEP_VALUES.fullmatch, modes)) and image.format != "BMP":  # whose 16 bits are a whole pixel
        notes.append(UPPER_BITS)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        colours = _TIFF_COLOURS.get(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0), 1)
        alpha = tags.get(TiffImagePlugin.EXTRASAMPLES, (0,))[0] in _TIFF_ALPHA
        if tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > colours + alpha:
            notes.append(MORE_BANDS)
    return tuple(notes)


def _other_bytes(image: ImageFile.ImageFile) -> list[Any]:
    """Tiles that read the lower byte of each value of a 16-bit colour picture; Pillow reads the upper one.

    Empty for any other picture.
    """
    changed = []
    for tile in image.tile:
        mode = _raw_mode(tile)
        match = _DEEP_COLOURS.fullmatch(mode)
        if match is None:
            return []
        order = match[2]
        if order == "N":  # that of this machine
            order = "L" if sys.byteorder == "little" else "B"
        mode = f"{match[1]};16{'B' if order == 'L' else 'L'}"
        arguments: Any = tile.args
        changed.append(tile._replace(args=mode if isinstance(arguments, str) else (mode, *arguments[1:])))
    return changed


def _deep_to_rgb(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """The picture of the upper and the lower bytes of its values, scaled from their own range over all
    colours.
    """
    values = np.asarray(upper)[..., :3].astype(np.uint16) << 8
    values |= np.asarray(lower)[..., :3]
    return Image.fromarray(_eight_bits(values))


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
    """The name for a message: signs that would end its line or move a terminal's cursor are written as
    escapes.
    """
    return name if name.isprintable() else repr(name)
