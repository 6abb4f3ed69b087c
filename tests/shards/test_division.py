"""`visft shards FOLDER --val SHARE`: validation split off by image or by group, the same on any machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.coco_tree import write_tree
from tests.yolo_folder import write_picture, write_yolo
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.shards.cli import main
from visft_ds.shards.division import Division


def _names(shards: Path, split: str) -> list[str]:
    reader = ShardReader(Manifest.load(shards, split))
    return sorted(
        json.loads(reader.read(number, "labels")[1] or b"")["file_name"] for number in range(len(reader))
    )


def test_one_coco_file_becomes_train_and_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "mine", 20)
    tree.instances.rename(tmp_path / "mine/instances_train.json")
    tree.captions.unlink()
    words = [str(tmp_path / "mine"), "--val", "0.2"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "COCO, train, val" in printed and "val: split off, 0.2 of the images, by image, seed 0" in printed
    shards = tmp_path / "mine-shards"
    train = _names(shards, "train")
    val = _names(shards, "val")
    # the names are those of any machine: sha256 of "0 NAME" orders them
    assert val == ["picture.14.jpg", "picture.18.jpg", "picture.5.jpg", "picture.6.jpg"]
    assert len(train) == 16 and sorted(train + val) == sorted(f"picture.{n}.jpg" for n in range(20))
    options = Manifest.load(shards, "val").options
    assert (options["val"], options["group"], options["seed"]) == (0.2, None, 0)
    assert main([*words, "--seed", "1"]) == 2  # never a mixture of two divisions
    assert "--replace" in capsys.readouterr().err
    assert main([*words, "--seed", "1", "--replace"]) == 0
    assert _names(shards, "val") != val
    assert main([str(tmp_path / "mine"), "--replace"]) == 2  # val would be among the images of train
    assert "split off" in capsys.readouterr().err


def test_groups_stay_on_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo(tmp_path / "mine")
    folder = tmp_path / "mine"
    for video in range(6):
        for frame in range(4):
            write_picture(folder / f"train/images/v{video}_{frame}.jpg", seed=9 * video + frame)
            (folder / f"train/labels/v{video}_{frame}.txt").write_text("0 0.5 0.5 0.5 0.25")
    for number in range(5):
        (folder / f"train/images/{number}.jpg").unlink()
        (folder / f"train/labels/{number}.txt").unlink(missing_ok=True)
    words = [str(folder), "--val", "0.3", "--group", "^(v[0-9])_"]
    assert main(words) == 2
    assert "has a split 'val' already" in capsys.readouterr().err
    (folder / "data.yaml").write_text("train: train/images\nnames: [cat, yes, dog]\n")
    assert main(words) == 0
    assert "16 images, 4 groups" in capsys.readouterr().out
    train = {name[:2] for name in _names(tmp_path / "mine-shards", "train")}
    val = {name[:2] for name in _names(tmp_path / "mine-shards", "val")}
    assert len(train) == 4 and len(val) == 2 and not train & val
    assert main([str(folder), "--val", "0.3", "--group", "nothing"]) == 2
    assert "matches no part of the file name v" in capsys.readouterr().err


def test_a_division_does_not_depend_on_the_order_of_names() -> None:
    names = [f"{number}.jpg" for number in range(50)]
    division = Division(0.1, 3)
    assert division.validation(names) == division.validation(names[::-1])
    assert len(division.validation(names)) == 5
    assert Division(0.1, 4).validation(names) != division.validation(names)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.999])
def test_each_side_has_an_image_at_least(share: float) -> None:
    assert len(Division(share, 0).validation(["a", "b"])) == 1


def test_the_group_is_the_first_parenthesis_that_matches() -> None:
    assert Division(0.5, 0, "^(v[0-9])_(f[0-9])").group_of("v1_f2.jpg") == "v1"
    assert Division(0.5, 0, "^(?:(v[0-9])|p([0-9]))_").group_of("p7_f2.jpg") == "7"
    assert Division(0.5, 0, "^[^_]+").group_of("v1_f2.jpg") == "v1"


def test_a_large_group_does_not_become_validation() -> None:
    names = [f"big_{number}" for number in range(90)] + [f"small_{number}" for number in range(10)]
    for seed in range(4):
        names_of_val = Division(0.2, seed, "^[a-z]+").validation(names)
        assert names_of_val == set(names[90:])


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["--val", "0"], "a share between 0 and 1"),
        (["--val", "1"], "a share between 0 and 1"),
        (["--val", "nan"], "a share between 0 and 1"),
        (["--val", "0.2", "--group", "("], "not a regular expression"),
        (["--val", "0.2", "--group", "^"], "into one group"),
        (["--group", "a"], "--group needs --val"),
    ],
)
def test_wrong_calls(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], word: str) -> None:
    tree = write_tree(tmp_path, 4)
    call = ["build", *tree.arguments(tmp_path / "out", "train"), *words]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    tree.edit(lambda content: content.update(images=content["images"][1:2]))
    assert (
        main(
            [
                "build",
                "--images",
                str(tree.images),
                "--instances",
                str(tree.instances),
                "--out",
                str(tmp_path / "out"),
                "--split",
                "train",
                "--val",
                "0.5",
            ]
        )
        == 2
    )
    assert capsys.readouterr().err == "shards: --val needs at least 2 images, there are 1\n"
