"""visft judge from command line to files: models of every kind, resumed, and by several processes."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clip_case import SIDE, make_clip
from tests.evals.conftest import SETTINGS
from tests.golden.judge import record_in, run
from tests.random_tower import build_backbone, save_backbone
from visft_ds.config import resolve
from visft_ds.errors import RankError
from visft_ds.evals.judge import variants
from visft_ds.evals.judge.benchmark import ImageSet
from visft_ds.evals.judge.classes import read_classes
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.encoding import Settings, encode_images
from visft_ds.evals.judge.layers import blocks_of
from visft_ds.evals.judge.model_text import ModelSpec, parse_model, parse_variants
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.scoring import remembered, shared
from visft_ds.run.record import write_run
from visft_ds.run_files import BACKBONE_FILE


def _all(clip_world: Path) -> list[str]:
    base = clip_world / "clip.safetensors"
    models = (
        f"base={base}",
        f"visft={base}+{clip_world}/adapter@0.5",
        f"merged={clip_world}/merged.safetensors",
    )
    kinds = [f"{kind}={clip_world}/shapes" for kind in ("zero_shot", "classification")]
    kinds += [f"{kind}={clip_world}/coco" for kind in ("retrieval", "objects")]
    return [
        *models,
        *(word for kind in kinds for word in ("--on", kind)),
        *("--primary", "zero_shot/shapes top1", "--layers", "last", "--quick"),
    ]


@pytest.fixture(scope="module")
def finished(clip_world: Path) -> Path:
    """Three models on data of four kinds; nothing to complain about."""
    status, _, errors = run(*_all(clip_world), "--out", clip_world / "out")
    assert (status, errors) == (0, "")
    return clip_world / "out"


def test_one_table_of_all_models(clip_world: Path, finished: Path) -> None:
    record = record_in(finished)
    rows = {row["name"]: row for row in record["rows"]}
    expected = ["top1", "kNN", "linear", "1-shot", "image to text R@1", "text to image R@10", "text top1"]
    expected.append("marked top1")
    assert all(any(name.endswith(end) for name in rows) for end in expected)
    assert list(record["models"]) == ["base", "visft", "merged"]
    row = rows["retrieval/coco text to image R@5"]
    assert row["items"] == 24 and row["differences"].keys() == {"visft", "merged"}
    change = row["values"]["visft"] - row["values"]["base"]
    assert row["differences"]["visft"]["value"] == pytest.approx(change)
    assert "x 0.5" in record["models"]["visft"] and 0 < record["shifts"]["visft"] < record["shifts"]["merged"]
    page = (finished / "judge.html").read_text()
    assert all(
        f"<h2>{of['variant']}: {of['word']}</h2>" in page and of["sentences"][0] in page
        for of in record["verdicts"]
    )


def test_numbers_are_those_of_plain_loops(clip_world: Path, finished: Path) -> None:
    """Zero-shot and retrieval again, image by image, from open_clip's model."""
    clip, rows = make_clip(), {row["name"]: row for row in record_in(finished)["rows"]}
    encoder = load_encoder(parse_model(str(clip_world / "clip.safetensors")), "fp32")
    assert encoder.text is not None
    data = read_classes(str(clip_world / "shapes"))
    classes = encoder.text.encode([f"a photo of a {name}." for name in data.classes], torch.device("cpu"))
    captions = json.loads((clip_world / "coco/annotations/captions_val2017.json").read_text())["annotations"]
    texts = encoder.text.encode([caption["caption"] for caption in captions], torch.device("cpu"))
    right, found = [], []
    for index, label in enumerate(data.labels):
        with torch.no_grad():
            image = clip.encode_image(encoder.preprocess(data.images.read(index))[None], normalize=True)[0]
        right.append(int((classes @ image).argmax()) == label)
        found.append(captions[int((texts @ image).argmax())]["image_id"] == index)
    assert rows["zero_shot/shapes top1"]["values"]["base"] == pytest.approx(np.mean(right))
    assert rows["retrieval/coco image to text R@1"]["values"]["base"] == pytest.approx(np.mean(found))


def test_the_same_command_again_computes_nothing(
    clip_world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record_in(finished)["rows"]

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(variants, "load_encoder", refuse)
        patched.setattr(
            "visft_ds.interop.layouts.fingerprint", refuse
        )  # a base of 10 GB is known without being read
        assert run(*_all(clip_world), "--out", finished)[0] == 0
    assert record_in(finished)["rows"] == before
    next((finished / "scores").iterdir()).unlink()  # that score alone is computed again
    assert run(*_all(clip_world), "--out", finished)[0] == 0 and record_in(finished)["rows"] == before


def test_scale_of_an_adapter(clip_world: Path) -> None:
    """Times one it is the merged weights, times nothing the base, and each of them is another entry of the
    cache.
    """
    base, image = clip_world / "clip.safetensors", torch.randn(2, 3, SIDE, SIDE)
    texts = [f"{base}+{clip_world}/adapter{end}" for end in ("@0", "", "@0.5", "@-1")]
    loaded = [load_encoder(parse_model(text), "fp32").module for text in (str(base), *texts)]
    merged = load_encoder(parse_model(f"{clip_world}/merged.safetensors"), "fp32").module
    with torch.no_grad():
        plain, nothing, whole, half, back = (module(image, ["pooled"])["pooled"] for module in loaded)
        expected = merged(image, ["pooled"])["pooled"]
    torch.testing.assert_close(plain, nothing, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert min((whole - plain).abs().max(), (half - whole).abs().max(), (back - plain).abs().max()) > 1e-2
    assert len({str(parse_model(text).identity) for text in texts}) == len(texts)


def test_processes_share_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result is made by one of two processes, here threads; both read all."""
    settings, made, of_thread = Settings(torch.device("cpu"), "fp32", tmp_path, 5, 3), [], threading.local()
    monkeypatch.setattr("visft_ds.distributed.world_size", lambda: 2)
    monkeypatch.setattr("visft_ds.distributed.rank", lambda: of_thread.rank)

    def result(number: int, own: bool) -> int:
        def make() -> int:
            made.append((number, of_thread.rank))
            return number**2

        return remembered({"number": number}, settings, make, own)

    def work(rank: int) -> list[int]:
        of_thread.rank = rank
        return shared([partial(result, number) for number in range(5)], "results")

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (0, 1))) == [[0, 1, 4, 9, 16]] * 2
    assert sorted(made) == [(number, number % 2) for number in range(5)]

    def broken(own: bool) -> int:
        raise ValueError("damaged")

    of_thread.rank = 1
    with pytest.raises(RankError, match="damaged"):  # which is printed whatever the rank
        shared([partial(result, 0), broken], "results")


def test_an_image_with_broken_features_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(torch.nn.Module):
        def forward(self, images: torch.Tensor, kinds: Any) -> dict[str, torch.Tensor]:
            return {"pooled": 1 / (images.mean(dim=(2, 3)) * 255 - 3).round()}

    monkeypatch.setenv("RANK", "1")  # where no bar counts
    drawn = ImageSet(
        [f"{index}.png" for index in range(5)], lambda index: Image.new("RGB", (4, 4), (index,) * 3), ""
    )
    encoder = Encoder(
        Broken(), ("pooled",), square_preprocess(4, (0,) * 3, (1,) * 3), ((0,) * 3, (1,) * 3), 4, None
    )
    with pytest.raises(ValueError, match=r"3\.png"):
        encode_images(encoder, drawn, ["pooled"], Settings(torch.device("cpu"), "fp32", Path(), 2, 1), "")


def test_a_run_is_a_model(tmp_path: Path) -> None:
    """A stage-1 run is its base; what no tensor tells comes from the run's configuration."""
    config = resolve(
        stage=1, model="debug", settings=SETTINGS, flags={"visft.data.root": ("shards", "--data")}
    )
    run = tmp_path / "stage1"
    write_run(run, config.to_dict(), 1, ["train.py"])
    save_backbone(
        build_backbone("debug", **config.visft.model.backbone_options()), run / "export" / BACKBONE_FILE
    )
    (run / "export/export.json").write_text((run / "run.json").read_text())
    spec = parse_model(f"before={run}")
    assert (spec.label, spec.adapter, spec.scale) == ("before", None, 1.0)
    assert load_encoder(spec, "fp32").kinds == ("pooled", "patches")


def test_a_base_goes_on_behind_the_block_that_its_training_read(tmp_path: Path) -> None:
    """As BASE a stage-1 run is the network that its user has; where the file ends, or #BLOCK says so, it
    ends.
    """
    settings = [*SETTINGS, "visft.model.out_indices=[0]"]
    config = resolve(
        stage=1, model="debug", settings=settings, flags={"visft.data.root": ("shards", "--data")}
    )
    options = config.visft.model.backbone_options()
    for name, layers in (("run", []), ("cut", [0])):
        write_run(tmp_path / name, config.to_dict(), 1, ["train.py"])
        backbone = build_backbone("debug", **{**options, "layers": layers})
        save_backbone(backbone, tmp_path / name / "export" / BACKBONE_FILE)
        (tmp_path / name / "export/export.json").write_text((tmp_path / name / "run.json").read_text())
    arms = parse_variants([f"base={tmp_path}/run", f"tuned={tmp_path}/run"])
    settings_of = Settings(torch.device("cpu"), "fp32", tmp_path, 1, 1)

    def ends(spec: ModelSpec) -> list[str]:
        return list(blocks_of(load_encoder(spec, "fp32"), settings_of))

    assert ends(arms["base"][0]) == ["blocks.0", "blocks.1"] and ends(arms["tuned"][0]) == ["blocks.0"]
    for text in (f"{tmp_path}/cut", f"{tmp_path}/run#0"):
        assert ends(parse_variants([f"base={text}"])["base"][0]) == ["blocks.0"]


def test_wrong_usage_is_named(clip_world: Path, tmp_path: Path) -> None:
    base, shapes = clip_world / "clip.safetensors", f"zero_shot={clip_world}/shapes"
    primary = ("--primary", "zero_shot/shapes top1")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("")
    for models, words, out, message in (
        ([base, base], primary, "out", "two models are called clip"),
        ([base, f"tuned={base}"], primary, "foreign", "is not empty"),
        ([base, f"tuned={base}"], (), "out", "segmentation"),
        ([f"{base},{base}", f"tuned={base}"], primary, "out", "BASE must be one model, without @SCALE"),
        ([f"{base}@0.5", f"tuned={base}"], primary, "out", "BASE must be one model, without @SCALE"),
    ):
        status, _, errors = run(*models, *words, "--on", shapes, "--out", tmp_path / out)
        assert status == 2 and message in errors
    status, _, errors = run(base, f"tuned={base}", *primary, "--on", shapes, "--numbers", "top2")
    assert status == 2 and "--numbers top2: no such number; did you mean top1?" in errors
    words = ("--on", f"objects={clip_world}/coco", "--primary", "objects/coco text top1", "--layers", "last")
    status, _, errors = run(base, f"cut={base}#0", *words, "--quick", "--out", tmp_path / "silent")
    assert status == 2 and "cut has no such number" in errors


def test_what_a_model_lacks_is_told_before_anything_is_encoded(
    clip_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A text side for zero-shot, a classifier for kept predictions: known when the models are open."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("encoded")

    monkeypatch.setattr("visft_ds.evals.judge.encoding.encode_images", refuse)
    monkeypatch.setattr("visft_ds.evals.judge.layers.encode_images", refuse)
    base, cut = clip_world / "clip.safetensors", f"cut={clip_world}/clip.safetensors#0"
    for kind, models, said in (
        ("zero_shot", (base, cut), "zero_shot/shapes needs clip, which cut does not have"),
        ("agreement", (base, f"tuned={base}"), "clip is not a model of timm"),
    ):
        on = ("--on", f"classification={clip_world}/shapes", "--on", f"{kind}={clip_world}/shapes")
        primary = ("--primary", "classification/shapes kNN")
        status, _, errors = run(*models, *on, *primary, "--quick", "--out", tmp_path / kind)
        assert status == 2 and said in errors


def test_a_rehearsal_tells_models_data_and_time_and_writes_nothing(
    clip_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "--on",
        f"classification={clip_world}/shapes",
        "--primary",
        "classification/shapes kNN",
        "--numbers",
        "kNN",
    ]
    models = [f"base={clip_world}/clip.safetensors", f"cut={clip_world}/clip.safetensors#0"]
    words += ["--quick", "--dry-run", "--out", str(tmp_path / "out")]
    status, printed, errors = run(*models, *words)
    assert (status, errors) == (0, "") and not (tmp_path / "out").exists()
    text = " ".join(printed.split())
    assert f"base best of blocks.0 to blocks.1 {clip_world}/clip.safetensors" in text
    assert f"cut blocks.0 {clip_world}/clip.safetensors after block 0" in text
    assert "classification/shapes 6 train, 6 test kNN" in text
    # layers of base and cut, 6 each; scores of base, cut, noise and half, 12 each; base and six measurements
    # of 6 images
    assert "encoding 102 images" in text
    # Published: 12,500 steps of 1,024 crops for the linear classifier, and all images for both numbers, four
    # models; an image of the tower's 28 x 28 pixels takes 3.6 s here.
    monkeypatch.setattr("visft_ds.evals.judge.rehearsal.seconds_of", lambda *_: 3.6)
    published = [word for word in words if word not in ("--quick", "--numbers", "kNN")]
    _, printed, _ = run(*models, *published)
    hours = (224 / SIDE) ** 2 * (12_800_000 + 2 * 12) * 4 * 3.6 / 3600
    assert f"published heads 4 models {hours:,.2g} hours" in " ".join(printed.split())
    monkeypatch.setattr("visft_ds.distributed.rank", lambda: 1)
    monkeypatch.setattr("visft_ds.evals.judge.scoring._present", lambda path: pytest.fail("waited for ever"))
    assert run(*models, *words) == (0, "", "")


def test_weights_of_timm_are_fetched_with_download_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return tmp_path

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("visft_ds.pretrained.fetch", fetch)
    with pytest.raises(ValueError, match="add --download"):
        parse_variants(["timm:test_vit.r160_in1k"])
    assert not asked
    parse_variants(["timm:test_vit.r160_in1k"], download=True)
    assert asked


def test_a_folder_of_open_clip_is_known_by_its_files(tmp_path: Path) -> None:
    """A second export into the same folder is another model."""
    file = tmp_path / "open_clip_model.safetensors"
    file.write_text("one")
    before = parse_model(f"open_clip:local-dir:{tmp_path}").identity
    file.write_text("two")
    assert parse_model(f"open_clip:local-dir:{tmp_path}").identity != before


def test_weights_of_open_clip_are_downloaded_only_if_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By tag and by repository; a file of it in the hub's cache is enough."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    for text in ("open_clip:ViT-B-32:laion2b_s34b_b79k", f"open_clip:hf-hub:{repository}"):
        with pytest.raises(ValueError, match=f"{repository}.*--download"):
            parse_model(text)
        assert parse_model(text, download=True).open_clip
    (tmp_path / "a.pt").touch()
    assert parse_model(f"open_clip:ViT-B-32:{tmp_path}/a.pt").open_clip == "ViT-B-32"
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots/1"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("1")
    (snapshot / "open_clip_model.safetensors").touch()
    assert parse_model("open_clip:ViT-B-32:laion2b_s34b_b79k").open_clip == "ViT-B-32"


def test_images_of_a_group_are_one_piece_of_evidence(clip_world: Path, tmp_path: Path) -> None:
    """Twelve images of two patients: fewer than six units can show nothing."""
    models = [
        f"base={clip_world}/clip.safetensors",
        f"tuned={clip_world}/merged.safetensors",
        "--layers",
        "last",
    ]
    words = ["--primary", "zero_shot/shapes top1", "--out", tmp_path / "out"]
    status, _, errors = run(*models, "--on", f"zero_shot={clip_world}/shapes,groups=-([0-4])", *words)
    assert status == 2 and "gives no group for circle/0-5.png" in errors
    status, printed, _ = run(*models, "--on", rf"zero_shot={clip_world}/shapes,groups=^\w+", *words)
    assert status == 0 and "fewer than six items can show nothing" in " ".join(printed.split())
    assert record_in(tmp_path / "out")["rows"][0]["differences"]["tuned"]["detectable"] is None
