"""`visft shards FOLDER` of annotation files of one image each: Pascal VOC's XML, labelme's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.yolo_folder import write_picture, write_yolo
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.shards.cli import main
from visft_ds.shards.layouts import recognise


def _xml(*objects: tuple[str, int, int, int, int], width: int = 64) -> str:
    entries = ""
    for name, left, top, right, bottom in objects:
        corners = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}.5</ymax>"
        entries += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    size = f"<size><width>{width}</width><height>32</height></size>"
    return f'<?xml version="1.0"?>\n<annotation><filename>x</filename>{size}{entries}</annotation>'


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _shape(kind: str, points: list[list[float]], label: str = "cat", **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "shape_type": kind, **more}


def _labelme(*shapes: dict[str, Any]) -> str:
    content = {"shapes": shapes, "imagePath": "..\\x.jpg", "imageHeight": 32, "imageWidth": 64}
    return json.dumps({**content, "imageData": None})


def _annotations(shards: Path, split: str) -> list[Any]:
    reader = ShardReader(Manifest.load(shards, split))
    labels = [json.loads(reader.read(number, "labels")[1] or b"") for number in range(len(reader))]
    return [
        entry
        for label in sorted(labels, key=lambda each: each["file_name"])
        for entry in label["annotations"]
    ]


def test_a_folder_above_several_data_sets_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of labelme up to three folders below make it one, were there no other data set beside them."""
    write_picture(tmp_path / "mine/a.jpg")
    _write(tmp_path / "mine/a.json", _labelme(_shape("rectangle", [[1, 1], [9, 9]])))
    write_yolo(tmp_path / "yolo data")
    write_picture(tmp_path / "studio/b.jpg")
    _write(tmp_path / "studio/result.json", '{"images": [{"file_name": "b.jpg"}]}')
    assert main([str(tmp_path)]) == 2
    names = [f"visft shards {tmp_path}/mine", f"visft shards {tmp_path}/studio"]
    names.append(f"visft shards '{tmp_path}/yolo data'")
    assert f"is not a data set; folders in it are: {' or '.join(names)}\n" in capsys.readouterr().err
    assert not Path(f"{tmp_path}-shards").exists()


def test_pascal_voc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    for number in range(12):
        write_picture(folder / f"JPEGImages/{number:02}.jpg", seed=number)
        if number < 11:
            _write(folder / f"Annotations/{number:02}.xml", _xml(("dog", 1, 2, 11, 22), ("cat", 3, 3, 9, 9)))
    _write(folder / "Annotations/10.xml", _xml())
    assert main([str(folder), "--val", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "mine: Pascal VOC, train, val" in printed
    assert "1 x image without annotation file (left out), e.g. JPEGImages/11.jpg" in printed
    shards = tmp_path / "mine-shards"
    manifest = Manifest.load(shards, "train")
    assert [(category.coco_id, category.name) for category in manifest.categories] == [(0, "cat"), (1, "dog")]
    assert manifest.counts["images"] + Manifest.load(shards, "val").counts["images"] == 11
    dog, cat = _annotations(shards, "train")[:2]
    assert (dog["bbox"], dog["category_id"], dog["area"]) == ([1, 2, 10, 20.5], 1, 205)
    assert (cat["bbox"], cat["category_id"]) == ([3, 3, 6, 6.5], 0)


def test_splits_of_pascal_voc(tmp_path: Path) -> None:
    for split in ("train", "valid"):  # Roboflow: XML beside the images
        write_picture(tmp_path / f"roboflow/{split}/a.jpg")
        _write(tmp_path / f"roboflow/{split}/a.xml", _xml(("dog", 1, 2, 11, 22)))
    _, splits, _ = recognise(tmp_path / "roboflow")
    assert [(split.name, split.images.name) for split in splits] == [("train", "train"), ("val", "valid")]
    folder = tmp_path / "voc"
    for name in "abcd":
        write_picture(folder / f"JPEGImages/{name}.jpg")
        _write(folder / f"Annotations/{name}.xml", _xml((name, 1, 2, 11, 22)))
    _write(folder / "ImageSets/Main/train.txt", "a\nb\n")
    _write(folder / "ImageSets/Main/val.txt", "c\n")
    _, splits, _ = recognise(folder)
    assert [split.name for split in splits] == ["train", "val"]
    assert splits[0].findings == {"image in none of the lists ImageSets/Main (left out)": (1, ["d.jpg"])}
    _write(folder / "ImageSets/Main/val.txt", "c\nb\n")
    with pytest.raises(ValueError, match=r"val\.txt: .*b is in the list of 'train'"):
        recognise(folder)


def test_labelme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    triangle = [[2, 2], [10, 2], [10, 10]]
    piece = [[20, 2], [28, 2], [28, 10]]
    for number in range(3):
        write_picture(folder / f"{number}.jpg", seed=number)
    _write(folder / "0.json", _labelme(_shape("polygon", triangle), _shape("polygon", piece)))
    grouped = [_shape("polygon", triangle, group_id=1), _shape("polygon", piece, group_id=1)]
    _write(folder / "1.json", _labelme(*grouped, _shape("point", [[1, 1]])))
    _write(folder / "2.json", _labelme(_shape("rectangle", [[30, 20], [10, 4]], "dog")))
    assert main([str(folder)]) == 0
    assert "1 x labelme shape of type 'point' (left out), e.g. 1.jpg" in capsys.readouterr().out
    first, second, grouped_one, box = _annotations(tmp_path / "mine-shards", "train")
    assert (first["bbox"], first["area"], first["segmentation"]) == (
        [2, 2, 8, 8],
        32,
        [[2, 2, 10, 2, 10, 10]],
    )
    assert second["bbox"] == [20, 2, 8, 8]
    assert (grouped_one["bbox"], grouped_one["area"], len(grouped_one["segmentation"])) == (
        [2, 2, 26, 8],
        64,
        2,
    )
    assert (box["bbox"], box["category_id"]) == ([10, 4, 20, 16], 1)


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("a.xml", "", "a.xml: cannot be read as a file of Pascal VOC"),
        ("a.xml", "<annotations/>", "not with <annotation>"),
        ("a.xml", '<!DOCTYPE a [<!ENTITY b "c">]><annotation/>', "entities"),
        ("a.xml", "<annotation><object><name>a</name></object></annotation>", "needs a name and a bndbox"),
        ("a.xml", _xml(("dog", 1, 2, 11, 22), width=65), "another size"),
        ("a.xml", _xml(), "has an object"),
        ("a.json", "", "a.json: cannot be read as a file of labelme"),
        ("a.json", "[]", "it has no shapes"),
        ("a.json", _labelme(_shape("polygon", [])), "a.json: cannot be read"),
        ("a.json", _labelme(_shape("polygon", [[1, 1]])), "1 of its 1 annotations cannot be used"),
    ],
)
def test_rubbish(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, word: str) -> None:
    write_picture(tmp_path / "a.jpg")
    (tmp_path / name).write_text(text)
    main([str(tmp_path), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert word in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("annotations.xml", "export the task as `COCO 1.0`, with `Save images`"),
        ("obj.data", "export the task as `COCO 1.0`"),
        ("project-3-at-2026-01-01.json", "`COCO with Images` or `YOLO with Images`"),
        ("via_project_1Dec2026_9h5m.json", "Export Annotations (COCO format) in VIA"),
    ],
)
def test_exports_that_are_not_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, word: str
) -> None:
    write_picture(tmp_path / "images/a.jpg")
    (tmp_path / name).write_text("")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert word in error and name in error and error.count("\n") == 1
