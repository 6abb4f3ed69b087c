"""The parts of a conversion: masks, categories, large JSON files, the check of images, their hashes, re-encoding."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from faster_coco_eval import mask as coco_mask
from PIL import Image, PngImagePlugin

from tests.coco_tree import NO_PHOTOS, PHOTOS, write_tree
from visft_ds.data.decode import decode_image
from visft_ds.shards import source
from visft_ds.shards.categories import map_categories
from visft_ds.shards.images import check_image, difference_hash, stored_frame
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.segmentations import stored_segmentation
from visft_ds.shards.source import SourceImage, SourceSelection, read_source
from visft_ds.tasks.classes import COCO_CATEGORY_IDS, COCO_NAMES

TRIANGLE = [1, 1, 5, 1, 5, 5.5]


def _image(height: int, width: int, name: str = "a.jpg") -> SourceImage:
    return SourceImage(1, name, width, height, b"{}", (), 0, 0, 0)


def _jpeg(pixels: npt.NDArray[np.uint8], mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _scene(seed: int, height: int = 90, width: int = 120) -> npt.NDArray[np.uint8]:
    """Something between a photograph and noise: coarse areas with fine texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3)).repeat(-(-height // 6), 0).repeat(-(-width // 8), 1)[:height, :width]
    return (coarse + rng.normal(0, 12, (height, width, 3))).clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------- segmentations


@pytest.mark.parametrize(
    ("given", "stored", "found"),
    [
        ([TRIANGLE], [TRIANGLE], []),
        ([], [], []),
        (None, None, []),
        ([TRIANGLE, [1, 1, 2, 2]], [TRIANGLE], ["polygon under three points"]),
        ([[1, 1, 2, 2]], None, ["polygon under three points"]),
        ([[*TRIANGLE, 3]], None, ["polygon malformed"]),
        ([[1, 1, 5, 1, "5", 5]], None, ["polygon malformed"]),
        ([[1, 1, 5, 1, None, 5], TRIANGLE], [TRIANGLE], ["polygon malformed"]),
        ([1, 2, 3, 4, 5, 6], None, ["polygon malformed"] * 6),
        ("x", None, ["mask malformed"]),
        ({"size": [4, 5], "counts": [3, 4, 13]}, {"size": [4, 5], "counts": "34="}, ["uncompressed run-length code"]),
        ({"size": [4.0, 5], "counts": [3, 4, 13]}, {"size": [4, 5], "counts": "34="}, ["uncompressed run-length code"]),
        ({"size": [4, 5], "counts": "34="}, {"size": [4, 5], "counts": "34="}, []),
        ({"size": [5, 4], "counts": [3, 4, 13]}, None, ["run-length code of another size"]),
        ({"size": [4, 5], "counts": [3, 4]}, None, ["mask malformed"]),
        ({"size": [4, 5], "counts": [3, -4, 21]}, None, ["mask malformed"]),
        ({"size": [4, 5], "counts": [3, 4.0, 13]}, None, ["mask malformed"]),
        ({"size": [4, 5], "counts": "34"}, None, ["mask malformed"]),  # reads 7 of 20 pixels
        ({"size": [4, 5], "counts": "34`"}, None, ["mask malformed"]),  # cut off within a number
        ({"size": [4, 5], "counts": "34=\n"}, None, ["mask malformed"]),
        ({"counts": [20]}, None, ["mask malformed"]),
    ],
)
def test_masks_that_a_reader_can_use_are_kept_and_no_others(given: Any, stored: Any, found: list[str]) -> None:
    """Readers in C take two points for a box and write as many pixels as the runs say, wherever that ends."""
    assert stored_segmentation(given, 4, 5) == (stored, found)


def test_compressed_codes_of_any_mask_are_accepted() -> None:
    """Our own reading of the text, which decides what is malformed, agrees with the library's writing."""
    rng = np.random.default_rng(0)
    for share in (0.02, 0.5, 0.98):
        for shape in ((1, 1), (37, 53), (300, 1000)):
            mask = np.asfortranarray(rng.random(shape).repeat(1, 0) < share, dtype=np.uint8)
            code = {"size": list(shape), "counts": coco_mask.encode(mask)["counts"].decode()}
            assert stored_segmentation(code, *shape) == (code, [])


# ---------------------------------------------------------------------------------------------------- categories


def _entries(names: dict[int, str]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for number, name in names.items()]


def test_cocos_categories_are_cocos() -> None:
    assert tuple(COCO_NAMES) == COCO_CATEGORY_IDS
    assert (COCO_NAMES[1], COCO_NAMES[13], COCO_NAMES[62], COCO_NAMES[90]) == (
        "person",
        "stop sign",
        "chair",
        "toothbrush",
    )


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
def test_cocos_names_are_those_of_its_own_file() -> None:
    content = json.loads((PHOTOS / "annotations/instances_val2017.json").read_text())
    assert {entry["id"]: entry["name"] for entry in content["categories"]} == dict(COCO_NAMES)


def test_coco80_drops_other_categories_and_refuses_other_ids() -> None:
    table = map_categories(_entries({**COCO_NAMES, 12: "street sign"}), "coco80", None, "x.json")
    assert len(table.categories) == 80 and table.ids[12] is None and table.ids[90] == 90
    contiguous = dict(enumerate(COCO_NAMES.values(), 1))
    with pytest.raises(ValueError, match=r"id 13 is 'parking meter', not 'stop sign'.* more.*Use keep, or a file"):
        map_categories(_entries(contiguous), "coco80", None, "x.json")


def test_a_file_maps_merges_and_drops_categories() -> None:
    rules = {"dog": {"id": 7, "name": "animal"}, "4": {"id": 7, "name": "animal"}, "*": None}
    table = map_categories(_entries({3: "dog", 4: "cat", 5: "tree"}), "map.json", json.dumps(rules).encode(), "x")
    assert table.ids == {3: 7, 4: 7, 5: None}
    assert [(one.id, one.coco_id, one.name) for one in table.categories] == [(0, 7, "animal")]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"dog": None}, "says nothing about category 4"),
        ({"dog": None, "cat": None, "cow": None}, "names 'cow', which x does not have"),
        ({"dog": 5, "*": None}, "'dog' goes to 5"),
        ({"dog": {"id": "5", "name": "d"}, "*": None}, "'dog' goes to"),
        ({"dog": {"id": 1, "name": "a"}, "cat": {"id": 1, "name": "b"}}, "gives id 1 two names: 'a' and 'b'"),
        ([], "must be a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_a_map_that_leaves_something_open_is_refused(rules: Any, message: str) -> None:
    file = b"{" if rules == "{" else json.dumps(rules).encode()
    with pytest.raises(ValueError, match=message):
        map_categories(_entries({3: "dog", 4: "cat"}), "map.json", file, "x")


# ---------------------------------------------------------------------------------------------------------- JSON


def test_a_file_too_large_to_parse_at_once_gives_the_same_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = write_tree(tmp_path)
    tree.edit(
        lambda content: content["annotations"][0].update(bbox=[0.1, 1e-3, 12.345678901234567, 3], note="é\\u00e9\n")
    )
    at_once = read_source(tree.instances, tree.captions, SourceSelection())
    monkeypatch.setattr(source, "_AT_ONCE", 100)
    monkeypatch.setattr(source.orjson, "loads", None)  # so that nothing can be parsed at once
    one_by_one = read_source(tree.instances, tree.captions, SourceSelection())
    assert one_by_one.images == at_once.images and len(at_once.images) == 12
    assert (one_by_one.categories, one_by_one.files) == (at_once.categories, at_once.files)
    assert one_by_one.findings.listed() == at_once.findings.listed()


@pytest.mark.parametrize("limit", [1 << 30, 0])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [], "categories": [', r"x\.json is not valid JSON"),
        ('{"images": [], "annotations": [NaN], "categories": []}', r"x\.json is not valid JSON"),
        ("[1]", "it has no list"),
        ('{"images": [], "annotations": [], "categories": 3}', "it has no list 'categories'"),
        ('{"images": [3], "annotations": [], "categories": []}', "every entry of 'images' must be an object"),
        ('{"images": [], "annotations": [], "categories": []}', "its list of images is empty"),
    ],
)
def test_what_is_no_coco_file_is_refused_at_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, text: str, message: str
) -> None:
    monkeypatch.setattr(source, "_AT_ONCE", limit)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path / "x.json", None, SourceSelection())


# --------------------------------------------------------------------------------------------------------- check


def _damaged(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(3, len(data))
    changed = bytearray(data)
    kind = rng.choice(["cut", "flip", "zero", "marker", "gap"])
    if kind == "cut":
        del changed[place:]
    elif kind == "flip":
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "zero":
        changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    elif kind == "marker":
        changed[place:place] = bytes([0xFF, 0xD0 + rng.randrange(10)])
    else:
        del changed[place : place + rng.randrange(1, 40)]
    return bytes(changed)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1, "quality": 30}),
        ("RGB", {"restart_marker_blocks": 4}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
    ],
)
def test_the_check_refuses_exactly_what_training_could_not_decode(mode: str, options: dict[str, Any]) -> None:
    """It decodes a small grey picture only; a file that passes here and fails in training would stop a run."""
    rng = random.Random(mode + str(options))
    data = _jpeg(_scene(1), mode, **options)
    verdicts = set()
    for trial in range(120):
        changed = data if trial == 0 else _damaged(data, rng)
        try:
            shape = decode_image(changed).shape[:2]
        except ValueError:
            shape = None
        checked = check_image(changed, _image(90, 120))
        assert (checked.reason == "unreadable") == (shape is None)
        assert (checked.reason == "size differs") == (shape is not None and shape != (90, 120))
        verdicts.add(checked.reason)
    assert {None, "unreadable"} <= verdicts, "both kinds must have been tried"


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
def test_the_check_and_training_agree_on_damaged_photographs() -> None:
    rng = random.Random(7)
    for path in sorted((PHOTOS / "val2017").glob("*.jpg"))[:5]:
        data = path.read_bytes()
        height, width = decode_image(data).shape[:2]
        for _ in range(12):
            changed = _damaged(data, rng)
            try:
                fits = decode_image(changed).shape[:2] == (height, width)
            except ValueError:
                fits = False
            assert (check_image(changed, _image(height, width)).reason is None) == fits


def test_lesser_checks_look_less_far() -> None:
    data = _jpeg(_scene(1))
    cut, other = data[:-300], _image(91, 120)
    assert check_image(cut, _image(90, 120), "decode").reason == "unreadable"
    assert check_image(cut, _image(90, 120), "header").reason is None
    assert check_image(data, other, "header").reason == "size differs"
    assert check_image(data, other, "none").reason is None
    assert check_image(b"GIF89a", other, "none").reason == "unreadable"
    assert check_image(data, _image(90, 120), "header").dhash == 0 != check_image(data, _image(90, 120)).dhash


def test_the_frame_of_a_png_is_that_of_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(image: Image.Image) -> None:
        raise AssertionError("all pixels were decoded")

    Image.fromarray(_scene(1)).save(tmp_path / "a.png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    assert stored_frame(tmp_path / "a.png") == (90, 120, 1)


# -------------------------------------------------------------------------------------------------------- hashes


def test_the_hash_is_that_of_exact_averages() -> None:
    """Against a picture that is blown up until all cells have whole pixels."""
    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (5, 7), (8, 9), (53, 80), (61, 40)):
        grey = rng.integers(0, 256, (height, width), dtype=np.uint8)
        blown = grey.repeat(8, 0).repeat(9, 1).astype(np.int64)  # (8 H, 9 W): cells of H x W
        cells = blown.reshape(8, height, 9, width).sum(axis=(1, 3))
        expected = "".join("01"[int(bit)] for bit in (cells[:, 1:] > cells[:, :-1]).ravel())
        assert difference_hash(grey) == int(expected, 2)
    assert difference_hash(np.full((30, 40), 9, np.uint8)) == 0


# --------------------------------------------------------------------------------------------------- re-encoding


@pytest.mark.parametrize("text", ["90", "q0", "q101", "q90:0", "q90:", "q90:448x"])
def test_wrong_re_encodings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write q90:448"):
        Reencoding.parse(text)


def test_re_encoding_shrinks_the_short_side_and_keeps_the_scene() -> None:
    pixels = np.asarray(Image.fromarray(_scene(3, 6, 8)).resize((641, 427), Image.Resampling.BICUBIC))
    encoding = Reencoding.parse("q90:200")
    small = decode_image(encoding.encode(_jpeg(pixels)))
    assert small.shape == (200, 300, 3) and encoding.size(427, 641) == (200, 300)
    expected = np.asarray(Image.fromarray(pixels).resize((300, 200), Image.Resampling.LANCZOS)).astype(int)
    # twice through JPEG with halved chroma; a shift by one pixel would differ by more than 3 on average
    assert np.abs(small - expected).mean() < 2
    whole = simplejpeg.decode_jpeg_header(Reencoding.parse("q50").encode(_jpeg(pixels)))
    assert whole[:2] == (427, 641) and encoding.size(100, 90) == (100, 90)
    assert encoding.encode(_jpeg(pixels)) == encoding.encode(_jpeg(pixels))
