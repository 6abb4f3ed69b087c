"""The door for files from outside: what it lets in, and that all else is one ValueError with the path."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from visft_ds.files import image_frame, open_image, read_bytes, reading, wrong_name

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
    assert image_frame(data) == (20, 30, orientation, "PNG")
    assert image_frame(data).upright == expected.size[::-1]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30))
    elif mode == "F":
        image = Image.fromarray(np.linspace(-3, 3, 600, dtype=np.float32).reshape(20, 30))
    else:
        image = RGB.convert(mode)
    options = {"transparency": bytes(range(200))} if mode == "P" else {}  # of which Pillow warns
    pixels = np.asarray(open_image(encoded(image, "TIFF" if mode in ("CMYK", "F") else "PNG", **options)))
    assert pixels.shape == (20, 30, 3)
    assert pixels.min() < 20
    assert pixels.max() > 235  # 16 bits are scaled, not clipped


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


def test_errors_of_the_system_and_nested_ones_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), reading(tmp_path / "none", "anything"):
        read_bytes(tmp_path / "none")
    with pytest.raises(ValueError, match=r"^y\.txt: wrong$"), reading("y.txt", "a list"), reading("y.txt", "a line"):
        raise ValueError("y.txt: wrong")


def test_names_that_lead_nowhere_else_are_right() -> None:
    for name in ("../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", "", "a\0.jpg", "a\x1b[2J.jpg"):
        assert wrong_name(name), name
    for name in ("a.jpg", "Bild 1.jpg", "...", "a..b", "-x", "ファイル.png"):
        assert wrong_name(name) is None and wrong_name(f"train/{name}") is None
