"""`visft labels`: what is wrong is found, and what was decided on its page is what `visft shards` builds."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import finished
from tests.coco_tree import Tree, write_tree
from visft_ds.cli import main
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.labels.doubts import doubts_of

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def label(category: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": list(bbox), **more}


def test_each_kind_of_wrong_label_is_told_from_right_ones() -> None:
    labels = [
        label(1, 0, 0, 20, 20),  # right
        label(1, 50, 0, 20, 20),  # is of class 2
        label(2, 106, 6, 20, 20),  # lies beside its object
        label(1, 150, 0, 20, 20),  # twice
        label(1, 150, 0, 20, 19.5),
        label(2, 200, 0, 20, 20),  # there is nothing
        label(1, 300, 0, 60, 60, iscrowd=1),
    ]
    predictions = [
        label(1, 0, 0, 20, 20, score=0.9),
        label(1, 1, 1, 20, 20, score=0.3),  # again the right one
        label(2, 50, 0, 20, 20, score=0.8),
        label(2, 100, 0, 20, 20, score=0.9, segmentation="its mask"),
        label(1, 150, 0, 20, 20, score=0.9),
        label(2, 250, 0, 20, 20, score=0.7),  # has no label
        label(1, 250, 1, 20, 20, score=0.5),  # the same object
        label(1, 310, 10, 20, 20, score=0.9),  # of the crowd
        label(2, 270, 40, 20, 20, score=0.1),
    ]
    doubts = doubts_of(labels, predictions)
    told = {}
    for doubt in doubts:
        given = None if doubt.given is None else labels.index(doubt.given)  # type: ignore[arg-type]
        told[given] = (doubt.kind, doubt.proposed)
    assert len(doubts) == 7
    assert doubts[-1].given in (labels[0], labels[3]) and doubts[-2].given in (labels[0], labels[3])
    assert told[1] == ("class", {**labels[1], "category_id": 2})
    assert told[2] == ("box", {"category_id": 2, "bbox": [100, 0, 20, 20], "segmentation": "its mask"})
    assert told[4] == ("twice", None)
    assert told[5] == ("nothing", None)
    assert told[None] == ("missing", {"category_id": 2, "bbox": [250, 0, 20, 20]})
    assert doubts_of([], []) == []


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return write_tree(tmp_path / "tree")


def build(tree: Tree, out: Path, *files: Path) -> int:
    words = ["shards", *tree.arguments(out), "--replace"]
    for file in files:
        words += ["--corrections", str(file)]
    words.insert(1, "build")
    return main(words)


def annotations(folder: Path) -> list[dict[str, Any]]:
    with ShardReader(Manifest.load(folder, "toy")) as reader:
        return list(coco_dataset(reader)["annotations"])


def corrections(tree: Tree, **changes: Any) -> dict[str, Any]:
    content = json.loads(tree.instances.read_text())
    return {
        "info": {"format": "visft_ds corrections", "version": 1, "split": "toy"},
        "images": [{**image, "id": 5 * image["id"]} for image in content["images"][:3]],
        "categories": [
            {"id": category["id"], "name": category["name"]} for category in content["categories"]
        ],
        "annotations": [],
        "removed": [],
        **changes,
    }


def test_corrections_change_add_and_remove_labels(tree: Tree, tmp_path: Path, capsys: Any) -> None:
    """Whatever the ids are called in the file: images go by file name, classes by name, labels by their box."""
    content = json.loads(tree.instances.read_text())
    names = {image["id"]: image["file_name"] for image in content["images"][:3]}
    old, gone = [
        entry for entry in content["annotations"] if entry["image_id"] in names and not entry["iscrowd"]
    ][:2]

    def known(entry: dict[str, Any]) -> dict[str, Any]:
        return {
            "image_id": 5 * entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": [side + 0.004 for side in entry["bbox"]],
        }

    other = next(category["id"] for category in content["categories"] if category["id"] != old["category_id"])
    changed = {**known(old), "category_id": other, "area": 12.0, "iscrowd": 0, "replaces": known(old)}
    added = {**known(old), "bbox": [1, 2, 3, 4], "area": 12.0, "iscrowd": 0}
    file = tmp_path / "corrections-toy.json"
    file.write_text(json.dumps(corrections(tree, annotations=[changed, added], removed=[known(gone)])))
    assert build(tree, tmp_path / "before") == 0
    assert build(tree, tmp_path / "after", file) == 0
    printed = capsys.readouterr().out
    for words in ("1 x label changed", "1 x label added", "1 x label removed"):
        assert f"{words} by corrections" in printed

    def contents(entries: list[dict[str, Any]]) -> list[tuple[int, int, tuple[float, ...]]]:
        return sorted((entry["image_id"], entry["category_id"], tuple(entry["bbox"])) for entry in entries)

    before = contents(annotations(tmp_path / "before"))
    before.remove((old["image_id"], old["category_id"], tuple(old["bbox"])))
    before.remove((gone["image_id"], gone["category_id"], tuple(gone["bbox"])))
    before.append((old["image_id"], other, tuple(changed["bbox"])))
    before.append((old["image_id"], old["category_id"], (1, 2, 3, 4)))
    assert contents(annotations(tmp_path / "after")) == sorted(before)
    assert Manifest.load(tmp_path / "after", "toy").sources["corrections"]["name"] == file.name


def test_corrections_of_other_labels_are_refused(tree: Tree, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "corrections.json"
    content = json.loads(tree.instances.read_text())
    first = content["images"][0]
    category = content["categories"][0]
    gone = {"image_id": 5 * first["id"], "category_id": category["id"], "bbox": [7, 7, 1, 1]}
    strange = {**first, "id": 5 * first["id"], "file_name": "strange.jpg"}
    cases: dict[str, Any] = {
        "not of version 1": corrections(
            tree, info={"format": "visft_ds corrections", "version": 2, "split": "toy"}
        ),
        "corrects the split val; there is toy": corrections(
            tree, info={"format": "visft_ds corrections", "version": 1, "split": "val"}
        ),
        "its image strange.jpg is not one": corrections(tree, images=[strange]),
        "its class zebra (91) is not one": corrections(tree, categories=[{"id": 91, "name": "zebra"}]),
        "any more: run `visft labels`": corrections(tree, removed=[gone]),
        "annotations is no list": corrections(tree, annotations={}),
    }
    for message, content in cases.items():
        file.write_text(json.dumps(content))
        assert build(tree, tmp_path / "out", file) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1, error
    file.write_text("{")
    assert build(tree, tmp_path / "out", file) == 2 and str(file) in capsys.readouterr().err


def test_a_page_of_a_run_and_what_is_no_run(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "pages"
    assert (
        main(["labels", str(finished.runs() / "stage1"), "--out", str(out), "--split", "val", "--most", "2"])
        == 0
    )
    printed = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"val.html", "proposals-val.json"}
    assert f"{out}/val.html" in printed
    proposals = json.loads((out / "proposals-val.json").read_text())
    assert len(proposals["annotations"]) + len(proposals["removed"]) == 2
    assert main(["labels", str(tmp_path)]) == 2 and "no run" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_keys_on_the_page_make_the_corrections(tmp_path: Path) -> None:
    """In the browser itself, with names that would be markup; a label that is taken twice counts once."""
    from visft_ds.evals.pages import render

    hostile = "</script><img src=x onerror=alert(1)>"
    given = {"name": hostile, "shown": [1, 1, 5, 5], "label": {"category_id": 1, "bbox": [1, 1, 5, 5]}}
    proposed = {"name": "cat", "shown": [2, 2, 5, 5], "label": {"category_id": 2, "bbox": [2, 2, 5, 5]}}
    same = {"kind": "another class", "score": 0.9, "file_name": hostile, "picture": "", "size": [9, 9]}
    rows = [
        {**same, "image_id": 1, "given": given, "proposed": proposed},  # taken
        {**same, "image_id": 2, "given": None, "proposed": proposed},  # delete is not offered; taken
        {**same, "image_id": 3, "given": given, "proposed": None},  # taken: removed
        {**same, "image_id": 4, "given": given, "proposed": proposed},  # kept
        {**same, "image_id": 5, "given": given, "proposed": proposed},  # deleted
    ]
    images = [{"id": number, "file_name": hostile} for number in range(1, 6)]
    page = render(
        "labels/page.html.j2", title=hostile, about="", command="", file="corrections.json", rows=rows,
        images=images, head={"categories": []},
    )  # fmt: skip
    keys = """<script>
    for (const key of ["t", "d", "t", "t", "k", "d", "ArrowUp"])
      document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    document.title = JSON.stringify({made: corrections(), state: document.getElementById("state").textContent,
      images: document.images.length});
    </script>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{keys}</body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ]
    command = [str(CHROMIUM), *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    title = re.search("<title>(.*?)</title>", dom, re.DOTALL)
    assert title is not None
    seen = json.loads(title[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert seen["images"] == 0
    assert seen["state"] == "5 of 5 decided; 2 changed or new, 2 removed"
    replaced = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    assert seen["made"]["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [2, 2, 5, 5], "replaces": replaced},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [2, 2, 5, 5]},
    ]
    assert [entry["image_id"] for entry in seen["made"]["removed"]] == [3, 5]
    assert [image["id"] for image in seen["made"]["images"]] == [1, 2, 3, 5]
