"""Label maps: each layout is recognised and packed without loss, what cannot be meant is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.map_folder import bands, write_own, write_pair
from visft_ds.data.dataset import coco_dataset, labels_of_split
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.judge.dense_sets import read_train_and_test
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.prepare.settle import settle
from visft_ds.shards.cli import main
from visft_ds.tasks.semantic.results import measure_semantic, number_map

CAMVID = "sky, building, pole, road, pavement, tree, sign_symbol, fence, car, pedestrian, bicyclist"


def _ade(folder: Path) -> Path:
    for part in ("training", "validation"):
        numbers = np.array([0, 12, 150], dtype=np.uint8)
        write_pair(folder / f"images/{part}/a.jpg", folder / f"annotations/{part}/a.png", bands(1), numbers)
    names = [f"{number}\t0.1\t5\t5\t1\t{f'thing {number}'}, other name" for number in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *names]))
    return folder


def _cityscapes(folder: Path) -> Path:
    for part in ("train", "val"):
        image = folder / f"leftImg8bit/{part}/ulm/ulm_01_leftImg8bit.png"
        maps = folder / f"gtFine/{part}/ulm"
        write_pair(image, maps / "ulm_01_gtFine_labelIds.png", bands(1), np.array([3, 7, 33], dtype=np.uint8))
        Image.new("L", (64, 48), 1).save(maps / "ulm_01_gtFine_instanceIds.png")
    return folder


def _camvid(folder: Path) -> Path:
    for split in ("train", "val"):
        numbers = np.array([0, 10, 11], dtype=np.uint8)  # 11 means no class
        write_pair(folder / f"{split}/a.png", folder / f"{split}annot/a.png", bands(1), numbers)
    return folder


@pytest.mark.parametrize(
    ("write", "kind", "names", "regions"),
    [
        (write_own, "label maps", ["sky", "meadow", "house"], 24),
        (_ade, "ADE20k", [f"thing_{number}" for number in range(1, 151)], 2),
        (_cityscapes, "Cityscapes", None, 2),
        (_camvid, "CamVid", CAMVID.split(", "), 2),
    ],
)
def test_layouts(
    write: Callable[[Path], Path],
    kind: str,
    names: list[str] | None,
    regions: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, shards = write(tmp_path / "data"), tmp_path / "data-shards"
    assert main([str(folder)]) == 0
    assert f"data: {kind}, train, val" in capsys.readouterr().out
    manifest = Manifest.load(shards, "train")
    assert manifest.labels == {"maps"} and manifest.counts["regions"] == regions
    known = [category.name for category in manifest.categories]
    assert [name.replace(" ", "_") for name in known] == names or (
        len(known) == 19 and known[0] == "road" and known[-1] == "bicycle"
    )
    assert manifest.index["num_annotations"].sum() == regions
    visft = settle(["--data", str(shards)]).config.visft  # the command that it prints
    assert list(visft.tasks.enabled()) == ["semantic"] and visft.run.keep_best == "semantic/mIoU"
    assert visft.model.out_indices == (2, 4, 6)


def test_nothing_of_a_map_is_lost(tmp_path: Path) -> None:
    draw, numbers = np.random.default_rng(0), np.array([*range(12), 255], dtype=np.uint8)
    for name in "abc":
        maps = numbers[draw.integers(0, 13, (33, 41))]
        write_pair(tmp_path / f"images/train/{name}.png", tmp_path / f"labels/train/{name}.png", maps % 3)
        Image.fromarray(maps).save(tmp_path / f"labels/train/{name}.png")
    (tmp_path / "classes.txt").write_text("\n".join("abcdefghijklm"))
    assert main([str(tmp_path), "--out", str(tmp_path / "shards")]) == 0
    for label in labels_of_split(ShardReader(Manifest.load(tmp_path / "shards", "train"))):
        found = number_map(label["annotations"], (33, 41), {number: number for number in range(12)})
        assert np.array_equal(found, np.asarray(Image.open(tmp_path / f"labels/train/{label['file_name']}")))


def _saved(image: Image.Image) -> Callable[[Path], object]:
    return lambda folder: image.save(folder / "labels/train/0train.png")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_saved(Image.new("RGB", (40, 64))), "mode RGB"),
        (_saved(Image.new("L", (40, 64), 7)), "number 7 has no name"),
        (_saved(Image.new("I;16", (40, 64), 300)), "number 300"),
        (_saved(Image.new("L", (9, 9))), "another size"),
        (lambda folder: (folder / "labels/train/1train.png").unlink(), "without label map"),
        (lambda folder: (folder / "images/train/1train.png").unlink(), "without image"),
        (lambda folder: (folder / "classes.txt").write_text("\n".join(map(str, range(256)))), "254"),
        (lambda folder: (folder / "classes.txt").write_text("sky\nsky"), "no two alike"),
        (lambda folder: (folder / "data.yaml").write_text("names: [a]"), "2 layouts"),
        (
            lambda folder: [Image.new("L", (9, 9), 255).save(one) for one in folder.glob("*/train/*")],
            "all pixels are 255",
        ),
    ],
)
def test_what_is_refused(
    spoil: Callable[[Path], object], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(write_own(tmp_path))
    assert main([str(tmp_path), "--out", str(tmp_path / "shards"), "--split", "train"]) == 2
    assert word in capsys.readouterr().err


def test_maps_of_0_and_255_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual form of binary masks, whose object would be no class."""
    write_own(tmp_path)
    for path in tmp_path.glob("labels/*/*.png"):
        Image.fromarray(np.where(np.asarray(Image.open(path)) == 1, 255, 0).astype(np.uint8)).save(path)
    (tmp_path / "classes.txt").write_text("back\nobject\n")
    assert main([str(tmp_path), "--out", str(tmp_path / "shards"), "--split", "train"]) == 0
    output = capsys.readouterr().out
    assert "images with each of 2 classes: back 8, object 0" in output
    assert "the maps hold 0, 255, and 255 means no class (--void N), e.g. 1 object" in output
    assert Manifest.load(tmp_path / "shards", "train").findings["class that no image has"] == (1, ["object"])


def test_a_number_without_a_class_loses_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CamVid has "Unlabelled" among its 12 names; as a class it would be learnt, and count in the mean IoU as
    0.
    """
    write_own(tmp_path)
    command = [str(tmp_path), "--out", str(tmp_path / "shards"), "--void"]
    assert main([*command, "256"]) == 2 and "0 to 255" in capsys.readouterr().err
    for path in tmp_path.glob("labels/*/*.png"):
        numbers = np.asarray(Image.open(path)).copy()
        numbers[numbers == 255] = 3
        Image.fromarray(numbers).save(path)
    (tmp_path / "classes.txt").write_text("sky\nmeadow\nhouse\nUnlabelled\n")
    assert main([*command, "3"]) == 0
    assert "e.g. 3 Unlabelled" in capsys.readouterr().out
    reader = ShardReader(Manifest.load(tmp_path / "shards", "val"))
    assert [category.name for category in reader.manifest.categories] == ["sky", "meadow", "house"]
    truth = coco_dataset(reader)
    assert measure_semantic(truth, truth["annotations"], per_category=True) == {
        **{"semantic/mIoU": 1, "semantic/accuracy": 1},
        **{f"semantic/IoU/{name}": 1 for name in ("sky", "meadow", "house")},
    }
    _, judged = read_train_and_test(Request(QUICK, "x", str(tmp_path / "shards")))
    assert judged.classes == ("sky", "meadow", "house") and set(np.unique(judged.label(0))) <= {
        0,
        1,
        2,
        65_535,
    }


def test_another_number_without_a_class(tmp_path: Path) -> None:
    write_own(tmp_path)
    for path in tmp_path.glob("labels/*/*.png"):
        numbers = np.asarray(Image.open(path)).copy()
        numbers[numbers == 255] = 0
        Image.fromarray(numbers).save(path)
    (tmp_path / "classes.txt").write_text("meadow\nhouse\n")
    assert main([str(tmp_path), "--out", str(tmp_path / "shards"), "--void", "0", "--masks-from-boxes"]) == 2
    assert main([str(tmp_path), "--out", str(tmp_path / "shards"), "--void", "0"]) == 0
    manifest = Manifest.load(tmp_path / "shards", "val")
    assert [(category.coco_id, category.name) for category in manifest.categories] == [
        (1, "meadow"),
        (2, "house"),
    ]
