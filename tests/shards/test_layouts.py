"""`visft shards FOLDER`: each layout is recognised and packed; two things in one folder, or nothing, are
refused.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.coco_tree import write_tree
from tests.yolo_folder import write_picture, write_yolo
from visft_ds.data.shards import Manifest, verify
from visft_ds.shards.cli import main
from visft_ds.shards.layouts import recognise


def _coco(folder: Path, year: str = "2017") -> Path:
    for split in ("train", "val"):
        tree = write_tree(folder / "made" / split, 6)
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        tree.images.rename(folder / f"{split}{year}")
        for role, file in (("instances", tree.instances), ("captions", tree.captions)):
            file.rename(folder / f"annotations/{role}_{split}{year}.json")
    shutil.rmtree(folder / "made")
    (folder / "annotations/person_keypoints_val2017.json").write_text("{}")
    return folder


def _roboflow(folder: Path) -> Path:
    for split in ("train", "valid"):
        tree = write_tree(folder / "made" / split, 6)
        tree.images.rename(folder / split)
        tree.instances.rename(folder / split / "_annotations.coco.json")
    shutil.rmtree(folder / "made")
    return folder


def _captioned(folder: Path, *lines: Any) -> Path:
    for number in range(12):
        write_picture(folder / f"train/{number}.jpg", seed=number)
    lines = lines or (
        {"file_name": "0.jpg", "text": "A dog.", "source": "x"},
        {"file_name": "1.jpg", "captions": ["A cat.", "A cat that sleeps."]},
        {"file_name": "0.jpg", "caption": "A dog again."},
        {"file_name": "gone.jpg", "text": "Nothing."},
        *({"file_name": f"{number}.jpg", "text": "A cow."} for number in range(2, 12)),
    )
    (folder / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_yolo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo(tmp_path / "my data")
    assert main([str(tmp_path / "my data")]) == 0
    told = capsys.readouterr().out
    assert "my data: YOLO, train, val" in told and f"visft train --data '{tmp_path}/my data-shards'\n" in told
    for split in ("train", "val"):
        manifest = Manifest.load(tmp_path / "my data-shards", split)
        assert manifest.labels == {"annotations"}
        assert [(c.coco_id, c.name) for c in manifest.categories] == [(0, "cat"), (1, "yes"), (2, "dog")]
        assert (manifest.counts["images"], manifest.counts["annotations"], manifest.counts["empty"]) == (
            5,
            4,
            2,
        )
        assert verify(manifest) == []
    assert (
        main(["build", str(tmp_path / "my data/data.yaml"), "--out", str(tmp_path / "my data-shards")]) == 0
    )
    for folder, told in (
        (tmp_path / "my data-shards", "shards already (train, val)"),
        (tmp_path, "folders in it are: visft shards"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            recognise(folder)


def test_boxes_of_unreadable_pictures_do_not_hide_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yolo(tmp_path / "mine")
    for path in (tmp_path / "mine").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    assert main([str(tmp_path / "mine")]) == 2
    assert "5 x unreadable" in capsys.readouterr().err


def test_a_wrong_label_of_any_split_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_yolo(tmp_path / "mine")
    (tmp_path / "mine/valid/labels/1.txt").write_text("4 0.5 0.5 0.5 0.5")
    assert main([str(tmp_path / "mine")]) == 2
    assert "valid/labels/1.txt line 1: class 4" in capsys.readouterr().err
    assert not (tmp_path / "mine-shards").exists()


def test_cocos_tree_is_the_same_as_by_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _coco(tmp_path / "coco")
    assert main([str(folder), "--split", "val"]) == 0
    assert "not read: annotations/person_keypoints_val2017.json" in capsys.readouterr().out
    files = ["--instances", str(folder / "annotations/instances_val2017.json")]
    files += ["--captions", str(folder / "annotations/captions_val2017.json")]
    out = tmp_path / "flags"
    assert (
        main(["build", "--images", str(folder / "val2017"), *files, "--out", str(out), "--split", "val"]) == 0
    )
    for path in sorted(out.glob("val*")):
        assert path.read_bytes() == (tmp_path / "coco-shards" / path.name).read_bytes()
    assert not (tmp_path / "coco-shards/train.manifest.json").exists()


def test_roboflows_coco_and_plain_names(tmp_path: Path) -> None:
    kind, splits, _ = recognise(_roboflow(tmp_path / "roboflow"))
    assert kind == "Roboflow" and [split.name for split in splits] == ["train", "val"]
    assert splits[1].images == tmp_path / "roboflow/valid"
    plain = _coco(tmp_path / "plain", year="")
    for split in ("train", "val"):
        (plain / f"annotations/captions_{split}.json").unlink()
        (plain / f"annotations/instances_{split}.json").rename(plain / f"{split}.json")
    kind, splits, _ = recognise(plain)
    assert kind == "COCO" and [(split.name, split.captions) for split in splits] == [
        ("train", None),
        ("val", None),
    ]


def test_captioned_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(_captioned(tmp_path / "mine"))]) == 0
    manifest = Manifest.load(tmp_path / "mine-shards", "train")
    assert (manifest.counts["images"], manifest.counts["captions"]) == (12, 14)
    assert list(manifest.left_out) == [["gone.jpg", "no such file in the images folder"]]
    assert manifest.labels == {"captions"} and manifest.vocabulary["dog"] == 2
    assert "with --val 0.2 --replace splits it off" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        {"text": "A dog."},
        {"file_name": "0.jpg", "text": 0},
        {"file_name": "../0.jpg", "text": "A dog."},
    ],
)
def test_a_wrong_line_of_captions_is_named(tmp_path: Path, line: Any) -> None:
    with pytest.raises(ValueError, match=r"metadata\.jsonl: .*: line 2: "):
        recognise(_captioned(tmp_path, {"file_name": "0.jpg", "text": "A dog."}, line))


def test_a_folder_that_is_two_things_is_refused(tmp_path: Path) -> None:
    (_roboflow(tmp_path) / "data.yaml").write_text("train: train\nnames: [a]\n")
    with pytest.raises(ValueError, match="fits 2 layouts, Roboflow: train/_annotations"):
        recognise(tmp_path)


def test_a_folder_that_is_nothing_says_what_was_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "package.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "looked for\n  COCO" in error and "found labels/, package.json" in error
    assert "or name the files: visft shards build --images DIR --instances FILE" in error


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["build"], "--images, --out, --split"),
        (["build", "{mine}", "--instances", "x"], "--instances"),
        (["{mine}", "--split", "test"], "'test'"),
        (["{mine}", "--void", "0"], "--void"),
        (["verify", "{mine}"], "no finished split"),
        (["nosuch"], "no such folder: nosuch (commands: build, "),
        (["--dry-run", "--val", "2", "{mine}"], "--val 2"),  # flags may come first
        (["--near-duplicates", "{mine}"], "a FOLDER that is recognised, before the flags"),
    ],
)
def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], word: str) -> None:
    write_yolo(tmp_path / "mine")
    assert main([word.format(mine=tmp_path / "mine") for word in words]) == 2
    assert word in capsys.readouterr().err


def test_two_years_of_one_split_are_refused(tmp_path: Path) -> None:
    folder = _coco(tmp_path)
    shutil.copytree(folder / "train2017", folder / "train2014")
    shutil.copyfile(
        folder / "annotations/instances_train2017.json", folder / "annotations/instances_train2014.json"
    )
    with pytest.raises(ValueError, match="has more than one 'train'"):
        recognise(folder)
    assert [split.name for split in recognise(folder, "val")[1]] == ["val"]
    shutil.rmtree(folder / "val2017")
    with pytest.raises(ValueError, match=r"val2017\.json: there is no folder"):
        recognise(folder, "val")


def test_names_that_would_move_a_terminal_are_shown_as_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", 40)
    tree.edit(lambda content: content["images"][0].update(file_name="a\n\x1b[2Jb.jpg"))
    assert main(["build", *tree.arguments(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 x name not allowed" in printed and "\x1b" not in printed and r"a\n\x1b[2Jb.jpg" in printed


def _exported(folder: Path, file: str, prefix: str = "", images: str = "images") -> Path:
    """A COCO data set in the form of a tool: its annotation file, and what its image names begin with."""
    tree = write_tree(folder, 6)
    tree.captions.unlink()
    for image in list(tree.images.iterdir()):
        (folder / images).mkdir(parents=True, exist_ok=True)
        image.rename(folder / images / image.name)
    tree.edit(
        lambda content: [image.update(file_name=prefix + image["file_name"]) for image in content["images"]]
    )
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(tree.instances.read_text(), encoding="utf-8-sig")  # as Windows writes it
    tree.instances.unlink()
    return folder


@pytest.mark.parametrize(
    ("file", "prefix", "images"),
    [
        ("annotations/instances_default.json", "", "images/default"),  # CVAT, COCO 1.0
        ("annotations/instances_Train.json", "", "images/Train"),  # CVAT, a subset
        ("annotations/person_keypoints_default.json", "", "images/default"),  # CVAT, COCO Keypoints 1.0
        ("annotations/person_keypoints_train2017.json", "", "train2017"),
        ("result.json", "images/", "images"),  # Label Studio
        ("annotations.json", "", "images"),
        ("annotations/annotations.json", "", "images"),
        ("annotations.json", "", "."),
        ("via_project_1Dec2026_9h5m_coco.json", "", "."),  # VIA 2
        ("result.json", "D:\\images\\", "images"),
        ("result.json", "..\\..\\media\\upload\\", "images"),
        ("train.json", "/home/me/mine/training/", "training"),
        ("instances_Training.json", "", "training"),
    ],
)
def test_coco_files_of_tools(tmp_path: Path, file: str, prefix: str, images: str) -> None:
    folder = _exported(tmp_path / "mine", file, prefix, images)
    assert main([str(folder), "--val", "0.4"]) == 0
    counts = [Manifest.load(tmp_path / "mine-shards", split).counts for split in ("train", "val")]
    assert [count["images"] for count in counts] == [4, 2]
    assert [count["left_out"] for count in counts] == [0, 0]


def test_paths_of_another_machine_that_end_alike_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = write_tree(tmp_path / "tree", 6)
    names = ["C:\\2023\\picture.1.jpg", "C:\\2024\\picture.1.jpg"]

    def rename(content: dict[str, Any]) -> None:
        content["images"][1]["file_name"], content["images"][2]["file_name"] = names

    tree.edit(rename)
    assert main(["build", *tree.arguments(tmp_path / "out")]) == 2
    assert "2 images, one called C:\\2024\\picture.1.jpg, are the same file" in capsys.readouterr().err


def test_yolo_of_another_machine_with_long_names_of_splits(tmp_path: Path) -> None:
    path = write_yolo(tmp_path)
    (tmp_path / "training.txt").write_text(
        "C:\\mine\\train\\images\\0.jpg\n/home/me/train/images/1.jpg\n\ntrain\\images\\2.jpg\n"
    )
    path.write_text("path: C:\\mine\ntrain: C:\\mine\\training.txt\nval: valid\\images\nnames: [a, b, c]\n")
    splits = recognise(tmp_path)[1]
    assert [(split.name, len(split.instances["images"])) for split in splits] == [("train", 3), ("val", 5)]  # type: ignore[index, arg-type]
    assert splits[0].images == tmp_path / "train/images"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["annotations/instances_default.json"], "no folder of its images, such as images/: export it with"),
        (["classes.txt", "labels/a.txt", "images/note"], "there is no image in"),
    ],
)
def test_exports_that_lack_something_name_the_one_that_works(
    tmp_path: Path, files: list[str], words: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("cat")
    with pytest.raises(ValueError, match=re.escape(words)):
        recognise(tmp_path)


def test_a_file_of_a_common_name_makes_no_second_layout(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "annotations.json").write_text("not json")
    assert recognise(tmp_path)[0] == "YOLO"
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(ValueError, match=r"annotations\.json: cannot be read as a COCO file"):
        recognise(tmp_path)


def test_label_studios_yolo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    write_yolo(folder)
    (folder / "data.yaml").unlink()
    for name in ("images", "labels"):
        (folder / "train" / name).rename(folder / name)
    (folder / "classes.txt").write_text("cat\nyes\r\ndog\n")
    assert main([str(folder), "--val", "0.4"]) == 0
    manifest = Manifest.load(tmp_path / "mine-shards", "train")
    assert [category.name for category in manifest.categories] == ["cat", "yes", "dog"]
    assert manifest.counts["images"] == 3
    (folder / "classes.txt").write_text("")
    capsys.readouterr()
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err
    assert "classes.txt: cannot be read as a list of classes" in error and error.count("\n") == 1
