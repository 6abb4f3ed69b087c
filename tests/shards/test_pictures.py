"""Pictures of any format and orientation end up in shards with the pixels that their labels fit; lost ones
are told.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageOps

from tests.coco_tree import Tree, write_tree
from tests.yolo_folder import write_yolo
from visft_ds.data.dataset import read_raw
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.shards.cli import main

BOX = (30, 4, 24, 8)  # of a white rectangle in a black picture, as it is shown


def encoded(pixels: npt.NDArray[Any] | Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def photograph(
    orientation: int, kind: str = "JPEG", side: tuple[int, int] = (40, 60)
) -> tuple[bytes, tuple[int, int]]:
    """(file, (H, W) as stored) of a picture that shows a white rectangle at `BOX` when its EXIF data is
    applied.
    """
    shown = np.zeros((*side, 3), np.uint8)
    x, y, width, height = BOX
    shown[y : y + height, x : x + width] = 255
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    exif = Image.Exif()
    exif[0x0112] = undo
    turned = Image.open(io.BytesIO(encoded(shown, "PNG", exif=exif)))
    turned.load()
    stored = ImageOps.exif_transpose(turned)
    exif[0x0112] = orientation
    return encoded(stored, kind, exif=exif, quality=95), (stored.height, stored.width)


def write_coco(folder: Path, data: bytes, size: tuple[int, int], box: tuple[int, ...] = BOX) -> Tree:
    """A data set of twelve times this picture, stated to have `size`."""
    tree = Tree(folder / "images", folder / "instances.json", folder / "captions.json")
    tree.images.mkdir(parents=True)
    images, annotations = [], []
    for number in range(12):
        (tree.images / f"{number}.jpg").write_bytes(data)
        images.append({"id": number, "file_name": f"{number}.jpg", "height": size[0], "width": size[1]})
        annotations.append({"id": number, "image_id": number, "category_id": 1, "bbox": box, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "sheet"}]}
    tree.instances.write_text(json.dumps(content))
    return tree


def white(manifest: Manifest) -> list[int]:
    """The box of what is white in the first picture, as training reads it."""
    raw = read_raw(ShardReader(manifest), 0)
    assert raw.image is not None and raw.image.shape[:2] == raw.size
    bright = raw.image[..., 0] > 127
    rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


@pytest.mark.parametrize("side", [(40, 60), (60, 60)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_of_upright_pictures_fit(tmp_path: Path, orientation: int, side: tuple[int, int]) -> None:
    data, stored = photograph(orientation, side=side)
    tree = write_coco(tmp_path, data, side)
    manifest = tree.pack(tmp_path / "out", captions=False)
    assert white(manifest) == list(BOX) and not manifest.left_out
    told = [kind for kind in manifest.findings if "EXIF" in kind]
    assert len(told) == (orientation > 1)
    assert all(
        ("cannot tell" in kind) == (stored == side and (side[0] == side[1] or orientation < 5))
        for kind in told
    )
    assert (ShardReader(manifest).read(0, "images")[0] == data) == (orientation == 1), (
        "others are stored upright"
    )


@pytest.mark.parametrize("orientation", [3, 6])
def test_labels_of_pictures_as_they_are_stored_fit(tmp_path: Path, orientation: int) -> None:
    """By default where only that size fits the annotations, else by --exif ignore."""
    data, stored = photograph(orientation)
    box = (6, 28, 24, 8) if orientation == 3 else (4, 6, 8, 24)
    tree = write_coco(tmp_path, data, stored, box)
    exif = "ignore" if orientation == 3 else None
    manifest = tree.pack(tmp_path / "out", captions=False, exif=exif)
    assert white(manifest) == list(box)
    assert ShardReader(manifest).read(0, "images")[0] == data
    assert ("EXIF rotation not applied: the annotations fit the picture as stored" in manifest.findings) == (
        exif is None
    )
    if orientation == 6:
        with pytest.raises(ValueError, match="12 x another size"):
            tree.pack(tmp_path / "no", captions=False, exif="apply")


@pytest.mark.parametrize("mode", ["P", "RGBA", "L"])
def test_transparency_that_is_dropped_is_counted(tmp_path: Path, mode: str) -> None:
    file = io.BytesIO()
    options = {"transparency": 0} if mode == "P" else {}
    Image.new(mode, (60, 40)).save(file, "PNG", **options)
    manifest = write_coco(tmp_path, file.getvalue(), (40, 60)).pack(tmp_path / "out", captions=False)
    told = [count for kind, (count, _) in manifest.findings.items() if "transparency" in kind]
    assert told == ([] if mode == "L" else [12])


@pytest.mark.parametrize(("exif", "box"), [((), list(BOX)), (("--exif", "ignore"), [4, 6, 8, 24])])
def test_yolo_labels_fit_the_picture_as_shown(
    tmp_path: Path, exif: tuple[str, ...], box: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = photograph(6)
    x, y, width, height = box
    side = (60, 40) if exif else (40, 60)
    line = f"0 {(x + width / 2) / side[1]} {(y + height / 2) / side[0]} {width / side[1]} {height / side[0]}"
    write_yolo(tmp_path / "mine", (line,))
    for split in ("train", "valid"):
        (tmp_path / f"mine/{split}/images/0.jpg").write_bytes(data)
    assert main([str(tmp_path / "mine"), *exif]) == 0
    assert ("1 x picture stored upright by EXIF; its size cannot tell" in capsys.readouterr().out) == (
        not exif
    )
    manifest = Manifest.load(tmp_path / "mine-shards", "train")
    assert white(manifest) == box == read_raw(ShardReader(manifest), 0).annotations[0]["bbox"]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "webp": ("WEBP", {"lossless": True}),
    "bmp": ("BMP", {}),
    "tif": ("TIFF", {}),
    "gif": ("GIF", {}),
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95}),
}


@pytest.mark.parametrize("suffix", KINDS)
def test_every_format_is_read_as_it_is(tmp_path: Path, suffix: str) -> None:
    kind, options = KINDS[suffix]
    pixels = np.asarray(Image.open(io.BytesIO(photograph(1)[0])))
    data = encoded(pixels, kind, **options)
    tree = write_coco(tmp_path, data, (40, 60))
    manifest = tree.pack(tmp_path / "out", captions=False)
    assert ShardReader(manifest).read(0, "images")[0] == data and white(manifest) == list(BOX)
    assert f".{suffix}".encode() in (tmp_path / "out/toy-000000.tar").read_bytes()[:100]


def test_lost_pictures_are_counted_and_above_a_tenth_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", 40)
    command = ["build", *tree.arguments(tmp_path / "out")]
    (tree.images / "picture.0.jpg").unlink()
    (tree.images / "picture.1.jpg").write_bytes(b"<html>404</html>")
    Image.new("RGB", (7, 7)).save(tree.images / "picture.2.jpg")
    cut = (tree.images / "picture.3.jpg").read_bytes()[:-40]
    (tree.images / "picture.3.jpg").write_bytes(cut)
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "36 images" in printed and "4 left out" in printed
    for reason in ("1 x no such file", "2 x unreadable", "1 x another size, e.g. picture.2.jpg (7 x 7"):
        assert reason in printed
    assert len(Manifest.load(tmp_path / "out", "toy").left_out) == 4
    (tree.images / "picture.4.jpg").write_bytes(b"")
    assert main(command) == 2
    assert "5 of its 40 images cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out/toy.manifest.json").exists()
    for index in range(5, 30):
        (tree.images / f"picture.{index}.jpg").unlink()
    assert main(command) == 2
    assert "26 of its 40" in capsys.readouterr().err, "missing files are found before anything is written"

    def without_the_lost(content: dict[str, Any]) -> None:
        content["images"] = content["images"][30:]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [
            annotation for annotation in content["annotations"] if annotation["image_id"] in kept
        ]

    tree.edit(without_the_lost)
    assert main(command) == 0, "what failed builds left is not in the way"


def test_what_is_no_plain_file_is_left_out(tmp_path: Path) -> None:
    """A pipe that nobody writes to, a device, terabytes without content, a link to itself, a picture
    elsewhere.
    """
    tree = write_tree(tmp_path / "tree", 80)
    for index in range(5):
        (tree.images / f"picture.{index}.jpg").unlink()
    os.mkfifo(tree.images / "picture.0.jpg")
    (tree.images / "picture.1.jpg").symlink_to("/dev/zero")
    (tree.images / "picture.2.jpg").touch()
    os.truncate(tree.images / "picture.2.jpg", 1 << 40)
    (tree.images / "picture.3.jpg").symlink_to("picture.3.jpg")
    (tree.images / "picture.4.jpg").mkdir()
    shutil.copy(tree.images / "picture.5.jpg", tree.images.parent / "secret.jpg")
    tree.edit(lambda content: content["images"][5].update(file_name="../secret.jpg"))
    tree.edit(lambda content: content["images"][6].update(file_name="x" * 300))
    manifest = tree.pack(tmp_path / "out", captions=False)
    strange = {"../secret.jpg", "x" * 300}
    assert {name for name, _ in manifest.left_out} == {*(f"picture.{n}.jpg" for n in range(5)), *strange}
