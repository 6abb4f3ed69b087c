"""`visft predict`: what it writes, that it goes on where it was ended, and one clear message for bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO
from PIL import Image

from tests.published import save_published_lora
from visft_ds.interop.adapter import average
from visft_ds.interop.merge import read_adapter
from visft_ds.predict import command
from visft_ds.predict.cli import main
from visft_ds.predict.images import OpenedImage
from visft_ds.predict.model import Model, load
from visft_ds.predict.results import Prediction

ALL = ("--threshold", "0", "--batch-size", "1")


def _run(out: Path, *arguments: Any) -> int:
    model = () if "--model" in arguments else ("--model", "runs/stage2")
    return main([*map(str, arguments), "--out", str(out), *model])


def _results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / command.RESULTS).read_text(encoding="utf-8"))
    return found


def test_it_writes_what_the_model_predicts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, "photos", *ALL) == 0
    said = capsys.readouterr()
    assert "predicted  4 images" in said.out
    whole = _results(tmp_path)
    files = sorted(Path("photos").iterdir())
    assert [one["file_name"] for one in whole["images"]] == [file.name for file in files]
    assert whole["skipped"] == [] and {"id": 52, "name": "star"} in whole["categories"]
    wanted: dict[str, list[Any]] = {}
    for number, prediction in enumerate(load("runs/stage2").predict(files, threshold=0, batch_size=1), 1):
        for task, results in prediction.to_coco(number).items():
            wanted.setdefault(task, []).extend(results)
    assert {task: whole[task] for task in wanted} == wanted and len(wanted) == 3
    for file in files:
        with Image.open(tmp_path / f"pictures/{file.name}.png") as picture:
            assert picture.width > 3 * 448
    # other programs read it
    truth = COCO()
    truth.dataset = {"images": whole["images"], "categories": whole["categories"], "annotations": []}
    truth.createIndex()
    assert len(truth.loadRes(whole["detection"]).getAnnIds()) == 16
    known = {one["id"] for one in whole["categories"]}
    assert {one["category_id"] for one in whole["detection"] + whole["segmentation"]} <= known


def test_a_broken_file_is_named_and_skipped(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in/deep"
    folder.mkdir(parents=True)
    for number in range(20):
        source = sorted((place / "photos").iterdir())[number % 4]
        content = source.read_bytes()
        (folder / f"{number:02}.jpg").write_bytes(content if number % 10 else content[:700])
    assert _run(tmp_path / "out", tmp_path / "in", "--no-pictures", *ALL[2:]) == 0
    said = capsys.readouterr()
    broken = [str(folder / name) for name in ("00.jpg", "10.jpg")]
    assert [line.split(": ")[0] for line in said.err.splitlines()] == [f"skipped {name}" for name in broken]
    told = " ".join(said.out.split())  # long paths wrap
    assert "predicted 18 images" in told and "skipped 2: " in told
    whole = _results(tmp_path / "out")
    assert [one["file_name"] for one in whole["skipped"]] == ["deep/00.jpg", "deep/10.jpg"]
    assert len(whole["images"]) == 18 and not (tmp_path / "out/pictures").exists()
    assert whole["detection"] == whole["segmentation"] == [] and len(whole["captioning"]) == 18
    shutil.copy(folder / "01.jpg", folder / "00.jpg")  # it was mended: only this one is predicted
    assert _run(tmp_path / "out", tmp_path / "in", "--no-pictures", *ALL[2:]) == 0
    assert (
        "18 done before" in " ".join(capsys.readouterr().out.split())
        and len(_results(tmp_path / "out")["images"]) == 19
    )


def _counting(monkeypatch: pytest.MonkeyPatch, ends_at: int | None = None) -> list[str]:
    """Names of the images that go through the model; Ctrl-C instead of number `ends_at`."""
    seen: list[str] = []
    real = Model.predict_opened

    def predict(self: Model, images: Sequence[OpenedImage], **options: Any) -> list[Prediction]:
        if len(seen) == ends_at:
            raise KeyboardInterrupt
        seen.extend(one.path.name for one in images if one.path)
        return real(self, images, **options)

    monkeypatch.setattr(Model, "predict_opened", predict)
    return seen


def test_the_same_command_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [path.name for path in sorted((place / "photos").iterdir())]
    assert _run(tmp_path / "whole", "photos", "--no-pictures", *ALL) == 0
    with monkeypatch.context() as patch:
        seen = _counting(patch, ends_at=2)
        assert _run(tmp_path / "parts", "photos", "--no-pictures", *ALL) == 130
        assert seen == names[:2]
    assert "the same command goes on" in capsys.readouterr().err
    record = tmp_path / "parts" / command.RECORD
    record.write_bytes(record.read_bytes()[:-30])  # the machine went down in the middle of a line
    with monkeypatch.context() as patch:
        seen = _counting(patch)
        assert _run(tmp_path / "parts", "photos", "--no-pictures", *ALL) == 0
        assert seen == names[1:]
    assert _results(tmp_path / "parts") == _results(tmp_path / "whole")
    with monkeypatch.context() as patch:
        seen = _counting(patch)
        assert _run(tmp_path / "parts", "photos", "--no-pictures", *ALL) == 0
        assert seen == []
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [command.RESULTS, command.RECORD, "run.lock"]


def test_other_settings_are_refused_in_the_same_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path, "photos", "--tasks", "captioning", "--no-pictures") == 0
    before = (tmp_path / command.RECORD).read_bytes()
    for changed, said in (
        (("photos", "--threshold", "0.25", "--no-pictures", "--tasks", "captioning"), "--threshold: 0.5 -> 0.25"),
        (("photos", "--no-pictures"), "--tasks: captioning -> detection"),
        (("photos", "--tasks", "captioning"), "pictures: no -> yes"),
        (("runs/../photos", "photos/..", "--tasks", "captioning", "--no-pictures"), "folder of the images"),
        (("photos", "--no-pictures", "--tasks", "captioning", "--adapter", "none"), "--model"),
    ):
        capsys.readouterr()
        assert _run(tmp_path, *changed) == 2, changed
        assert said in capsys.readouterr().err
    assert (tmp_path / command.RECORD).read_bytes() == before
    (tmp_path / command.RECORD).write_text("my notes\n")
    assert _run(tmp_path, "photos", "--no-pictures") == 2
    assert "is damaged" in capsys.readouterr().err and (tmp_path / command.RECORD).read_text() == "my notes\n"


def test_another_adapter_file_is_another_model(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = read_adapter(place / "runs/stage2/export/adapter")
    save_published_lora(adapter, tmp_path / "one.pt")
    save_published_lora(average([adapter, adapter]), tmp_path / "other.pt")
    given = ("dog.jpg", "--no-pictures", "--adapter")
    assert _run(tmp_path / "out", *given, tmp_path / "one.pt") == 0
    assert _run(tmp_path / "out", *given, tmp_path / "other.pt") == 2
    assert "--model: " in capsys.readouterr().err


def test_names_that_are_no_utf_8_or_as_long_as_can_be(place: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in (b"caf\xe9.jpg", b"l" * 251 + b".jpg"):
        shutil.copy(place / "dog.jpg", tmp_path / "in" / os.fsdecode(name))
    (tmp_path / "in" / os.fsdecode(b"cut\xe9.jpg")).write_text("no picture")
    for _ in range(2):  # the second goes on
        assert _run(tmp_path / "out", tmp_path / "in", *ALL) == 0
    whole = _results(tmp_path / "out")
    assert [one["file_name"] for one in whole["images"]] == [r"caf\xe9.jpg", f"{'l' * 251}.jpg"]
    assert [one["file_name"] for one in whole["skipped"]] == [r"cut\xe9.jpg"]
    assert len(list((tmp_path / "out/pictures").iterdir())) == 2


@pytest.mark.parametrize("what", ["picture", "record", "results"])
def test_a_full_disk_loses_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    options = (*ALL, *(("--no-pictures",) if what != "picture" else ()))
    calls = []

    def fail(*given: Any, **more: Any) -> None:
        calls.append(given)
        if what == "results" or len(calls) == 3:
            raise full
        real(*given, **more)

    owner, name = {
        "picture": (command, "save_png"),
        "record": (command.Record, "_write"),
        "results": (Path, "replace"),
    }[what]
    real = getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        assert _run(tmp_path, "photos", *options) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "No space left on device" in said[0] and "the same command goes on" in said[0]
    assert _run(tmp_path, "photos", *options) == 0
    assert len(_results(tmp_path)["images"]) == 4


def test_bad_input_has_one_message_and_status_2(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    half = tmp_path / "half"
    shutil.copytree("runs/stage2", half, ignore=shutil.ignore_patterns("adapter"))
    for arguments, said in (
        (("absent.jpg",), "absent.jpg: no such file"),
        ((tmp_path / "empty",), "no image there"),
        (("photos", "--model", half), "interrupted"),
        (("photos", "--model", tmp_path / "absent"), "no such run"),
        (("photos", "--threshold", "2"), "from 0 to 1"),
        (("photos", "--batch-size", "0"), "at least 1"),
        (("photos", "--tasks", "depth"), "depth"),
        ((tmp_path / "text.jpg",), "none of 1 files"),
    ):
        assert _run(tmp_path / "out", *arguments) == 2, arguments
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("skipped")]
        assert len(errors) == 1 and errors[0].startswith("predict: ") and said in errors[0], errors
    (tmp_path / "file").write_text("")
    assert _run(tmp_path / "file", "photos") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_predictions_are_no_input(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(tmp_path / name / "same.png")
    model = str(place / "stage1/export")
    options = ("--model", model, "--allow-other-base", "--image-size", "56")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # in the default folder, below the one that is searched
        assert main([".", *options]) == 0
    assert [one["file_name"] for one in _results(tmp_path / "predictions")["images"]] == ["a/same.png", "b/same.png"]
    assert (tmp_path / "predictions/pictures/b/same.png.png").is_file()
