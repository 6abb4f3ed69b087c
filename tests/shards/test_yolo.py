"""YOLO labels become what COCO says of the same objects; what is wrong in them is named by file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.yolo_folder import BOX, POLYGON, write_picture, write_yolo
from visft_ds.shards.yolo import read_description, read_yolo
from visft_ds.tasks.classes import COCO_NAMES


def read(path: Path, split: str = "train") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(read_yolo(read_description(path), split)[1].data)
    return content


def test_boxes_polygons_and_pictures_without_a_label(tmp_path: Path) -> None:
    folder, made = read_yolo(read_description(write_yolo(tmp_path)), "val")
    content = json.loads(made.data)
    assert folder == tmp_path / "valid/images"
    assert [image["file_name"] for image in content["images"]] == [f"{n}.jpg" for n in range(5)]
    assert {(image["height"], image["width"]) for image in content["images"]} == {(32, 64)}
    assert content["categories"] == [{"id": n, "name": name} for n, name in enumerate(("cat", "yes", "dog"))]
    box, _, small, outline = content["annotations"]
    assert box == {"id": 1, "image_id": 1, "category_id": 0, "iscrowd": 0, "bbox": [16, 12, 32, 8], "area": 256}
    assert (small["image_id"], small["category_id"], small["bbox"]) == (2, 1, [12.8, 6.4, 6.4, 3.2])
    assert outline["segmentation"] == [[16, 8, 48, 8, 48, 24]]
    assert outline["bbox"] == [16, 8, 32, 16] and outline["area"] == 256
    assert made.findings == ()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_labels_fit_the_picture_as_shown_and_become_those_of_the_stored_one(tmp_path: Path, orientation: int) -> None:
    """A white rectangle, labelled where a viewer shows it, is found where the pixels are."""
    path, stored = write_yolo(tmp_path, (BOX,)), np.zeros((40, 60, 3), np.uint8)
    stored[4:12, 30:54] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "train/images/0.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "train/images/0.jpg") as image:
        shown = np.asarray(ImageOps.exif_transpose(image))[..., 0] > 127
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = shown.shape
    sizes = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width, (bottom - top) / height)
    (tmp_path / "train/labels/0.txt").write_text("0 " + " ".join(f"{size:.6f}" for size in sizes))
    content = read(path)
    assert content["annotations"][0]["bbox"] == pytest.approx([30, 4, 24, 8], abs=0.01)
    assert (content["images"][0]["height"], content["images"][0]["width"]) == (40, 60)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3 0.5 0.5 0.1 0.1", r"class 3, but data\.yaml names 3 \(0 to 2\)"),
        ("-1 0.5 0.5 0.1 0.1", "class -1"),
        ("0.5 0.5 0.5 0.1 0.1", r"class 0\.5"),
        ("nan 0.5 0.5 0.1 0.1", "class nan"),
        ("cat 0.5 0.5 0.1 0.1", "'cat' is no number"),
        ("0 0.5 0.5 0.1", "4 values; a box has 5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 values"),
        ("0 0.1 0.1 0.2 0.2 0.3", "6 values"),
        ("0 1.5 0.5 0.1 0.1", r"1\.5 is outside of \[0, 1\]"),
        ("0 320 200 64 64", r"320 is outside of \[0, 1\]"),
        ("0 0.5 nan 0.1 0.1", "nan is outside"),
        ("0 0.1 0.1 0.2 0.1 0.2 -0.2", "-0.2 is outside"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = write_yolo(tmp_path, (f"{BOX}\n\n{line}\n", BOX))
    with pytest.raises(ValueError, match=rf"wrong lines in its labels: 1\n  .*train/labels/0\.txt line 3: {message}"):
        read(path)


def test_many_wrong_lines_are_counted_and_a_few_shown(tmp_path: Path) -> None:
    path = write_yolo(tmp_path, ("9 0 0 0 0\n" * 4, BOX, "9 0 0 0 0\n" * 4))
    with pytest.raises(ValueError, match=r"labels: 8(\n.* line \d: class 9.*){5}\n  and 3 more$"):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b]", "names no images"),
        ("train: train/images", "has no names"),
        ("train: train/images\nnames: [a, b]\nnc: 4", "nc is 4, but there are 2 names"),
        ("train: train/images\nnames: {0: a, 0: b, one: c}", "one: c"),
        ("train: train/images\nnames: [[a]]", "names must be"),
        ("train: nowhere\nnames: [a]", r"train: 'nowhere' does not exist; looked for .*/nowhere"),
        ("train: {a: b}\nnames: [a]", "train must be a folder"),
        ("train: train/images\nval: valid/images\nvalid: valid/images\nnames: [a]", "names images of 'val' twice"),
        ("train: valid\nnames: [a", "is not YAML"),
        ("- a", "must hold keys"),
        ("a: " + "[" * 50_000, "is not YAML"),
        ("train: train/images\nnames: [a]\nkpt_shape: [17]", "kpt_shape must be two numbers"),
        ("x: " + "a" * (1 << 20), "allowed are 1048576"),
    ],
)
def test_a_wrong_description_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write_yolo(tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)data\.yaml.*{message}"):
        read_description(path)


def test_nothing_of_a_description_is_built_or_multiplied(tmp_path: Path) -> None:
    path = write_yolo(tmp_path)
    merged = "".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}\n" for n in range(1, 40))
    path.write_text(f"k0: &k0 {{a: b}}\n{merged}names: !!python/object/apply:os.getcwd []\ntrain: train/images\n")
    with pytest.raises(ValueError, match="has no names"):
        read_description(path)


@pytest.mark.parametrize("shape", ["[2, 3]", "[3, 2]"])
def test_keypoints_are_dropped_and_said(tmp_path: Path, shape: str) -> None:
    path = write_yolo(tmp_path, (f"{BOX} 0.5 0.5 2 0 0 0",))
    path.write_text(path.read_text() + f"kpt_shape: {shape}\n")
    (annotation,) = read(path)["annotations"]
    assert annotation["bbox"] == [16, 12, 32, 8] and annotation["keypoints"] == [0.5, 0.5, 2, 0, 0, 0]
    (tmp_path / "train/labels/0.txt").write_text(POLYGON)
    with pytest.raises(ValueError, match=r"7 values; with the kpt_shape of .* 5 of its box and 6 of keypoints"):
        read(path)


def test_lists_of_images_labels_beside_them_and_cocos_names(tmp_path: Path) -> None:
    for place in ("a/1.jpg", "b/2.jpg"):
        write_picture(tmp_path / place)
        (tmp_path / place).with_suffix(".txt").write_text("1 0.5 0.5 0.5 0.5\n79 0.5 0.5 0.5 0.5")
    (tmp_path / "train.txt").write_text("./a/1.jpg\nb/2.jpg\n")
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(COCO_NAMES.values()))
    (tmp_path / "coco.yaml").write_text(f"path: ../elsewhere\ntrain: train.txt\nval: [a, b]\nnames:\n{names}")
    for split in ("train", "val"):
        content = read(tmp_path / "coco.yaml", split)
        assert [image["file_name"] for image in content["images"]] == ["a/1.jpg", "b/2.jpg"]
        assert {annotation["category_id"] for annotation in content["annotations"]} == {2, 90}, "bicycle, toothbrush"


def test_labels_in_the_wrong_place_are_no_empty_pictures(tmp_path: Path) -> None:
    path = write_yolo(tmp_path)
    (tmp_path / "train/labels").rename(tmp_path / "train/annotations")
    with pytest.raises(ValueError, match=r"train: none of its 5 images has a label, .*train/labels/0\.txt"):
        read(path)


def test_labels_without_a_picture_are_said(tmp_path: Path) -> None:
    path = write_yolo(tmp_path)
    (tmp_path / "train/images/2.jpg").unlink()
    (tmp_path / "train/labels/classes.txt").write_text("cat\n")
    made = read_yolo(read_description(path), "train")[1]
    assert made.findings == (("label without image", str(tmp_path / "train/labels/2.txt")),)
    assert POLYGON not in made.data.decode()
