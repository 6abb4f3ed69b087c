"""The door for files from outside: parsers' errors become one ValueError, reads are bounded, pictures are
upright RGB.

Names of files that stand in other files may not lead out of their folder; what a user has put there under
such a name, a link to another disk among it, is followed. Letters: H W pixels.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import re
import stat
import sys
import uuid
import warnings
from collections.abc import Iterator
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

#: First bytes of a TIFF.
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
#: Colours of 16 bits as Pillow names them, by the order of the bytes of a value, of which it reads one.
_DEEP_COLOURS = re.compile("(RGB|RGBX|RGBA);16([LBN])")
_DEEP_VALUES = re.compile("[^;]+;(16|32)[A-Z]*")
#: Number of colours by photometric interpretation, of those TIFFs that Pillow reads; any other has one.
_TIFF_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}
_TIFF_ALPHA = (1, 2)  # extra samples that mean transparency
_BANDS_OF_MOST = 8  # of a picture with the most pixels; of smaller ones more
_COLOURS_ONLY = (
    "it has {}, and colours of 8 bits are read here; convert it, or train on such pictures (docs/bands.md)"
)
_PALETTE = "its values are numbers of a palette, no bands: save it with colours (RGB) or as grey"
#: Modes of Pillow whose values are those of the file.
_MODES_OF_BANDS = ("L", "LA", "RGB", "RGBA", "I;16", "I;16B")


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
        elif isinstance(error, UnidentifiedImageError):  # its text is the address of a buffer
            cause = "its content is of another kind"
        elif isinstance(error, ValueError | Warning) or (
            isinstance(error, OSError | SyntaxError) and str(error)
        ):
            cause = str(error)
        elif isinstance(error, KeyError) and " " not in str(error):
            cause = f"it has no {error}"
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
    most: int = MAX_PIXELS,
) -> Image.Image:
    """Decode a picture to RGB; of several frames, the first.

    Grey, palette and CMYK pictures are converted, transparency is dropped. EXIF that cannot be read turns
    nothing.

    Args:
        source: the file, or its bytes.
        name: how messages call it, if not by its path.
        upright: apply the EXIF orientation.
        most: pixels that are decoded.

    Returns:
        Picture of mode RGB, loaded.

    Raises:
        ValueError: not one of `FORMATS`, damaged or cut, of more than `most` pixels, or not a regular file;
            one with more than colours of 8 bits, which `read_bands` reads.
        OSError: it is not there, or may not be read.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    with opened_header(io.BytesIO(data), name or _name_of(source), most) as image:
        check_scans(data)
        refuse_beyond(image)
        image.load()
        turn = _orientation(image) if upright else 1
        rgb = to_rgb(image)
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


class Frame(NamedTuple):
    """Facts in the header of a picture."""

    height: int  #: as stored
    width: int
    orientation: int  #: of EXIF, 1 to 8
    format: str  #: Pillow's name
    beyond: str  #: what it has beyond colours of 8 bits; "" for most pictures
    transparent: bool = False  #: it has a band or colours that are said to be transparent

    @property
    def upright(self) -> tuple[int, int]:
        """(H, W) of the picture as it is shown."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def image_frame(source: Path | str | bytes, name: str | None = None, most: int = MAX_PIXELS) -> Frame:
    """The frame of a picture; no pixel is decoded. Arguments and errors are those of `open_image`, but
    pictures of any bands have one.
    """
    with nullcontext(io.BytesIO(source)) if isinstance(source, bytes) else open_regular(source) as file:
        try:
            with opened_header(file, name or _name_of(source), most) as image:
                orientation = _orientation(image)
                format_name = image.format or ""
                transparent = "transparency" in image.info or image.mode.endswith(("A", "a"))
                return Frame(image.height, image.width, orientation, format_name, _beyond(image), transparent)
        except ValueError:
            frame = _tiff_frame(file)
            if frame is None:
                raise
            return frame


def _tiff_frame(file: BinaryIO) -> Frame | None:
    """The frame of a TIFF that Pillow does not know, of many bands; None if it is none."""
    file.seek(0)
    if file.read(4) not in _TIFF:
        return None
    file.seek(0)  # the library takes the place where it finds a file for its start
    try:
        with _tifffile().TiffFile(file) as tiff:
            page = tiff.pages[0]
            beyond = f"{page.samplesperpixel} bands of {page.dtype}"
            return Frame(page.imagelength, page.imagewidth, 1, "TIFF", beyond)
    except Exception:  # noqa: BLE001  it raises anything; what Pillow said of the file is raised instead
        return None


def _tifffile() -> Any:
    """The library, which would write into the output what is an error here."""
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return tifffile


def read_bands(
    source: Path | str | bytes, name: str | None = None, most: int = MAX_PIXELS
) -> npt.NDArray[Any]:
    """All bands of a picture, with the values that its file has: of a TIFF its samples, or its pages if they
    are alike and have one sample each; transparency is a band, too.

    Returns:
        (H, W, bands) uint8 or uint16; float32 of these and of int8, int16 and float16.

    Raises:
        ValueError: as `open_image`; numbers of a palette, or CMYK; values of 32 bits that are no floats; a
            picture that its EXIF data turns.
        OSError: it is not there, or may not be read.
    """
    data = source if isinstance(source, bytes) else read_bytes(source)
    name = name or _name_of(source)
    if data.startswith(_TIFF):
        with reading(name, "a TIFF"):
            return _kept_values(_tiff_values(data, most))
    with opened_header(io.BytesIO(data), name, most) as image:
        check_scans(data)
        if _orientation(image) != 1:
            raise ValueError("its EXIF data turns it: store it upright")
        return _kept_values(_pillow_values(image, data))


def _tiff_values(data: bytes, most: int) -> npt.NDArray[Any]:
    """Values (H, W, bands) of a TIFF."""
    library = _tifffile()
    with library.TiffFile(io.BytesIO(data)) as tiff:
        if not len(tiff.pages):
            raise ValueError("it has no picture")
        first = tiff.pages[0]
        pages = [first]
        if first.samplesperpixel == 1:
            kind = (first.shape, first.dtype)
            pages = [page for page in tiff.pages if (page.shape, page.dtype) == kind]
        bands = len(pages) * first.samplesperpixel
        pixels = first.imagelength * first.imagewidth
        if not 0 < pixels * max(1, bands / _BANDS_OF_MOST) <= most:
            shape = f"{first.imagewidth} x {first.imagelength} pixels of {bands} bands"
            raise ValueError(f"{shape}; allowed are 1 to {most:,} pixels of up to {_BANDS_OF_MOST} bands")
        if first.photometric == library.PHOTOMETRIC.PALETTE:
            raise ValueError(_PALETTE)
        if first.tags.valueof("Orientation", default=1) != 1:
            raise ValueError("its tag Orientation turns it: store it upright")
        values = np.stack([page.asarray() for page in pages], axis=-1)
        is_planar = first.planarconfig == library.PLANARCONFIG.SEPARATE
    if first.samplesperpixel == 1:
        return values
    return np.moveaxis(values[..., 0], 0, -1) if is_planar else values[..., 0]


def _pillow_values(image: ImageFile.ImageFile, data: bytes) -> npt.NDArray[Any]:
    """Values (H, W, bands) of any other picture whose header has been read."""
    other_bytes = _other_bytes(image)
    is_cut = any(_DEEP_VALUES.fullmatch(raw_mode(tile)) for tile in image.tile)  # by Pillow, to upper bytes
    if image.mode in ("P", "PA"):
        raise ValueError(_PALETTE)
    if image.mode not in _MODES_OF_BANDS or (is_cut and not other_bytes and not image.mode.startswith("I")):
        raise ValueError(f"its values ({raw_mode(image.tile[0])}) cannot be read exactly: save it as a TIFF")
    values = np.asarray(image)
    if other_bytes:
        with Image.open(io.BytesIO(data), formats=FORMATS) as again:
            again.tile = other_bytes
            values = values.astype(np.uint16) << 8
            values |= np.asarray(again)
    return np.atleast_3d(values)


def _kept_values(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Values in a type that shards have, none of which changes."""
    kind = values.dtype.newbyteorder("=")
    if kind in (np.uint8, np.uint16, np.float32):
        return values.astype(kind, copy=False)
    if kind in (np.int8, np.int16, np.float16):
        return values.astype(np.float32)
    raise ValueError(f"its values are {kind}; uint8, uint16, int16 and float32 are read: convert it")


def release(pixels: npt.NDArray[Any]) -> None:
    """Give back the memory of the file that pixels are read from; who looks at them reads them again."""
    base: object = pixels
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def _name_of(source: Path | str | bytes) -> str:
    return "a picture" if isinstance(source, bytes) else str(source)


@contextmanager
def opened_header(file: BinaryIO, name: str, most: int) -> Iterator[ImageFile.ImageFile]:
    """A picture whose header has been read; what goes wrong with it here or later is one ValueError."""
    with reading(name, "a picture (JPEG, PNG, WebP, BMP, GIF or TIFF)"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF and metadata that are odd; damaged pixels are errors
        with _pillow_allows(most):
            try:
                opened = Image.open(file, formats=FORMATS)
            except UnidentifiedImageError:
                frame = _tiff_frame(file)
                if frame is not None:
                    raise ValueError(_COLOURS_ONLY.format(frame.beyond)) from None
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
    """A picture of any mode of Pillow as RGB; transparency is dropped. Raises ValueError for one with more
    than colours of 8 bits.
    """
    refuse_beyond(image)
    # Through RGBA, because Pillow warns about palettes that carry transparency otherwise.
    return image.convert("RGBA").convert("RGB") if "transparency" in image.info else image.convert("RGB")


def refuse_beyond(image: Image.Image) -> None:
    """Raise ValueError for a picture that is not loaded yet and has more than colours of 8 bits."""
    beyond = _beyond(image)
    if beyond:
        raise ValueError(_COLOURS_ONLY.format(beyond))


def raw_mode(tile: Any) -> str:
    """Pillow's name of how values lie in a part of a file."""
    first = tile.args[0] if isinstance(tile.args, tuple) and tile.args else tile.args
    return first if isinstance(first, str) else ""


def _beyond(image: Image.Image) -> str:
    """Name what a picture has beyond colours of 8 bits and transparency; "" for most."""
    modes = {raw_mode(tile) for tile in getattr(image, "tile", ())}
    is_deep = any(map(_DEEP_VALUES.fullmatch, modes)) and image.format != "BMP"  # whose 16 bits are a pixel
    if is_deep or image.mode.startswith(("I", "F")):
        return "values of more than 8 bits"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        colours = _TIFF_COLOURS.get(tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 0), 1)
        alpha = tags.get(TiffImagePlugin.EXTRASAMPLES, (0,))[0] in _TIFF_ALPHA
        samples = tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1)
        if samples > colours + alpha:
            return f"{samples} bands"
    return ""


def _other_bytes(image: ImageFile.ImageFile) -> list[Any]:
    """Tiles that read the lower byte of each value of a 16-bit colour picture; Pillow reads the upper one.

    Empty for any other picture.
    """
    changed = []
    for tile in image.tile:
        mode = raw_mode(tile)
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
