"""COCO files spoiled the way other programs spoil them: a build that would lose the annotations stops and says why."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.coco_tree import NO_PHOTOS, PHOTOS, Tree, write_tree
from tools.make_shards import main
from visft_ds.data.shards import Manifest, verify
from visft_ds.shards.build import Options, build
from visft_ds.shards.findings import TooManyDropsError
from visft_ds.shards.finish import BuildReport
from visft_ds.toy.annotations import write_toy_coco

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


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return write_tree(tmp_path / "tree")


def _build(tree: Tree, out: Path, *extra: str) -> int:
    return main(["build", *tree.arguments(out), "--quiet", *extra])


def _digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir() if path.is_file()}


def _found(report: BuildReport) -> dict[str, int]:
    return {finding["kind"]: finding["count"] for finding in report.findings}


def _options(tree: Tree, out: Path, **changes: Any) -> Options:
    given = {"images": tree.images, "instances": tree.instances, "captions": tree.captions, "out": out, "split": "toy"}
    return Options(**{**given, **changes})


def each(change: Callable[[Content], Any], share: float = 1.0) -> Change:
    """Change a share of the annotations."""

    def edit(content: Content) -> None:
        entries = content["annotations"]
        for entry in entries[: round(share * len(entries))]:
            change(entry)

    return edit


def _text(key: str) -> Change:
    return each(lambda entry: entry.update({key: str(entry[key])}))


def _corners(entry: Content) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x, y, x + width, y + height]


def _normalised(entry: Content) -> None:
    x, y, width, height = entry["bbox"]
    entry["bbox"] = [x / 144, y / 96, width / 144, height / 96]


def _shifted(content: Content) -> None:
    """Category ids from 0 on in the annotations, from 1 on in the table."""
    ids = sorted(category["id"] for category in content["categories"])
    for entry in content["annotations"]:
        entry["category_id"] = ids.index(entry["category_id"])


SPOILED: dict[str, tuple[Change, str, str]] = {
    "text for image_id": (_text("image_id"), "'image_id' is text; COCO wants an integer", "'image_id' is \"3\""),
    "text for category_id": (
        _text("category_id"),
        "'category_id' is text; COCO wants an integer",
        "'category_id' is \"",
    ),
    "text in boxes": (
        each(lambda entry: entry.update(bbox=list(map(str, entry["bbox"])))),
        "'bbox' holds text; COCO wants four numbers",
        "'bbox' is [\"",
    ),
    "boxes of three": (
        each(lambda entry: entry["bbox"].pop()),
        "'bbox' is no list of four numbers: x y width height",
        "'bbox' is [",
    ),
    "no bbox": (
        each(lambda entry: entry.pop("bbox")),
        "there is no 'bbox'; COCO wants four numbers",
        "entry 0 of 'annotations'",
    ),
    "text for iscrowd": (_text("iscrowd"), "'iscrowd' is text; COCO wants 0 or 1", "'iscrowd' is \""),
    "no id": (
        each(lambda entry: entry.pop("id")),
        "there is no 'id'; COCO wants an integer",
        "entry 0 of 'annotations'",
    ),
    "one id for all": (each(lambda entry: entry.update(id=1)), "'id' is that of an earlier entry", "'id' is 1"),
    "ids in fractions": (
        each(lambda entry: entry.update(image_id=entry["image_id"] + 0.5)),
        "'image_id' is a number with a decimal point; COCO wants an integer",
        "'image_id' is 3.5",
    ),
    "other images": (
        each(lambda entry: entry.update(image_id=entry["image_id"] + 1)),
        "'image_id' is not among the ids of 'images'",
        "'image_id' is 4",
    ),
    "categories from 0 on": (
        _shifted,
        "'category_id' is not among the ids of 'categories' (1 to 90)",
        "'category_id' is 7",
    ),
    "x1 y1 x2 y2": (each(_corners), "box looks like x1 y1 x2 y2; COCO wants x y width height", "in 144 x 96"),
    "0 to 1": (each(_normalised), "box looks normalised to 0..1; COCO wants pixels", "in 144 x 96"),
}


@pytest.mark.parametrize("way", SPOILED)
def test_a_build_that_loses_its_annotations_stops_and_names_the_cause(
    way: str, toy: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert _build(toy, whole) == 0
    good = toy.instances.read_text()
    change, cause, example = SPOILED[way]
    toy.edit(change)
    capsys.readouterr()
    for extra in ((), ("--dry-run",), ("--json",)):
        assert _build(toy, out, *extra) == 3
        said, message = capsys.readouterr()
        assert not said and not out.exists(), "nothing is written"
    total = len(json.loads(good)["annotations"])
    assert f" of {total} annotations of {toy.instances} cannot be used" in message
    assert f" x {cause}\n" in message and example in message
    assert "--allow-drops" in message and "Traceback" not in message
    assert _build(toy, out, "--allow-drops") == 0, "the same, told to go on"
    assert (out / "toy.manifest.json").is_file()
    toy.instances.write_text(good)
    again = tmp_path / "again"
    assert _build(toy, again) == 0 and _digests(again) == _digests(whole), "mended, it is made as ever"


def test_a_refused_build_leaves_a_finished_split_alone(toy: Tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert _build(toy, out) == 0
    before = _digests(out)
    toy.edit(_text("image_id"))
    assert _build(toy, out, "--replace") == 3 and _digests(out) == before


def test_a_tenth_may_be_dropped_and_no_more(tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen annotations, one of them a crowd: one without a box is told, two stop the build."""
    assert len(json.loads(tree.instances.read_text())["annotations"]) == 16
    tree.edit(lambda content: content["annotations"][0].pop("bbox"))
    assert _build(tree, tmp_path / "one") == 0
    assert "1 x box malformed" in capsys.readouterr().out
    tree.edit(lambda content: content["annotations"][1].update(category_id="8"))
    assert _build(tree, tmp_path / "two") == 3
    message = capsys.readouterr().err
    assert "2 of 16 annotations" in message
    assert "1 x there is no 'bbox'" in message and "1 x 'category_id' is text" in message


def test_what_was_asked_for_is_no_loss(tree: Tree, tmp_path: Path) -> None:
    """Categories, crowds and images that flags leave out, and strangers to the few images that were chosen."""
    rules = tmp_path / "rules.json"
    rules.write_text('{"thing 3": {"id": 3, "name": "thing 3"}, "*": null}')
    report = build(_options(tree, tmp_path / "mapped", categories=str(rules), keep_crowd=False))
    assert _found(report)["category dropped"] == 7 and _found(report)["crowd dropped"] == 1
    chosen = tmp_path / "ids.txt"
    chosen.write_text("1007\n")
    tree.edit(lambda content: content["annotations"][-2].update(image_id=5))
    assert build(_options(tree, tmp_path / "chosen", ids=chosen)).counts["annotations"] == 1
    # but all that was chosen may not be lost, few as it is
    tree.edit(lambda content: content["annotations"].pop(-2))
    tree.edit(lambda content: content["annotations"][0].update(bbox=None))
    with pytest.raises(ValueError, match=r"1 of 1 annotations .* that were asked for"):
        build(_options(tree, tmp_path / "lost", ids=chosen))


def test_captions_without_an_image_id_stop_the_build_too(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A caption of an image that is not in the set is nothing odd, all of them are."""
    good = tree.captions.read_text()
    tree.edit(
        lambda content: content["annotations"].extend({"image_id": n, "caption": "x"} for n in range(99)), "captions"
    )
    assert _build(tree, tmp_path / "strangers") == 0
    for change, cause in (
        (_text("image_id"), "'image_id' is text; COCO wants an integer"),
        (each(lambda entry: entry.update(caption=5)), "'caption' is an integer; COCO wants text"),
        (each(lambda entry: entry.update(caption=" ")), "'caption' is empty"),
        (each(lambda entry: entry.update(image_id=7)), "'image_id' is not among the ids of 'images'"),
    ):
        tree.captions.write_text(good)
        tree.edit(change, "captions")
        capsys.readouterr()
        assert _build(tree, tmp_path / "out") == 3
        assert f"24 x {cause}\n" in capsys.readouterr().err


def test_what_is_of_two_images_is_of_neither(tree: Tree, tmp_path: Path) -> None:
    tree.edit(lambda content: content["images"][1].update(id=content["images"][3]["id"]))
    with pytest.raises(TooManyDropsError, match="3 x 'image_id' belongs to two images\n"):
        build(_options(tree, tmp_path / "out"))
    found = _found(build(_options(tree, tmp_path / "out", allow_drops=True)))
    assert (found["annotation of two images"], found["caption of two images"]) == (3, 2)


# ---------------------------------------------------------------------------------------- boxes of another form


def test_boxes_beyond_all_pixels_are_malformed(tree: Tree, tmp_path: Path) -> None:
    """Their areas would be no numbers of 64 bits, or none at all."""

    def edit(content: Content) -> None:
        for entry, side in zip(content["annotations"], (5_000_000_000, 1e200), strict=False):
            entry["bbox"] = [0, 0, side, side]
            del entry["area"]

    tree.edit(edit)
    with pytest.raises(TooManyDropsError, match="2 x 'bbox' is out of range; allowed are numbers below 1,000,000,000"):
        build(_options(tree, tmp_path / "out"))
    assert _found(build(_options(tree, tmp_path / "out", allow_drops=True)))["box malformed"] == 2
    assert verify(Manifest.load(tmp_path / "out", "toy")) == []


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
@pytest.mark.parametrize("split", ["train2017", "val2017"])
@pytest.mark.parametrize("without", [(), ("area",), ("segmentation",), ("area", "segmentation")])
def test_boxes_of_photographs_are_taken_for_what_they_are(split: str, without: Sequence[str], tmp_path: Path) -> None:
    """As given none looks otherwise, as corners half of them, normalised nearly all; with and without masks, areas."""
    content = json.loads((PHOTOS / f"annotations/instances_{split}.json").read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for entry in content["annotations"]:
        for key in without:
            entry.pop(key)

    def counts(form: str) -> dict[str, int]:
        file = tmp_path / f"{form}.json"
        file.write_text(json.dumps({**content, "annotations": [changed(one, form) for one in content["annotations"]]}))
        return _found(build(Options(PHOTOS / split, file, None, tmp_path, "x", allow_drops=True), dry_run=True))

    def changed(entry: Content, form: str) -> Content:
        x, y, width, height = entry["bbox"]
        full, high = sizes[entry["image_id"]]
        boxes = {
            "given": [x, y, width, height],
            "rounded": [round(x), round(y), round(width + 0.5), round(height + 0.5)],
            "corners": [x, y, x + width, y + height],
            "normalised": [x / full, y / high, width / full, height / high],
        }
        return {**entry, "bbox": boxes[form]}

    corners, normalised = "box looks like x1 y1 x2 y2", "box looks normalised to 0..1"
    total = len(content["annotations"])
    for form in ("given", "rounded"):
        assert not {corners, normalised} & counts(form).keys()
    assert counts("corners")[corners] > total / 2 and normalised not in counts("corners")
    # a box over the whole image becomes 0 0 1 1, which without mask and area may be its first pixel
    assert counts("normalised")[normalised] > 0.95 * total and corners not in counts("normalised")


@pytest.mark.parametrize(
    ("box", "fields"),
    [
        ([30, 20, 60, 40], {}),  # beyond the image, but its mask begins behind what would be the second corner
        ([30, 20, 60, 40], {"segmentation": None, "area": 2400}),  # an area that only width x height can be
        ([0, 0, 1, 1], {"segmentation": None, "area": 1}),  # one pixel
        ([0, 0, 0, 0], {"segmentation": None}),  # no box
        ([0.0, 0.0, 70.0, 50.0], {}),  # the whole image is the same in both forms
        ([-1.5, -1.5, 72, 52], {}),  # rounding at the border
    ],
)
def test_ordinary_boxes_at_the_border_are_no_other_form(box: list[float], fields: Content, tmp_path: Path) -> None:
    Image.new("RGB", (70, 50)).save(tmp_path / "a.png")
    mask = [[55, 35, 69, 35, 69, 49, 55, 49]]
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": mask, "area": 200, **fields}
    image = {"id": 1, "file_name": "a.png", "width": 70, "height": 50}
    file = tmp_path / "instances.json"
    categories = [{"id": 1, "name": "thing"}]
    file.write_text(json.dumps({"images": [image], "annotations": [entry], "categories": categories}))
    report = build(Options(tmp_path, file, None, tmp_path / "out", "x"), dry_run=True)
    assert not [kind for kind in _found(report) if "looks" in kind]


# ------------------------------------------------------------------------------------------------- nothing is left


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"id": "5"}, "'id' is text; COCO wants an integer"),
        ({"id": 5.0}, "'id' is a number with a decimal point"),
        ({"id": -5}, "'id' is -5; allowed are integers from 0"),
        ({"width": None}, "'width' is null; COCO wants an integer"),
        ({"height": 0}, "'height' is 0; allowed are integers from 1 to 2147483647"),
        ({"height": 1 << 31}, "'height' is 2147483648; allowed are integers from 1 to 2147483647"),
        ({"file_name": 7}, "'file_name' is an integer; COCO wants text"),
    ],
)
def test_a_file_without_usable_images_says_what_is_wrong_with_them(
    change: Content, reason: str, tree: Tree, tmp_path: Path
) -> None:
    def edit(content: Content) -> None:
        for image in content["images"]:
            image.update(change)

    tree.edit(edit)
    with pytest.raises(ValueError, match="no usable image") as caught:
        build(_options(tree, tmp_path / "out"))
    assert (
        "12 entries of 'images' are left out" in str(caught.value)
        and reason in str(caught.value)
        and "--" not in str(caught.value)
    )


def test_only_flags_that_were_given_are_named(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 12 images; none is left by --license$"):
        build(_options(tree, tmp_path / "out", licenses=(99,)))
    tree.edit(lambda content: content.update(images=[]))
    with pytest.raises(ValueError, match="list of images is empty"):
        build(_options(tree, tmp_path / "out"))


def test_no_picture_in_the_folder_says_why(tree: Tree, tmp_path: Path) -> None:
    def edit(content: Content) -> None:
        for image in content["images"]:
            image["file_name"] = f"images/{image['file_name']}"

    tree.edit(edit)
    with pytest.raises(ValueError, match="no image of the data set is usable") as caught:
        build(_options(tree, tmp_path / "out", seed=None))
    assert "12 x missing (no such file in the images folder), for instance images/picture.0.jpg" in str(caught.value)
    tree.edit(lambda content: [image.update(file_name=image["file_name"][7:], width=7) for image in content["images"]])
    with pytest.raises(ValueError, match=r"1 x size differs \(the file has .* for other reasons") as caught:
        build(_options(tree, tmp_path / "out", seed=None))
    assert "{" not in str(caught.value)


def test_unusable_pictures_are_named_on_the_console(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, kind in enumerate(("BMP", "BMP", "BMP", "GIF")):
        path = tree.images / f"picture.{place}.jpg"
        with Image.open(path) as picture:
            picture.convert("RGB").save(path, kind)
    with Image.open(tree.images / "picture.4.jpg") as picture:
        deep = Image.fromarray(np.zeros(picture.size[::-1], np.uint16))
    deep.save(tree.images / "picture.4.jpg", "PNG")
    assert _build(tree, tmp_path / "out", "--seed", "none") == 0
    said = capsys.readouterr().out
    assert "quarantined: left out, listed with reasons under 'quarantine' in the manifest" in said
    assert str(tmp_path / "out/toy.manifest.json") in said
    other = "unreadable (neither JPEG nor PNG but {}; convert it to one of the two)"
    assert f"    3 x {other.format('BMP')}, for instance picture.0.jpg\n" in said
    assert f"    1 x {other.format('GIF')}, for instance picture.3.jpg\n" in said
    assert "    1 x unreadable (16 bits per grey value; convert it to 8 bits), for instance picture.4.jpg\n" in said
    assert "picture.1.jpg: unreadable (neither JPEG" in said, "the examples have their reasons too"


def test_a_split_of_other_files_is_refused_in_words(tree: Tree, tmp_path: Path) -> None:
    build(_options(tree, tmp_path / "out"))
    tree.edit(lambda content: content["annotations"].pop())
    with pytest.raises(ValueError, match="built otherwise") as caught:
        build(_options(tree, tmp_path / "out"))
    assert "instances: instances.json (sha256 " in str(caught.value) and "{" not in str(caught.value)
    assert "captions" not in str(caught.value), "only what differs"


def test_a_byte_order_mark_is_skipped(tree: Tree, tmp_path: Path) -> None:
    expected = build(_options(tree, tmp_path / "plain")).fingerprint
    for path in (tree.instances, tree.captions):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ids = tmp_path / "ids.txt"
    ids.write_bytes(b"\xef\xbb\xbf" + "\n".join(str(1000 + 7 * place) for place in range(12)).encode())
    assert build(_options(tree, tmp_path / "marked", ids=ids)).fingerprint == expected
    assert main(["verify", str(tmp_path / "marked")]) == 0


def _keypoints(content: Content) -> None:
    for entry in content["annotations"]:
        entry.update(keypoints=[1, 2, 2], num_keypoints=1)


def _namesakes(content: Content) -> None:
    content["categories"][1]["name"] = content["categories"][0]["name"]


@pytest.mark.parametrize(
    ("kind", "change", "finding", "example"),
    [
        ("instances", _keypoints, "more fields", "keypoints, num_keypoints"),
        ("instances", _namesakes, "category name twice", ": "),
        (
            "captions",
            lambda c: c["annotations"][0].update(caption="一只狗在草地上奔跑"),
            "caption in one piece",
            "一只狗",
        ),
        (
            "captions",
            lambda c: c["annotations"][0].update(caption="a dog " * 26),
            "caption over 50 words",
            "a dog a dog",
        ),
    ],
)
def test_what_is_kept_and_not_learnt_from_is_said(
    kind: str, change: Change, finding: str, example: str, toy: Tree, tmp_path: Path
) -> None:
    assert finding not in _found(build(_options(toy, tmp_path / "before")))
    file = getattr(toy, kind)
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    report = build(_options(toy, tmp_path / "out"))
    assert _found(report)[finding] >= 1
    assert example in next(entry["examples"][0] for entry in report.findings if entry["kind"] == finding)


def test_links_in_a_circle_are_missing_pictures(tree: Tree, tmp_path: Path) -> None:
    first = sorted(tree.images.iterdir())[0]
    first.unlink()
    first.symlink_to(first.name)
    report = build(_options(tree, tmp_path / "out"))
    assert [bad["reason"] for bad in report.quarantine] == ["missing"]


def test_a_build_without_a_usable_picture_leaves_nothing(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(tree.instances.read_text())
    for entry in content["images"]:
        entry["width"] += 1
    tree.instances.write_text(json.dumps(content))
    assert _build(tree, tmp_path / "out") == 2
    assert "size differs" in capsys.readouterr().err and list((tmp_path / "out").iterdir()) == []
