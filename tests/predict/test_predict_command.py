"""`visft predict`: what it writes, and one clear message for bad input."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import Image

from visft_ds.predict import command
from visft_ds.predict.cli import main
from visft_ds.predict.model import load
from visft_ds.predict.results import Prediction

ALL = ("--threshold", "0", "--batch-size", "1")


def _run(out: Path, *arguments: Any) -> int:
    model = () if "--run" in arguments else ("--run", "runs/stage2")
    return main([*map(str, arguments), "--out", str(out), *model])


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of predictions are small and empty: to draw and pack them takes most of the time."""
    monkeypatch.setattr(Prediction, "draw", lambda prediction: Image.new("RGB", (8, 8)))


def _results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / command.RESULTS).read_text(encoding="utf-8"))
    return found


def test_it_writes_what_the_model_predicts(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, "photos", *ALL) == 0
    printed = capsys.readouterr()
    assert "predicted  4 of 4 images" in printed.out
    whole = _results(tmp_path)
    files = sorted(Path("photos").iterdir())
    assert [image["file_name"] for image in whole["images"]] == [file.name for file in files]
    assert whole["skipped"] == [] and {"id": 52, "name": "star"} in whole["categories"]
    wanted: dict[str, list[Any]] = {}
    for number, prediction in enumerate(load("runs/stage2").predict(files, threshold=0, batch_size=1), 1):
        for task, results in prediction.to_coco(number).items():
            wanted.setdefault(task, []).extend(results)
    assert {task: whole[task] for task in wanted} == wanted and len(wanted) == 3
    for file in files:
        with Image.open(tmp_path / f"visualizations/{file.stem}.jpg") as picture:
            assert picture.width > 3 * 448
    # other programs read it
    truth = COCO()
    truth.dataset = {"images": whole["images"], "categories": whole["categories"], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes(whole["detection"]).getAnnIds()) == 16
    known = {category["id"] for category in whole["categories"]}
    assert {result["category_id"] for result in whole["detection"] + whole["segmentation"]} <= known


@pytest.mark.usefixtures("undrawn")
def test_the_same_command_continues_after_an_interruption(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third picture is not drawn: two are done then, whose numbers are on disk and whose pictures
    stay.
    """
    out, draws = tmp_path / "out", Prediction.draw

    def draw(prediction: Prediction) -> Any:
        assert prediction.path is not None
        if prediction.path == files[2]:
            raise KeyboardInterrupt
        return draws(prediction)

    files = sorted(Path("photos").iterdir())
    monkeypatch.setattr(Prediction, "draw", draw)
    with pytest.raises(KeyboardInterrupt):
        _run(out, "photos", *ALL)
    lines = (out / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    assert [json.loads(line)["file_name"] for line in lines[1:]] == [file.name for file in files[:2]]
    assert len(list((out / "visualizations").iterdir())) >= 2 and not (out / "predictions.json").exists()
    (out / "predictions.jsonl").write_bytes(b"".join(lines)[:-9])  # killed in the middle of a line
    kept = (out / f"visualizations/{files[0].stem}.jpg").stat().st_mtime_ns

    assert _run(out, "photos", "--threshold", "0.3") == 2
    assert "other settings: threshold 0.0, now 0.3. Give that command again" in capsys.readouterr().err
    written = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(b"[]\n" + written)
    assert _run(out, "photos", *ALL) == 2 and "remove its folder to begin anew" in capsys.readouterr().err
    (out / "predictions.jsonl").write_bytes(written)
    monkeypatch.setattr(Prediction, "draw", draws)
    assert _run(out, "photos", "--threshold", "0", "--batch-size", "2") == 0
    assert "1 of them are done" in capsys.readouterr().out
    assert (out / f"visualizations/{files[0].stem}.jpg").stat().st_mtime_ns == kept
    assert sorted(path.name for path in out.iterdir()) == ["predictions.json", "visualizations"]
    whole = _results(out)
    assert [(image["id"], image["file_name"]) for image in whole["images"]] == [
        *enumerate([f.name for f in files], 1)
    ]
    assert [result["image_id"] for result in whole["captioning"]] == [1, 2, 3, 4]
    boxes = [result for result in whole["detection"] if result["image_id"] == 1]
    assert [result["bbox"] for result in boxes] == [
        result["bbox"] for result in json.loads(lines[1])["results"]["detection"]
    ]


def test_predictions_are_no_input(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / name / "same.png")
    model = str(place / "stage1/export")
    options = ("--run", model, "--image-size", "56")
    monkeypatch.chdir(tmp_path)
    assert main([".", *options]) == 0  # into the default folder, below the one that is searched
    assert "detection, segmentation  no object scores 0.5 or more" in capsys.readouterr().out
    assert [image["file_name"] for image in _results(tmp_path / "predictions")["images"]] == [
        "a/same.png",
        "b/same.png",
    ]
    assert (tmp_path / "predictions/visualizations/b/same.jpg").is_file()


@pytest.mark.usefixtures("undrawn")
def test_a_broken_file_is_named_and_skipped(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in/deep"
    folder.mkdir(parents=True)
    content = (place / "dog.jpg").read_bytes()
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(content if number else content[:700])
    (folder / os.fsdecode(b"caf\xe9.jpg")).write_bytes(content)
    assert _run(tmp_path / "out", tmp_path / "in", *ALL) == 0
    assert f"skipped {folder / '0.jpg'}" in capsys.readouterr().err
    whole = _results(tmp_path / "out")
    assert [file["file_name"] for file in whole["skipped"]] == ["deep/0.jpg"]
    assert [image["file_name"] for image in whole["images"]] == [
        *(f"deep/{n}.jpg" for n in (1, 2, 3)),
        r"deep/caf\xe9.jpg",
    ]
    assert len(whole["captioning"]) == 4
    assert _run(tmp_path / "out", tmp_path / "in") == 2 and "not empty" in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
def test_pipes_devices_links_and_what_only_calls_itself_a_picture(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing waits, nothing is run, no folder is walked for ever."""
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(place / "dog.jpg", folder)
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "round").symlink_to(folder)
    (folder / "self.jpg").symlink_to(folder / "self.jpg")
    (folder / "drawing.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    for number, given in enumerate((folder, f"{folder}/**/*.jpg")):
        assert _run(tmp_path / f"out{number}", given, *ALL) == 0
        assert [image["file_name"] for image in _results(tmp_path / f"out{number}")["images"]] == ["dog.jpg"]
    capsys.readouterr()
    for name in ("pipe.jpg", "zero.jpg", "drawing.jpg"):
        assert _run(tmp_path / "none", folder / name) == 2
        assert name in capsys.readouterr().err


def test_bad_input_has_one_message_and_status_2(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, word in (
        (("absent.jpg",), "absent.jpg"),
        ((tmp_path / "empty",), "no image"),
        (("photos", "--threshold", "2"), "threshold"),
    ):
        assert _run(tmp_path / "out", *arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("predict: ") and word in line


def test_drawings_have_one_ending() -> None:
    names = command.names_of_drawings(["a.png", "a.jpg", "b/c.tif"])
    assert names == {"a.png": "a.png.jpg", "a.jpg": "a.jpg.jpg", "b/c.tif": "b/c.jpg"}
