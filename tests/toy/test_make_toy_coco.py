"""The toy set must be COCO as pycocotools reads it, its masks must be the drawn pixels, its bytes
reproducible.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from visft_ds.data.panoptic import read_segment_numbers
from visft_ds.toy.coco import SPLITS, describe, main, write_toy_coco
from visft_ds.toy.rooms import draw_room
from visft_ds.toy.scenes import draw_scene, rasterise
from visft_ds.toy.shapes import CATEGORY_IDS, NAMES
from visft_ds.toy.styles import STYLES, Style, style_of

# The oracle's own decode() under NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)

TRAIN, VAL, WIDTH, HEIGHT = 70, 40, 144, 96


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "coco"
    write_toy_coco(out, train=TRAIN, val=VAL, height=HEIGHT, width=WIDTH, seed=3)
    return out


def test_the_command_writes_the_same_bytes_with_two_workers(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "again")
    words = f"--train {TRAIN} --val {VAL} --size {WIDTH}x{HEIGHT} --seed 3 --workers 2 --out {out}".split()
    assert main(words) == 0 and _digest(tmp_path / "again") == _digest(tree)
    for wrong, said in (
        (words, "not an empty folder"),
        (["--out", f"{out}2", "--size", "20"], "sides of 28"),
    ):
        assert main(wrong) == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "again2").exists()


def test_a_script_without_a_guard_ends_with_what_it_lacks(tmp_path: Path) -> None:
    """Its workers import the script again: they must not start workers without end."""
    script = tmp_path / "draw.py"
    size = "train=20, val=0, height=28, width=28, workers=2"
    call = f"write_toy_coco(Path({str(tmp_path / 'toy')!r}), {size})"
    imports = "from pathlib import Path\nfrom visft_ds.toy.coco import write_toy_coco\n"
    script.write_text(imports + call)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and 'below `if __name__ == "__main__":`' in done.stderr
    shutil.rmtree(tmp_path / "toy", ignore_errors=True)
    script.write_text(f"{imports}if __name__ == '__main__':\n    print({call}['images'])\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("20\n", "")


def test_fewer_images_are_the_first_ones_and_other_seeds_or_styles_are_different(
    tree: Path, tmp_path: Path
) -> None:
    changes = {"few": {}, "seed": {"seed": 4}, "style": {"style": "b"}, "even": {"colours": "even"}}
    for name, change in changes.items():
        write_toy_coco(
            tmp_path / name, **{"train": 4, "val": 2, "height": HEIGHT, "width": WIDTH, "seed": 3} | change
        )
    whole, few, *others = (_digest(folder) for folder in (tree, *(tmp_path / name for name in changes)))
    pictures = [name for name in few if name.endswith(".jpg")]
    assert len(pictures) == 6 and all(few[name] == whole[name] for name in pictures)
    assert all(any(other[name] != few[name] for name in pictures) for other in others)


@pytest.mark.parametrize("split", SPLITS)
def test_pycocotools_reads_the_annotations(tree: Path, split: str) -> None:
    coco = COCO(str(tree / "annotations" / f"instances_{split}.json"))
    assert sorted(path.name for path in (tree / split).iterdir()) == sorted(
        i["file_name"] for i in coco.imgs.values()
    )
    assert {c["name"]: c["id"] for c in coco.cats.values()} == CATEGORY_IDS
    forms = set()
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.sum() == annotation["area"] > 0
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + w <= WIDTH and y + h <= HEIGHT
        ys, xs = np.nonzero(mask)
        # COCO's rasteriser rounds corners to pixels: a box may differ from the pixels', most at thin tips.
        assert (
            np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - (x, y, x + w, y + h)).max()
            <= 2
        )
        forms.add((type(annotation["segmentation"]), annotation["iscrowd"]))
    # outlines of whole shapes are polygons; of crowds and of what others hide, the pixels are coded
    assert forms == {(list, 0), (dict, 0), (dict, 1)}
    for image in coco.imgs.values():
        shapes = [coco.annToMask(coco.anns[number]) for number in coco.getAnnIds(image["id"])]
        assert not shapes or np.max(np.sum(shapes, axis=0)) == 1, "visible parts overlap"
    told = json.loads((tree / "annotations" / f"captions_{split}.json").read_bytes())["annotations"]
    assert sorted(one["image_id"] for one in told) == sorted(5 * list(coco.imgs)) and len(
        {one["id"] for one in told}
    ) == len(told)
    assert (
        0 < sum(not coco.getAnnIds(number) for number in coco.imgs) < len(coco.imgs) // 2
    )  # images without objects
    assert {annotation["category_id"] for annotation in coco.anns.values()} == set(coco.cats)
    assert any(annotation["iscrowd"] for annotation in coco.anns.values())


def test_even_colours_say_nothing_about_shapes() -> None:
    """A colour is as likely with each category; with usual ones seven shapes of eight can be named by it."""
    for colours, low, high in (("usual", 0.8, 0.95), ("even", 0.0, 0.2)):
        style = style_of("b", colours)
        scenes = [draw_scene(np.random.default_rng(seed), style, 56, 56) for seed in range(150)]
        shapes = [shape for scene in scenes for shape in scene.shapes]
        own = [list(style.colours)[NAMES.index(shape.category)] == shape.colour for shape in shapes]
        assert low < np.mean(own) < high, colours


def test_shapes_that_are_left_out_never_come() -> None:
    """Also not in crowds; and without any left out, the same numbers are drawn as ever."""
    style = style_of("a", "even", ("heart", "arrow"))
    scenes = [draw_scene(np.random.default_rng(number), style, 56, 56) for number in range(200)]
    seen = {
        shape.category for scene in scenes for shape in (*scene.shapes, *([scene.crowd] * bool(scene.crowd)))
    }
    assert seen == set(NAMES) - {"heart", "arrow"}
    for names, told in ((("hart",), "hart"), (NAMES, "allowed")):
        with pytest.raises(ValueError, match=told):
            style_of("a", "even", names)


def test_drawn_styles_share_no_pattern_with_style_a() -> None:
    """They are for judging what was trained on style a; a number always draws the same style."""
    seen = [style_of(str(number), "even") for number in range(8)]
    for style in seen:
        assert not set(style.textures) & set(STYLES["a"].textures)
        assert not set(style.grounds) & set(STYLES["a"].grounds)
        assert len(set(style.colours.values())) == len(NAMES)
    assert len({style.textures for style in seen}) > 4 and len({style.period for style in seen}) == 8
    assert seen[3] == style_of("3", "even")
    for wrong in ("-1", "c", "1.5", "\u0663"):
        with pytest.raises(ValueError, match="a number"):
            style_of(wrong, "even")


@pytest.mark.parametrize("style", [*STYLES.values(), replace(style_of("11", "usual"), grain=0.0)])
def test_masks_are_the_drawn_pixels(style: Style) -> None:
    """Against the same ground without shapes: what changed is what is marked, up to the soft edge."""
    for seed in range(8):
        scene = draw_scene(np.random.default_rng(seed), style, 112, 112)
        bare = draw_scene(np.random.default_rng(seed), style, 112, 112, max_shapes=0).image.astype(int)
        change = np.abs(scene.image.astype(int) - bare).max(axis=2)
        marked = np.zeros((112, 112), dtype=bool)
        for shape in scene.shapes:
            marked |= shape.visible
            raster = rasterise(shape.polygons, 112, 112)
            assert not (shape.visible & ~raster).any()
            if shape.is_whole():
                assert np.array_equal(raster, shape.visible)
        inside = marked & ~_grow(~marked)
        assert (
            not scene.shapes or np.mean(change[inside] > 8) > 0.99
        )  # a pattern may meet the colour of the ground
        assert change[~_grow(marked)].max() <= 32  # a tip thinner than a pixel shows faintly


def _grow(mask: np.ndarray) -> np.ndarray:
    """One pixel more in each direction: soft edges colour the pixels that a polygon only touches."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def test_captions_count_what_is_there() -> None:
    """Also of as many objects as COCO has, when asked for."""
    numbers = ("No", "One", "Two", "Three", "Four", "Five")
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, STYLES["a"], 112, 112)
        captions = describe(rng, scene)
        assert len(captions) == 5 and all(caption.endswith(".") for caption in captions)
        if scene.shapes:
            assert captions[1].split()[0] == numbers[len(scene.shapes)]
            assert all(f"{shape.colour} {shape.category}" in captions[0] for shape in scene.shapes)
    scenes = [
        draw_scene(np.random.default_rng(seed), STYLES["a"], 160, 200, max_shapes=18) for seed in range(24)
    ]
    counts = [len(scene.shapes) for scene in scenes]
    assert 6 < np.mean(counts) < 9 and max(counts) > 13


@pytest.mark.parametrize(
    "words", ["--size 27", "--size 4097", "--train -1", "--train 0 --val 0", "--workers 0", "--max-shapes 0"]
)
def test_what_cannot_be_drawn_is_refused(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["--out", str(tmp_path / "toy"), *words.split()]) == 2
        and words.split()[1] in capsys.readouterr().err
    )


def test_rooms_have_the_depth_of_what_they_show() -> None:
    """Rays times depth end on the floor, 1.4 m below the camera, or above it; on a sphere at its radius."""
    for seed in range(4):
        room = draw_room(np.random.default_rng(seed), 60, 80)
        scene, depth = room.scene, room.depth
        rows, columns = np.mgrid[:60, :80]
        x, y = (columns + 0.5 - 40) / 72 * depth, (rows + 0.5 - 30) / 72 * depth
        assert scene.image.shape == (60, 80, 3) and depth.dtype == np.float32
        assert y.min() >= -1.2 - 1e-5 and y.max() <= 1.4 + 1e-5 and 1 < depth.min() < depth.max() <= 9
        for shape in scene.shapes:
            if shape.category == "sphere" and shape.visible.sum() > 100:
                points = np.stack([x, y, depth], axis=-1)[shape.visible]
                # |p|^2 = 2 p c + r^2 - |c|^2 is linear in the centre
                unknowns, *_ = np.linalg.lstsq(
                    np.column_stack([2 * points, np.ones(len(points))]), (points**2).sum(axis=1), rcond=None
                )
                radius = np.sqrt(unknowns[3] + (unknowns[:3] ** 2).sum())
                away = np.linalg.norm(points - unknowns[:3], axis=1)
                assert np.abs(away - radius).max() < 1e-4 and unknowns[1] + radius == pytest.approx(
                    1.4, abs=1e-3
                )


def test_segments_of_rooms_are_their_objects_and_the_room(tmp_path: Path) -> None:
    counts = {"train": 3, "val": 0, "height": 60, "width": 80}
    with pytest.raises(ValueError, match="give --depth"):
        write_toy_coco(tmp_path / "rooms", **counts, panoptic=True)  # type: ignore[arg-type]
    write_toy_coco(tmp_path / "rooms", **counts, depth=True, panoptic=True)  # type: ignore[arg-type]
    folder = tmp_path / "rooms/annotations"
    content = json.loads((folder / "panoptic_train2017.json").read_bytes())
    coco = COCO(str(folder / "instances_train2017.json"))
    assert [category["isthing"] for category in content["categories"]] == [1, 1, 0, 0, 0]
    for annotation in content["annotations"]:
        segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        file = folder / "panoptic_train2017" / annotation["file_name"]
        numbers = read_segment_numbers(file.read_bytes())
        assert set(np.unique(numbers).tolist()) == set(segments)  # nothing is void
        stuff = [segment["category_id"] for segment in segments.values() if segment["category_id"] > 2]
        assert sorted(stuff) == [3, 4, 5]
        for shape in coco.imgToAnns[annotation["image_id"]]:
            (own,) = np.unique(numbers[coco.annToMask(shape).astype(bool)]).tolist()
            assert segments[own]["category_id"] == shape["category_id"]
            assert segments[own]["area"] == shape["area"] == (numbers == own).sum()


@pytest.mark.parametrize("split", SPLITS)
def test_questions_have_true_answers(tree: Path, split: str) -> None:
    """By the annotations alone; yes and no are about as frequent."""
    coco = COCO(str(tree / "annotations" / f"instances_{split}.json"))
    captions = COCO(str(tree / "annotations" / f"captions_{split}.json"))
    asked = json.loads((tree / f"questions/OpenEnded_toy_{split}_questions.json").read_bytes())["questions"]
    given = json.loads((tree / f"questions/toy_{split}_annotations.json").read_bytes())["annotations"]
    counts = Counter()
    for entry, answered in zip(asked, given, strict=True):
        question = entry["question"]
        answer = answered["multiple_choice_answer"]
        assert (entry["question_id"], len(answered["answers"])) == (answered["question_id"], 10)
        assert {one["answer"] for one in answered["answers"]} == {answer}
        shapes = [annotation for annotation in coco.imgToAnns[entry["image_id"]] if not annotation["iscrowd"]]
        names = [coco.cats[one["category_id"]]["name"] for one in shapes]
        described = captions.imgToAnns[entry["image_id"]][0]["caption"]
        counts[answered["answer_type"], answer if answer in ("yes", "no") else ""] += 1
        match answered["answer_type"]:
            case "count":
                assert answer == str(len(shapes))
            case "there":
                assert (question.split()[-1][:-1] in names) == (answer == "yes")
            case "colour":
                assert f"{answer} {question.split()[-1][:-1]}" in described
            case "shape":
                assert f"{question.split()[-1][:-1]} {answer}" in described
            case "relation":
                _, _, side, *_, anchor = question[:-1].split()
                middles = {
                    name: one["bbox"][0] + one["bbox"][2] / 2 for name, one in zip(names, shapes, strict=True)
                }
                assert (middles[answer] < middles[anchor]) == (side == "left")
            case kind:
                pytest.fail(kind)
    assert 0.2 < counts["there", "yes"] / (counts["there", "yes"] + counts["there", "no"]) < 0.8
    assert {kind for kind, _ in counts} == {"count", "there", "colour", "shape", "relation"}
