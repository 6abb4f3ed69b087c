"""Pictures of bands: what is read of a file, what shards, models and runs keep of it, and what is refused."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
import torch
from PIL import Image

from tests.finished import SMALL
from tests.golden.judge import record_in, run
from tests.random_tower import adapter_of, header_of, move_adapters, save_adapter
from tests.small_timm import random_base
from tests.test_files import deep_png, tiff
from tests.tiny import command
from visft_ds import evaluate, fit, load
from visft_ds.data.dataset import read_raw
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.encoding import Settings, pictures
from visft_ds.evals.judge.images import from_files, in_bands
from visft_ds.evals.judge.kinds import parse_benchmark
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.export.cli import main as export
from visft_ds.files import read_bands
from visft_ds.interop.layouts import fingerprint_of, load_backbone, model_of
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import save_tensors
from visft_ds.merge.cli import main as merge
from visft_ds.models import build_empty
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import build_timm
from visft_ds.predict.images import opened
from visft_ds.prepare.settle import settle
from visft_ds.settings.bands import Bands, in_words
from visft_ds.shards.cli import main

DEEP = np.random.default_rng(0).integers(0, 65536, (40, 60, 5)).astype(np.uint16)
#: A model's, of pictures of four bands.
FOUR = Bands(
    count=4,
    numbers=(4, 3, 2, 1),
    kind="uint16",
    range=(0.0, 4095.0),
    mean=(0.5,) * 4,
    std=(0.25, 0.2, 0.2, 0.1),
)


def encoded(values: npt.NDArray[Any], **options: Any) -> bytes:
    """A TIFF of (H, W, bands) values, as satellites' have them."""
    file = io.BytesIO()
    tifffile.imwrite(file, values, photometric="minisblack", metadata=None, **options)
    return file.getvalue()


def write_set(folder: Path, pictures: list[bytes], *, split: str = "train", suffix: str = "tif") -> Path:
    """A COCO folder of pictures of 60 x 40 with a box in each, of two classes in turn."""
    images = []
    objects = []
    (folder / split).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for number, data in enumerate(pictures, 1):
        name = f"{number}.{suffix}"
        (folder / split / name).write_bytes(data)
        images.append({"id": number, "file_name": name, "height": 40, "width": 60})
        box = {"bbox": [4, 4, 24, 24], "area": 576, "iscrowd": 0, "category_id": 1 + number % 2}
        objects.append({"id": number, "image_id": number, **box})
    content = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    return folder


def scene(number: int, bands: int = 4) -> npt.NDArray[np.uint16]:
    """A picture of 12 bits in 16."""
    return np.random.default_rng(number).integers(0, 4096, (40, 60, bands)).astype(np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encoded(DEEP, planarconfig="contig"), DEEP),
        (encoded(np.moveaxis(DEEP, 2, 0), planarconfig="separate"), DEEP),
        (encoded(DEEP, planarconfig="contig", compression="zlib", tile=(16, 16)), DEEP),
        (encoded(np.moveaxis(DEEP, 2, 0)), DEEP),  # a page for each
        (encoded(DEEP[..., 0]), DEEP[..., :1]),
        (tiff(DEEP[..., :3], ">"), DEEP[..., :3]),
        (encoded(DEEP.astype(np.int16), planarconfig="contig"), DEEP.astype(np.int16).astype(np.float32)),
        (deep_png(DEEP[..., :1]), DEEP[..., :1]),
        (deep_png(DEEP[..., :3]), DEEP[..., :3]),
        (deep_png(DEEP[..., :4]), DEEP[..., :4]),
    ],
)
def test_values_are_those_of_the_file(data: bytes, expected: npt.NDArray[Any]) -> None:
    values = read_bands(data)
    assert values.dtype == expected.dtype and np.array_equal(values, expected)


def palette() -> bytes:
    file = io.BytesIO()
    Image.fromarray(DEEP[..., :3].astype(np.uint8)).convert("P").save(
        file, "PNG", transparency=bytes(range(200))
    )
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (palette(), "palette"),
        (encoded(DEEP[..., 0].astype(np.uint32)), "uint32"),
        (deep_png(DEEP[..., :2]), "LA;16B"),
        (encoded(DEEP, planarconfig="contig")[:-4000], "bytes"),
        (b"II*\0" + bytes(20), "no picture"),
        (b"II*\0", "TIFF"),
    ],
)
def test_files_without_usable_bands_are_refused(data: bytes, cause: str) -> None:
    with pytest.raises(ValueError, match=f"x.tif.*{cause}"):
        read_bands(data, "x.tif")


def test_shards_keep_every_value_of_16_bits(tmp_path: Path) -> None:
    """All 65,536 values come out of the loader apart from each other; bands in the order that was asked for."""
    every = np.arange(65536, dtype=np.uint16)
    values = np.resize(np.concatenate([every, every[::-1]]), (40 * 60 * 14, 4))
    pictures = [
        encoded(values[2400 * n : 2400 * (n + 1)].reshape(40, 60, 4), planarconfig="contig")
        for n in range(14)
    ]
    folder = write_set(tmp_path / "set", [*pictures, encoded(scene(0), planarconfig="contig")])
    assert main([str(folder), "--range", "0,65535", "--bands", "4,2"]) == 0
    manifest = Manifest.load(tmp_path / "set-shards", "train")
    reader = ShardReader(manifest)
    bands = manifest.bands
    assert bands is not None and (bands.numbers, bands.count, bands.range) == ((4, 2), 4, (0.0, 65535.0))
    levels = set[float]()
    for index in range(len(reader)):
        raw = read_raw(reader, index)
        source = (
            read_bands(pictures[raw.image_id - 1])[..., [3, 1]]
            if raw.image_id < 15
            else scene(0)[..., [3, 1]]
        )
        stored, _ = reader.read(index, "images")
        assert np.array_equal(read_bands(stored or b""), source)
        assert raw.image is not None and raw.image.dtype == np.float32
        assert np.array_equal(np.rint(raw.image.astype(np.float64) * 257), source)
        levels.update(np.unique(raw.image).tolist())
    assert len(levels) == 65536


def test_a_range_is_found_over_train_and_holds_for_val(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one band of 16 bits, without a flag; means and spreads are those of the values."""
    folder = tmp_path / "set"
    values = [scene(n, 1) // 2 + 100 for n in range(4)]
    write_set(folder, [deep_png(3 * picture) for picture in values], split="val", suffix="png")
    write_set(folder, [deep_png(picture) for picture in values], suffix="png")
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    stack = np.stack(values).astype(np.float64)
    low, high = stack.min(), stack.max()
    for split in ("train", "val"):
        bands = Manifest.load(tmp_path / "set-shards", split).bands
        assert bands is not None and bands.range == (low, high) and bands.kind == "uint16"
    train = Manifest.load(tmp_path / "set-shards", "train").bands
    assert train is not None
    assert train.mean[0] == pytest.approx((stack.mean() - low) / (high - low))
    assert train.std[0] == pytest.approx(stack.std() / (high - low))
    assert "4 x picture with values beyond the range" in printed and "bands 1 of 1 (uint16" in printed
    first = (tmp_path / "set-shards/train-000000.tar").read_bytes()
    assert main([str(folder), "--replace"]) == 0
    assert (tmp_path / "set-shards/train-000000.tar").read_bytes() == first
    assert main(["verify", str(tmp_path / "set-shards")]) == 0
    assert main(["permute", str(tmp_path / "set-shards"), "--out", str(tmp_path / "other")]) == 0
    assert main([str(tmp_path / "other"), "--range", f"{low:g},{high:g}"]) == 0
    other = Manifest.load(tmp_path / "other-shards", "train").bands
    assert other == train


@pytest.mark.parametrize(
    ("pictures", "words", "cause"),
    [
        ([encoded(scene(0).astype(np.float32), planarconfig="contig")] * 3, [], "--range 0,1"),
        ([encoded(scene(0), planarconfig="contig")] * 3, ["--bands", "5,1"], "have 4 bands"),
        ([encoded(scene(0), planarconfig="contig")] * 3, ["--range", "5,1"], "lower value first"),
        ([encoded(scene(0), planarconfig="contig")] * 3, ["--range", "5"], "two numbers"),
        ([encoded(scene(0), planarconfig="contig")] * 3, ["--bands", "1.5"], "whole numbers"),
        ([encoded(scene(0), planarconfig="contig")] * 3, ["--range", "5000,9000"], "band 1 is 5000 in all"),
        ([palette()] * 3, ["--bands", "1"], "palette"),
        ([encoded(DEEP[..., 0].astype(np.uint32))] * 3, [], "its values are uint32"),
        (
            [encoded(scene(0), planarconfig="contig")] * 3 + [encoded(scene(0, 3), planarconfig="contig")],
            [],
            "other bands than most pictures, e.g. 4.tif (3 of uint16, not 4 of uint16)",
        ),
        (
            [encoded(scene(0, 3).astype(np.uint8), planarconfig="contig")] * 3 + [deep_png(scene(1, 3))],
            [],
            "3 of uint16",
        ),
    ],
)
def test_sets_that_cannot_be_used_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pictures: list[bytes], words: list[str], cause: str
) -> None:
    folder = write_set(tmp_path / "set", pictures)
    assert main([str(folder), *words]) == 2
    assert cause in capsys.readouterr().err
    assert not (tmp_path / "set-shards/train.manifest.json").exists()


def test_a_deep_picture_among_photographs_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = io.BytesIO()
    Image.fromarray(DEEP[..., :3].astype(np.uint8)).save(file, "PNG")
    folder = write_set(tmp_path / "set", [file.getvalue()] * 12 + [deep_png(scene(1, 3))], suffix="png")
    assert main([str(folder)]) == 0
    assert (
        "1 x more than the three colours of 8 bits of most pictures, e.g. 13.png (values of more than 8 bits)"
        in capsys.readouterr().out
    )
    manifest = Manifest.load(tmp_path / "set-shards", "train")
    assert manifest.bands is None and len(manifest) == 12
    assert "bands" not in json.loads((tmp_path / "set-shards/train.manifest.json").read_text())


@pytest.mark.parametrize("preset", ["debug", "timm:test_resnet", "timm:test_vit"])
def test_a_stem_is_widened_as_timm_does(tmp_path: Path, preset: str) -> None:
    """Weights for three colours are repeated in turn and scaled; a file with four keeps them. With zeros for
    new bands the model sees what that of three colours sees.
    """
    options: dict[str, Any] = {}
    if preset == "debug":
        options = {"width": 16, "depth": 2, "num_heads": 2, "image_size": 56}
    plain: Any = build_empty(preset, torch.float32, options, "cpu")
    for parameter in plain.parameters():
        parameter.data.normal_(0, 0.02)
    save_tensors(tmp_path / "base.safetensors", plain.state_dict(), header_of(plain))
    model = {"preset": preset, **options, "bands": FOUR.model_dump(mode="json")}
    wide = load_backbone(tmp_path / "base.safetensors", model)
    assert model_of(wide) == model and wide.pixel_mean == FOUR.mean
    stem = plain.get_parameter(plain.first_weight)
    expected = stem[:, [0, 1, 2, 0]] * 3 / 4
    assert torch.allclose(wide.get_parameter(wide.first_weight), expected)
    images = torch.randn(1, 4, 64, 64)
    assert wide(images)[-1].shape == plain(images[:, :3])[-1].shape
    save_tensors(tmp_path / "wide.safetensors", wide.state_dict(), header_of(wide))
    assert torch.allclose(
        load_backbone(tmp_path / "wide.safetensors").get_parameter(wide.first_weight), expected
    )
    zeros = FOUR.model_copy(update={"new": "zero"}).model_dump(mode="json")
    of_zeros = load_backbone(tmp_path / "base.safetensors", {**model, "bands": zeros})
    assert model_of(of_zeros)["bands"] == zeros and "new" not in FOUR.model_dump()
    torch.testing.assert_close(of_zeros(images)[-1], plain(images[:, :3])[-1])
    del model["bands"]
    with pytest.raises(ValueError, match="not"):
        load_backbone(tmp_path / "wide.safetensors", model)


def test_other_stems_are_refused() -> None:
    with pytest.raises(ValueError, match="plain convolution"):
        build_timm("mobileone_s0", bands=FOUR, device="meta")


@pytest.mark.parametrize(
    ("picture", "cause"),
    [
        (scene(0, 3), "3 bands of uint16, and the model reads bands 4,3,2,1 of 4"),
        (scene(0).astype(np.uint8), "4 bands of uint8"),
        (scene(0).astype(np.float32), "4 bands of float32"),
        (scene(0)[..., 0], "1 bands of uint16"),
        (torch.from_numpy(scene(0)), "40 bands of uint16"),
        (deep_png(scene(0, 3)), "3 bands of uint16"),
        (palette(), "palette"),
        (Image.fromarray(DEEP[..., :3].astype(np.uint8)), "of type Image"),
    ],
)
def test_a_model_of_bands_refuses_other_pictures(picture: Any, cause: str) -> None:
    with pytest.raises(ValueError, match=f"the image.*{cause}"):
        opened(picture, bands=FOUR)


def test_a_model_of_colours_refuses_deep_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(encoded(scene(0), planarconfig="contig"))
    deep = Image.open(io.BytesIO(deep_png(scene(0, 3))))
    for picture in (
        tmp_path / "a.tif",
        deep_png(scene(0, 1)),
        deep,
        Image.fromarray(scene(0)[..., 0]),
        scene(0),
    ):
        with pytest.raises(ValueError, match=r"8 bits are read here|uint8 in an array"):
            opened(picture)


def test_bands_of_a_picture_are_those_that_are_read() -> None:
    for picture in (
        scene(0),
        encoded(scene(0), planarconfig="contig"),
        torch.from_numpy(np.moveaxis(scene(0), 2, 0)),
    ):
        ((image,), is_single) = opened(picture, bands=FOUR)
        assert is_single and np.array_equal(image.pixels, scene(0)[..., ::-1])


def test_a_run_takes_the_bands_of_its_data(tmp_path: Path) -> None:
    """And refuses a validation split, and further data, of another range. New bands may begin at 0."""
    folder = write_set(tmp_path / "set", [encoded(scene(n), planarconfig="contig") for n in range(4)])
    assert main([str(folder), "--range", "0,4095"]) == 0
    words = command(tmp_path / "set-shards", tmp_path / "run", extra={**SMALL, "visft.run.eval_every": 0})
    words += ["--tasks", "detection"]
    config = settle(words).config
    manifest = Manifest.load(tmp_path / "set-shards", "train")
    assert config.visft.model.bands == manifest.bands
    assert main([str(folder), "--range", "0,4000", "--out", str(tmp_path / "other")]) == 0
    more = json.dumps([{"name": "more", "root": str(tmp_path / "other")}])
    with pytest.raises(
        ValueError, match=r"0 to 4000\), and the model reads .*--range 0,4095 --bands 1,2,3,4"
    ):
        settle([*words, "--set", f"visft.data.sets={more}"])
    zeros = settle([*words, "--set", "visft.model.new_bands=zero"]).config.visft.model
    assert zeros.bands is not None and zeros.bands.new == "zero"
    with pytest.raises(ValueError, match="more than three bands"):
        Bands(
            **{**FOUR.model_dump(), "numbers": (1, 2), "mean": (0.5,) * 2, "std": (0.1,) * 2, "new": "zero"}
        )
    assert Manifest.load(tmp_path / "other", "train").fingerprint != manifest.fingerprint
    assert in_words(None) == "three colours of 8 bits"


def moved(name: str, folder: Path, bands: Bands) -> tuple[Any, Path, list[str]]:
    """A model of bands with an adapter; the folder of that; flags that merge it, without a format."""
    base = random_base(name, folder)
    model = load_backbone(base, {"preset": f"timm:{name}", "bands": bands.model_dump(mode="json")})
    inject_lora(model, rank=2, alpha=4, targets=("q", "v"))
    move_adapters(model)
    adapter = save_adapter(adapter_of(model, fingerprint_of(model, base)), folder / "adapter")
    return model, adapter, ["--adapter", str(adapter), "--backbone", str(base), "--format"]


def test_an_adapter_over_bands_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For timm; not for open_clip, whose models have three colours."""
    name = "vit_test_patch8_siglip_gap_32"
    model, folder, words = moved(name, tmp_path, FOUR)
    assert export([*words, "open_clip", "--out", str(tmp_path / "other")]) == 2
    assert "bands 4,3,2,1 of 4 (uint16, 0 to 4095), and open_clip" in capsys.readouterr().err
    assert export([*words, "timm", "--out", str(tmp_path / "merged")]) == 0
    merged = load_backbone(tmp_path / "merged/model.safetensors")
    images = torch.randn(1, 4, 32, 32)
    assert torch.allclose(merged(images)[0], model(images)[0], atol=1e-5) and merged.bands == FOUR
    with pytest.raises(ValueError, match="three colours of 8 bits"):
        read_adapter(folder).install(build_timm(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_test_patch8_dinov3", "vit_test_patch8_clip_quickgelu_32"])
def test_other_libraries_read_bands(tmp_path: Path, name: str) -> None:
    """By PEFT over a base whose new bands began at 0, too."""
    _, _, words = moved(name, tmp_path, FOUR.model_copy(update={"new": "zero"}))
    for form in ("transformers", "peft", "peft_transformers"):
        assert export([*words, form, "--out", str(tmp_path / form)]) == 0
    assert json.loads((tmp_path / "transformers/config.json").read_text())["num_channels"] == 4
    assert (
        "--scale 0 --backbone FILE --out base.safetensors && visft export"
        in (tmp_path / "peft/README.md").read_text()
    )


def test_judge_sees_the_bands_of_a_file_as_shares_of_their_range(tmp_path: Path) -> None:
    """Other pictures, and kinds of data that need three colours, are refused."""
    values = scene(0)[:32, :32]
    (tmp_path / "1.tif").write_bytes(encoded(values, planarconfig="contig"))
    images = in_bands(from_files([tmp_path / "1.tif"], tmp_path), FOUR)
    normalisation = (FOUR.mean, FOUR.std)
    encoder = Encoder(torch.nn.Identity(), (), square_preprocess(32, *normalisation), normalisation, 32, None)
    (seen,) = pictures(encoder, images, Settings(torch.device("cpu"), "fp32", tmp_path, 1, 1))
    expected = (torch.from_numpy(values[..., ::-1] / 4095) - torch.tensor(FOUR.mean)) / torch.tensor(FOUR.std)
    assert torch.allclose(seen[0], expected.movedim(2, 0).float(), atol=1e-5)
    with pytest.raises(ValueError, match="the images are of three colours"):
        parse_benchmark("digits", QUICK, FOUR)
    with pytest.raises(ValueError, match=r"read bands 4,3,2,1 of 4 .* zero_shot is for photographs"):
        parse_benchmark(f"zero_shot={tmp_path}", QUICK, FOUR)


@pytest.mark.slow
def test_models_of_bands_are_judged_on_pictures_of_bands(tmp_path: Path) -> None:
    """On files and on shards alike; shards of other bands and models of other bands are refused."""
    name = "vit_test_patch8_siglip_gap_32"
    _, adapter, _ = moved(name, tmp_path, FOUR)
    plain = ["--backbone", str(tmp_path / "base.safetensors"), "--adapter", str(adapter), "--scale", "0"]
    assert merge([*plain, "--out", str(tmp_path / "plain.safetensors")]) == 0
    for number in range(12):
        split = "train" if number < 6 else "val"
        picture = encoded(scene(number)[:32, :48], planarconfig="contig")
        for folder in (f"maps/images/{split}", f"classes/{split}/{number % 2}"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"{number}.tif").write_bytes(picture)
        numbers = np.zeros((32, 48), np.uint8)
        numbers[8:, : 3 * number + 8] = 1
        (tmp_path / "maps/labels" / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(tmp_path / f"maps/labels/{split}/{number}.png")
    (tmp_path / "maps/classes.txt").write_text("ground\nwater\n")
    for bands in ("4,3,2,1", "1,2"):
        shards = str(tmp_path / f"maps {bands}")
        assert main([str(tmp_path / "maps"), "--range", "0,4095", "--bands", bands, "--out", shards]) == 0

    plain_base = f"{tmp_path}/plain.safetensors"

    def judged(*on: str, base: str = plain_base, quick: str = "--quick") -> str:
        flags = ["--layers", "last", "--numbers", "in-context mIoU,kNN"]
        flags += [word for text in on for word in ("--on", text.replace("=", f"={tmp_path}/", 1))]
        models = [f"base={base}", f"tuned={tmp_path}/base.safetensors+{adapter}"]
        return run(*models, *flags, *filter(None, [quick]), "--out", tmp_path / "out")[2]

    assert judged("segmentation=maps", "segmentation=maps 4,3,2,1", "classification=classes") == ""
    rows = {row["name"]: row["values"] for row in record_in(tmp_path / "out")["rows"]}
    of_files = rows["segmentation/maps in-context mIoU"]
    assert of_files == rows["segmentation/maps 4,3,2,1 in-context mIoU"] and of_files["base"] > 0
    assert rows["classification/classes kNN"].keys() == {"base", "tuned"}

    assert "the images are of bands 1,2 of 4 (uint16, 0 to 4095), and the" in judged("segmentation=maps 1,2")
    assert "published protocols change colours: add --quick" in judged("segmentation=maps", quick="")
    of_colours = f"timm:{name}:{tmp_path}/base.safetensors"
    assert "tuned reads bands 4,3,2,1" in judged("segmentation=maps", base=of_colours)


def squares(folder: Path, split: str, count: int, seed: int) -> None:
    """Pictures of 128 x 128 with one square each: `a` is brighter in bands 1 to 3, `b` in band 4."""
    generator = np.random.default_rng(seed)
    pictures = []
    places = []
    for number in range(count):
        values = generator.normal(900, 100, (128, 128, 4))
        y, x = generator.integers(0, 88, 2).tolist()
        shown = slice(0, 3) if number % 2 else slice(3, 4)
        values[y : y + 40, x : x + 40, shown] += 1200
        pictures.append(encoded(values.clip(0, 4095).astype(np.uint16), planarconfig="contig"))
        places.append([x, y, 40, 40])
    write_set(folder, pictures, split=split)
    path = folder / f"annotations/instances_{split}.json"
    content = json.loads(path.read_text())
    for image, entry, place in zip(content["images"], content["annotations"], places, strict=True):
        image |= {"height": 128, "width": 128}
        entry |= {"bbox": place, "area": 1600, "category_id": 1 + image["id"] % 2}
    path.write_text(json.dumps(content))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_a_class_that_only_one_band_shows_is_learnt(tmp_path: Path) -> None:
    """And without that band it is not. The exported model says the same."""
    squares(tmp_path / "set", "train", 40, 0)
    squares(tmp_path / "set", "val", 20, 1)
    found = {}
    for bands in ("1,2,3,4", "1,2,3"):
        shards = tmp_path / bands
        assert main([str(tmp_path / "set"), "--range", "0,4095", "--bands", bands, "--out", str(shards)]) == 0
        settings = {
            "visft.shared.image.fixed_size": 128,
            "visft.run.eval_every": 0,
            "visft.run.keep_best": None,
        }
        settings |= {"visft.shared.batch_size": 8, "visft.shared.micro_batch": 8, "visft.features.views": 2}
        settings["scheduler.params.total_num_steps"] = 60
        fit(stage=1, model="small_data", data=shards, out=tmp_path / f"run{bands}", settings=settings)
        found[bands] = evaluate(tmp_path / f"run{bands}", split="val").metrics["box/AP/b"]
    assert found["1,2,3,4"] > 0.4 and found["1,2,3"] < 0.15, found
    pytest.importorskip("onnxscript")
    for form in ("onnx", "torch"):
        words = [str(tmp_path / "run1,2,3,4"), "--out", str(tmp_path / form), "--format", form]
        assert export([*words, "--picture-size", "150x120"]) == 0
    picture = tmp_path / "set/val/1.tif"
    ours = load(tmp_path / "onnx").predict(picture, threshold=0.2).boxes
    assert ours is not None and len(ours) > 0
    program = re.findall(r"```python\n(.*?)```", (tmp_path / "onnx/README.md").read_text(), re.DOTALL)
    (tmp_path / "onnx/run.py").write_text(program[0].replace(">= 0.5", ">= 0.2"))
    ran = subprocess.run(
        [sys.executable, "-P", "run.py", str(picture)],
        cwd=tmp_path / "onnx", capture_output=True, text=True, env={},
    )  # fmt: skip
    assert ran.returncode == 0 and len(ran.stdout.splitlines()) == len(ours), ran.stderr
