"""COCO files as other programs write them: what cannot be used is counted, and above a tenth it is an
error.
"""

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
from visft_ds.shards.common import FolderSplit
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
    return read_coco(FolderSplit("toy", tree.images, tree.instances, tree.captions))


def count(source: CocoSource, word: str) -> int:
    return sum(number for kind, (number, _) in source.findings.items() if word in kind)


def stored(source: CocoSource) -> list[Content]:
    """All annotations as they go into the labels."""
    return [annotation for image in source.images for annotation in json.loads(image.label())["annotations"]]


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
    "far away": (lambda entry: entry["bbox"].__setitem__(2, 1e6), "far outside"),
    "masks of text": (lambda entry: entry.update(segmentation="a mask"), "neither polygons nor"),
    "masks of corners": (lambda entry: entry.update(segmentation=[[1, 1, 9, 9]]), "neither polygons nor"),
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


def test_duplicate_annotations_are_counted(toy: Tree) -> None:
    """Under another id; a split of two exports of the same labels is an error."""
    before = json.loads(toy.instances.read_text())["annotations"]

    def twice(number: int) -> Change:
        return lambda content: content["annotations"].extend(
            {**annotation, "id": 10_000 + annotation["id"]} for annotation in before[:number]
        )

    toy.edit(twice(2))
    assert count(read(toy), "duplicate annotation") == 2
    toy.edit(lambda content: content.update(annotations=list(before)))
    toy.edit(twice(len(before)))
    with pytest.raises(ValueError, match=f"{len(before)} x duplicate annotation"):
        read(toy)


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

    objects = sum(
        not annotation["iscrowd"] for annotation in json.loads(toy.instances.read_text())["annotations"]
    )
    assert not count(read(toy), "from its box")
    toy.edit(each(moved, 0.08))
    assert not count(read(toy), "from its box")
    toy.edit(each(moved))
    assert count(read(toy), "from its box") > 0.8 * objects


def test_kept_as_they_are(toy: Tree) -> None:
    """Crowds and boxes without area belong to the data set; other fields, unusable masks and a byte order
    mark not.
    """

    def change(content: Content) -> None:
        first, second, third, fourth, fifth, *_ = [
            annotation for annotation in content["annotations"] if not annotation["iscrowd"]
        ]
        first["bbox"][2] = 0
        first["keypoints"] = [1, 2, 3]
        second.pop("area")
        second["segmentation"] = []
        third["segmentation"] = [[1, 1, 2, 2], [1, 1, 9, 1, 9, 3]]
        fourth["segmentation"] = [["1", 1, 2, 2, 3, 3]]
        fifth["iscrowd"] = 1
        changed.extend(one["id"] for one in (first, second, third, fourth, fifth))

    changed = list[int]()
    before = sum(image.trainable for image in read(toy).images)
    toy.edit(change)
    toy.instances.write_bytes(b"\xef\xbb\xbf" + toy.instances.read_bytes())
    source = read(toy)
    labels = {annotation["id"]: annotation for annotation in stored(source)}
    first, second, third, fourth, fifth = (labels[number] for number in changed)
    assert first["bbox"][2] == 0 and "keypoints" not in first
    assert second["area"] == second["bbox"][2] * second["bbox"][3] and second["segmentation"] == []
    assert len(third["segmentation"]) == 1 and "segmentation" not in fourth
    assert fifth["iscrowd"] == 1 and before - sum(image.trainable for image in source.images) == 2
    assert count(source, "without area") == count(source, "fewer than three points") == 1
    assert count(source, "neither polygons") == 1 and count(source, "object without a mask") == 2


def test_run_length_codes(toy: Tree) -> None:
    """Runs that are no text become text; what does not fill the image, or is no code, is no mask, and
    counted.
    """
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
        {"size": size, "counts": [-7, 9, whole - 2]},
    ]
    codes.extend([codes[0]] * 60)  # a tenth may be lost

    def change(content: Content) -> None:
        one = next(annotation for annotation in content["annotations"] if not annotation["iscrowd"])
        kept = [{**one, "id": n, "segmentation": code, "area": n} for n, code in enumerate(codes)]
        content["annotations"] = kept

    toy.edit(change)
    source = read(toy)
    good = {"size": size, "counts": text}
    assert [annotation.get("segmentation") for annotation in stored(source)] == [good] * 2 + [None] * 6 + [
        good
    ] * 60
    assert count(source, "neither polygons") == 6


FORMS: dict[str, Any] = {
    "numbers": [10, 10, 40, 10, 40, 50.5],
    "points": [[10, 10], [40, 10], [40, 50.5]],
    "lists of points": [[[10, 10], [40, 10], [40, 50.5]]],
    "text": "[[10, 10, 40, 10, 40, 50.5]]",
    "text of numbers": "[10, 10, 40, 10, 40, 50.5]",
}


@pytest.mark.parametrize("form", FORMS)
def test_polygons_in_another_form_are_read(toy: Tree, form: str) -> None:
    """Else all masks are lost, and the build ends well."""
    toy.edit(each(lambda entry: entry.update(segmentation=FORMS[form])))
    source = read(toy)
    labels = stored(source)
    assert all(one["segmentation"] == [[10, 10, 40, 10, 40, 50.5]] for one in labels)
    assert count(source, "read as polygons") == len(labels) and not count(source, "without a mask")


def test_polygons_end_where_training_cuts_them_off(toy: Tree) -> None:
    """The library takes memory in proportion to the distance: a corner at 1e8 ended evaluation and the
    judge.
    """
    toy.edit(each(lambda entry: entry.update(segmentation=[[1, 1, 31, 1, 1e9, -1e9]]), 0.09))
    source = read(toy)
    cut = count(source, "cut off there")
    shapes = [annotation["segmentation"] for annotation in stored(source)]
    assert cut == sum(shape == [[1, 1, 31, 1, 288, -96]] for shape in shapes) > 0


def test_classes_are_counted_by_images(toy: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class that no image has, such as a background that a tool adds, trains nothing."""
    toy.edit(lambda content: content["categories"].append({"id": 0, "name": "back\x1b[2Jground"}))
    content = json.loads(toy.instances.read_text())
    own = [annotation for annotation in content["annotations"] if not annotation["iscrowd"]]
    most = max(
        content["categories"],
        key=lambda one: len({a["image_id"] for a in own if a["category_id"] == one["id"]}),
    )
    images = len({one["image_id"] for one in own if one["category_id"] == most["id"]})
    assert main(["build", *toy.arguments(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert f"images with each of {len(content['categories'])} classes: {most['name']} {images}, " in output
    assert r"'back\x1b[2Jground' 0" in output and "1 x class that no image has, e.g. 'back" in output
    assert main(["info", str(tmp_path / "out")]) == 0
    assert f"{most['name']} {images}, " in capsys.readouterr().out


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
    toy.edit(lambda content: content["categories"].__setitem__(-1, {"id": 1000, "name": " "}))
    with pytest.raises(ValueError, match="a unique id and a name"):
        read(toy)


def test_entries_of_images_are_lost_like_their_files(toy: Tree) -> None:
    toy.edit(lambda content: content["images"][0].update(width=-1))
    assert count(read(toy), "impossible id or size") == 1
    for index in range(1, 5):
        toy.edit(lambda content, index=index: content["images"][index].pop("file_name"))
    with pytest.raises(ValueError, match="5 of its 24 images cannot be used"):
        read(toy)


def test_captions(toy: Tree) -> None:
    alone = read_coco(FolderSplit("toy", toy.images, captions=toy.captions))
    assert alone.categories == () and all(image.captions for image in alone.images)
    toy.edit(each(lambda entry: entry.update(image_id=10**6 + entry["image_id"]), 0.5), "captions")
    assert count(read(toy), "caption without image"), (
        "of a part of COCO's images the captions of all are often given"
    )
    with pytest.raises(ValueError, match="cannot be used"):
        read_coco(FolderSplit("toy", toy.images, captions=toy.captions))
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
    source = read_coco(FolderSplit("toy", toy.images, toy.instances, toy.captions), ellipses=True)
    drawn = count(source, "ellipse")
    labels = stored(source)
    assert 0 < drawn < len(labels) and not count(source, "without a mask")
    found = 0
    for label in labels:
        (x, y, width, height), shape = label["bbox"], label.get("segmentation")
        if isinstance(shape, list) and shape[0][:2] == [round(x + width, 2), round(y + height / 2, 2)]:
            found += 1
            (code,) = coco_mask.frPyObjects(shape, 96, 144)
            if min(x, y) >= 0 and x + width <= 144 and y + height <= 96 and min(width, height) > 10:
                assert coco_mask.area(code) == pytest.approx(math.pi / 4 * width * height, rel=0.1)
    assert found == drawn
