"""Weights in every form that leaves: averages, LoRA alone, runs, card, refusals."""

from __future__ import annotations

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapter_bounds import same_change
from tests.published import save_published_lora
from tests.random_tower import save_backbone
from tools.merge_lora import main
from visft_ds.checkpoint.format import save_checkpoint
from visft_ds.config import resolve
from visft_ds.interop.adapter import Adapter, average
from visft_ds.interop.files import TensorInfo, open_weights, sha256_file
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import merge_into_file, read_adapter
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.writing import write_torch
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.parallel.state import EngineState

SIZES = {"width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28}


def _model() -> EvaViT:
    model = build_backbone("debug", seed=None, class_token=True, **SIZES).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model


def _adapter(seed: int = 0, rank: int = 3, targets: tuple[str, ...] = ("q", "v"), size: float = 0.3) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    rows = {"attn.qkv": sum(target in "qkv" for target in targets), "attn.proj": 1}
    tensors = {}
    for index in range(2):
        for module, count in rows.items():
            if module == "attn.qkv" or "proj" in targets:
                stem = f"blocks.{index}.{module}."
                tensors[stem + "lora_A"] = torch.randn(count * rank, 32, generator=generator)
                tensors[stem + "lora_B"] = size * torch.randn(count * 32, rank, generator=generator)
    return Adapter(rank, 2.0, targets, tensors)


def _case(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path, Adapter]:
    """(base, PEFT folder, adapter): an EVA-CLIP file with a text side, and an adapter that records its hash."""
    model, base = _model(), folder / "base.safetensors"
    save_backbone(model, base, "eva_clip", dtype=dtype)
    tensors = load_file(base) | {"text.ln_final.weight": torch.randn(5), "logit_scale": torch.tensor(4.6)}
    save_file(tensors, base, {"tower": tower_of(model).to_json()})
    adapter = replace(_adapter(), base_sha256=sha256_file(base))
    return base, save_peft_adapter(adapter, folder / "adapter", tower_of(model)), adapter


def _run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_an_average_is_the_mean_of_the_changes_not_of_the_factors() -> None:
    targets = ("q", "k", "v", "proj")
    first, second = _adapter(1, 3, targets), replace(_adapter(2, 5, targets), alpha=0.5)
    mixed = average([first, second])
    for weight in first.weights():
        wanted = 0.5 * first.delta(weight) + 0.5 * second.delta(weight)
        assert torch.allclose(mixed.delta(weight), wanted, atol=1e-5)  # fp32 sums of 8 products of size 1
    assert mixed.rank == 8


def test_adapters_that_do_not_belong_together_are_not_averaged() -> None:
    first = replace(_adapter(1), base_sha256="a" * 64)
    of_timm = replace(_adapter(1), targets=("blocks.*.attn.qkv",), model="test_vit")
    for pair in (
        (first, _adapter(2, targets=("q",))),
        (first, replace(_adapter(2), base_sha256="b" * 64)),
        (of_timm, _adapter(2)),
        (of_timm, replace(of_timm, layers_read=(0,))),
        (of_timm, replace(of_timm, options={"img_size": 96})),
    ):
        with pytest.raises(ValueError, match=r"averaged|bases"):
            average(pair)


def test_the_tool_averages_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, folder, adapter = _case(tmp_path)
    other = _adapter(7, 2)
    save_published_lora(other, tmp_path / "other.pt")
    out = tmp_path / "out"
    given = ("--base", base, "--adapter", folder, "--adapter", tmp_path / "other.pt")
    assert _run(*given, "--out", out, "--format", "eva_clip", "--verify") == 0
    assert "mean of 2 adapters" in (out / "README.md").read_text()
    assert "other.pt: rank 2" in capsys.readouterr().out
    name = "blocks.1.attn.qkv.weight"
    change = open_weights(out / "eva_clip.pt").get(f"visual.{name}") - load_file(base)[f"visual.{name}"]
    assert torch.allclose(change, 0.5 * adapter.delta(name) + 0.5 * other.delta(name), atol=1e-5)


def test_torch_files_hold_each_tensor_in_a_storage_of_its_own(tmp_path: Path) -> None:
    """Views of one mapped file as one storage would be written whole for every tensor."""
    tensors: dict[str, Tensor] = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "large": torch.randn(300, 100),
        "flag": torch.tensor([True, False]),
    }
    infos = {name: TensorInfo.of(value) for name, value in tensors.items()}
    path = tmp_path / "w.pth"
    write_torch(path, infos, tensors.__getitem__)
    read = torch.load(path, weights_only=True)
    assert list(read) == list(tensors) and all(torch.equal(read[name], value) for name, value in tensors.items())
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in read.values())
    assert path.stat().st_size < 1.1 * sum(value.nbytes for value in tensors.values()) + 4096
    assert os.listdir(tmp_path) == ["w.pth"]


def test_a_published_lora_becomes_an_adapter_folder(tmp_path: Path) -> None:
    base, _, adapter = _case(tmp_path)
    save_published_lora(adapter, tmp_path / "lora.pt")
    out = tmp_path / "out"
    given = ("--adapter", tmp_path / "lora.pt", "--format", "peft", "--out", out)
    assert _run(*given) == 2 and not out.exists()
    assert _run("--base", base, *given) == 0
    assert same_change(read_adapter(out), adapter)
    card = (out / "README.md").read_text()
    assert f"| base weights | base.safetensors | {adapter.base_sha256} |" in card and str(tmp_path) not in card


def _unfinished_run(folder: Path, base: Path, adapter: Adapter, *more: str) -> Path:
    """A run folder as training leaves it after a checkpoint, before its export."""
    config = resolve(
        stage=2,
        model="debug",
        settings=(
            f"visft.model.weights={base}",
            'visft.model.overrides={"width": 32, "depth": 2, "num_heads": 2, "image_size": 28}',
            f"visft.lora.rank={adapter.rank}",
            f"visft.lora.alpha={adapter.alpha}",
        ),
    )
    run = folder / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema": 2, "config": config.to_dict()}), encoding="utf-8")
    parameters = {f"backbone.{name}": value for name, value in adapter.tensors.items()}
    parameters |= {name: torch.zeros(2) for name in more}
    moments = {key: {name: torch.zeros(1) for name in parameters} for key in ("exp_avg", "exp_avg_sq")}
    identity = {"base weights": sha256_file(base)}
    save_checkpoint(run / "checkpoints", 40, EngineState(parameters, moments, updates=40), identity)
    return run


def test_a_run_is_taken_by_its_newest_checkpoint_until_it_has_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, adapter = _case(tmp_path)
    run = _unfinished_run(tmp_path, base, adapter)
    numbers = {20: {"val/box/AP50": 0.125}, 40: {"val/box/AP50": 0.5, "val/box/AP": -1.0, "val/mask/AP50": "nan"}}
    lines = [json.dumps({"kind": "step", "step": step, **values}) for step, values in numbers.items()]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for number, given in enumerate((run, run / "checkpoints" / "step_00000040")):
        out = tmp_path / f"out{number}"
        assert _run("--base", base, "--adapter", given, "--out", out, "--format", "peft") == 0
        read = read_adapter(out)
        assert read.base_sha256 == adapter.base_sha256 and read.fingerprint() == adapter.fingerprint()
        card = (out / "README.md").read_text()
        assert "| checkpoint | step 40 |" in card and "| stage | 2 |" in card and str(tmp_path) not in card
        assert "| box/AP50 (val, evaluation of the run, step 40) | 0.5000 |" in card
        assert "-1.0" not in card and "0.125" not in card and "mask" not in card
        front = yaml.safe_load(card.split("---")[1])
        assert "datasets" not in front and front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "step_00000040" in capsys.readouterr().out
    (run / "export").mkdir()
    other = adapter.scaled(3.0)
    save_peft_adapter(other, run / "export" / "adapter", tower_of(_model()))
    assert _run("--base", base, "--adapter", run, "--out", tmp_path / "last", "--format", "peft") == 0
    assert read_adapter(tmp_path / "last").fingerprint() == other.fingerprint()
    monkeypatch.chdir(run / "export")
    given = ("--base", base, "--adapter", "adapter", "--format", "peft")
    assert _run(*given, "--out", tmp_path / "beside") == 0
    of_file = ("--base", base, "--adapter", "adapter/adapter_model.safetensors", "--format", "peft")
    assert _run(*of_file, "--out", tmp_path / "file") == 0
    for place in ("beside", "file"):
        card = (tmp_path / place / "README.md").read_text()
        assert "(val, evaluation of the run, step 40) | 0.5000 |" in card and "| values |" not in card


def test_a_checkpoint_whose_adapter_is_not_all_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _, adapter = _case(tmp_path)
    run = _unfinished_run(tmp_path, base, adapter, "backbone.norm.weight")
    given = ("--base", base, "--adapter", run, "--out", tmp_path / "out.safetensors")
    assert _run(*given) == 2 and "trains its backbone itself as well" in capsys.readouterr().err
    damaged = run / "checkpoints" / "step_00000040" / "parameters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert _run(*given) == 2 and "no whole checkpoint" in capsys.readouterr().err


def test_the_card_says_what_was_measured_and_nothing_else(tmp_path: Path) -> None:
    base, folder, adapter = _case(tmp_path)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    record = {
        "format": "visft_ds evaluation",
        "version": 1,
        "metrics": {"box/AP50": 0.25, "box/AP": -1.0, "box/AP50/cat": 0.5},
        "model": {"backbone": f"{tmp_path}/secret"},
        "data": {"where": str(tmp_path), "split": "val", "images": 7, "total": 7, "fingerprint": "0123456789abcdef"},
    }
    out = tmp_path / "out"
    given = ("--base", base, "--adapter", folder, "--out", out, "--dtype", "bf16")
    part = record | {"data": record["data"] | {"total": 200}}  # type: ignore[operator]
    (evaluation / "metrics.json").write_text(json.dumps(part))
    assert _run(*given, "--results", evaluation) == 2 and not out.exists()
    (evaluation / "metrics.json").write_text(json.dumps(record))
    assert _run(*given, "--verify", "--results", evaluation) == 0
    card = (out / "README.md").read_text()
    assert "| box/AP50 (val, 7 images, data 0123456789ab) | 0.2500 |" in card
    front = yaml.safe_load(card.split("---")[1])
    (result,) = front["model-index"][0]["results"]
    assert result["task"]["type"] == "object-detection" and result["metrics"] == [{"type": "box/AP50", "value": 0.25}]
    assert (front["library_name"], front["pipeline_tag"]) == ("timm", "image-feature-extraction")
    assert not {"license", "base_model", "datasets"} & front.keys() and "-1.0" not in card and "cat" not in card
    assert adapter.base_sha256 in card and adapter.fingerprint() in card and "Not recorded." in card  # type: ignore[operator]
    assert re.search(r"\| outputs against base \+ change, relative difference \| \S+ by timm 1\.", card)
    assert str(tmp_path) not in card and "secret" not in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {4, 5}, "two columns, and three of the sources"
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert stat.S_IMODE(out.stat().st_mode) & 0o055, "others may read it as any other folder"


def _spoiled(folder: Path) -> dict[str, Path]:
    """Inputs that must not be merged, by name."""
    base = folder / "base.safetensors"
    tensors = load_file(base)
    poisoned = {**tensors, "visual.blocks.1.mlp.fc2.bias": torch.full((32,), float("nan"))}
    save_file(poisoned, folder / "poisoned.safetensors", {"tower": tower_of(_model()).to_json()})
    (folder / "half.safetensors").write_bytes(base.read_bytes()[: base.stat().st_size // 2])
    fewer = {name: value for name, value in tensors.items() if "blocks.1." not in name or "mlp" in name}
    save_file(fewer, folder / "fewer.safetensors")
    save_backbone(build_backbone("debug", **{**SIZES, "depth": 3}), folder / "other_tower.safetensors")
    merge_into_file(base, replace(_adapter(9), base_sha256=None), folder / "merged.safetensors", layout="eva_clip")

    class Code:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder / "code-was-run"),)

    torch.save({**tensors, "x": Code()}, folder / "code.pt")
    return {path.stem: path for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"--base": "poisoned", "--allow-other-base": True}, "fc2.bias holds NaN"),
        ({"--base": "half"}, "half"),
        ({"--base": "fewer", "--allow-other-base": True}, "Missing"),
        ({"--base": "other_tower"}, "depth 3"),
        ({"--base": "merged"}, "twice"),
        ({"--base": "code"}, "code"),
        ({"--adapter": "base"}, "LoRA"),
        ({"--format": "lavis"}, ".pth"),
        ({"--format": "open_clip"}, "text tower"),
        ({"--format": "peft", "--dtype": "bf16"}, "adapter alone"),
        ({"--dtype": "fp16", "--scale": "1e7"}, "float16"),
        ({"--scale": "nan"}, "finite"),
        ({"--out": "base"}, "not overwritten"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str | bool], word: str
) -> None:
    _case(tmp_path)
    spoiled = _spoiled(tmp_path)
    before = sorted(os.listdir(tmp_path))
    flags: dict[str, str | bool] = {"--base": "base", "--adapter": "adapter", "--out": "out.safetensors"}
    arguments: list[str] = []
    for name, value in (flags | change).items():
        path = spoiled.get(str(value), tmp_path / str(value)) if name in flags else value
        arguments += [name] if value is True else [name, str(path)]
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert word in said.err and said.err.startswith("merge: ")
    assert sorted(os.listdir(tmp_path)) == before, "no result, no temporary file, and no code was run"
