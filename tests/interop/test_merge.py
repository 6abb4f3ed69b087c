"""Merging: the file computes what base + adapter computes, nothing is merged twice or in silence, losses are told."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.adapter_bounds import same_change
from tests.published import save_published_lora
from tests.random_tower import SIZES, fold_adapters, move_adapters, random_tower, save_backbone
from tools.merge_lora import main
from visft_ds.interop.adapter import Adapter, adapter_of
from visft_ds.interop.backbones import load_backbone
from visft_ds.interop.files import open_weights, sha256_file
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import merge_into_file, merge_tolerance, read_adapter, verify_merge
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora, lora_parameters


def _case(folder: Path, *, size: float = 0.3, targets: tuple[str, ...] = ("q", "v")) -> tuple[Path, Adapter, EvaViT]:
    """(base file in EVA-CLIP form with a text tower, adapter, model with the adapter)."""
    model = random_tower(class_token=False)
    save_backbone(model, folder / "plain.safetensors", "eva_clip")
    extra = {
        "text.ln_final.weight": torch.randn(5).bfloat16(),
        "logit_scale": torch.tensor(4.6),
        "visual.cls_token": torch.randn(1, 1, 32).half(),
        "visual.head.weight": torch.randn(7, 32).half(),
        "visual.head.bias": torch.randn(7).half(),
    }
    base = folder / "base.safetensors"
    tower = open_weights(folder / "plain.safetensors").metadata["tower"]
    save_file(load_file(folder / "plain.safetensors") | extra, base, {"tower": tower})
    inject_lora(model, rank=4, alpha=2.0, targets=targets)
    move_adapters(model, spread=size)
    return base, adapter_of(model, base_sha256=sha256_file(base)), model


@pytest.mark.parametrize("targets", [("q", "v"), ("k", "proj", "fc1", "fc2")])
def test_merged_file_equals_a_merged_model(tmp_path: Path, targets: tuple[str, ...]) -> None:
    base, adapter, model = _case(tmp_path, targets=targets)
    report = merge_into_file(base, adapter, tmp_path / "out.safetensors", layout="timm")
    fold_adapters(model)
    written = load_file(tmp_path / "out.safetensors")
    lora = lora_parameters(model)
    for name, parameter in model.named_parameters():
        # One fp32 addition either way; the two products may add in another order.
        if name not in lora:
            assert torch.allclose(written[name], parameter, rtol=0, atol=1e-6), name
    assert set(written) == {name for name in dict(model.named_parameters()) if name not in lora} | {
        "cls_token",
        "head.weight",
        "head.bias",
    }
    assert sorted(report.left_out) == ["logit_scale", "text.ln_final.weight"]
    assert report.total.retained == pytest.approx(1.0, abs=1e-4) and report.total.error < 1e-4


def test_eva_clip_form_carries_everything_else_untouched(tmp_path: Path) -> None:
    base, adapter, _ = _case(tmp_path)
    out = tmp_path / "out.safetensors"
    report = merge_into_file(base, adapter, out, layout="eva_clip", dtype=torch.float16)
    before, after = load_file(base), load_file(out)
    assert set(before) == set(after) and not report.left_out
    # The text side of this base is one tensor: EVA-CLIP would read it, and leave the rest random.
    assert any("leave at random text tower" in note for note in report.notes)
    changed = {f"visual.{name}" for name in adapter.weights()}
    for name, value in before.items():
        carried = not name.startswith("visual.") or name.removeprefix("visual.") in (
            "cls_token",
            "head.weight",
            "head.bias",
        )
        assert after[name].dtype == (value.dtype if carried else torch.float16), name
        if name not in changed:
            assert torch.equal(after[name], value if carried else value.half()), name
        else:
            assert not torch.equal(after[name], value.half()), name
    assert open_weights(out).metadata["lora_merged"] == "true"
    assert open_weights(out).metadata["base_sha256"] == sha256_file(base)


def test_scale(tmp_path: Path) -> None:
    base, adapter, _ = _case(tmp_path)
    merge_into_file(base, adapter.scaled(-0.5), tmp_path / "out.safetensors", layout="eva_clip")
    name = "blocks.1.attn.qkv.weight"
    difference = load_file(tmp_path / "out.safetensors")[f"visual.{name}"] - load_file(base)[f"visual.{name}"]
    assert torch.allclose(difference, -0.5 * adapter.delta(name), atol=1e-6)


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    base, adapter, _ = _case(tmp_path)
    out = tmp_path / "out.safetensors"
    merge_into_file(base, adapter, out)
    kept = sha256_file(out)
    other = tmp_path / "other.safetensors"
    save_backbone(build_backbone("debug", depth=3, width=32, num_heads=2, image_size=28), tmp_path / "deep.safetensors")
    elsewhere = replace(adapter, base_sha256="f" * 64)
    cases: list[tuple[Path, Adapter, Path, str]] = [
        (base, adapter, out, "not overwritten"),
        (out, adapter, other, "count it twice"),
        (base, elsewhere, other, r"trained on the base with sha256 ffff.*--allow-other-base"),
        (tmp_path / "deep.safetensors", adapter, other, r"depth 2; this tower has width 32, depth 3"),
        (base, adapter, tmp_path / "other.pt", "written as .safetensors only"),
    ]
    for given_base, given_adapter, target, message in cases:
        with pytest.raises(ValueError, match=message):
            merge_into_file(given_base, given_adapter, target)
    report = merge_into_file(base, elsewhere, other, allow_other_base=True)
    assert any("ffff" in note for note in report.notes)
    assert sha256_file(out) == kept and not [name for name in os.listdir(tmp_path) if "tmp-" in name]


def _share(base_dtype: torch.dtype, out_dtype: torch.dtype, size: float, folder: Path) -> tuple[float, float, bool]:
    base, adapter, _ = _case(folder, size=size)
    rounded: dict[str, Tensor] = {name: value.to(base_dtype) for name, value in load_file(base).items()}
    save_file(rounded, folder / "rounded.safetensors")
    given = replace(adapter, base_sha256=None)
    report = merge_into_file(folder / "rounded.safetensors", given, folder / "out.safetensors", dtype=out_dtype)
    return report.total.retained, report.total.error, report.total.lost


def test_a_small_change_drowns_in_bfloat16_and_is_reported(tmp_path: Path) -> None:
    """Numbers near 0.2 are 2^-10 apart in bf16, 2^-13 in fp16; this change is about 2e-4 large."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    retained, _, lost = _share(torch.bfloat16, torch.bfloat16, 2e-4, folders[0])
    assert retained < 0.9 and lost
    # Rounding a finer base is dither: the projection looks fine, and the error alone shows the loss.
    retained, error, lost = _share(torch.float32, torch.bfloat16, 2e-4, folders[1])
    assert abs(retained - 1) < 0.3 and error > 0.5 and lost
    retained, error, lost = _share(torch.bfloat16, torch.float32, 2e-4, folders[2])
    assert retained == pytest.approx(1, abs=1e-3) and error < 1e-2 and not lost


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_verification_passes_a_right_file_and_fails_a_wrong_one(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter, model = _case(tmp_path)
    out, tower = tmp_path / "out.safetensors", replace(tower_of(model), class_token=True)
    merge_into_file(base, adapter, out, dtype=dtype)
    result = verify_merge(base, adapter, out, tower, dtype=dtype)
    assert result.passed and result.effect > 3 * result.tolerance
    wrong = tmp_path / "wrong.safetensors"
    merge_into_file(base, adapter.scaled(0.0), wrong, dtype=dtype)
    assert not verify_merge(base, adapter, wrong, tower, dtype=dtype).passed


def test_verification_tolerance_holds_for_a_deep_tower(tmp_path: Path) -> None:
    """Rounding errors add up over the blocks, slowly: the allowance covers them and stays narrow."""
    model = build_backbone("debug", **{**SIZES, "depth": 24}, post_norm=True)
    save_backbone(model, tmp_path / "base.safetensors")
    inject_lora(model, rank=2)
    for dtype in (torch.float16, torch.bfloat16):
        out = tmp_path / f"{dtype}.safetensors"
        merge_into_file(tmp_path / "base.safetensors", adapter_of(model), out, dtype=dtype)
        result = verify_merge(tmp_path / "base.safetensors", adapter_of(model), out, tower_of(model), dtype=dtype)
        assert merge_tolerance(dtype) / 20 < result.relative < merge_tolerance(dtype) / 2


def test_adapters_are_read_from_folder_file_and_published_form(tmp_path: Path) -> None:
    _, adapter, model = _case(tmp_path)
    folder = save_peft_adapter(adapter, tmp_path / "adapter", tower_of(model))
    save_published_lora(adapter, tmp_path / "eva_e_lora_5000.pt")
    for path in (folder, folder / "adapter_model.safetensors", tmp_path / "eva_e_lora_5000.pt"):
        assert same_change(read_adapter(path), adapter)


def test_the_tool_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, model = _case(tmp_path)
    folder = save_peft_adapter(adapter, tmp_path / "adapter", tower_of(model))
    out = tmp_path / "out.safetensors"
    words = ("--base", base, "--adapter", folder, "--out", out, "--verify")
    assert main([*map(str, words)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert [line.split()[:2] for line in lines if line.split()[0] in ("0", "1", "all")] == [
        ["0", "100.0%"],
        ["1", "100.0%"],
        ["all", "100.0%"],
    ]
    assert any(line.startswith("verify   random images") for line in lines) and "warning" not in printed
    load_backbone(random_tower(), out)
    twice = tmp_path / "twice.safetensors"
    assert main(["--base", str(out), "--adapter", str(folder), "--out", str(twice)]) == 2
    assert "count it twice" in capsys.readouterr().err
    assert not twice.exists()


def test_without_adapter_the_base_is_written_in_another_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter, _ = _case(tmp_path)
    out = tmp_path / "out.safetensors"
    assert main(["--base", str(base), "--out", str(out), "--verify"]) == 0
    before, after = load_file(base), load_file(out)
    inner = {name: name.removeprefix("visual.") for name in before if name.startswith("visual.")}
    assert set(after) == set(inner.values())
    assert all(torch.equal(before[name].float(), after[new].float()) for name, new in inner.items())
    assert "no change" not in capsys.readouterr().out
    # What was trained on the base belongs to the same values in another form, not to rounded ones.
    assert not merge_into_file(out, adapter, tmp_path / "merged.safetensors").notes
    half = tmp_path / "half.safetensors"
    assert main(["--base", str(base), "--out", str(half), "--dtype", "bf16"]) == 0
    with pytest.raises(ValueError, match="was trained on the base with sha256"):
        merge_into_file(half, adapter, tmp_path / "other.safetensors")
    # A merged file stays one.
    assert main(["--base", str(tmp_path / "merged.safetensors"), "--out", str(tmp_path / "again.safetensors")]) == 0
    with pytest.raises(ValueError, match="count it twice"):
        merge_into_file(tmp_path / "again.safetensors", adapter, tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_a_full_disk_is_told_with_path_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base, _, _ = _case(tmp_path)
    before = sorted(os.listdir(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    given = ["--base", str(base), "--out", str(tmp_path / name), "--format", "eva_clip"]
    assert main(given) == 2
    size = base.stat().st_size / 1e6
    told = (
        rf"{tmp_path / name} cannot be written: No space left on device, {size:.1f} MB are to be written \(.* MB free\)"
    )
    assert re.search(told, capsys.readouterr().err) and sorted(os.listdir(tmp_path)) == before
