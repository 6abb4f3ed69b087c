"""Pictures of hundreds of megapixels: their pixels in the file itself, or in a temporary one, so that little
memory is taken.

Pillow decodes a picture as a whole, to four bytes a pixel. So strips and tiles of a TIFF, and rows of a PNG,
are made small pictures of their own, which it decodes one after the other. JPEGs are written into the file by
their own library, which keeps some rows alone unless they are progressive.
"""

from __future__ import annotations

import io
import math
import os
import struct
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, TiffImagePlugin, TiffTags

from visft_ds.data.decode import decode_image
from visft_ds.files import MAX_PIXELS, open_regular, opened_header, raw_mode, refuse_beyond, release, to_rgb

_ROWS = 256  #: that are decoded together
_PIECE = 2**20  #: bytes of a PNG that are read at once
_PAUSE = 0.02  #: seconds in which a JPEG grows by some megabytes
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = b"II*\0\x08\0\0\0"
#: Tags of a TIFF that say how its parts are to be read, beside their sizes and places: bits, compression,
#: colours, order of bits, bands and their planes, predictor, palette, tiles, inks, transparency, kind of
#: values, tables of JPEG, and four of YCbCr.
_KEPT = (258, 259, 262, 266, 277, 284, 317, 320, 322, 323, 332, 338, 339, 347, 529, 530, 531, 532)


def mapped_image(path: Path, most: int) -> npt.NDArray[np.uint8] | None:
    """Pixels (H, W, 3) of a TIFF that the file has as they are, row by row, of which only those that are
    looked at are read; None of any other picture. Errors are those of `open_image`.
    """
    with open_regular(path) as file, opened_header(file, str(path), most) as image:
        parts = image.tile if image.format == "TIFF" and image.mode == "RGB" else []
        end = parts[0].offset if parts else -1
        for part in parts:
            left, top, right, bottom = part.extents or (0, 0, 0, 0)
            is_plain = part.codec_name == "raw" and raw_mode(part) == "RGB"
            if not is_plain or (left, right, part.offset) != (0, image.width, end):
                return None
            end += (bottom - top) * (right - left) * 3
        if not 0 < end <= os.fstat(file.fileno()).st_size:
            return None
        shape = (image.height, image.width, 3)
        return np.memmap(path, np.uint8, "r", parts[0].offset, shape)


def spooled_image(path: Path, most: int) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) of a picture as it is stored, in a temporary file without a name, so that `release`
    gives their memory back. Errors are those of `open_image`.

    What cannot be decoded part by part is decoded at once, after a warning.
    """
    with open_regular(path) as file, opened_header(file, str(path), most) as image:
        refuse_beyond(image)
        shape = (image.height, image.width, 3)
        with tempfile.TemporaryFile() as spool:
            try:
                os.posix_fallocate(spool.fileno(), 0, math.prod(shape))
            except OSError as error:  # a full disk; later it would kill the process
                error.filename = tempfile.gettempdir()
                raise
            pixels = np.memmap(spool, np.uint8, "r+", shape=shape)
        if image.format == "JPEG":
            file.seek(0)
            with _releasing(pixels):
                decode_image(file.read(), most, pixels)
            return pixels
        top = 0
        for part in _parts(image, file, path):
            pixels[top : top + part.height] = np.asarray(to_rgb(part))
            top += part.height
            release(pixels)
        return pixels


@contextmanager
def _releasing(pixels: npt.NDArray[np.uint8]) -> Iterator[None]:
    """Give memory back again and again, while a library writes all pixels in one call."""
    is_written = threading.Event()

    def release_often() -> None:
        while not is_written.wait(_PAUSE):
            release(pixels)

    thread = threading.Thread(target=release_often)
    thread.start()
    try:
        yield
    finally:
        is_written.set()
        thread.join()
        release(pixels)


def _parts(image: ImageFile.ImageFile, file: BinaryIO, path: Path) -> Iterator[Image.Image]:
    """Pictures of some rows after others."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        rows = min(tags.get(TiffImagePlugin.ROWSPERSTRIP, image.height), image.height)
        if TiffImagePlugin.TILELENGTH in tags or rows * image.width <= MAX_PIXELS:
            return _tiff_parts(image, file)
    elif image.format == "PNG" and image.mode in ("RGB", "RGBA", "LA") and not image.info.get("interlace"):
        return _png_parts(image, file)
    return _parts_of_all(image, path)


def _parts_of_all(image: ImageFile.ImageFile, path: Path) -> Iterator[Image.Image]:
    """Parts of a picture that is decoded at once."""
    size = image.width * image.height * (1 if image.mode in ("1", "L", "P") else 4) / 2**30
    kinds = {"PNG": "an interlaced PNG", "TIFF": "a TIFF in one strip"}
    kind = kinds.get(str(image.format), f"{image.format}, which")
    print(f"warning: {path}: {kind} is decoded at once, to {size:.1f} GiB", file=sys.stderr)
    image.load()
    for top in range(0, image.height, _ROWS):
        yield image.crop((0, top, image.width, min(top + _ROWS, image.height)))


def _tiff_parts(image: TiffImagePlugin.TiffImageFile, file: BinaryIO) -> Iterator[Image.Image]:
    """Rows of tiles of a TIFF, or some of its strips."""
    tags = image.tag_v2
    is_tiled = TiffImagePlugin.TILELENGTH in tags
    if is_tiled:
        rows = tags[TiffImagePlugin.TILELENGTH]
        across = -(-image.width // tags[TiffImagePlugin.TILEWIDTH])
        together = 1
        names = (TiffImagePlugin.TILEOFFSETS, TiffImagePlugin.TILEBYTECOUNTS)
    else:
        rows = min(tags.get(TiffImagePlugin.ROWSPERSTRIP, image.height), image.height)
        across = 1
        together = max(1, _ROWS // rows)
        names = (TiffImagePlugin.STRIPOFFSETS, TiffImagePlugin.STRIPBYTECOUNTS)
    offsets, lengths = (tags[name] for name in names)
    down = -(-image.height // rows)
    planes = len(offsets) // (down * across)
    for first in range(0, down, together):
        count = min(together, down - first)
        chunks = []
        for plane in range(planes):
            start = (plane * down + first) * across
            for number in range(start, start + count * across):
                file.seek(offsets[number])
                chunks.append(file.read(lengths[number]))
                if len(chunks[-1]) < lengths[number]:
                    raise ValueError("the file is cut off")
        height = min(count * rows, image.height - first * rows)
        yield _small_tiff(tags, chunks, (height, image.width), rows, names)


def _small_tiff(
    tags: TiffImagePlugin.ImageFileDirectory_v2,
    chunks: list[bytes],
    size: tuple[int, int],
    rows: int,
    names: tuple[int, int],
) -> Image.Image:
    """A picture (height, width) of some strips or tiles of another TIFF, which is described by these tags."""
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in _KEPT:
        if tag in tags:
            directory.tagtype[tag] = tags.tagtype[tag]
            directory[tag] = tags[tag]
    offsets_tag, lengths = names
    is_tiled = offsets_tag == TiffImagePlugin.TILEOFFSETS
    directory[TiffImagePlugin.IMAGELENGTH], directory[TiffImagePlugin.IMAGEWIDTH] = size
    directory[TiffImagePlugin.ROWSPERSTRIP] = rows
    for tag in names:
        directory.tagtype[tag] = TiffTags.LONG
    directory[lengths] = tuple(map(len, chunks))
    starts = np.cumsum([0, *map(len, chunks[:-1])])
    directory[offsets_tag] = tuple(starts.tolist())
    if is_tiled:  # Pillow adds the end of the directory to the offsets of strips alone
        begin = len(_TIFF) + len(directory.tobytes(len(_TIFF)))
        directory[offsets_tag] = tuple((starts + begin).tolist())
    content = directory.tobytes(len(_TIFF))
    return Image.open(io.BytesIO(_TIFF + content + b"".join(chunks)), formats=("TIFF",))


def _png_parts(image: ImageFile.ImageFile, file: BinaryIO) -> Iterator[Image.Image]:
    """Rows of a PNG of 8 bits. Filters look at the row before, which comes first in a part, unfiltered."""
    width, height = image.size
    line = 1 + width * len(image.getbands())
    colours = {"RGB": 2, "LA": 4, "RGBA": 6}[image.mode]
    pieces = _compressed(file)
    decoder = zlib.decompressobj()
    before = b""
    for top in range(0, height, _ROWS):
        rows = min(_ROWS, height - top)
        filtered = bytearray()
        while len(filtered) < rows * line:
            piece = decoder.unconsumed_tail or next(pieces, b"")
            more = decoder.decompress(piece, rows * line - len(filtered))
            if not piece and not more:
                raise ValueError("the file is cut off")
            filtered += more
        known = 1 if before else 0
        header = struct.pack(">IIBBBBB", width, known + rows, 8, colours, 0, 0, 0)
        content = zlib.compress(before + filtered, 0)
        chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", content) + _chunk(b"IEND", b"")
        with Image.open(io.BytesIO(_PNG + chunks), formats=("PNG",)) as part:
            part.load()
            before = b"\0" + part.crop((0, known + rows - 1, width, known + rows)).tobytes()
            yield part.crop((0, known, width, known + rows))


def _compressed(file: BinaryIO) -> Iterator[bytes]:
    """Pixels of a PNG as its file has them."""
    file.seek(len(_PNG))
    while len(header := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind != b"IDAT":
            file.seek(length, os.SEEK_CUR)
            length = 0
        while length > 0:
            piece = file.read(min(length, _PIECE))
            if not piece:
                return
            yield piece
            length -= len(piece)
        file.seek(4, os.SEEK_CUR)  # the checksum


def _chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
