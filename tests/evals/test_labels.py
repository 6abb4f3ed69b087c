"""`visft labels`: what is wrong is found, and what was decided on its page is what `visft shards` builds."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
import torch
from PIL import Image

import visft_ds
from tests import finished
from tests.coco_tree import Tree, write_tree
from tests.map_folder import write_own
from visft_ds.cli import main
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.labels import captions
from visft_ds.evals.labels.doubts import Doubt, doubts_of, region_doubts, with_probabilities
from visft_ds.predict.likeness import near_duplicates, picture_features
from visft_ds.shards.cli import main as shards
from visft_ds.tasks.semantic.results import number_map

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
    assert told[2] == ("box", predictions[3])
    assert told[4] == ("twice", None)
    assert told[5] == ("nothing", None)
    assert told[None] == ("missing", predictions[5])
    assert doubts_of([], []) == []


def test_probabilities_of_errors_are_those_of_planted_ones() -> None:
    """Of twenty errors among 200 labels; without errors, or with too few labels, nothing is claimed."""
    noise = np.random.default_rng(0)
    right = 1 / (1 + np.exp(1.2 - 0.3 * noise.normal(size=200)))
    wrong = 1 / (1 + np.exp(-0.3 - 0.3 * noise.normal(size=20)))

    def doubts(scores: Any) -> list[Doubt]:
        made = [Doubt("nothing", float(score), 1, {"number": number}, None) for number, score in scores]
        return with_probabilities(sorted(made, key=lambda doubt: -doubt.score))

    both = doubts(enumerate([*wrong, *right]))
    of_wrong = [doubt.probability for doubt in both if doubt.given["number"] < 20]  # type: ignore[index]
    of_right = [doubt.probability for doubt in both if doubt.given["number"] >= 20]  # type: ignore[index]
    assert of_wrong[9] > 0.9 and np.mean(of_wrong) > 0.8 and np.mean(of_right) < 0.05  # type: ignore[operator, arg-type]
    assert max(doubt.probability for doubt in doubts(enumerate(right))) < 0.5  # type: ignore[type-var]
    few = [
        *doubts(enumerate(right[:99])),
        Doubt("twice", 0.9, 1, {}, None),
        Doubt("missing", 0.9, 1, None, {}),
    ]
    assert {doubt.probability for doubt in with_probabilities(few)} == {None}
    same = [Doubt("nothing", 0.5, 1, {}, None)] * 100
    assert with_probabilities(same) == same


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
    of_captions = [label for label in proposals["removed"] if "caption" in label]
    of_boxes = len(proposals["annotations"]) + len(proposals["removed"]) - len(of_captions)
    assert of_boxes == len(of_captions) == 2 and "captions fit their own picture" in printed
    assert "near duplicates" not in printed  # of a split alone
    assert main(["labels", str(tmp_path)]) == 2 and "no run" in capsys.readouterr().err


def test_a_region_of_another_class_is_told_from_right_ones() -> None:
    """By the pixels of each connected part: the one at the left is of class 7, the one at the right is right."""
    given = np.zeros((20, 60), dtype=bool)
    given[5:15, 5:20] = True
    given[5:15, 40:55] = True
    answer = given.copy()
    answer[:, :30] = False
    wrong = given ^ answer
    content = {
        "images": [{"id": 1, "height": 20, "width": 60}],
        "categories": [{"id": 3, "name": "ground"}, {"id": 5, "name": "cat"}, {"id": 7, "name": "dog"}],
        "annotations": [region(5, given), region(3, ~given)],
    }
    ground = ~given
    ground[0] = False  # where the head is wrong, or a label
    sky = np.zeros_like(given)
    sky[0] = True
    predictions = [region(5, answer), region(7, wrong | sky), region(3, ground)]
    first, second = region_doubts(content, predictions)
    assert (first.kind, first.score, first.given["category_id"], first.proposed["category_id"]) == (  # type: ignore[index]
        "region", 1.0, 5, 7,
    )  # fmt: skip
    assert first.given["bbox"] == [5, 5, 15, 10] and second.given["category_id"] == 3  # type: ignore[index]
    assert second.score == pytest.approx(60 / 900)


def region(category: int, mask: np.ndarray) -> dict[str, Any]:
    code = coco_mask.encode(np.asfortranarray(mask).view(np.uint8))
    segmentation = {"size": list(mask.shape), "counts": code["counts"].decode()}
    return label(category, *coco_mask.toBbox(code).tolist(), segmentation=segmentation)


def test_corrections_of_regions_and_captions(tmp_path: Path, tree: Tree, capsys: Any) -> None:
    """A house of a label map becomes meadow, and a caption goes; a second time neither is there any more."""
    folder = write_own(tmp_path / "maps")
    path = folder / "labels/train/1train.png"
    numbers = np.asarray(Image.open(path))
    house = numbers == 2
    entry = region(2, house)
    file = tmp_path / "corrections-train.json"
    content = {
        "info": {"format": "visft_ds corrections", "version": 1, "split": "train"},
        "images": [{"id": 1, "file_name": "1train.png"}],
        "categories": [{"id": 2, "name": "house"}],
        "annotations": [{**entry, "category_id": 1, "replaces": entry}],
        "removed": [],
    }
    file.write_text(json.dumps(content))
    out = tmp_path / "shards"
    words = ["shards", str(folder), "--out", str(out), "--corrections", str(file), "--replace"]
    assert main(words) == 0 and "1 x region changed by corrections" in capsys.readouterr().out
    with ShardReader(Manifest.load(out, "train")) as reader:
        read = coco_dataset(reader)
    (image_id,) = [image["id"] for image in read["images"] if image["file_name"] == "1train.png"]
    of_image = [entry for entry in read["annotations"] if entry["image_id"] == image_id]
    now = number_map(of_image, numbers.shape, {0: 0, 1: 1, 2: 2})  # type: ignore[arg-type]
    assert np.array_equal(now, np.where(house, 1, numbers))
    Image.fromarray(np.where(house, 1, numbers).astype(np.uint8)).save(path)
    assert main(words) == 2 and "has no region house" in capsys.readouterr().err

    listed = json.loads(tree.captions.read_text())
    gone = listed["annotations"][0]
    (name,) = [image["file_name"] for image in listed["images"] if image["id"] == gone["image_id"]]
    removed = {"image_id": gone["image_id"], "caption": gone["caption"]}
    images = [{"id": gone["image_id"], "file_name": name}]
    file.write_text(json.dumps(corrections(tree, images=images, removed=[removed, removed])))
    assert build(tree, tmp_path / "after", file) == 2 and "no caption" in capsys.readouterr().err
    file.write_text(json.dumps(corrections(tree, images=images, removed=[removed])))
    assert build(tree, tmp_path / "after", file) == 0
    assert "1 x caption removed by corrections" in capsys.readouterr().out
    manifest = Manifest.load(tmp_path / "after", "toy")
    assert manifest.counts["captions"] == len(listed["annotations"]) - 1


def test_a_caption_is_compared_with_the_same_beside_other_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [RawSample(n, 10 + n, (8, 8), None, (), ("a cat", "..."[: 3 * n])) for n in range(3)]
    likelihoods = torch.tensor([[0.2, 0.1, 0.3], [0.1, 0.1, 0.1], [0.1, 0.5, 0.8]], dtype=torch.float64)
    monkeypatch.setattr(captions, "_log_likelihoods", lambda *_: likelihoods.log())
    doubts = captions._doubts_of_pictures(None, None, samples)  # type: ignore[arg-type]
    assert [doubt.image_id for doubt in doubts] == [10, 11, 12]
    assert [doubt.score for doubt in doubts] == pytest.approx([0.2 / 0.4, 0.1 / 0.2, 0.3 / 1.1])
    assert captions._doubts_of_pictures(None, None, samples[:1]) == []  # type: ignore[arg-type]


def test_near_duplicates_are_found_and_nothing_else() -> None:
    """A picture that is compressed, and one that is mirrored; all have much in common, as drawings have."""
    noise = np.random.default_rng(0)
    pictures = [np.kron(noise.integers(0, 256, (7, 7, 3)), np.ones((32, 32, 1))) for _ in range(8)]
    photographs = [picture.astype(np.uint8) for picture in pictures]
    buffer = io.BytesIO()
    Image.fromarray(photographs[1]).save(buffer, "JPEG", quality=40)
    backbone = visft_ds.load_backbone(finished.runs() / "stage1", device="cpu")
    train = picture_features(backbone, photographs[:4])
    validation = picture_features(backbone, [*photographs[4:], np.asarray(Image.open(buffer))])
    assert train.shape == (4, backbone.width, 4, 4)
    common = 10 * noise.normal(size=train.shape[1:]).astype(np.float32)
    mirrored = np.concatenate([validation, train[2:3, ..., ::-1]]) + (common + common[..., ::-1])
    pairs = near_duplicates(train + (common + common[..., ::-1]), mirrored)
    assert sorted((pair.first, pair.second) for pair in pairs) == [(1, 4), (2, 5)]
    assert near_duplicates(train, train[:0]) == []


def test_shards_name_pictures_that_stand_in_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(0)
    for number in range(6):
        split = "train" if number < 3 else "val"
        (tmp_path / "data" / split).mkdir(parents=True, exist_ok=True)
        if number < 5:
            pixels = np.kron(noise.integers(0, 256, (7, 7, 3)), np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{split}/{number}.png")  # the last one is the fifth
        with (tmp_path / f"data/{split}/metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": f"{number}.png", "text": "noise"}) + "\n")
    shutil.copy(tmp_path / "data/val/5.png", tmp_path / "data/train/0.png")
    words = [str(tmp_path / "data"), "--near-duplicates", str(finished.runs() / "stage1")]
    assert shards(words) == 0
    printed = capsys.readouterr().out
    assert "val/4.png and train/0.png" in printed and "2 of 3 pictures of val" in printed
    assert shards([*words, "--split", "train", "--replace"]) == 2
    assert "needs the splits train and val" in capsys.readouterr().err


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_keys_on_the_page_make_the_corrections(tmp_path: Path) -> None:
    """In the browser itself, with names that would be markup; a label that is taken twice counts once."""
    from visft_ds.evals.pages import render

    hostile = "</script><img src=x onerror=alert(1)>"
    given = {"name": hostile, "shown": [1, 1, 5, 5], "label": {"category_id": 1, "bbox": [1, 1, 5, 5]}}
    proposed = {"name": "cat", "shown": [2, 2, 5, 5], "label": {"category_id": 2, "bbox": [2, 2, 5, 5]}}
    caption = {"name": hostile, "shown": None, "label": {"caption": hostile}}
    same = {"kind": "another class", "score": 0.9, "file_name": hostile, "picture": "", "size": [9, 9]}
    same["probability"] = None
    rows = [
        {**same, "image_id": 1, "given": given, "proposed": proposed},  # taken
        {**same, "image_id": 2, "given": None, "proposed": proposed},  # delete is not offered; taken
        {**same, "image_id": 3, "given": given, "proposed": None},  # taken: removed
        {**same, "image_id": 4, "given": given, "proposed": proposed},  # kept
        {**same, "image_id": 5, "given": given, "proposed": proposed},  # deleted
        {**same, "image_id": 6, "given": caption, "proposed": None},  # taken: removed
    ]
    images = [{"id": number, "file_name": hostile} for number in range(1, 7)]
    page = render(
        "labels/page.html.j2", title=hostile, about="", command="", file="corrections.json", rows=rows,
        images=images, head={"categories": []},
    )  # fmt: skip
    keys = """<script>
    for (const key of ["t", "d", "t", "T", "k", "D", "t", "ArrowUp"])
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
    assert seen["state"] == "6 of 6 decided; 2 changed or new, 3 removed"
    replaced = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 5, 5]}
    assert seen["made"]["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 2, "bbox": [2, 2, 5, 5], "replaces": replaced},
        {"id": 2, "image_id": 2, "category_id": 2, "bbox": [2, 2, 5, 5]},
    ]
    assert [entry["image_id"] for entry in seen["made"]["removed"]] == [3, 5, 6]
    assert seen["made"]["removed"][2] == {"image_id": 6, "caption": hostile}
    assert [image["id"] for image in seen["made"]["images"]] == [1, 2, 3, 5, 6]
