"""Models read after a block, and the block that is best to read: against the libraries' own inner features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from tests.clip_case import SIDE, make_clip, save_clip
from tests.random_tower import adapter_of, merge, move_adapters, relative, save_adapter
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.judge import dense, layers
from visft_ds.evals.judge.encoders import KINDS_WITHOUT_TEXT
from visft_ds.evals.judge.kinds import parse_benchmark
from visft_ds.evals.judge.layers import choose, half_of, judge_blocks
from visft_ds.evals.judge.models import load_encoder, parse_model
from visft_ds.evals.judge.protocol import Score
from visft_ds.evals.judge.scoring import Settings, judge
from visft_ds.interop.adapter import Adapter
from visft_ds.models.lora import inject_lora


def _read(model: str, images: Tensor) -> dict[str, Tensor]:
    encoder = load_encoder(parse_model(model), "fp32")
    assert encoder.kinds == KINDS_WITHOUT_TEXT and encoder.text is None
    with torch.no_grad():
        found: dict[str, Tensor] = encoder.module(images, KINDS_WITHOUT_TEXT)
    return found


def _adapted(tmp_path: Path, model: str) -> tuple[Any, Adapter]:
    """The model's backbone with an adapter that does something, saved in the folder `adapter`."""
    backbone: Any = load_encoder(parse_model(model), "fp32").module.backbone
    inject_lora(backbone, rank=2, alpha=2, targets=("q", "v"))
    move_adapters(backbone, spread=0.5)
    adapter = adapter_of(backbone)
    save_adapter(adapter, tmp_path / "adapter")
    return backbone, adapter


@torch.no_grad()
def test_adapted_and_merged_towers(tmp_path: Path) -> None:
    """An adapter on both blocks, read in front of the second: base + adapter at a scale, and what is merged of it."""
    path, images = save_clip(make_clip(), tmp_path / "clip.safetensors"), torch.randn(1, 3, SIDE, SIDE)
    _, adapter = _adapted(tmp_path, str(path))
    merge(path, adapter.scaled(0.5), tmp_path / "merged.safetensors")
    first = _read(f"{path}+{tmp_path}/adapter#0@0.5", images)["patches"]
    assert relative(_read(f"merged={tmp_path}/merged.safetensors#0", images)["patches"], first) < 1e-5
    assert relative(_read(f"{path}#0", images)["patches"], first) > 1e-3
    # What was trained up to a block is read there, by what the adapter and the header of the merged file say.
    backbone, adapter = _adapted(tmp_path, f"{path}#0")
    merge(path, adapter, tmp_path / "short.safetensors")
    wanted = backbone(images)[0]
    for model in (f"{path}+{tmp_path}/adapter", f"{tmp_path}/short.safetensors"):
        assert relative(_read(model, images)["patches"], wanted) < 1e-5
    assert relative(_read(f"{tmp_path}/short.safetensors#1", images)["patches"], wanted) > 1e-2


@pytest.mark.parametrize(("name", "index"), [("test_vit", 2), ("test_efficientnet", 3)])
@torch.no_grad()
def test_models_of_timm(tmp_path: Path, name: str, index: int) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 160, 160)
    (wanted,) = model.forward_intermediates(
        images, indices=[index], norm=name == "test_vit", intermediates_only=True, output_fmt="NCHW"
    )
    assert torch.equal(_read(f"timm:{name}:{tmp_path}/w.safetensors#{index}", images)["patches"], wanted)


@pytest.fixture(autouse=True)
def probes_learn_little(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("PLACES", 500), ("PATCHES", 200), ("_STEPS", 50)):
        monkeypatch.setattr(dense, name, count)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two colours whose border moves, with label maps."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 8)):
        for number in range(count):
            border = int(rng.integers(20, 44))
            labels = (np.arange(64) >= border).astype(np.uint8)[None].repeat(64, axis=0)
            noise = rng.integers(0, 120, (64, 64, 3))
            for place, pixels in (("images", noise + 60 * labels[..., None]), ("labels", labels)):
                path = root / place / part / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


@pytest.mark.parametrize("kind", ["timm", "ours"])
def test_one_forward_reads_what_each_cut_model_gives(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The same scores whether all blocks fit at once or one does; the end has a row if it is another map."""
    if kind == "timm":
        whole = timm.create_model("test_efficientnet", num_classes=0)
        save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, tmp_path / "w.safetensors")
        model, blocks = f"timm:test_efficientnet:{tmp_path}/w.safetensors", [*(f"blocks.{n}" for n in range(5)), "end"]
    else:
        model, blocks = str(save_clip(make_clip(), tmp_path / "clip.safetensors")), ["blocks.0", "blocks.1"]
    settings = Settings(torch.device("cpu"), "fp32", tmp_path / "cache", 4, 0)
    benchmark = parse_benchmark(f"dense={pictures}")
    together = judge_blocks(parse_model(model), [benchmark], settings)
    assert list(together) == blocks
    monkeypatch.setattr(layers, "MOST", 1)
    apart = judge_blocks(parse_model(model), [benchmark], settings)
    specs = [parse_model(f"{n}={model}" + ("" if block == "end" else f"#{n}")) for n, block in enumerate(blocks)]
    alone, _ = judge(specs, [benchmark], settings)
    for number, block in enumerate(blocks):
        for name, score in together[block].items():
            assert np.array_equal(score.values, apart[block][name].values)
            assert score.value == pytest.approx(alone[str(number)][name].value, abs=0.02)


def test_the_command_names_the_best_block(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file({key: value.contiguous() for key, value in values.items()}, tmp_path / "vit.safetensors")
    words = ["--model", f"timm:test_vit:{tmp_path}/vit.safetensors", "--benchmark", f"dense={pictures},name=two"]
    words += ["--threads", "0", "--primary", "dense/two knn mIoU", "--out", str(tmp_path / "out")]
    assert evaluate(["layers", *words]) == 0
    record = json.loads((tmp_path / "out" / "layers.json").read_text())
    assert list(record["levels"]) == [f"blocks.{number}" for number in range(6)]
    choices = {one["number"]: one for one in record["choices"]}
    assert record["best"] == choices["dense/two knn mIoU"]["block"]
    printed = capsys.readouterr().out
    number = record["best"].rpartition(".")[2]
    assert (f"#{number}" in printed or number == "end") and "chosen on one half" in printed
    assert "blocks.5" in (tmp_path / "out" / "layers.svg").read_text()


def test_a_block_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    """Blocks that are best by luck in one half gain nothing in the other."""
    rng, images = np.random.default_rng(1), np.arange(60) // 2
    first = half_of(Score("n", np.arange(60.0), images), 0).values.astype(int)
    assert set(images[first]) & set(np.delete(images, first)) == set() and 10 < len(first) < 50
    end = (rng.random(60) < 0.5).astype(np.float64)
    lucky, good = end.copy(), end.copy()
    lucky[first] = 1
    good[first], good[np.setdiff1d(np.arange(60), first)] = 0, 1
    (choice,) = choose({name: {"n": Score("n", v, images)} for name, v in (("a", lucky), ("b", good), ("end", end))})
    assert choice.block == "a" and choice.difference is not None and choice.difference.value == 0
    (choice,) = choose({name: {"n": Score("n", v, images)} for name, v in (("a", good), ("end", end))})
    assert (choice.block, choice.difference) == ("end", None)
