"""Frozen matrices in few bits: the torchao's codes, exact gradients, nothing dense kept, who may do it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, to_nf4

from tests.unit.test_stages import WORDS, configured, prepared, write_own
from visft_ds.config.preflight import missing_inputs
from visft_ds.interop.adapters import LoraAdapter, adapter_of, average
from visft_ds.interop.backbones import save_backbone
from visft_ds.interop.files import open_weights
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.merge import check_base
from visft_ds.interop.peft import README, read_peft_adapter, save_peft_adapter
from visft_ds.models.eva_vit import build_backbone
from visft_ds.models.lora import inject_lora, merge_lora
from visft_ds.models.low_bit import frozen_matrices, number_of_values, store_in_few_bits
from visft_ds.ops import low_bit
from visft_ds.ops.lora import BACKENDS, lora_linear
from visft_ds.ops.low_bit import FORMATS, LowBit, low_bit_linear
from visft_ds.planner import plan_memory
from visft_ds.prepare.model import plan_groups

WIDTH = 128


def stored(
    format: str, rows: int = 96, fan_in: int = WIDTH, dtype: torch.dtype = torch.float32
) -> tuple[LowBit, Tensor]:
    weight = torch.randn(rows, fan_in, generator=torch.Generator().manual_seed(1)) * 0.02
    return LowBit(format, fan_in, dtype), weight


@pytest.mark.parametrize("format", FORMATS)
def test_codes_and_values_are_those_of_torchao(format: str) -> None:
    kind, weight = stored(format)
    packed = kind.pack(weight)
    theirs = {
        "int8": lambda: Int8Tensor.from_hp(weight, PerRow()).dequantize(),
        "fp8": lambda: Float8Tensor.from_hp(weight, torch.float8_e4m3fn, PerRow()).dequantize(),
        "nf4": lambda: to_nf4(weight, 64, WIDTH // 64).get_original_weight(),
    }[format]()
    ours = kind.unpack(packed, torch.float32)
    assert torch.equal(ours, theirs)
    assert torch.equal(kind.unpack(packed, torch.bfloat16), theirs.bfloat16())  # rounded once
    bytes_of_values = {"int8": 1.0, "fp8": 1.0, "nf4": 0.5 + 1 / 64}[format]
    scales = {"int8": 4, "fp8": 4, "nf4": 8}[format]
    assert packed.nbytes == 96 * (WIDTH * bytes_of_values + scales)
    error = float((ours - weight).norm() / weight.norm())
    assert error < {"int8": 0.01, "fp8": 0.03, "nf4": 0.11}[format]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_may_lie_at_any_byte_and_may_be_zero(format: str) -> None:
    """ZeRO-3 gathers parameters one after another into one buffer, wherever the last one ended."""
    kind, weight = stored(format)
    weight[3] = 0
    weight[5, :64] = 0
    packed = kind.pack(weight)
    buffer = torch.empty(1 + packed.numel(), dtype=torch.uint8)
    moved = buffer[1:].view_as(packed).copy_(packed)
    values = kind.unpack(moved, torch.float32)
    assert torch.equal(values, kind.unpack(packed, torch.float32)) and values.isfinite().all()
    assert float(values[3].abs().max()) < 1e-7


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for format in FORMATS:
        kind, weight = stored(format)
        packed = kind.pack(weight)
        whole = kind.unpack(packed, torch.float32)
        monkeypatch.setattr(low_bit, "_AT_ONCE", {"cpu": 7 * WIDTH, "cuda": 1})
        assert torch.equal(kind.unpack(packed, torch.float32), whole)


@pytest.mark.parametrize("format", FORMATS)
def test_the_gradient_is_that_of_the_values_and_nothing_dense_is_kept(format: str) -> None:
    kind, weight = stored(format, dtype=torch.float64)
    packed = torch.nn.Parameter(kind.pack(weight), requires_grad=False)
    dense = kind.unpack(packed, torch.float64)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    bias = torch.randn(96, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = low_bit_linear(x, packed, bias, kind)
    assert [tensor.untyped_storage().data_ptr() for tensor in kept] == [packed.untyped_storage().data_ptr()]
    given = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad(out, (x, bias), given)
    wanted = torch.autograd.grad(F.linear(x, dense, bias), (x, bias), given)
    assert torch.equal(out, F.linear(x, dense, bias))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
    few, one = packed[:3], x[0, :1].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda one: low_bit_linear(one, few, None, kind), (one,))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
@pytest.mark.parametrize("format", FORMATS)
def test_adapters_over_codes_are_adapters_over_their_values(format: str, backend: str) -> None:
    kind, weight = stored(format, rows=3 * WIDTH, dtype=torch.float64)
    packed = torch.nn.Parameter(kind.pack(weight), requires_grad=False)
    dense = kind.unpack(packed, torch.float64)
    generator = torch.Generator().manual_seed(4)
    slices = ((0, WIDTH), (2 * WIDTH, 3 * WIDTH))
    inputs = [
        torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for shape in ((7, WIDTH), (8, WIDTH), (2 * WIDTH, 4))
    ]

    def run(w: Tensor, **options: Any) -> list[Tensor]:
        x, a, b = inputs
        out = lora_linear(x, w, None, a, b, 0.5, slices, backend=backend, **options)
        return [out, *torch.autograd.grad(out.square().sum(), inputs)]

    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        x, a, b = inputs
        lora_linear(x, packed, None, a, b, 0.5, slices, backend=backend, low_bit=kind)
    assert max(kept) == max(packed.nbytes, b.nbytes) < dense.nbytes
    assert all(torch.equal(one, two) for one, two in zip(run(packed, low_bit=kind), run(dense), strict=True))


def test_a_model_keeps_its_names_and_says_what_changed(tmp_path: Path) -> None:
    full = prepared(configured(2))
    for base, worst in (("int8", 0.02), ("fp8", 0.06)):
        model = prepared(configured(2, {"visft.model.base": base}))
        names = {name: tuple(p.shape) for name, p in full.module.named_parameters()}
        found = {name: tuple(p.shape) for name, p in model.module.named_parameters()}
        assert found.keys() == names.keys() and number_of_values(model.module) == number_of_values(full.module)
        assert model.base_weights == full.base_weights
        changed = {name.removeprefix("backbone.") for name in names if names[name] != found[name]}
        assert changed == {f"{name}.weight" for name in frozen_matrices(model.module.backbone)}
        note, change = model.notes[-2:]
        assert f"frozen base as {base}: 0.0 MiB instead of 0.1" in note and "features change by" in change
        assert 0 < float(change.split("features change by ")[1].split(" %")[0]) < 100 * worst
        backbone, images = model.module.backbone, torch.randn(1, 3, 56, 56)
        change_here = (backbone(images) - full.module.backbone(images)).norm() / full.module.backbone(images).norm()
        assert 0 < change_here < worst


def test_what_trains_stays_in_full_precision() -> None:
    with pytest.raises(
        ValueError, match=r"8 matrices of the blocks train, e.g. blocks.0.attn.qkv.weight.*visft.model.base"
    ):
        plan_groups(
            configured(
                2,
                {
                    "visft.model.base": "int8",
                    "visft.lora": None,
                    "visft.param_groups": [{"name": "all", "params": "backbone.*"}],
                },
            ).visft,
            configured(2).optimizer.params,
        )
    with pytest.raises(ValueError, match=r"visft.model.compile.*must be none with visft.model.base = int8"):
        configured(2, {"visft.model.base": "int8", "visft.model.compile": "blocks", "visft.run.rehearsal": True})
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: nf4 needs rows of a multiple of 64 values, .* have 32"):
        prepared(configured(2, {"visft.model.base": "nf4"}))
    backbone = build_backbone("debug", width=64, depth=1, num_heads=2)
    inject_lora(backbone.requires_grad_(False), rank=2)
    store_in_few_bits(backbone, "nf4")
    with pytest.raises(ValueError, match="stored as nf4, which would round the update away"):
        merge_lora(backbone)


def test_without_torchao_a_run_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(2, {"visft.model.base": "int8"})
    assert not any(one.path == "torchao" for one in missing_inputs(config))
    for place in ("visft_ds.config.preflight", "visft_ds.ops.low_bit"):
        monkeypatch.setattr(f"{place}.find_spec", lambda name: None)
    (missing,) = [one for one in missing_inputs(config) if one.path == "torchao"]
    assert "visft.model.base=full" in missing.what and missing.command.startswith("pip install")
    with pytest.raises(ValueError, match="needs torchao: pip install"):
        LowBit("int8", 4, torch.float32).pack(torch.ones(2, 4))


def test_heads_of_another_storage_are_noted(tmp_path: Path) -> None:
    first = configured(1)
    heads = write_own(tmp_path, prepared(first), first, mode="sampled")
    notes = prepared(configured(2, {"visft.model.base": "int8"}), heads).notes
    assert "the detection head learnt over a base in full, this run has int8" in notes
    assert not any("learnt over" in note for note in prepared(configured(2), heads).notes)


def test_adapters_tell_which_base_they_were_trained_over(tmp_path: Path) -> None:
    backbone = build_backbone("debug", width=64, depth=1, num_heads=2)
    save_backbone(backbone, tmp_path / "base.safetensors")
    inject_lora(backbone, rank=2)
    torch.nn.init.normal_(backbone.blocks[0].attn.qkv.lora_B)
    adapter: LoraAdapter = replace(adapter_of(backbone), base_storage="nf4")
    folder = save_peft_adapter(adapter, tmp_path / "adapter", tower_of(backbone))
    assert "trained over the base stored as nf4" in (folder / README).read_text(encoding="utf-8")
    again = read_peft_adapter(folder)
    assert again.base_storage == "nf4" and again.fingerprint() == adapter.fingerprint()
    assert average([again, replace(again, base_storage="full")], [0.5, 0.5]).base_storage == "full and nf4"
    _, notes = check_base(open_weights(tmp_path / "base.safetensors"), again, allow_other=False)
    assert any("trained over the base stored as nf4; this is the full one" in note for note in notes)
    told = json.loads(open_weights(folder / "adapter_model.safetensors").metadata["visft_adapter"])
    assert told["base_storage"] == "nf4"


def test_the_planner_knows_the_storage() -> None:
    """Weights to the byte; and no product keeps its values, so activations stay as they are."""
    wide = {"visft.model.overrides": {"width": 128, "depth": 2, "num_heads": 2, "image_size": 56}}
    plans = {}
    for base in ("full", "int8", "nf4"):
        config = configured(2, {**wide, "visft.model.base": base})
        plans[base] = plan_memory(
            config, 1, precision="fp32", task="detection", vocabulary_size=WORDS.size, device=torch.device("cpu")
        )
        assert plans[base].weights == sum(p.nbytes for p in prepared(config).module.parameters())
    values = 2 * 12 * 128 * 128
    assert plans["full"].weights - plans["int8"].weights == 4 * values - (values + 4 * 2 * 9 * 128)
    assert plans["nf4"].activations == plans["int8"].activations <= plans["full"].activations
