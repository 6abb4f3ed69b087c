"""The door for files from outside: what it lets in, and that all else is one ValueError with the path."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from visft_ds.data.decode import decode_image
from visft_ds.files import (
    image_frame,
    open_image,
    read_bytes,
    reading,
    remove_unfinished,
    writing,
    wrong_name,
)

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(RGB, "PNG", exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(expected))
    assert open_image(data, upright=False).size == RGB.size
    assert image_frame(data) == (20, 30, orientation, "PNG", "", False)
    assert image_frame(data).upright == expected.size[::-1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    options = {"transparency": bytes(range(200))} if mode == "P" else {}  # of which Pillow warns
    data = encoded(RGB.convert(mode), "TIFF" if mode == "CMYK" else "PNG", **options)
    pixels = np.asarray(open_image(data))
    assert pixels.shape == (20, 30, 3)
    assert pixels.min() < 20
    assert pixels.max() > 235


def deep_png(values: npt.NDArray[np.uint16]) -> bytes:
    """A PNG of 16 bits: (H, W, 1), grey, to (H, W, 4), RGB with transparency."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, bands = values.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(
    values: npt.NDArray[Any], order: str = "<", extra: int | None = None, deflated: bool = False
) -> bytes:
    """A TIFF of (H, W, bands) in RGB, or grey for one band; `extra` is the kind of a fourth band."""
    height, width, bands = values.shape
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    if deflated:
        pixels = zlib.compress(pixels)
    bits = [8 * values.dtype.itemsize] * bands
    tags = {256: [width], 257: [height], 258: bits, 259: [8 if deflated else 1], 262: [2 if bands > 2 else 1]}
    tags |= {273: [8], 277: [bands], 278: [height], 279: [len(pixels)]}
    if extra is not None:
        tags[338] = [extra]
    start = 8 + len(pixels) + len(pixels) % 2
    entries, behind = b"", b""
    for tag, numbers in tags.items():
        data = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(data) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(behind)
            behind += data
            data = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + data
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    listed = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + behind
    return head + pixels.ljust(start - 8, b"\0") + listed


#: Of a camera of 12 bits, which files of 16 bits hold: from 100 to 4000.
DEEP = np.random.default_rng(0).integers(100, 4001, (20, 30, 4)).astype(np.uint16)
DEEP[0, 0], DEEP[0, 1] = 100, 4000


@pytest.mark.parametrize(
    "data",
    [
        *(deep_png(DEEP[..., :bands]) for bands in (1, 2, 3, 4)),
        tiff(DEEP[..., :1], ">"),
        tiff(DEEP[..., :3], deflated=True),
        tiff(DEEP, extra=2),
        encoded(Image.fromarray(np.linspace(-3, 3, 600, dtype=np.float32).reshape(20, 30)), "TIFF"),
    ],
)
def test_more_than_8_bits_are_refused_where_colours_are_read(data: bytes) -> None:
    assert image_frame(data).beyond == "values of more than 8 bits"
    with pytest.raises(ValueError, match=r"a\.png.*more than 8 bits.*docs/bands\.md"):
        open_image(data, "a.png")
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_image(data)


def test_bands_beyond_colours_are_refused_where_colours_are_read() -> None:
    plain = (DEEP >> 4).astype(np.uint8)
    assert image_frame(tiff(plain[..., :3])).beyond == image_frame(tiff(plain, extra=2)).beyond == ""
    for data in (tiff(plain), tiff(plain, extra=0)):
        assert image_frame(data).beyond == "4 bands"
        with pytest.raises(ValueError, match="4 bands"):
            open_image(data)
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        assert image_frame(encoded(RGB, kind)).beyond == ""


def scans(count: int) -> bytes:
    """A JPEG of so many scans, of which most repeat the last."""
    data = encoded(RGB.convert("L"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * (count - data.count(b"\xff\xda")) + data[-2:]


@pytest.mark.parametrize("read", [open_image, decode_image])
def test_scans_are_those_of_the_picture(read: Callable[[bytes], object]) -> None:
    """Each scan decodes the whole image again; a phone's film behind the picture has what looks like
    thousands.
    """
    read(encoded(RGB, "JPEG", progressive=True) + b"\xff\xda" * 1000)
    with pytest.raises(ValueError, match="more than 200 scans"):
        read(scans(201))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        encoded(RGB, "JPEG")[:400],
        encoded(RGB, "PNG")[:100],
        encoded(RGB, "JPEG").replace(b"\xff\xda", b"\xff\xda" * 300, 1),  # each scan would be decoded
    ],
)
def test_what_is_no_whole_picture_is_refused_by_its_path(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "1.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"1\.jpg: cannot be read as a picture"):
        open_image(path)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 2**40)
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "sparse"):
        with pytest.raises(ValueError, match=r"regular file|bytes"):
            read_bytes(path)


@pytest.mark.parametrize("text", ['{"a": 1}', "[", "[" * 100_000, "[1, 2]"])
def test_whatever_a_parser_raises_becomes_one_sentence(text: str) -> None:
    with (
        pytest.raises(ValueError, match=r"^x\.json: cannot be read as a list of images: .*\S$"),
        reading("x.json", "a list of images"),
    ):
        json.loads(text)["images"][0]


def test_a_missing_key_is_named() -> None:
    with (
        pytest.raises(ValueError, match=r"^x\.json: cannot be read as a list of images: it has no 'images'$"),
        reading("x.json", "a list of images"),
    ):
        {}["images"]


def test_errors_of_the_system_and_nested_ones_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading(tmp_path / "none", "anything"):
        read_bytes(tmp_path / "none")
    with (
        pytest.raises(ValueError, match=r"^y\.txt: wrong$"),
        reading("y.txt", "a list"),
        reading("y.txt", "a line"),
    ):
        raise ValueError("y.txt: wrong")


def test_names_that_lead_nowhere_else_are_right() -> None:
    for name in ("../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", "", "a\0.jpg", "a\x1b[2J.jpg"):
        assert wrong_name(name), name
    for name in ("a.jpg", "Bild 1.jpg", "...", "a..b", "-x", "ファイル.png"):
        assert wrong_name(name) is None and wrong_name(f"train/{name}") is None


def test_what_a_killed_writer_left_can_be_removed(tmp_path: Path) -> None:
    whole = tmp_path / "export" / "adapter" / "w.safetensors"
    with writing(whole) as file:
        file.write(b"whole")
        file.flush()
        shutil.copy(file.name, f"{file.name}0")  # as of another process, which was killed meanwhile
    assert len(os.listdir(whole.parent)) == 2
    remove_unfinished(tmp_path, "v*")
    assert len(os.listdir(whole.parent)) == 2
    remove_unfinished(tmp_path / "export")
    assert os.listdir(whole.parent) == ["w.safetensors"] and whole.read_bytes() == b"whole"


def test_processes_that_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "same"
    with writing(path) as first, writing(path) as second:
        first.write(b"first")
        second.write(b"second")
        assert not path.exists()
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["same"]
