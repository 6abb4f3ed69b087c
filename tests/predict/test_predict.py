"""Predictions for one's own pictures: the numbers of an evaluation, whatever way the picture comes in."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin
from tifffile import imwrite

from tests import finished
from tests.opened import open_run
from tests.random_tower import merge
from visft_ds.config.record import recorded_config
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evaluation import collect
from visft_ds.files import open_image, release
from visft_ds.interop.published import read_adapter
from visft_ds.predict.images import MOST_IN_TILES, OpenedImage, find_images, open_file, opened
from visft_ds.predict.large import mapped_image
from visft_ds.predict.loading import ModelSource, files_of_run
from visft_ds.predict.model import Model, load, load_backbone
from visft_ds.predict.results import Boxes, Masks, Prediction
from visft_ds.settings.tiles import Tiles
from visft_ds.tasks.pictures import palette

TASKS = ["detection", "segmentation", "captioning"]


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return load(place / "runs/stage2")


def _same(found: Prediction, wanted: Prediction) -> None:
    assert (
        found.boxes is not None
        and wanted.boxes is not None
        and found.masks is not None
        and wanted.masks is not None
    )
    np.testing.assert_array_equal(found.boxes.xyxy, wanted.boxes.xyxy)
    np.testing.assert_array_equal(found.boxes.scores, wanted.boxes.scores)
    np.testing.assert_array_equal(found.masks.masks, wanted.masks.masks)
    assert found.boxes.names.tolist() == wanted.boxes.names.tolist()
    assert found.masks.names.tolist() == wanted.masks.names.tolist()
    assert found.caption == wanted.caption


def test_predictions_are_those_of_an_evaluation(model: Model, place: Path) -> None:
    recorded = recorded_config(place / "runs/stage2")
    config, streams = recorded.visft, open_run(recorded)[1].streams
    files = files_of_run(place / "runs/stage2", config, TASKS)
    decoding = {"captioning": config.tasks.captioning.decoding.model_dump()}  # type: ignore[union-attr]
    source = ModelSource(files, config.streams(), decoding=decoding)
    evaluated, _ = source.build("fp32", torch.device("cpu"))
    manifest = Manifest.load(finished.shards(), "val")
    with ShardReader(manifest) as reader:
        collected = collect(evaluated.predict, reader, streams, evaluated.vocabulary)
    assert collected is not None
    ids = manifest.index["image_id"].tolist()
    names = {category.coco_id: category.name for category in manifest.categories}
    predictions = model.predict([f"photos/{image_id:012}.jpg" for image_id in ids], threshold=0)
    for image_id, found in zip(ids, predictions, strict=True):
        own = {
            task: [result for result in results if result["image_id"] == image_id]
            for task, results in collected.items()
        }
        boxes = sorted(own["detection"], key=lambda one: -one["score"])
        corners = [(x, y, x + w, y + h) for x, y, w, h in (result["bbox"] for result in boxes)]
        assert len(boxes) > 2 and found.boxes is not None and found.masks is not None
        np.testing.assert_array_equal(found.boxes.xyxy, np.array(corners, dtype=np.float32))
        np.testing.assert_array_equal(
            found.boxes.scores, np.array([result["score"] for result in boxes], dtype=np.float32)
        )
        assert found.boxes.ids.tolist() == [result["category_id"] for result in boxes]
        assert list(found.boxes.names) == [names[result["category_id"]] for result in boxes]
        coco, masks = found.to_coco(image_id), sorted(own["segmentation"], key=lambda one: -one["score"])
        assert [result["bbox"] for result in coco["detection"]] == [
            pytest.approx(result["bbox"], abs=1e-4) for result in boxes
        ]
        # run-length codes are unique: these came from a bool mask and back
        assert [result["segmentation"] for result in coco["segmentation"]] == [
            result["segmentation"] for result in masks
        ]
        assert [result["bbox"] for result in coco["segmentation"]] == [result["bbox"] for result in masks]
        assert found.masks.to_coco(image_id) == [
            {**result, "score": pytest.approx(result["score"])} for result in coco["segmentation"]
        ]
        assert coco["captioning"] == own["captioning"] and found.caption == own["captioning"][0]["caption"]


def test_every_kind_of_input_is_the_same_picture(model: Model, place: Path) -> None:
    pixels = open_file(place / "dog.jpg").pixels
    folder = place / "kinds"
    folder.mkdir()
    for kind in ("png", "bmp", "tiff"):
        Image.fromarray(pixels).save(folder / f"dog.{kind}")
    Image.fromarray(pixels).save(folder / "dog.webp", lossless=True)
    (folder / "notes.txt").write_text("no picture")
    (folder / "._dog.png").write_bytes(b"what macOS leaves beside a file")
    expected = model.predict(place / "dog.jpg", threshold=0)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    frozen = pixels.copy()
    frozen.setflags(write=False)  # torch warns of such arrays
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "png")  # which leaves it at its end
    data = (folder / "dog.png").read_bytes()
    with (folder / "dog.png").open("rb") as file:
        for source in (data, memoryview(data), written, file):
            np.testing.assert_array_equal(opened(source)[0][0].pixels, pixels)
    alone = [str(place / "dog.jpg"), Image.fromarray(pixels), pixels, frozen, tensor, data]
    for one in alone:
        _same(model.predict(one, threshold=0), expected)
    lists: list[Any] = [
        [pixels],
        (tensor,),
        iter(alone),
        folder,
        f"{folder}/*",
        f"{folder}/**",
        [folder, *alone],
    ]
    counts = [1, 1, 6, 4, 4, 4, 10]
    for many, count in zip(lists, counts, strict=True):
        predictions = model.predict(many, threshold=0, batch_size=1)
        assert len(predictions) == count
        for actual in predictions:
            _same(actual, expected)


def test_tiles_are_those_of_a_picture_in_pieces(place: Path, tmp_path: Path) -> None:
    """A picture of six tiles finds what each tile finds alone; a file of raw rows is read so, too."""
    model = load("runs/stage2", tasks="detection,segmentation", device="cpu")
    pixels = np.asarray(Image.open("dog.jpg").resize((120, 88)))
    Image.fromarray(pixels).save(tmp_path / "rows.tif")
    mapped = mapped_image(tmp_path / "rows.tif", 10**6)
    assert isinstance(mapped, np.memmap) and np.array_equal(mapped, pixels)
    whole = model.predict(pixels, threshold=0, tile=64, batch_size=3)
    assert whole.image.shape == (88, 120, 3) and whole.boxes is not None and whole.masks is not None
    assert len(whole.boxes) and whole.masks.masks.shape[1:] == (88, 120)
    expected = set()
    for top, left in ((0, 0), (0, 28), (0, 56), (24, 0), (24, 28), (24, 56)):
        alone = model.predict(pixels[top : top + 64, left : left + 64], threshold=0)
        assert alone.boxes is not None
        expected |= {round(score, 4) for score in alone.boxes.scores.tolist()}
    assert {round(score, 4) for score in whole.boxes.scores.tolist()} <= expected
    warning = model.warning_about(Tiles(64, 16))
    assert warning is not None and "trained on whole images" in warning and "--tile 64" in warning
    again = model.predict(tmp_path / "rows.tif", threshold=0, tile="64", batch_size=3)
    assert again.results == whole.results
    assert model.predict(pixels, tile="none").results == model.predict(pixels).results
    for tile in (8, "big"):
        with pytest.raises(ValueError, match=r"^tile"):
            model.predict(pixels, tile=tile)
    with pytest.raises(ValueError, match="captioning"):
        load("runs/stage2", device="cpu").predict(pixels, tile=64)


def test_a_less_sure_part_belongs_to_a_sure_object(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least score is that of objects, not of their parts in two tiles."""
    model = load("runs/stage2", tasks="detection", device="cpu")
    seen = [([10, 8, 54, 20], 0.8), ([0, 8, 52, 20], 0.5)]

    def found(_: Model, images: Sequence[OpenedImage], threshold: float) -> list[Prediction]:
        predictions = []
        for image, (box, score) in zip(images, seen, strict=True):
            result = {"image_id": 0, "category_id": 1, "bbox": box, "score": score}
            results = {"detection": [result] if score >= threshold else []}
            predictions.append(Prediction(image.pixels, None, {1: "bar"}, results))
        return predictions

    monkeypatch.setattr(Model, "predict_opened", found)
    (whole,) = model.predict(np.zeros((64, 112, 3), np.uint8), threshold=0.7, tile=64).boxes.xyxy.tolist()
    assert whole == [10, 8, 100, 28]


def test_large_pictures_are_decoded_to_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they are decoded to memory, some rows at a time, whatever their mode and compression."""
    monkeypatch.setattr("visft_ds.predict.images.MAX_PIXELS", 100)
    monkeypatch.setattr("visft_ds.predict.large._ROWS", 8)
    monkeypatch.setattr("visft_ds.predict.large._PIECE", 100)
    colours = np.random.default_rng(0).integers(0, 256, (20, 39, 4), np.uint8)
    rgba = Image.fromarray(colours)
    palette_picture = rgba.convert("RGB").quantize(16)
    palette_picture.info["transparency"] = 3
    pictures = {"rgba.png": rgba, "palette.png": palette_picture}
    pictures |= {"grey.bmp": rgba.convert("L"), "cmyk.tif": rgba.convert("CMYK")}
    pictures |= {"rgb.png": rgba.convert("RGB"), "la.png": rgba.convert("LA")}
    pictures |= {"rgb.jpg": rgba.convert("RGB"), "grey.jpg": rgba.convert("L")}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        for mode in ("RGB", "P", "L", "CMYK"):
            if (compression, mode) != ("jpeg", "P"):
                pictures[f"{compression}_{mode}.tif"] = picture = rgba.convert("RGB").convert(mode)
                strips = {TiffImagePlugin.ROWSPERSTRIP: 16 if compression == "jpeg" else 3}
                picture.save(tmp_path / f"{compression}_{mode}.tif", compression=compression, tiffinfo=strips)
    imwrite(tmp_path / "tiled.tif", colours[..., :3], photometric="rgb", tile=(16, 16))
    smooth = np.cumsum(colours[..., :3].astype(np.int64), axis=1).astype(np.uint8)
    deflated = {"compression": "zlib", "predictor": True, "tile": (16, 16)}
    imwrite(tmp_path / "deflated.tif", smooth, photometric="rgb", **deflated)
    imwrite(tmp_path / "big.tif", smooth, photometric="rgb", bigtiff=True, **deflated)
    imwrite(tmp_path / "motorola.tif", smooth, photometric="rgb", byteorder=">", **deflated)
    planes = np.moveaxis(smooth, 2, 0)
    imwrite(tmp_path / "planes.tif", planes, photometric="rgb", compression="zlib", planarconfig="separate")
    written = ("tiled.tif", "deflated.tif", "big.tif", "motorola.tif", "planes.tif")
    for name in (*pictures, *written):
        large = open_file(tmp_path / name, MOST_IN_TILES).pixels
        np.testing.assert_array_equal(large, np.asarray(open_image(tmp_path / name)))
        release(large)
        assert (large == np.asarray(open_image(tmp_path / name))).all() and isinstance(large, np.memmap)
        is_at_once = name in ("palette.png", "grey.bmp")
        assert ("is decoded at once, to 0.0 GiB" in capsys.readouterr().err) == is_at_once
    whole = (tmp_path / "rgb.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.tif").write_bytes((tmp_path / "deflated.tif").read_bytes()[:-99])
    jpeg = (tmp_path / "rgb.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(jpeg[:-99])
    for name in ("cut.png", "cut.tif", "cut.jpg"):
        with pytest.raises(ValueError, match=f"{name}.*(cut off|[Pp]remature)"):
            open_file(tmp_path / name, MOST_IN_TILES)


def test_an_image_does_not_depend_on_its_neighbours(place: Path) -> None:
    """Images of other shapes are padded to one size, which the backbone does not see."""
    shutil.copytree(finished.runs() / "stage1/export", place / "moved")  # without its run: sizes of the paper
    model = load(place / "moved", tasks="detection")
    pixels = open_file(place / "dog.jpg").pixels
    images = [pixels[:40], pixels[:, :40], pixels[8:48]]
    together = model.predict(images, threshold=0, batch_size=3)
    for image, found in zip(images, together, strict=True):
        alone = model.predict(image, threshold=0)
        np.testing.assert_allclose(found.boxes.xyxy, alone.boxes.xyxy, rtol=1e-5, atol=1e-3)  # type: ignore[union-attr]
        np.testing.assert_allclose(found.boxes.scores, alone.boxes.scores, rtol=1e-5)  # type: ignore[union-attr]
        np.testing.assert_array_equal(found.image, image)
    assert together[0].masks is None and together[0].caption is None
    assert repr(model).startswith(f"Model({place / 'moved'}: detection; 12 categories; fp32 on ")


THREE = {
    "scores": np.array([0.9, 0.5, 0.25], np.float32),
    "ids": np.array([3, 1, 3]),
    "names": np.array(["cat", "dog", "cat"]),
    "xyxy": np.array([[0, 0, 2, 1], [1, 0, 3, 2], [0.5, 0, 2, 2]], np.float32),
}


def test_objects_are_taken_out_as_of_an_array() -> None:
    boxes = Boxes(**THREE)
    masks = Masks(**THREE, masks=np.eye(3, dtype=bool)[:, None].repeat(2, axis=1))
    first = boxes[0]
    assert (first.name, first.id, first.score, first.mask) == ("cat", 3, pytest.approx(0.9), None)
    assert first.xyxy.tolist() == [0, 0, 2, 1] and boxes[-1].score == 0.25
    assert [mask.mask.tolist() for mask in masks] == masks.masks.tolist()  # type: ignore[union-attr]
    sure = masks[masks.scores >= 0.5]
    assert isinstance(sure, Masks) and sure.masks.shape == (2, 2, 3) and sure.ids.tolist() == [3, 1]
    for chosen in (boxes[boxes.names == "cat"], boxes[[0, 2]], boxes[::2], boxes[[True, False, True]]):
        assert isinstance(chosen, Boxes) and chosen.scores.tolist() == [pytest.approx(0.9), 0.25]
    assert len(boxes[boxes.scores > 1]) == 0 and list(boxes[3:]) == []
    assert repr(boxes) == "Boxes(3: cat 0.90, dog 0.50, cat 0.25)" and repr(boxes[:0]) == "Boxes(0: )"
    for wrong in (3, True, None, "cat", [True], 0.5, (0, 0)):
        with pytest.raises(IndexError):
            boxes[wrong]  # type: ignore[call-overload]


def test_objects_go_to_other_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = Masks(**THREE, masks=np.ones((3, 2, 3), dtype=bool))
    assert Boxes(**THREE).to_coco(7)[1] == {
        "image_id": 7,
        "category_id": 1,
        "bbox": [1, 0, 2, 2],
        "score": 0.5,
    }
    stand_in = SimpleNamespace(Detections=dict, DataFrame=dict)
    for name in ("supervision", "pandas"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    detections = masks.to_supervision()
    assert detections["data"]["class_name"].tolist() == ["cat", "dog", "cat"]
    assert detections["xyxy"] is masks.xyxy and detections["class_id"] is masks.ids
    assert detections["mask"] is masks.masks and Boxes(**THREE).to_supervision()["mask"] is None
    table = masks.to_pandas()
    assert table["name"] is masks.names and table["ymax"].tolist() == [1, 2, 2] and len(table) == 7
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ValueError, match="pip install supervision"):
        masks.to_supervision()


def test_the_threshold_is_of_scores(model: Model, place: Path) -> None:
    every = model.predict(place / "dog.jpg", threshold=0)
    middle = float(every.boxes.scores[1])
    some = model.predict(place / "dog.jpg", threshold=middle)
    assert len(every.boxes) == 4 and len(some.boxes) == 2 and (some.boxes.scores >= middle).all()
    none = model.predict(place / "dog.jpg", threshold=1)
    assert (none.boxes.xyxy.shape, none.masks.masks.shape) == ((0, 4), (0, 56, 56))
    assert none.to_coco(1) == {
        "detection": [],
        "segmentation": [],
        "captioning": every.to_coco(1)["captioning"],
    }
    assert repr(none).endswith(f"56 x 56 pixels, 0 boxes, 0 masks, {none.caption!r})")


def test_a_drawing_shows_what_was_found(model: Model, place: Path) -> None:
    actual = model.predict(place / "dog.jpg", threshold=0)
    # heads with classes for COCO's ids, which name only those of their data
    colours = palette([*model.categories.values(), *actual.boxes.names, *actual.masks.names])
    expected = [colours[names[0]] for names in (actual.boxes.names, actual.boxes.names, actual.masks.names)]

    def shown(image: Image.Image) -> list[bool]:
        panels = np.split(np.asarray(image)[:, 6:-6], 3, axis=1)
        return [
            bool((panel == colour).all(axis=-1).any()) for panel, colour in zip(panels, expected, strict=True)
        ]

    assert shown(actual.draw(side=200)) == [False, True, True]
    none = model.predict(place / "dog.jpg", threshold=1)
    assert shown(none.draw(side=200)) == [False, False, False]


def test_the_backbone_gives_features_of_images(model: Model, place: Path) -> None:
    pixels = torch.from_numpy(open_file(place / "dog.jpg").pixels).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    features = model.backbone(pixels)
    assert isinstance(model.backbone, torch.nn.Module) and features.shape == (2, 16, 4, 4)
    sizes, one = torch.full((2, 2), 56), torch.zeros(2, dtype=torch.int64)
    batch = Batch(pixels, sizes, sizes, one, one, one, one == 0)
    torch.testing.assert_close(features, model._loaded.module.features(batch)[0].features, rtol=0, atol=0)
    torch.testing.assert_close(model.backbone(pixels / 255), features)
    alone = load_backbone(place / "runs/stage2")
    assert torch.equal(alone(pixels), features)
    bare = load_backbone(place / "runs/stage2", adapter="none")
    assert not torch.allclose(bare(pixels), features)
    for wrong, message in (
        (pixels[0], "shape"),
        (pixels.float() / 127.5 - 1, "float images from -0"),
        (pixels.int(), "int32"),
        (pixels * torch.nan, "float images from nan"),
        (pixels[..., :13], "H and W at least 14"),
    ):
        with pytest.raises(ValueError, match=message):
            model.backbone(wrong)


def test_an_export_and_merged_weights_are_the_model_of_the_run(model: Model, place: Path) -> None:
    run = place / "runs/stage2"
    expected = model.predict("dog.jpg", threshold=0)
    _same(load(run / "export").predict("dog.jpg", threshold=0), expected)
    (place / "merged").mkdir()
    merged = place / "merged/model.safetensors"
    merge(run / "export/backbone.safetensors", read_adapter(run / "export/adapter"), merged)
    shutil.rmtree(place / "merged/model.safetensors-adapter")
    heads = place / "stage1/export"
    for source in (merged, merged.parent):
        with pytest.raises(ValueError, match="heads=FOLDER"):
            load(source)
        loaded = load(source, heads=heads, image_size=56)
        actual = loaded.predict("dog.jpg", threshold=0)
        np.testing.assert_allclose(actual.boxes.xyxy, expected.boxes.xyxy, atol=1e-3)
        assert actual.caption is not None
        load_backbone(source)


def test_an_export_keeps_its_adapter_on_base_weights_from_elsewhere(place: Path) -> None:
    carried, base = place / "carried", place / "base.safetensors"
    shutil.copytree(place / "runs/stage2/export", carried)
    (carried / "backbone.safetensors").rename(base)
    pixels = torch.rand(1, 3, 56, 56)
    expected = load_backbone(place / "runs/stage2")(pixels)
    assert torch.equal(load_backbone(carried, backbone=base)(pixels), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_photographs_are_turned_upright(place: Path, tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("jpg", "png", "webp"):
        path = tmp_path / f"turned.{kind}"
        Image.open(place / "dog.jpg").crop((0, 0, 40, 24)).save(path, exif=exif)
        with Image.open(path) as image:
            expected = np.asarray(ImageOps.exif_transpose(image))
            np.testing.assert_array_equal(open_file(path).pixels, expected)
            np.testing.assert_array_equal(opened(image)[0][0].pixels, expected)
        assert expected.shape[:2] == ((24, 40) if orientation < 5 else (40, 24))


def test_what_is_no_picture_is_named(model: Model, place: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes((place / "dog.jpg").read_bytes()[:900])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            model.predict([place / "dog.jpg", path])
    array = np.zeros((8, 8, 3), np.uint8)
    for wrong, word in (
        (tmp_path / "absent.jpg", "absent"),
        (array / 255, "float64"),
        (torch.from_numpy(array).permute(2, 0, 1)[None], "shape"),
        (array[..., :2], "shape"),
        ([array, None], "image 1"),
        (7, "int"),
        ({"image": array}, "dict"),
        (io.StringIO("text"), "StringIO"),
        (b"no picture", "the image: "),
        ("https://example.com/dog.jpg", "https://example.com/dog.jpg: URLs"),
    ):
        with pytest.raises(ValueError, match=word):
            model.predict(wrong)
    with pytest.raises(ValueError, match=r"threshold '0\.5'"):
        model.predict(array, threshold="0.5")  # type: ignore[call-overload]


def test_what_is_no_model_is_refused(place: Path) -> None:
    (place / "nothing").mkdir()
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("nowhere/absent", {}, "no such run.*; visft train makes a run"),
        ("runs/absent", {}, "no such run.*; .*beside it: .*stage2"),
        ("nothing", {}, "neither a run"),
        ("runs/stage2", {"tasks": "detection,depth"}, "depth"),
        ("runs/stage2", {"device": "cuda:99"}, "GPUs"),
        ("runs/stage2", {"device": "meta"}, "cpu"),
        ("runs/stage2", {"device": "cuda:x"}, "GPUs"),
        ("runs/stage2", {"image_size": 0}, "image size"),
        ("runs/stage2", {"image_size": 56.5}, "image size"),
        ("runs/stage2", {"image_size": 10**6}, "image size"),
    ]
    for source, options, word in cases:
        with pytest.raises(ValueError, match=word) as error:
            load(place / source, **options)
        assert "--" not in str(error.value)


def test_names_of_files_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/dog.jpg", "b/dog.jpg", "b/deep/dog.jpg", "out/dog.jpg", ".hidden/dog.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    found = find_images(["a/dog.jpg", "a/../b", "b/*.jpg", "a/dog.jpg"])
    assert list(found) == ["a/dog.jpg", "b/deep/dog.jpg", "b/dog.jpg"]
    assert sorted(find_images(["."], outside=Path("out"))) == ["a/dog.jpg", "b/deep/dog.jpg", "b/dog.jpg"]
