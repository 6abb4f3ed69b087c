"""YOLO labels become what COCO says of the same objects; what is wrong in them is named by file and line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.yolo_folder import BOX, POLYGON, write_picture, write_yolo
from visft_ds.shards.yolo import read_yolo
from visft_ds.tasks.classes import COCO_NAMES


def read(path: Path, split: str = "train") -> Any:
    return read_yolo(path, split)[0].instances


def test_boxes_polygons_and_pictures_without_a_label(tmp_path: Path) -> None:
    (split,) = read_yolo(write_yolo(tmp_path), "val")
    content: Any = split.instances
    assert split.images == tmp_path / "valid/images" and not split.findings
    assert [image["file_name"] for image in content["images"]] == [f"{n}.jpg" for n in range(5)]
    assert {(image["height"], image["width"]) for image in content["images"]} == {(32, 64)}
    assert content["categories"] == [{"id": n, "name": name} for n, name in enumerate(("cat", "yes", "dog"))]
    box, _, small, outline = content["annotations"]
    assert box == {
        "id": 1,
        "image_id": 1,
        "category_id": 0,
        "iscrowd": 0,
        "bbox": [16, 12, 32, 8],
        "area": 256,
    }
    assert (small["image_id"], small["category_id"], small["bbox"]) == (2, 1, [12.8, 6.4, 6.4, 3.2])
    assert outline["segmentation"] == [[16, 8, 48, 8, 48, 24]]
    assert outline["bbox"] == [16, 8, 32, 16] and outline["area"] == 256


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("3 0.5 0.5 0.1 0.1", "class 3"),
        ("nan 0.5 0.5 0.1 0.1", "class nan"),
        ("cat 0.5 0.5 0.1 0.1", "'cat'"),
        ("0 0.5 0.5 0.1", "4 values"),
        ("0 1.5 0.5 0.1 0.1", r"1\.5 is outside"),
        ("0 0.1 0.1 0.2 0.1 0.2 -0.2", "-0.2 is outside"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, word: str) -> None:
    path = write_yolo(tmp_path, (f"{BOX}\n\n{line}\n", BOX))
    with pytest.raises(ValueError, match=rf"train/labels/0\.txt line 3: .*{word}"):
        read(path)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("names: [a, b]", "names no images"),
        ("train: train/images", "'names'"),
        ("train: train/images\nnames: [a, b]\nnc: 4", "nc is 4"),
        ("train: train/images\nnames: [a]\ntrain: valid/images", "'train' occurs twice"),
        ('train: train/images\nnames: ["\\ud800"]', "surrogates"),
        ("train: nowhere\nnames: [a]", "'nowhere' does not exist"),
        ("train: train/images\nval: valid/images\nvalid: valid/images\nnames: [a]", "'val' twice"),
    ],
)
def test_a_wrong_description_is_named(tmp_path: Path, text: str, word: str) -> None:
    path = write_yolo(tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"(?s)data\.yaml.*{word}") as error:
        read_yolo(path)
    assert "\n" not in str(error.value)


def test_nothing_of_a_description_is_built_or_multiplied(tmp_path: Path) -> None:
    path = write_yolo(tmp_path)
    path.write_text("names: !!python/object/apply:os.getcwd []\ntrain: train/images\n")
    with pytest.raises(ValueError, match="names must be"):
        read_yolo(path)
    aliases = "b0: &b0 [x, x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}, *b{n - 1}]\n" for n in range(1, 40))
    path.write_text(f"{aliases}names: *b39\ntrain: train/images\n")
    with pytest.raises(ValueError, match=r"data\.yaml"):
        read_yolo(path)


@pytest.mark.parametrize("shape", ["[2, 3]", "[3, 2]"])
def test_keypoints_are_cut_off(tmp_path: Path, shape: str) -> None:
    path = write_yolo(tmp_path, (f"{BOX} 0.5 0.5 2 0 0 0",))
    path.write_text(path.read_text() + f"kpt_shape: {shape}\n")
    (annotation,) = read(path)["annotations"]
    assert annotation["bbox"] == [16, 12, 32, 8] and "segmentation" not in annotation
    (tmp_path / "train/labels/0.txt").write_text(POLYGON)
    with pytest.raises(ValueError, match="7 values"):
        read(path)


def test_lists_of_images_labels_beside_them_and_cocos_names(tmp_path: Path) -> None:
    for place in ("a/1.jpg", "b/2.jpg"):
        write_picture(tmp_path / place)
        (tmp_path / place).with_suffix(".txt").write_text("1 0.5 0.5 0.5 0.5\n79 0.5 0.5 0.5 0.5")
    (tmp_path / "train.txt").write_text(f"./a/1.jpg\n\n{tmp_path}/b/2.jpg\n")
    names = "".join(f"  {number}: {name}\n" for number, name in enumerate(COCO_NAMES.values()))
    (tmp_path / "coco.yaml").write_text(f"path: ../elsewhere\ntrain: train.txt\nval: [a, b]\nnames:\n{names}")
    for split in ("train", "val"):
        content = read(tmp_path / "coco.yaml", split)
        assert [image["file_name"] for image in content["images"]] == ["a/1.jpg", "b/2.jpg"]
        assert {annotation["category_id"] for annotation in content["annotations"]} == {2, 90}, (
            "bicycle, toothbrush"
        )


@pytest.mark.parametrize("name", ["../../secret.jpg", "/etc/secret.jpg", "images/../../../secret.jpg"])
def test_lists_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    write_picture(tmp_path / "secret.jpg")
    path = write_yolo(tmp_path / "deep/mine")
    (tmp_path / "deep/mine/train.txt").write_text(f"train/images/0.jpg\n{name}\n")
    path.write_text("train: train.txt\nnames: [a]\n")
    with pytest.raises(ValueError, match=r"train\.txt line 2: .*leaves"):
        read(path)


@pytest.mark.parametrize(
    "text", ["train: {}", "train: ../../private", "path: {}\ntrain: images", "val: [train/images, {}]"]
)
def test_a_description_does_not_lead_out_of_its_folder(tmp_path: Path, text: str) -> None:
    """A stranger's data.yaml would take private photographs into shards."""
    write_picture(tmp_path / "private/images/0.jpg")
    path = write_yolo(tmp_path / "deep/mine")
    path.write_text(text.format(tmp_path / "private") + "\nnames: [a]\n")
    with pytest.raises(
        ValueError, match=r"data\.yaml.*private.* is outside its folder .*copy the data\.yaml"
    ):
        read_yolo(path)
    path.write_text(f"path: {path.parent}\ntrain: {path.parent}/train/images\nnames: [a, b, c]\n")
    assert len(read(path)["images"]) == 5


def test_a_split_that_is_not_there_is_noted(tmp_path: Path) -> None:
    """Roboflow's exports name a test set even if there is none."""
    path = write_yolo(tmp_path)
    path.write_text(path.read_text() + "test: ../test/images\n")
    train, val = read_yolo(path)
    assert (train.name, val.name) == ("train", "val") and not val.findings
    assert train.findings == {"split whose images are missing (not built)": (1, ["test: ../test/images"])}
    with pytest.raises(ValueError, match=r"test: '\.\./test/images' does not exist"):
        read_yolo(path, "test")


def test_links_to_folders_and_pipes_are_no_images(tmp_path: Path) -> None:
    path = write_yolo(tmp_path / "mine")
    images = tmp_path / "mine/train/images"
    (images / "again").symlink_to(images)
    (images / "up").symlink_to(tmp_path)
    os.mkfifo(images / "pipe.jpg")
    assert len(read(path)["images"]) == 5
    os.mkfifo(tmp_path / "mine/pipe.txt")
    path.write_text("train: pipe.txt\nnames: [a]\n")
    with pytest.raises(ValueError, match="not a regular file"):
        read(path)


def test_labels_in_the_wrong_place_are_no_empty_pictures(tmp_path: Path) -> None:
    path = write_yolo(tmp_path)
    (tmp_path / "train/labels").rename(tmp_path / "train/annotations")
    with pytest.raises(ValueError, match=r"none of its 5 images has a label .*train/labels/0\.txt"):
        read(path)


def test_labels_without_a_picture_are_counted_and_above_a_tenth_an_error(tmp_path: Path) -> None:
    path = write_yolo(tmp_path, (BOX,) * 20)
    (tmp_path / "train/images/2.jpg").unlink()
    (tmp_path / "train/labels/classes.txt").write_text("cat\n")
    findings = read_yolo(path, "train")[0].findings
    assert findings == {"label without image": (1, [str(tmp_path / "train/labels/2.txt")])}
    for index in range(3, 6):
        (tmp_path / f"train/images/{index}.jpg").unlink()
    with pytest.raises(ValueError, match="4 x label without image"):
        read(path)
