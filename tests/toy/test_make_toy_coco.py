"""The toy set must be COCO as pycocotools reads it, its masks must be the drawn pixels, its bytes reproducible."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from visft_ds.toy.coco import SPLITS, describe, main, write_toy_coco
from visft_ds.toy.scenes import CATEGORIES, NAMES, OUTLINES, STYLES, draw_scene, rasterise, style_of, trace

# The oracle's own decode() under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
TRAIN, VAL, WIDTH, HEIGHT = 70, 40, 144, 96


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "coco"
    write_toy_coco(out, train=TRAIN, val=VAL, height=HEIGHT, width=WIDTH, seed=3)
    return out


def test_tool_writes_the_same_bytes_with_two_workers(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also starts the tool as a script, where its own folder would come first on sys.path."""
    arguments = f"--train {TRAIN} --val {VAL} --size {WIDTH}x{HEIGHT} --seed 3 --workers 2".split()
    arguments += ["--out", str(tmp_path / "again")]
    command = [sys.executable, "-m", "visft_ds", "toy", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert _digest(tmp_path / "again") == _digest(tree)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("toy: ") and "not an empty folder" in error
    assert _digest(tmp_path / "again") == _digest(tree)


def test_fewer_images_are_the_first_ones_and_other_seeds_or_styles_are_different(tree: Path, tmp_path: Path) -> None:
    write_toy_coco(tmp_path / "few", train=4, val=2, height=HEIGHT, width=WIDTH, seed=3)
    write_toy_coco(tmp_path / "seed", train=4, val=2, height=HEIGHT, width=WIDTH, seed=4)
    write_toy_coco(tmp_path / "style", train=4, val=2, height=HEIGHT, width=WIDTH, seed=3, style="b")
    write_toy_coco(tmp_path / "even", train=4, val=2, height=HEIGHT, width=WIDTH, seed=3, colours="even")
    whole, few = _digest(tree), _digest(tmp_path / "few")
    pictures = [name for name in few if name.endswith(".jpg")]
    assert len(pictures) == 6
    assert all(few[name] == whole[name] for name in pictures)
    assert _digest(tmp_path / "even") != few
    for other in ("seed", "style"):
        digests = _digest(tmp_path / other)
        assert all(digests[name] != whole[name] for name in pictures)


@pytest.mark.parametrize("split", SPLITS)
def test_pycocotools_reads_the_annotations(tree: Path, split: str) -> None:
    coco = COCO(str(tree / "annotations" / f"instances_{split}.json"))
    assert sorted(path.name for path in (tree / split).iterdir()) == sorted(i["file_name"] for i in coco.imgs.values())
    assert {c["id"]: c["name"] for c in coco.cats.values()} == {number: name for number, name, _ in CATEGORIES}
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        assert mask.shape == (HEIGHT, WIDTH)
        assert mask.sum() == annotation["area"] > 0
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and x + w <= WIDTH and y + h <= HEIGHT
        ys, xs = np.nonzero(mask)
        # COCO's rasteriser rounds corners to pixels: a box may differ from the pixels', most at thin tips.
        assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - (x, y, x + w, y + h)).max() <= 2
        assert isinstance(annotation["segmentation"], dict) == bool(annotation["iscrowd"])
    for image in coco.imgs.values():
        shapes = [coco.annToMask(coco.anns[number]) for number in coco.getAnnIds(image["id"])]
        assert not shapes or np.max(np.sum(shapes, axis=0)) == 1, "visible parts overlap"


def test_every_kind_of_image_occurs(tree: Path) -> None:
    content = json.loads((tree / "annotations" / "instances_train2017.json").read_bytes())
    used = {annotation["image_id"] for annotation in content["annotations"]}
    assert 0 < len(content["images"]) - len(used) < TRAIN // 4
    assert any(annotation["iscrowd"] for annotation in content["annotations"])
    assert {annotation["category_id"] for annotation in content["annotations"]} == {i for i, _, _ in CATEGORIES}
    parts = [len(annotation["segmentation"]) for annotation in content["annotations"] if not annotation["iscrowd"]]
    assert max(parts) >= 2


def test_ids_are_unique_across_splits_and_captions_complete(tree: Path) -> None:
    keys: list[int] = []
    for split in SPLITS:
        content = json.loads((tree / "annotations" / f"captions_{split}.json").read_bytes())
        images = [image["id"] for image in content["images"]]
        keys += images
        assert sorted(annotation["image_id"] for annotation in content["annotations"]) == sorted(images * 5)
        assert len({annotation["id"] for annotation in content["annotations"]}) == 5 * len(images)
    assert len(set(keys)) == len(keys) == TRAIN + VAL


def test_even_colours_say_nothing_about_shapes() -> None:
    """A colour is as likely with each category; with usual ones seven shapes of eight can be named by it."""
    for colours, low, high in (("usual", 0.8, 0.95), ("even", 0.0, 0.2)):
        style = style_of("b", colours)
        scenes = [draw_scene(np.random.default_rng(seed), style, 56, 56) for seed in range(150)]
        shapes = [shape for scene in scenes for shape in scene.shapes]
        own = [list(style.colours)[shape.category] == shape.colour for shape in shapes]
        assert low < np.mean(own) < high, colours


def test_shapes_that_are_left_out_never_come() -> None:
    """Also not in crowds; and without any left out, the same numbers are drawn as ever."""
    style = style_of("a", "even", ("heart", "arrow"))
    scenes = [draw_scene(np.random.default_rng(number), style, 56, 56) for number in range(200)]
    seen = {
        NAMES[shape.category] for scene in scenes for shape in (*scene.shapes, *([scene.crowd] * bool(scene.crowd)))
    }
    assert seen == set(NAMES) - {"heart", "arrow"}
    for names, told in ((("hart",), "hart"), (NAMES, "allowed")):
        with pytest.raises(ValueError, match=told):
            style_of("a", "even", names)


def test_style_c_shares_neither_colours_nor_textures_nor_grounds() -> None:
    for other in ("a", "b"):
        for name in ("colours", "textures", "backgrounds", "background_colours"):
            assert not set(getattr(STYLES["c"], name)) & set(getattr(STYLES[other], name)), (other, name)


@pytest.mark.parametrize("style", STYLES)
def test_masks_are_the_drawn_pixels(style: str) -> None:
    """Against the same ground without shapes: what changed is what is marked, up to the soft edge."""
    for seed in range(8):
        scene = draw_scene(np.random.default_rng(seed), STYLES[style], 112, 112)
        bare = draw_scene(np.random.default_rng(seed), STYLES[style], 112, 112, max_shapes=0).image.astype(int)
        change = np.abs(scene.image.astype(int) - bare).max(axis=2)
        marked = np.zeros((112, 112), dtype=bool)
        for shape in [*scene.shapes, *([scene.crowd] if scene.crowd else [])]:
            assert np.array_equal(rasterise(shape.segmentation(), 112, 112), shape.visible)
        for shape in scene.shapes:
            marked |= shape.visible
        inside = marked & ~_grow(~marked)
        assert not scene.shapes or np.mean(change[inside] > 8) > 0.99  # a pattern may meet the colour of the ground
        assert change[~_grow(marked)].max() <= 32  # a tip thinner than a pixel shows faintly


def test_a_crowd_that_is_painted_over_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No sentence names what no image shows."""
    dot = np.array([[54.0, 54.0], [58.0, 54.0], [58.0, 58.0], [54.0, 58.0]])
    monkeypatch.setattr("visft_ds.toy.scenes.CROWD_SHARE", 1.0)
    monkeypatch.setattr("visft_ds.toy.scenes._scatter", lambda *_: [dot])
    scenes = [draw_scene(np.random.default_rng(seed), STYLES["a"], 112, 112) for seed in range(40)]
    assert 0 < sum(scene.crowd is None for scene in scenes) < 40
    for scene in scenes:
        told = " ".join(describe(np.random.default_rng(0), scene))
        assert ("crowd" in told) == bool(scene.crowd and scene.crowd.visible.any())


def test_as_many_objects_as_coco_has_when_asked_for() -> None:
    """Smaller shapes find room; each sentence still counts them."""
    scenes = [draw_scene(np.random.default_rng(seed), STYLES["a"], 160, 200, max_shapes=18) for seed in range(24)]
    counts = [len(scene.shapes) for scene in scenes]
    assert 6 < np.mean(counts) < 9 and max(counts) > 13
    crowded = scenes[int(np.argmax(counts))]
    assert "teen shapes" in " ".join(describe(np.random.default_rng(0), crowded)).lower()


def _grow(mask: np.ndarray) -> np.ndarray:
    """One pixel more in each direction: soft edges colour the pixels that a polygon only touches."""
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine draws slowly
@given(arrays(np.bool_, st.tuples(st.integers(1, 14), st.integers(1, 14))))
def test_traced_polygons_rasterise_to_exactly_the_mask(mask: np.ndarray) -> None:
    """Holes, single pixels and diagonal neighbours included."""
    polygons = trace(mask)
    if not mask.any():
        assert polygons == []
        return
    parts = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in polygons], *mask.shape)
    assert np.array_equal(coco_mask.decode(coco_mask.merge(parts)).astype(bool), mask)
    # Parts must not overlap either: a mask summed part by part has the right area.
    assert sum(int(coco_mask.area(part)) for part in parts) == mask.sum()


def test_outlines_fill_the_unit_square_and_differ() -> None:
    masks = {name: rasterise([p * 40 + 50 for p in OUTLINES[name]], 100, 100) for name in NAMES}
    for name, mask in masks.items():
        assert np.abs(np.concatenate(OUTLINES[name])).max() == pytest.approx(1, abs=0.16)
        others = [(mask & other).sum() / (mask | other).sum() for key, other in masks.items() if key != name]
        assert max(others) < 0.9, name  # nothing is nearly another category


def test_captions_count_what_is_there() -> None:
    numbers = ("No", "One", "Two", "Three", "Four", "Five")
    for seed in range(60):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng, STYLES["a"], 112, 112)
        captions = describe(rng, scene)
        assert len(captions) == 5
        assert all(caption.endswith(".") and "  " not in caption for caption in captions)
        if scene.shapes:
            assert captions[1].split()[0] == numbers[len(scene.shapes)]
            named = [f"{shape.colour} {NAMES[shape.category]}" for shape in scene.shapes]
            assert all(words in captions[0] for words in named)
            if len(set(named)) == len(named):
                across = [np.nonzero(shape.visible)[1].mean() for shape in scene.shapes]
                assert [captions[0].index(named[place]) for place in np.argsort(across)] == sorted(
                    captions[0].index(words) for words in named
                )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 20}, "too small"),
        ({"style": "d"}, "style 'd'"),
        ({"colours": "odd"}, "odd"),
        ({"train": -1}, "must not be negative"),
        ({"max_shapes": 21}, "1 to 20"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path: Path, change: dict, message: str) -> None:
    arguments = {"train": 1, "val": 1, "height": 56, "width": 56} | change
    with pytest.raises(ValueError, match=message):
        write_toy_coco(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_images_have_the_size_that_is_stated(tree: Path) -> None:
    content = json.loads((tree / "annotations" / "instances_val2017.json").read_bytes())
    for image in content["images"]:
        with Image.open(tree / "val2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (WIDTH, HEIGHT)
