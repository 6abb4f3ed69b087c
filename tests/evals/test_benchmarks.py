"""tools/evaluate.py benchmarks from command line to files: models of every kind, resumed, and by several processes."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.clip_case import HEADS, SIDE, make_clip, save_clip
from tests.evals.conftest import SETTINGS
from tests.random_tower import save_backbone
from tests.ranks import run_ranks
from visft_ds.config import resolve
from visft_ds.config.schema import Precision
from visft_ds.evals.benchmarks import cache, encoding
from visft_ds.evals.benchmarks.cache import Stored
from visft_ds.evals.benchmarks.class_sets import read_classes
from visft_ds.evals.benchmarks.encoders import Encoder
from visft_ds.evals.benchmarks.encoding import Worker, encode_together
from visft_ds.evals.benchmarks.models import LoadOptions, identity, load_encoder, parse_model
from visft_ds.evals.benchmarks.run import Settings, worker_of
from visft_ds.evals.cli import main
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.files import sha256_file
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import merge_into_file, read_adapter
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora
from visft_ds.monitor.metrics import RunRecord
from visft_ds.run.folder import BACKBONE_FILE

CLASSES = ("circle", "square")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP file, an adapter for it, merged weights, a folder of classes and a COCO tree with captions and boxes."""
    root = tmp_path_factory.mktemp("world")
    base = save_clip(make_clip(), root / "clip.safetensors")
    encoder = load_encoder(parse_model(str(base)), LoadOptions("fp32"))
    backbone: Any = encoder.module.backbone
    inject_lora(backbone, rank=4, alpha=4, targets=("q", "v"))
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=1.0)
    save_peft_adapter(adapter_of(backbone, base_sha256=sha256_file(base)), root / "adapter", tower_of(backbone))
    merge_into_file(base, read_adapter(root / "adapter"), root / "merged.safetensors", tower=tower_of(backbone))
    _draw(root)
    return root


def _draw(root: Path) -> None:
    rng = np.random.default_rng(0)
    coco: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    captions: list[dict[str, Any]] = []
    for number, name in enumerate(CLASSES):
        coco["categories"].append({"id": number, "name": name})
        for place in range(6):
            # each its own colour: towers of random weights tell little else apart
            pixels = (rng.integers(0, 180, 3) + rng.integers(0, 75, (40, 52, 3))).astype(np.uint8)
            for path in (root / "shapes" / name / f"{place}.png", root / f"coco/val2017/{number}-{place}.png"):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)
            image = len(coco["images"])
            coco["images"].append({"id": image, "file_name": f"{number}-{place}.png"})
            box = {"bbox": [2, 3, 20, 30], "iscrowd": 0, "category_id": number, "image_id": image}
            coco["annotations"].append({"id": image, **box})
            captions += [{"image_id": image, "caption": f"{name} {place}, {word}"} for word in ("seen", "drawn")]
    (root / "coco/annotations").mkdir()
    (root / "coco/annotations/instances_val2017.json").write_text(json.dumps(coco))
    told = {"images": coco["images"], "annotations": captions}
    (root / "coco/annotations/captions_val2017.json").write_text(json.dumps(told))


def _run(*arguments: Any) -> tuple[int, str, str]:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(["benchmarks", "--threads", "0", *map(str, arguments)])
    # A slow machine is told how much is left.
    said = [line for line in errors.getvalue().splitlines(keepends=True) if not re.search(r"\d+/\d+ .* left \d", line)]
    return status, out.getvalue(), "".join(said)


def _record(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "benchmarks.json").read_text())
    return record


def _all(world: Path) -> list[str]:
    base = world / "clip.safetensors"
    models = (f"base={base}", f"visft={base}+{world}/adapter@0.5", f"merged={world}/merged.safetensors")
    kinds = (f"zero_shot={world}/shapes", f"probe={world}/shapes", f"retrieval={world}/coco", f"objects={world}/coco")
    return [
        *(word for model in models for word in ("--model", model)),
        *(word for kind in kinds for word in ("--benchmark", kind)),
        *("--text", str(base)),
    ]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """All benchmarks of three models; nothing to complain about."""
    status, _, errors = _run(*_all(world), "--out", world / "out")
    assert (status, errors) == (0, "")
    return world / "out"


def test_one_table_of_all_models(world: Path, finished: Path) -> None:
    record = _record(finished)
    rows = {row["name"]: row for row in record["rows"]}
    wanted = ["top1", "knn", "linear", "1-shot", "image to text R@1", "text to image R@10", "crop, text top1"]
    assert all(any(name.endswith(end) for name in rows) for end in wanted)
    assert list(record["models"]) == ["base", "visft", "merged"]
    row = rows["retrieval/coco text to image R@5"]
    assert row["items"] == 24 and row["differences"].keys() == {"visft", "merged"}
    change = row["values"]["visft"]["value"] - row["values"]["base"]["value"]
    assert row["differences"]["visft"]["value"] == pytest.approx(change)
    assert record["benchmarks"]["objects/coco"]["crop"]["images"] == 12
    assert "times 0.5" in record["models"]["visft"]["adapter"]
    doses = {label: of["probe/shapes"] for label, of in record["doses"].items()}
    assert 0 < doses["visft"]["change"] < doses["merged"]["change"] and doses["merged"]["cosine"] < 1
    svg = (finished / "differences.svg").read_text()
    assert "merged: zero_shot/shapes top1" in svg
    for name in record["pictures"]:
        with Image.open(finished / name) as picture:
            assert picture.width > 200
    assert "pictures/retrieval-coco-image-to-text-R@1.png" in record["pictures"]


def test_numbers_are_those_of_plain_loops(world: Path, finished: Path) -> None:
    """Zero-shot and retrieval again, image by image, from open_clip's model."""
    clip, rows = make_clip(), {row["name"]: row for row in _record(finished)["rows"]}
    encoder = load_encoder(parse_model(str(world / "clip.safetensors")), LoadOptions("fp32"))
    assert encoder.text is not None
    data = read_classes(str(world / "shapes"))
    classes = encoder.text.encode([f"a photo of a {name}." for name in data.classes])
    captions = json.loads((world / "coco/annotations/captions_val2017.json").read_text())["annotations"]
    texts = encoder.text.encode([caption["caption"] for caption in captions])
    right, found = [], []
    for place, label in enumerate(data.labels):
        with torch.no_grad():
            image = clip.encode_image(encoder.preprocess(data.images.read(place))[None], normalize=True)[0]
        right.append(int((classes @ image).argmax()) == label)
        found.append(captions[int((texts @ image).argmax())]["image_id"] == place)
    assert rows["zero_shot/shapes top1"]["values"]["base"]["value"] == pytest.approx(np.mean(right))
    assert rows["retrieval/coco image to text R@1"]["values"]["base"]["value"] == pytest.approx(np.mean(found))


def test_the_same_command_again_computes_nothing(world: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _record(finished)["rows"]

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("computed again")

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "forward", refuse)
        patched.setattr("visft_ds.evals.benchmarks.run._save", refuse)
        assert _run(*_all(world), "--out", finished)[0] == 0
    assert _record(finished)["rows"] == before
    # Without the last chunk of one set, that chunk alone is made again, and with the same bits.
    chunk = next((finished / "cache/images").rglob("000000.safetensors"))
    content = chunk.read_bytes()
    chunk.unlink()
    for path in (finished / "cache/scores").iterdir():
        path.unlink()
    assert _run(*_all(world), "--out", finished)[0] == 0
    assert _record(finished)["rows"] == before and chunk.read_bytes() == content


def test_scale_of_an_adapter(world: Path) -> None:
    """Times one it is the merged weights, times nothing the base, and each of them is another entry of the cache."""
    base, image = world / "clip.safetensors", torch.randn(2, 3, SIDE, SIDE)
    texts = [f"{base}+{world}/adapter{end}" for end in ("@0", "", "@0.5", "@-1")]
    loaded = [load_encoder(parse_model(text), LoadOptions("fp32")).module for text in (str(base), *texts)]
    merged = load_encoder(parse_model(f"{world}/merged.safetensors"), LoadOptions("fp32")).module
    with torch.no_grad():
        plain, nothing, whole, half, back = (module(image, ["pooled"])["pooled"] for module in loaded)
        wanted = merged(image, ["pooled"])["pooled"]
    torch.testing.assert_close(plain, nothing, rtol=0, atol=1e-6)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    assert min((whole - plain).abs().max(), (half - whole).abs().max(), (back - plain).abs().max()) > 1e-2
    assert len({identity(module) for module in loaded}) == len(loaded)


def _worker(encoder: Encoder, folder: Path, precision: Precision = "fp32") -> Worker:
    settings = Settings(torch.device("cpu"), precision, folder, 2, 0, LoadOptions(precision))
    return worker_of(encoder, "model", settings)


def test_processes_share_chunks_and_leave_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes one after the other: each writes what is its own, together what one alone writes."""
    monkeypatch.setattr(cache, "CHUNK", 5)  # 12 images: chunks of 5, 5 and 2
    data = read_classes(str(world / "shapes"))
    encoder = load_encoder(parse_model(str(world / "clip.safetensors")), LoadOptions("fp32"))
    worker = _worker(encoder, tmp_path)

    def encode(folder: str, threads: int = 0) -> Stored:
        own = replace(worker, cache=tmp_path / folder, threads=threads)
        return encode_together([own], data.images, ["pooled", "clip"])[0]

    alone = encode("alone", threads=3)
    everything = [range(0, 5), range(5, 10), range(10, 12)]
    monkeypatch.setattr("visft_ds.parallel.distributed.world_size", lambda: 2)
    # What the main process found missing at the start holds for both.
    monkeypatch.setattr("visft_ds.parallel.distributed.broadcast_object", lambda value: everything)
    for rank in (0, 1):
        monkeypatch.setattr("visft_ds.parallel.distributed.rank", lambda rank=rank: rank)
        shared = encode("shared")
        assert len(list((tmp_path / "shared").rglob("*.safetensors"))) == (2 if rank == 0 else 3)
    one, other = alone.read(), shared.read()
    assert one.keys() == other.keys() == {"pooled", "clip"}
    assert all(torch.equal(one[name], other[name]) for name in one)
    damaged = sorted((tmp_path / "shared").rglob("*.safetensors"))[-1]
    damaged.write_bytes(sorted((tmp_path / "shared").rglob("*.safetensors"))[0].read_bytes())
    with pytest.raises(ValueError, match="does not hold 2 items: remove it"):
        shared.read()


def test_a_run_is_a_model(tmp_path: Path) -> None:
    """A stage-1 run is its base; what no tensor tells comes from the run's configuration."""
    config = resolve(stage=1, model="debug", settings=SETTINGS, flags={"--data": ("visft.data.root", "shards")})
    run = tmp_path / "stage1"
    RunRecord(config.to_dict(), 1, ["train.py"]).write(run)
    with pytest.raises(ValueError, match=r"not found: .*backbone.safetensors. If the run in .* was interrupted"):
        parse_model(str(run))
    save_backbone(build_backbone("debug", **config.visft.model.backbone_options()), run / "export" / BACKBONE_FILE)
    spec = parse_model(f"before={run}")
    assert (spec.label, spec.adapter, spec.scale) == ("before", None, 1.0) and spec.hints is not None
    assert load_encoder(spec, LoadOptions("fp32")).kinds == ("pooled", "patches")
    with pytest.raises(ValueError, match=r"@0.5 scales an adapter, and .*stage1 trained none"):
        parse_model(f"{run}@0.5")


def test_bf16_is_near_fp32_and_another_entry(world: Path, tmp_path: Path) -> None:
    data, stored = read_classes(str(world / "shapes")), []
    for precision in ("fp32", "bf16"):
        encoder = load_encoder(parse_model(f"{world}/clip.safetensors+{world}/adapter"), LoadOptions(precision))
        worker = _worker(encoder, tmp_path, precision)
        stored += encode_together([worker], data.images, ["clip", "columns"])
    one, other = (part.read() for part in stored)
    assert stored[0].what != stored[1].what
    assert one["columns"].shape == (12, 2 * 48, 2) and one["clip"].dtype == other["clip"].dtype == torch.float32
    for name in one:
        likeness = torch.cosine_similarity(one[name].flatten(1), other[name].flatten(1))
        assert 0.995 < likeness.min() < 1 - 1e-7, name  # bf16 has 8 bits; the same numbers would not be bf16


def test_numbers_that_are_none_are_not_scored(world: Path, tmp_path: Path) -> None:
    encoder = load_encoder(parse_model(str(world / "clip.safetensors")), LoadOptions("fp32"))
    encoder.module.backbone.norm.weight.data.fill_(torch.inf)  # type: ignore[union-attr]
    worker = _worker(encoder, tmp_path)
    with pytest.raises(ValueError, match=r"pooled of circle/0.png or one of the next 11 images is no finite number"):
        encode_together([worker], read_classes(str(world / "shapes")).images, ["pooled"])
    assert not list(tmp_path.rglob("*.safetensors"))


def test_wrong_usage_is_named(world: Path, tmp_path: Path) -> None:
    base, shapes = world / "clip.safetensors", f"zero_shot={world}/shapes"
    bare = world / "bare.safetensors"
    if not bare.exists():
        from safetensors.torch import load_file, save_file

        tensors = {name: value for name, value in load_file(base).items() if name.startswith("visual.")}
        save_file(tensors, bare, metadata={"tower": json.dumps({"num_heads": HEADS, "post_norm": True})})
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.txt").write_text("")
    for arguments, message in (
        (["--model", "x.pt"], "x.pt does not exist. Give"),
        (["--model", f"{base}@2"], "@2 scales an adapter, and none is given"),
        (["--model", f"{base}+nowhere"], "nowhere: no such adapter"),
        (["--model", f"{world}/shapes"], "is a folder without run.json"),
        (["--model", f"{world}/merged.safetensors+{world}/adapter"], "would count twice"),
        (["--model", f"{bare}+{world}/adapter"], "was trained on base weights with sha256"),
        (["--model", base, "--model", base], "two models are called clip"),
        (["--model", bare], "bare has no text side, which zero_shot/shapes compares with"),
        (["--model", bare, "--text", world / "merged.safetensors"], "has no text tower"),
        (["--model", "timm:resnet_18"], "timm has no model 'resnet_18'"),
        (["--model", "timm:resnet18:gone.pt"], "gone.pt is no file"),
        (["--model", "open_clip:ViT-B-32"], "say which weights: open_clip:ViT-B-32:TAG"),
        (["--model", "open_clip:ViT-B-33:x"], "open_clip has no model 'ViT-B-33'"),
        (["--model", base, "--batch-size", 0], "--batch-size 0 is not allowed"),
        (["--model", base, "--image-size", 13], "less than one patch of 14"),
        (["--model", base, "--out", tmp_path / "foreign"], "is not empty and not of an earlier start"),
    ):
        given = [*arguments, "--benchmark", shapes]
        given += [] if "--out" in arguments else ["--out", tmp_path / "out"]
        status, _, errors = _run(*given)
        assert status == 2 and message in errors, (message, errors)


def test_the_word_benchmarks_is_a_command_in_its_place_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--local_rank=1", "benchmarks", "--help"])
    assert "usage: visft evaluate benchmarks" in capsys.readouterr().out
    assert main(["--run", "benchmarks"]) == 2  # a run of that name
    assert "benchmarks" in capsys.readouterr().err


def test_packages_of_the_extra_are_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visft_ds.flags.find_spec", lambda name: None if name == "sklearn" else name)
    status, _, errors = _run("--model", "x.pt", "--benchmark", "digits", "--out", tmp_path / "out")
    assert status == 2 and "a benchmark needs sklearn, not installed here: pip install" in errors


def test_a_text_side_from_another_file(world: Path, tmp_path: Path) -> None:
    """A merged tower with class token and projection, its text tower in the file that the base came from."""
    arguments = ["--model", f"merged={world}/merged.safetensors", "--benchmark", f"zero_shot={world}/shapes"]
    status, out, _ = _run(*arguments, "--text", world / "clip.safetensors", "--out", tmp_path)
    assert status == 0 and "zero_shot/shapes top1" in out and not (tmp_path / "differences.svg").exists()
    assert (tmp_path / "pictures/zero_shot-shapes-top1.png").exists()  # what the only model has wrong


@pytest.mark.slow
def test_two_processes_give_the_same_table(world: Path, finished: Path, tmp_path: Path) -> None:
    run_ranks(["tools/evaluate.py", "benchmarks", *_all(world), "--out", str(tmp_path / "two")])
    assert _record(tmp_path / "two")["rows"] == _record(finished)["rows"]
    assert _record(tmp_path / "two")["processes"] == 2
