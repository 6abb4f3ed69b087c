"""Merging: the file computes what base + adapter computes, nothing is merged twice or in silence, losses are
told.
"""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.parallel.test_start import peak
from tests.published import save_published_lora
from tests.random_tower import (
    SIZES,
    adapter_of,
    build_backbone,
    fold_adapters,
    header_of,
    merge,
    move_adapters,
    random_tower,
    save_adapter,
    save_backbone,
)
from visft_ds.checkpoint.format import save_checkpoint
from visft_ds.cli import main
from visft_ds.config import resolve
from visft_ds.interop import export
from visft_ds.interop.adapter import Adapter, Factors, average
from visft_ds.interop.layouts import MODEL, bases_of, fingerprint_of, model_of, other_base
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import Lazy, Weights, open_weights, write_safetensors
from visft_ds.merge.source import adapter_at
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.parallel.state import EngineState


def _case(
    folder: Path, *, size: float = 0.3, targets: tuple[str, ...] = ("q", "v"), **kind: bool
) -> tuple[Path, Adapter, EvaViT]:
    """(base file in EVA-CLIP form with parts of a text tower, adapter, model with the adapter)."""
    model = random_tower(class_token=False, **kind)
    save_backbone(model, folder / "plain.safetensors", "visual.")
    extra = {
        "text.ln_final.weight": torch.randn(5).bfloat16(),
        "logit_scale": torch.tensor(4.6),
        "visual.cls_token": torch.randn(1, 1, 32).half(),
        "visual.head.weight": torch.randn(7, 32).half(),
        "visual.head.bias": torch.randn(7).half(),
    }
    base = folder / "base.safetensors"
    save_file(load_file(folder / "plain.safetensors") | extra, base, header_of(model))
    inject_lora(model, rank=4, alpha=2.0, targets=targets)
    move_adapters(model, spread=size)
    return base, adapter_of(model, fingerprint_of(model, base)), model


def _same_change(first: Adapter, second: Adapter) -> bool:
    """Whether both change every weight alike; alpha may be part of the scale or of B, which rounds
    otherwise.
    """
    changes = [(first.delta(name), second.delta(name)) for name in second.weights()]
    equal = all(torch.allclose(one, other, rtol=0, atol=1e-6) for one, other in changes)
    return equal and set(first.weights()) == set(second.weights())


def _run(*words: object) -> int:
    return main(["merge", *map(str, words)])


def _export(*words: object) -> int:
    return main(["export", *map(str, words)])


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "proj", "fc1", "fc2")])
def test_merged_file_equals_a_merged_model(tmp_path: Path, targets: tuple[str, ...]) -> None:
    base, adapter, model = _case(tmp_path, targets=targets)
    written = load_file(merge(base, adapter, tmp_path / "out.safetensors"))
    fold_adapters(model)
    lora = lora_parameters(model)
    for name, parameter in model.named_parameters():
        # One fp32 addition either way; the two products may add in another order.
        if name not in lora:
            assert torch.allclose(written[name], parameter, rtol=0, atol=1e-6), name
    assert set(written) == dict(model.named_parameters()).keys() - lora.keys() | {
        *("cls_token", "head.weight", "head.bias")
    }


def test_a_whole_clip_carries_everything_else_untouched(tmp_path: Path) -> None:
    base, adapter, model = _case(tmp_path)
    save_file(load_file(base) | {"text.positional_embedding": torch.randn(5).half()}, base, header_of(model))
    out = merge(base, adapter, tmp_path / "out", "--format", "open_clip", "--dtype", "fp16")
    before, after = load_file(base), load_file(out / "open_clip_model.safetensors")
    assert set(after) == {name.replace("visual.", "visual.trunk.") for name in before}
    changed = {f"visual.{name}" for name in adapter.weights()}
    for name, value in before.items():
        carried = not name.startswith("visual.") or name.startswith(("visual.cls_token", "visual.head"))
        written = after[name.replace("visual.", "visual.trunk.")]
        assert written.dtype == (value.dtype if carried else torch.float16), name
        assert torch.equal(written, value if carried else value.half()) != (name in changed), name
    merged = merge(base, adapter, tmp_path / "merged.safetensors")
    assert other_base("", adapter.base, bases_of(model, merged)) is None, "it says what it was made of"


def test_a_tower_that_ends_early_is_a_shorter_one_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a run exports a tower that trained itself up to a block; open_clip knows one depth."""
    base, _, model = _case(tmp_path, post_norm=False)
    tensors = {name: value for name, value in load_file(base).items() if ".blocks.1." not in name}
    save_file(tensors, base, {MODEL: json.dumps({**model_of(model), "layers": [0]})})
    out = merge(base, None, tmp_path / "out", verify=True)
    assert json.loads((out / "config.json").read_text())["model_args"]["depth"] == 1
    assert set(load_file(out / "model.safetensors")) == {
        name.removeprefix("visual.") for name in tensors if name.startswith("visual.")
    }
    assert _export("--backbone", base, "--out", tmp_path / "x", "--format", "open_clip") == 2
    assert "has 1 of 2 blocks" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_scale_and_mean(tmp_path: Path) -> None:
    base, adapter, model = _case(tmp_path)
    move_adapters(model)
    second = replace(adapter_of(model, adapter.base), alpha=0.5)
    folders = [save_adapter(one, tmp_path / f"a{index}") for index, one in enumerate((adapter, second))]
    words = [word for folder in folders for word in ("--adapter", folder)]
    assert _run("--backbone", base, *words, "--scale", -0.5, "--out", tmp_path / "out.safetensors") == 0
    after, before = load_file(tmp_path / "out.safetensors"), load_file(base)
    for name in adapter.weights():
        expected = -0.25 * (adapter.delta(name) + second.delta(name))
        assert torch.allclose(after[name] - before[f"visual.{name}"], expected, atol=1e-5), name
    with pytest.raises(ValueError, match="averaged"):
        average([adapter, replace(second, model={**second.model, "layers": [0]})])
    with pytest.raises(ValueError, match="different base weights"):
        average([adapter, replace(second, base="another")])


def test_one_fingerprint_whatever_the_layout_and_precision(tmp_path: Path) -> None:
    model = random_tower(1, class_token=False)
    found = set()
    for prefix in ("", "visual.", "visual.trunk.", "visual_encoder."):
        for dtype in (torch.float32, torch.bfloat16):
            save_backbone(model, tmp_path / "w.safetensors", prefix, dtype=dtype)
            found.add(fingerprint_of(model, tmp_path / "w.safetensors"))
    assert len(found) == 1
    for name, parameter in model.named_parameters():
        if name.endswith("norm1.weight"):
            parameter.data[-1] += 0.5
    save_backbone(model, tmp_path / "w.safetensors")
    assert fingerprint_of(model, tmp_path / "w.safetensors") not in found


def test_another_base_is_one_line_of_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, _ = _case(tmp_path)
    merge(base, replace(adapter, base="f" * 64), tmp_path / "out.safetensors")
    assert capsys.readouterr().err.startswith(
        "warning: the adapter was trained on other base weights (ffffffffffff)"
    )
    merge(
        merge(base, None, tmp_path / "half", "--dtype", "bf16") / "model.safetensors", adapter, tmp_path / "x"
    )
    assert not capsys.readouterr().err


def _share(base_dtype: torch.dtype, dtype: torch.dtype, folder: Path) -> export.Share:
    base, adapter, _ = _case(folder, size=2e-4)
    tower = Weights({n: Lazy.of(v.to(base_dtype)) for n, v in load_file(base).items()}, base).under("visual.")
    share = export.Share()
    merged = export.merge(tower, adapter, dtype, tower.keys(), share)
    for one in merged.values():
        one.read()
    return share


def test_a_small_change_drowns_in_bfloat16_and_is_reported(tmp_path: Path) -> None:
    """Numbers near 0.2 are 2^-10 apart in bf16, 2^-13 in fp16; this change is about 2e-4 large."""
    share = _share(torch.bfloat16, torch.bfloat16, tmp_path)
    assert share.retained < 0.9
    # Rounding a finer base is dither: the projection looks fine, and the error alone shows the loss.
    share = _share(torch.float32, torch.bfloat16, tmp_path)
    assert abs(share.retained - 1) < 0.3 and share.error > 0.5
    share = _share(torch.bfloat16, torch.float32, tmp_path)
    assert share.retained == pytest.approx(1, abs=1e-3) and share.error < 1e-2


def test_the_peak_is_one_tensor_over_the_mapped_base(tmp_path: Path) -> None:
    """Eight matrices of 16 MiB, one of them adapted."""
    values = {f"layer{number}.weight": torch.ones(2048, 2048) for number in range(8)}
    save_file(values, tmp_path / "base.safetensors")
    factors = Factors(2048, ((0, 2048),), torch.ones(2, 2048), torch.ones(2048, 2))
    adapter = Adapter({"preset": "debug"}, 2, 2.0, ("q",), {"layer0": factors})
    file, sizes = open_weights(tmp_path / "base.safetensors"), dict[str, int]()
    merged = export.merge(file, adapter, torch.float32, file.keys(), export.Share())
    with peak(sizes, "merge"):
        write_safetensors(tmp_path / "out.safetensors", merged, {})
    assert sizes["merge peak"] < 8 * 2**24, "delta, sum and what the share counts; not the file"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_verification_passes_a_right_file_and_fails_a_wrong_one(
    tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, _ = _case(tmp_path)

    def towers() -> int:
        return sum(
            type(object_) is EvaViT and not object_.norm.weight.is_meta for object_ in gc.get_objects()
        )

    others, load = towers(), export.by_library

    def by_library(*given: Any) -> Any:
        assert towers() == others, "EVA-ViT-E has 16 GiB in fp32: one model at a time"
        return load(*given)

    monkeypatch.setattr(export, "by_library", by_library)
    words = [
        *("--backbone", base, "--adapter", save_adapter(adapter, tmp_path / "adapter")),
        *("--format", "timm", "--dtype", dtype),
    ]
    assert _export(*words, "--out", tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    monkeypatch.setattr(Adapter, "delta", lambda self, weight: torch.zeros(96, 32))
    assert _export(*words, "--out", tmp_path / "wrong") == 2 and not (tmp_path / "wrong").exists()
    assert "verification failed" in capsys.readouterr().err
    assert not [name for name in os.listdir(tmp_path) if "tmp-" in name]


def test_a_deep_tower_stays_within_the_tolerance_of_verification(tmp_path: Path) -> None:
    """Rounding errors add up over the blocks, slowly."""
    model = build_backbone("debug", **{**SIZES, "depth": 24}, post_norm=True)
    save_backbone(model, tmp_path / "base.safetensors")
    inject_lora(model, rank=2)
    for dtype in ("fp16", "bf16"):
        merge(
            *(tmp_path / "base.safetensors", adapter_of(model), tmp_path / dtype, "--dtype", dtype),
            verify=True,
        )


def test_adapters_are_read_from_folder_file_and_published_form(tmp_path: Path) -> None:
    base, adapter, _ = _case(tmp_path)
    folder = save_adapter(adapter, tmp_path / "adapter")
    save_published_lora(adapter, tmp_path / "eva_e_lora_5000.pt")
    for path in (folder, tmp_path / "eva_e_lora_5000.pt"):
        assert _same_change(read_adapter(path), adapter)
    words = ("--backbone", base, "--adapter", tmp_path / "eva_e_lora_5000.pt", "--out", tmp_path / "out")
    assert _run(*words) == 0
    assert _same_change(read_adapter(tmp_path / "out"), adapter)


def test_without_adapter_the_base_is_written_in_another_form(tmp_path: Path) -> None:
    base, _, _ = _case(tmp_path)
    before, after = (
        load_file(base),
        load_file(merge(base, None, tmp_path / "out", verify=True) / "model.safetensors"),
    )
    inner = {name: name.removeprefix("visual.") for name in before if name.startswith("visual.")}
    assert set(after) == set(inner.values())
    assert all(torch.equal(before[name].float(), after[new].float()) for name, new in inner.items())


def _unfinished_run(folder: Path, base: Path, adapter: Adapter, *more: str) -> Path:
    """A run folder as training leaves it after a checkpoint, before its export."""
    sizes = {name: SIZES[name] for name in ("width", "depth", "num_heads", "mlp_ratio", "image_size")}
    settings = (
        f"visft.model.weights={base}",
        f"visft.model.overrides={json.dumps(sizes | {'post_norm': True})}",
        f"visft.lora.rank={adapter.rank}",
        f"visft.lora.alpha={adapter.alpha}",
    )
    config, run = resolve(stage=2, model="debug", settings=settings), folder / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema": 5, "config": config.to_dict()}), encoding="utf-8")
    parameters = {f"backbone.{name}": value for name, value in adapter.tensors.items()}
    parameters |= {name: torch.zeros(SIZES["width"]) for name in more}
    moments = {f"{key}/{name}": torch.zeros(1) for name in parameters for key in ("exp_avg", "exp_avg_sq")}
    identity = {"base weights": adapter.base or ""}
    save_checkpoint(run / "checkpoints", 40, EngineState(parameters, moments, updates=40), identity)
    return run


def test_a_run_is_taken_by_its_newest_checkpoint_until_it_has_an_export(tmp_path: Path) -> None:
    base, adapter, _ = _case(tmp_path)
    run = _unfinished_run(tmp_path, base, adapter)
    numbers = {
        20: {"val/box/AP50": 0.125},
        40: {"val/box/AP50": 0.5, "val/box/AP": -1.0, "val/mask/AP50": "nan"},
    }
    lines = [json.dumps({"kind": "step", "step": step, **values}) for step, values in numbers.items()]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    for number, given in enumerate((run, run / "checkpoints" / "step_00000040")):
        out = tmp_path / f"out{number}"
        assert _run("--backbone", base, "--adapter", given, "--out", out) == 0
        read = read_adapter(out)
        assert read.base == adapter.base and read.fingerprint() == adapter.fingerprint()
    card = (tmp_path / "out0/README.md").read_text()
    assert "| box/AP50 (val, evaluation of the run, step 40) | 0.5000 |" in card and str(tmp_path) not in card
    assert "-1.0" not in card and "0.125" not in card and "mask" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert "datasets" not in front and front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    other = adapter.scaled(3.0)
    save_adapter(other, run / "export" / "adapter")
    (run / "export/export.json").write_text((run / "run.json").read_text())
    assert _run("--backbone", base, run, "--out", tmp_path / "last") == 0
    assert read_adapter(tmp_path / "last").fingerprint() == other.fingerprint()
    record = (run / "run.json").read_text()
    changed = {
        **json.loads(record.replace('"eval_limit": null', '"eval_limit": 16')),
        "identity": {"masks": "drawn"},
    }
    (run / "run.json").write_text(json.dumps(changed))
    assert _run("--backbone", base, run, "--out", tmp_path / "part") == 0
    card = (tmp_path / "part/README.md").read_text()
    assert "AP50" not in card and "| masks | drawn |" in card, "numbers of a part are none of the split"


def test_adapters_of_two_models_are_refused_by_their_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also of a run that has no export yet."""
    base, adapter, _ = _case(tmp_path)
    run = _unfinished_run(tmp_path, base, adapter)
    other = replace(adapter, model={**(adapter.model or {}), "layers": [0]})
    folder = save_adapter(other, tmp_path / "other")
    assert _run("--adapter", run, "--adapter", folder, "--out", tmp_path / "out") == 2
    checkpoint = run / "checkpoints" / "step_00000040"
    assert f"{checkpoint} and {folder}" in capsys.readouterr().err


def test_a_checkpoint_whose_adapter_is_not_all_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, _ = _case(tmp_path)
    run = _unfinished_run(tmp_path, base, adapter, "backbone.norm.weight")
    given = ("--backbone", base, run, "--out", tmp_path / "out.safetensors")
    assert _run(*given) == 2 and "trains its backbone itself" in capsys.readouterr().err
    damaged = run / "checkpoints" / "step_00000040" / "parameters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert _run(*given) == 2 and "no whole checkpoint" in capsys.readouterr().err


def _spoiled(folder: Path, base: Path, adapter: Adapter) -> dict[str, Path]:
    """Files that are none, by name."""
    tensors, name = load_file(base), "visual.blocks.1.mlp.fc2.bias"
    poisoned = tensors | {name: torch.full((32,), float("nan"))}
    save_file(poisoned, folder / "poisoned.safetensors", open_weights(base).metadata)
    merge(base, adapter, folder / "merged.safetensors")
    return {path.stem: path for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"--backbone": "poisoned"}, "fc2.bias holds NaN"),
        ({"--backbone": "merged"}, "already contains a merged adapter"),
        ({"--adapter": "base"}, "LoRA"),
        ({"--format": "open_clip", "--out": "folder"}, "text tower"),
        ({"--format": "transformers", "--out": "folder"}, "transformers has no class"),
        ({"--format": "timm", "--web": ""}, "--web is of whole models"),
        ({"--format": "timm"}, "give a folder"),
        ({"--format": "peft", "--dtype": "fp16", "--out": "folder"}, "adapters are written in fp32"),
        ({"--out": "weights.pt"}, "give NAME.safetensors"),
        ({"--dtype": "fp16", "--scale": "1e7"}, "float16"),
        ({"--scale": "nan"}, "--scale"),
        ({"--out": "base"}, "not overwritten"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], word: str
) -> None:
    base, adapter, _ = _case(tmp_path)
    save_adapter(adapter, tmp_path / "adapter")
    spoiled = _spoiled(tmp_path, base, adapter)
    before = sorted(os.listdir(tmp_path))
    flags = {"--backbone": "base", "--adapter": "adapter", "--out": "out.safetensors"}
    command = "export" if "--format" in change else "merge"
    arguments = [command]
    for name, value in (flags | change).items():
        arguments.append(name)
        if name in flags:
            arguments.append(str(spoiled.get(value, tmp_path / value)))
        elif value:
            arguments.append(value)
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert word in printed.err and printed.err.splitlines()[-1].startswith(f"{command}: ")
    assert sorted(os.listdir(tmp_path)) == before, "no result and no temporary file"


def test_a_run_of_heads_alone_is_refused_with_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "export.json").write_text("{}")
    with pytest.raises(ValueError, match="trained no part of its backbone: give a run of stage 2"):
        adapter_at(tmp_path)
