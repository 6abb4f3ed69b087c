"""COCO files as other programs write them: what cannot be used is counted, and above a tenth it is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faster_coco_eval import mask as coco_mask

from tests.coco_tree import Tree, write_tree
from visft_ds.shards.cli import main
from visft_ds.shards.coco import CocoSource, read_coco
from visft_ds.toy.coco import write_toy_coco

Content = dict[str, Any]
Change = Callable[[Content], Any]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures whose boxes, masks and areas fit each other."""
    folder = tmp_path_factory.mktemp("scenes") / "coco"
    write_toy_coco(folder, train=24, val=1, height=96, width=144, seed=3)
    return folder


@pytest.fixture
def toy(scenes: Path, tmp_path: Path) -> Tree:
    """The same with JSON files of its own, to be spoiled."""
    tree = Tree(scenes / "train2017", tmp_path / "instances.json", tmp_path / "captions.json")
    for kind in ("instances", "captions"):
        getattr(tree, kind).write_text((scenes / f"annotations/{kind}_train2017.json").read_text())
    return tree


def read(tree: Tree) -> CocoSource:
    return read_coco(tree.instances, tree.captions)


def count(source: CocoSource, word: str) -> int:
    return sum(number for kind, (number, _) in source.findings.items() if word in kind)


def stored(source: CocoSource) -> list[Content]:
    """All annotations as they go into the labels."""
    return [one for image in source.images for one in json.loads(image.label())["annotations"]]


def each(change: Callable[[Content], Any], share: float = 1.0) -> Change:
    """Change a share of the annotations."""

    def edit(content: Content) -> None:
        entries = content["annotations"]
        for entry in entries[: round(share * len(entries))]:
            change(entry)

    return edit


def _corners(entry: Content) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x, y, x + width, y + height]


def _normalised(entry: Content) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x / 144, y / 96, width / 144, height / 96]


SPOILED: dict[str, tuple[Callable[[Content], Any], str]] = {
    "text for image_id": (lambda entry: entry.update(image_id=str(entry["image_id"])), "without image"),
    "text in boxes": (lambda entry: entry.update(bbox=list(map(str, entry["bbox"]))), "box or crowd flag"),
    "one id for all": (lambda entry: entry.update(id=7), "unique id"),
    "two corners": (_corners, "box beyond the image"),
    "normalised": (_normalised, "box beyond the image or within a pixel"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_annotations_that_cannot_be_used_are_an_error_above_a_tenth(
    toy: Tree, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, word = SPOILED[case]
    toy.edit(each(change))
    assert main(["build", *toy.arguments(tmp_path / "out")]) == 2
    first, found, *_ = capsys.readouterr().err.splitlines()
    assert "annotations cannot be used" in first and word in found and found.count("annotation ") >= 3
    assert not (tmp_path / "out").exists()


def test_less_than_a_tenth_is_counted(toy: Tree) -> None:
    objects = len(json.loads(toy.instances.read_text())["annotations"])
    toy.edit(each(lambda entry: entry.update(category_id=1000), 0.09))
    source = read(toy)
    assert count(source, "unknown category") == round(0.09 * objects)
    assert len(stored(source)) == objects - round(0.09 * objects)
    toy.edit(each(lambda entry: entry.update(category_id=1000), 0.11))
    with pytest.raises(ValueError, match="unknown category"):
        read(toy)


def test_masks_that_contradict_their_boxes_are_counted_above_a_tenth(toy: Tree) -> None:
    def moved(entry: Content) -> None:
        x, y, width, height = entry["bbox"]
        entry["bbox"] = [max(0, x - 4), max(0, y - 4), width, height]

    objects = sum(not one["iscrowd"] for one in json.loads(toy.instances.read_text())["annotations"])
    assert not count(read(toy), "from its box")
    toy.edit(each(moved, 0.08))
    assert not count(read(toy), "from its box")
    toy.edit(each(moved))
    assert count(read(toy), "from its box") > 0.8 * objects


def test_kept_as_they_are(toy: Tree) -> None:
    """Crowds and boxes without area belong to the data set; other fields, unusable masks and a byte order mark not."""

    def change(content: Content) -> None:
        first, second, third, fourth, fifth = [one for one in content["annotations"] if not one["iscrowd"]][:5]
        content["annotations"] = [first, second, third, fourth, fifth]
        first["bbox"][2] = 0
        first["keypoints"] = [1, 2, 3]
        second.pop("area")
        second["segmentation"] = []
        third["segmentation"] = [[1, 1, 2, 2], [1, 1, 9, 1, 9, float("1e9")]]
        fourth["segmentation"] = [["1", 1, 2, 2, 3, 3]]
        fifth["iscrowd"] = 1

    toy.edit(change)
    toy.instances.write_bytes(b"\xef\xbb\xbf" + toy.instances.read_bytes())
    source = read(toy)
    first, second, third, fourth, fifth = sorted(stored(source), key=lambda one: one["id"])
    assert first["bbox"][2] == 0 and "keypoints" not in first
    assert second["area"] == second["bbox"][2] * second["bbox"][3] and second["segmentation"] == []
    assert len(third["segmentation"]) == 1 and "segmentation" not in fourth
    assert fifth["iscrowd"] == 1 and sum(image.crowds for image in source.images) == 1
    assert sum(image.trainable for image in source.images) == 3
    assert count(source, "without area") == count(source, "crowd (kept") == 1
    assert count(source, "instance without mask") == 2


def test_run_length_codes(toy: Tree) -> None:
    """Runs that are no text become text; what does not fill the image, or is no code, is no mask."""
    size = [96, 144]
    whole = 96 * 144
    text = coco_mask.frPyObjects({"size": size, "counts": [7, 9, whole - 16]}, *size)["counts"].decode()
    codes = [
        {"size": size, "counts": [7, 9, whole - 16]},
        {"size": [96.0, 144.0], "counts": text},
        {"size": size, "counts": [7, 9]},
        {"size": size, "counts": [7, 9 * whole]},
        {"size": size, "counts": text + text},
        {"size": size, "counts": "\u20ac"},
        {"size": size, "counts": None},
        "text",
    ]

    def change(content: Content) -> None:
        one = next(one for one in content["annotations"] if not one["iscrowd"])
        content["annotations"] = [{**one, "id": n, "segmentation": code} for n, code in enumerate(codes)]

    toy.edit(change)
    source = read(toy)
    assert [one.get("segmentation") for one in stored(source)] == [{"size": size, "counts": text}] * 2 + [None] * 6


def test_ids_of_images_and_categories_are_their_own(toy: Tree) -> None:
    toy.edit(lambda content: content["images"].append(dict(content["images"][0])))
    assert count(read(toy), "image listed twice") == 1
    toy.edit(lambda content: content["images"].append({**content["images"][0], "file_name": "other.jpg"}))
    with pytest.raises(ValueError, match=r"other\.jpg and .* both have the id"):
        read(toy)
    toy.edit(lambda content: content["images"].pop())
    toy.edit(lambda content: content["categories"].append(dict(content["categories"][0])))
    with pytest.raises(ValueError, match="a unique id"):
        read(toy)


def test_entries_of_images_are_lost_like_their_files(toy: Tree) -> None:
    toy.edit(lambda content: content["images"][0].update(width=-1))
    assert count(read(toy), "impossible id or size") == 1
    for place in range(1, 5):
        toy.edit(lambda content, place=place: content["images"][place].pop("file_name"))
    with pytest.raises(ValueError, match="5 of its 24 images cannot be used"):
        read(toy)


def test_captions(toy: Tree) -> None:
    alone = read_coco(None, toy.captions)
    assert alone.categories == () and all(image.captions for image in alone.images)
    toy.edit(each(lambda entry: entry.update(image_id=10**6 + entry["image_id"]), 0.5), "captions")
    assert count(read(toy), "caption without image"), "of a part of COCO's images the captions of all are often given"
    with pytest.raises(ValueError, match="cannot be used"):
        read_coco(None, toy.captions)
    toy.edit(each(lambda entry: entry.update(image_id=-1)), "captions")
    with pytest.raises(ValueError, match="caption without image"):
        read(toy)
    toy.edit(each(lambda entry: entry.update(caption=" ", image_id=alone.images[0].image_id)), "captions")
    with pytest.raises(ValueError, match="caption without text"):
        read(toy)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"images": [' + b"[" * 100_000, b"\xff"])
def test_what_is_no_coco_file_is_named(tmp_path: Path, data: bytes) -> None:
    tree = write_tree(tmp_path / "tree", 4)
    tree.instances.write_bytes(data)
    with pytest.raises(ValueError, match=r"instances\.json: cannot be read as a COCO file"):
        tree.pack(tmp_path / "out", captions=False)


def test_masks_from_boxes_are_the_ellipses_in_them(toy: Tree) -> None:
    """Only of objects without a mask, and counted; their area is that of an ellipse."""
    toy.edit(each(lambda entry: entry.pop("segmentation"), share=0.5))
    source = read_coco(toy.instances, toy.captions, ellipses=True)
    drawn = count(source, "ellipse")
    labels = stored(source)
    assert 0 < drawn < len(labels) and not count(source, "without mask")
    found = 0
    for label in labels:
        (x, y, width, height), shape = label["bbox"], label.get("segmentation")
        if isinstance(shape, list) and shape[0][:2] == [round(x + width, 2), round(y + height / 2, 2)]:
            found += 1
            (code,) = coco_mask.frPyObjects(shape, 96, 144)
            if min(x, y) >= 0 and x + width <= 144 and y + height <= 96 and min(width, height) > 10:
                assert coco_mask.area(code) == pytest.approx(math.pi / 4 * width * height, rel=0.1)
    assert found == drawn
