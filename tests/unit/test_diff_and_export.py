"""Two splits are compared by content, and shards become the COCO files again that they were made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from coco_tree import NO_PHOTOS, PHOTOS, Tree, make_split, write_tree
from PIL import Image

from tools.make_shards import main
from visft_ds.data.manifest import Manifest
from visft_ds.shards.build import Options, build
from visft_ds.shards.compare_source import compare_source, same_mask
from visft_ds.shards.diff import diff
from visft_ds.shards.export import export
from visft_ds.shards.info import describe


def _pack(tree: Tree, out: Path, **options: Any) -> Manifest:
    build(Options(tree.images, tree.instances, tree.captions, out, "toy", **options))
    return Manifest.load(out, "toy")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_split(tmp_path_factory.mktemp("split"))


def test_the_same_content_cut_otherwise_is_the_same(
    split: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_split(tmp_path, max_count=5)
    difference = diff(split, other)
    assert difference.same_content and difference.shards and difference.options == {"max_count": (4, 5)}
    assert main(["diff", str(split.root), f"{other.root}/toy"]) == 0
    assert capsys.readouterr().out == "option max count: 4 -> 5\ncut into shards otherwise\nsame content\n"


def test_another_order_is_told(split: Manifest, tmp_path: Path) -> None:
    difference = diff(split, make_split(tmp_path, seed=None))
    assert difference.order and not difference.same_content
    assert not (difference.pixels or difference.labels or difference.only_first or difference.only_second)


def test_every_change_is_named(split: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = write_tree(tmp_path / "tree")
    picture = Image.open(tree.images / "picture.2.jpg")
    picture.save(tree.images / "picture.2.jpg", quality=20)

    def change(content: dict[str, Any]) -> None:
        annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
        annotations[1]["bbox"][2] -= 1
        annotations[1]["area"] = 5
        content["annotations"].remove(annotations[2])
        content["annotations"].append({**annotations[3], "id": 99})
        content["images"].pop(4)
        content["images"].append({**content["images"][0], "id": 5})
        content["categories"][0]["name"] = "other"

    tree.edit(change)
    tree.edit(lambda content: content["annotations"][6].update(caption="Another."), "captions")
    other = _pack(tree, tmp_path / "out", max_count=4, seed=None)
    difference = diff(split, other)
    assert difference.only_first == (1028,) and difference.only_second == (5,) and difference.pixels == (1014,)
    assert difference.categories_removed == ((13, "thing 13"),) and difference.categories_added == ((13, "other"),)
    changes = {change.image_id: change for change in difference.labels}
    assert set(changes) == {1007, 1014, 1021}
    assert changes[1007].annotations_changed == {1: ("area", "bbox")}
    assert (changes[1014].annotations_removed, changes[1014].annotations_added) == ((2,), (99,))
    caption = changes[1021]
    assert (caption.captions_removed, caption.captions_added) == (("Picture 0, it's red.",), ("Another.",))
    assert main(["diff", str(split.root / "toy"), str(other.root / "toy"), "--limit", "2"]) == 1
    output = capsys.readouterr().out
    assert "images with other labels (3):\n  1007: annotations changed 1 (area, bbox)\n" in output
    assert "and 1 more" in output and output.endswith("the content differs\n")
    assert main(["diff", str(split.root), str(other.root), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["same_content"] and found["labels"][0]["annotations_changed"] == {"1": ["area", "bbox"]}


def test_what_cannot_be_compared(split: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.manifest.json").write_text("{}")
    for wrong in (tmp_path / "a", tmp_path / "nowhere", tmp_path):
        assert main(["diff", str(split.root), str(wrong)]) == 2
        assert capsys.readouterr().err.startswith("make_shards: ")


def test_an_export_packs_to_the_same_split(split: Manifest, tmp_path: Path) -> None:
    assert main(["export", str(split.root), "--split", "toy", "--out", str(tmp_path / "coco"), "--images"]) == 0
    instances, captions, images = (
        tmp_path / "coco" / name for name in ("instances_toy.json", "captions_toy.json", "toy")
    )
    source = split.root.parent / "tree"
    for picture in (source / "images").iterdir():
        assert (images / picture.name).read_bytes() == picture.read_bytes()
    again = _pack(Tree(images, instances, captions), tmp_path / "again", max_count=4)
    assert again.fingerprint == split.fingerprint and diff(split, again).same_content


def test_an_export_overwrites_nothing_and_leaves_its_folder_never(
    split: Manifest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(split.root), "--split", "toy", "--out", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {
        "categories": 3,
        "images": 12,
        "annotations": 16,
        "captions": 24,
    }
    assert main(arguments) == 2 and "instances_toy.json exists" in capsys.readouterr().err
    tree = write_tree(tmp_path / "tree", 2)
    (tree.images / "sub").mkdir()
    (tree.images / "picture.0.jpg").rename(tree.images / "sub/0.jpg")
    tree.edit(lambda content: content["images"][0].update(file_name="sub/0.jpg"))
    packed = _pack(tree, tmp_path / "out")
    assert export(packed, tmp_path / "b", images=True).images == tmp_path / "b/toy"
    assert (tmp_path / "b/toy/sub/0.jpg").is_file()


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    """Shards of others may say anything."""
    tree = write_tree(tmp_path / "tree", 2)
    packed = _pack(tree, tmp_path / "out")
    for shard in packed.shards:
        path = packed.root / shard.name
        # The same length, so that the tar stays whole.
        path.write_bytes(path.read_bytes().replace(b'"picture.0.jpg"', b'"../../../0.jp"'))
    assert main(["repair", str(packed.root), "--split", "toy", "--replace"]) == 0
    with pytest.raises(ValueError, match=r"file name '../../../0.jp' would lead out of"):
        export(Manifest.load(packed.root, "toy"), tmp_path / "b", images=True)
    assert not (tmp_path.parent / "0.jp").exists()


def test_info_tells_what_a_split_holds(split: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(split, categories=True, shards=True)
    assert facts["trainable_per_image"] == {"mean": 1.25, "max": 3} and facts["captions_per_image"]["mean"] == 2
    assert facts["width"][0] == split.index["width"].min() and facts["width"][-1] == split.index["width"].max()
    assert [row["annotations"] for row in facts["category_table"]] == [9, 5, 2]
    assert [row["name"] for row in facts["shard_table"]] == [shard.name for shard in split.shards]
    assert main(["info", str(split.root), "--categories", "--shards"]) == 0
    output = capsys.readouterr().out
    assert "findings: " in output and "crowd 1" in output and "thing 13" in output and "toy-000002.tar" in output
    assert main(["info", str(split.root), "--json"]) == 0
    assert "category_table" not in json.loads(capsys.readouterr().out)[0]
    assert main(["info", str(split.root.parent)]) == 2


def _by_id(entries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    found = {entry["id"]: entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
def test_real_annotations_make_the_round_trip(tmp_path: Path) -> None:
    """COCO -> shards -> COCO: boxes, polygons, run-length codes, crowds, captions, licences, categories."""
    labels = PHOTOS / "annotations"
    instances, captions = labels / "instances_val2017.json", labels / "captions_val2017.json"
    build(Options(PHOTOS / "val2017", instances, captions, tmp_path / "shards", "val", check="header"))
    manifest = Manifest.load(tmp_path / "shards", "val")
    assert compare_source(manifest, instances, captions) == []
    done = export(manifest, tmp_path / "coco")
    assert done.captions is not None
    before, after = (orjson.loads(path.read_bytes()) for path in (instances, done.instances))
    images = _by_id(before["images"])
    assert _by_id(after["images"]).keys() == images.keys()
    for entry in after["images"]:
        assert entry == {name: images[entry["id"]][name] for name in entry}
        assert {"file_name", "width", "height", "license"} <= entry.keys()
    given = _by_id(before["annotations"])
    assert _by_id(after["annotations"]).keys() == given.keys()
    crowds = 0
    for entry in after["annotations"]:
        source, image = given[entry["id"]], images[entry["image_id"]]
        assert same_mask(entry.pop("segmentation"), source["segmentation"], (image["height"], image["width"]))
        assert entry == {name: source[name] for name in entry} and len(entry) == 6
        crowds += entry["iscrowd"]
    assert crowds == 2, "the set has run-length codes"
    assert after["categories"] == [{"id": one["id"], "name": one["name"]} for one in before["categories"]]
    told = [orjson.loads(path.read_bytes())["annotations"] for path in (captions, done.captions)]
    texts = [sorted((entry["image_id"], entry["caption"]) for entry in entries) for entries in told]
    assert texts[0] == texts[1]
