"""Panoptic maps in shards: byte for byte, alone or beside other labels; what cannot be meant is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image

from tests.panoptic_folder import NUMBERS, places, png_of, write_panoptic
from visft_ds.data.dataset import labels_of_split, read_raw
from visft_ds.data.panoptic import objects_of, read_segment_numbers
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.prepare.settle import settle
from visft_ds.shards.cli import main
from visft_ds.tasks import TASKS
from visft_ds.toy.coco import main as draw_toy


@pytest.mark.parametrize("cityscapes", [False, True])
def test_maps_are_stored_byte_for_byte(
    tmp_path: Path, cityscapes: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, shards = write_panoptic(tmp_path / "data", cityscapes=cityscapes), tmp_path / "data-shards"
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "data: panoptic maps, train, val" in printed and "not read" not in printed
    assert main(["verify", str(shards)]) == 0
    manifest = Manifest.load(shards, "train")
    assert manifest.labels == {"panoptic"} and manifest.counts["panoptic"] == 6 and not manifest.categories
    assert [(category.coco_id, category.name, category.thing) for category in manifest.panoptic] == [
        (2, "sky", False),
        (7, "box", True),
        (300, "ground", False),
    ]
    first = min(labels_of_split(ShardReader(manifest)), key=lambda label: label["file_name"])
    (file, *_) = sorted(
        folder.glob("**/*train*/*panoptic.png" if cityscapes else "annotations/*train*/*.png")
    )
    assert base64.b64decode(first["panoptic"]["png"]) == file.read_bytes()
    numbers = NUMBERS[places(11, 64, 40)]
    objects = objects_of(first["panoptic"])
    assert {(one["id"], one["area"], one["iscrowd"]) for one in objects} == {
        (number, int((numbers == number).sum()), int(number == 12)) for number in np.unique(numbers[1:])
    }
    visft = settle(["--data", str(shards)]).config.visft  # the command that it prints
    assert list(visft.tasks.enabled()) == ["panoptic"] and visft.run.keep_best == "panoptic/PQ"
    head = visft.tasks.enabled()["panoptic"].head
    assert (head.num_classes, head.stuff) == (3, (2, 300))  # type: ignore[attr-defined]
    # A head that fits few pictures of few segments.
    assert (head.num_queries, head.blocks, head.hidden_dim) == (24, 3, 128)  # type: ignore[attr-defined]
    assert head.score == 0.2  # type: ignore[attr-defined]
    own = settle(["--data", str(shards), "--set", "visft.tasks.panoptic.head.num_queries=50"]).config.visft
    assert own.tasks.enabled()["panoptic"].head.num_queries == 50  # type: ignore[attr-defined]


def test_permuted_maps_stay_whole(tmp_path: Path) -> None:
    folder, shards = write_panoptic(tmp_path / "data"), tmp_path / "data-shards"
    assert main([str(folder)]) == 0
    assert main(["permute", str(shards), "--out", str(tmp_path / "control"), "--seed", "1"]) == 0
    assert main([str(tmp_path / "control")]) == 0
    control, before = (Manifest.load(tmp_path / name, "train") for name in ("control-shards", "data-shards"))
    by_id = {label["image_id"]: label for label in labels_of_split(ShardReader(before))}
    assert control.panoptic == before.panoptic and control.labels == {"panoptic"}
    for index in range(6):
        raw = read_raw(ShardReader(control), index)
        label = by_id[raw.image_id]
        assert raw.panoptic == label["panoptic"] and raw.size == (label["height"], label["width"])


def test_beside_boxes_and_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An image without a map is kept, and detection keeps its own categories."""
    assert draw_toy(["--out", str(tmp_path / "data"), "--train=3", "--val=0", "--size=48x56"]) == 0
    path = tmp_path / "data/annotations/instances_train2017.json"
    known = orjson.loads(path.read_bytes())
    image = known["images"][0]
    folder = tmp_path / "data/annotations/panoptic_train2017"
    folder.mkdir()
    png_of(NUMBERS[places(0, image["height"], image["width"])]).save(folder / "a.png")
    categories = [{**known["categories"][0], "isthing": 1}, {"id": 300, "name": "ground", "isthing": 0}]
    segments = [{"id": number, "category_id": 300, "iscrowd": 0} for number in NUMBERS[1:].tolist()]
    content: dict[str, Any] = {"images": known["images"], "categories": categories}
    content["annotations"] = [{"image_id": image["id"], "file_name": "a.png", "segments_info": segments}]
    folder.with_suffix(".json").write_bytes(orjson.dumps(content))
    command = [str(tmp_path / "data"), "--out", str(tmp_path / "shards"), "--split", "train"]
    assert main(command) == 0 and "2 x image without panoptic map (kept)" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "shards", "train")
    assert manifest.labels >= {"annotations", "captions", "panoptic"} and len(manifest.panoptic) == 2
    visft = settle(["--data", str(tmp_path / "shards"), "--set", "visft.run.eval_every=0"]).config.visft
    tasks = visft.tasks.enabled()
    assert {"detection", "panoptic"} <= set(tasks) and tasks["panoptic"].head.num_classes == 2  # type: ignore[attr-defined]
    truth = TASKS["panoptic"].truth(ShardReader(manifest), range(3))
    assert [one["id"] for one in truth["images"]] == [image["id"]] and len(truth["annotations"]) == 5
    content["categories"][0]["name"] = "another"
    folder.with_suffix(".json").write_bytes(orjson.dumps(content))
    assert main([*command, "--replace"]) == 2 and "'another'" in capsys.readouterr().err


def _changed(change: Callable[[Any], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        path = folder / "annotations/panoptic_train2017.json"
        content = orjson.loads(path.read_bytes())
        change(content)
        path.write_bytes(orjson.dumps(content))

    return spoil


def _saved(picture: Image.Image) -> Callable[[Path], object]:
    return lambda folder: picture.save(folder / "annotations/panoptic_train2017/000000000011.png")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (_saved(Image.new("L", (40, 64))), "give RGB"),
        (_saved(Image.new("RGB", (9, 9))), "another size"),
        (_saved(Image.new("RGB", (40, 64), (1, 0, 0))), "segment 1, which"),
        (_changed(lambda content: content["annotations"][0]["segments_info"][0].update(id=0)), "from 1 to"),
        (
            _changed(lambda content: content["annotations"][0]["segments_info"][0].update(category_id=9)),
            "not among",
        ),
        (_changed(lambda content: content["categories"][0].pop("isthing")), "isthing"),
        (_changed(lambda content: content["annotations"][0].update(image_id=99)), "image_id 99 of 0000"),
        (
            lambda folder: (folder / "annotations/panoptic_train2017").rename(folder / "annotations/other"),
            "PNG files are missing",
        ),
    ],
)
def test_what_is_refused(
    spoil: Callable[[Path], object], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(write_panoptic(tmp_path))
    assert main([str(tmp_path), "--out", str(tmp_path / "shards"), "--split", "train"]) == 2
    assert word in capsys.readouterr().err


def test_colours_are_numbers(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, 1 << 24, (5, 7))
    png_of(numbers).save(tmp_path / "a.png")
    assert np.array_equal(read_segment_numbers((tmp_path / "a.png").read_bytes()), numbers)
