"""Folders of PEFT, read and written without it: bit for bit what we wrote, by its formulas what others wrote."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Conv2dSame
from torch import Tensor, nn

import tests.small_timm  # noqa: F401 (registers models of these names)
from tests.random_tower import adapter_of, move_adapters, random_tower, relative, save_adapter
from visft_ds.interop import peft_folder
from visft_ds.interop.adapter import average
from visft_ds.interop.peft_folder import read_folder
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import open_weights
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import (
    adapt_layers,
    inject_lora,
    lora_layers,
    slices_of,
    targets_of,
)
from visft_ds.models.timm_backbone import build_timm

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
WIDTH = 32  # of random_tower


def _adapted(targets: tuple[str, ...] = ("q", "v")) -> EvaViT:
    model = random_tower()
    inject_lora(model, rank=3, alpha=1.5, targets=targets)
    move_adapters(model)
    return model


def _factors(*layers: str, rank: int = 4, prefix: str = "", **sizes: tuple[int, int]) -> dict[str, Tensor]:
    """Tensors as PEFT names them; `sizes`: (rows, fan in) by the last part of a name."""
    tensors = {}
    for layer in layers:
        rows, width = sizes.get(layer.rpartition(".")[2], (3 * WIDTH, WIDTH))
        tensors[f"base_model.model.{prefix}{layer}.lora_A.weight"] = torch.randn(rank, width)
        tensors[f"base_model.model.{prefix}{layer}.lora_B.weight"] = torch.randn(rows, rank)
    return tensors


def _folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """As PEFT saves it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    usual = {
        **{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["qkv"], "bias": "none"},
        **{"use_dora": False, "modules_to_save": None, "megatron_core": "megatron.core", "loftq_config": {}},
        **{"qalora_group_size": 16, "peft_version": "0.21.2", "init_lora_weights": True, "eva_config": None},
    }
    (folder / CONFIG).write_text(json.dumps(usual | config))
    return folder


@pytest.mark.parametrize("targets", [("q", "v"), ("v",), ("q", "k", "v"), ("q", "v", "proj", "fc1", "fc2")])
def test_what_we_wrote_reads_back_bit_for_bit(tmp_path: Path, targets: tuple[str, ...]) -> None:
    adapter = replace(adapter_of(_adapted(targets), "0" * 64), step=500)
    folder = save_adapter(adapter, tmp_path / "adapter")
    assert sorted(file.name for file in folder.iterdir()) == [CONFIG, WEIGHTS]
    for path in (folder, folder / CONFIG, folder / WEIGHTS):
        again = read_adapter(path)
        assert replace(again, model={}) == replace(adapter, model={})
        assert again.slices == adapter.slices
        assert again.model is not None and again.model["preset"] == "eva_e" and again.model["width"] == WIDTH
        assert again.fingerprint() == adapter.fingerprint()
        assert all(torch.equal(value, again.tensors[name]) for name, value in adapter.tensors.items())
    second = save_adapter(replace(again, model=adapter.model), tmp_path / "again")
    for name in (CONFIG, WEIGHTS):
        assert (second / name).read_bytes() == (folder / name).read_bytes()


def test_what_peft_saved_again_is_a_lora_of_whole_layers(tmp_path: Path) -> None:
    """It drops our header: the change stays, slices, base and targets are not known any more."""
    model = _adapted()
    folder = save_adapter(adapter_of(model, "0" * 64), tmp_path / "adapter")
    ours = read_folder(folder)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)
    read = read_folder(folder)
    assert (read.model, read.base, read.targets) == (None, None, ()) and read.rank == 6
    assert read.on(random_tower()).targets == ("blocks.*.attn.qkv",)
    for name in ours.weights():
        assert torch.allclose(read.delta(name), ours.delta(name), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, {"qkv": 2.0, "fc1": 2.0}),
        ({"use_rslora": True}, {"qkv": 4.0, "fc1": 4.0}),
        ({"lora_alpha": 1.5, "use_dora": None}, {"qkv": 0.375, "fc1": 0.375}),
        ({"r": 2, "rank_pattern": {"fc1|qkv": 4}, "alpha_pattern": {"fc1": 3}}, {"qkv": 2.0, "fc1": 0.75}),
        ({"alpha_pattern": {r"blocks\.0\.mlp\.fc1": 0.0, "fc1": 1}}, {"qkv": 2.0, "fc1": 0.25}),
    ],
)
def test_a_folder_of_peft_changes_weights_by_its_formula(
    tmp_path: Path, config: dict[str, Any], scale: dict[str, float]
) -> None:
    tensors = _factors("blocks.1.attn.qkv", "blocks.1.mlp.fc1", fc1=(2 * WIDTH, WIDTH))
    adapter = read_folder(_folder(tmp_path / "peft", tensors, **config))
    model = random_tower()
    adapter.install(model)
    assert adapter.on(random_tower()).targets == ("blocks.1.attn.qkv", "blocks.1.mlp.fc1")
    for name, layer in lora_layers(model).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        expected = scale[name.rpartition(".")[2]] * b @ a
        assert relative(adapter.delta(f"{name}.weight"), expected) < 1e-6
        assert relative(layer.scale * layer.lora_B @ layer.lora_A, expected) < 1e-6


def test_different_ranks_are_padded_by_what_cannot_learn(tmp_path: Path) -> None:
    """A run has one rank: zeros in both factors have no gradient, so that no layer gains freedom."""
    tensors = _factors("blocks.0.attn.qkv") | _factors("blocks.1.attn.qkv", rank=2)
    folder = _folder(tmp_path / "peft", tensors, rank_pattern={r"blocks\.1\.attn\.qkv": 2})
    model = random_tower()
    read_folder(folder).install(model)
    model.tokens(torch.randn(1, 3, 28, 28))[0].sum().backward()
    layer = lora_layers(model)["blocks.1.attn.qkv"]
    assert layer.rank == 4 and layer.scale == 2.0
    for learns, is_padded in (
        (layer.lora_A.grad, layer.lora_A.grad[2:]),
        (layer.lora_B.grad, layer.lora_B.grad[:, 2:]),
    ):
        assert learns.any() and not is_padded.any()
    plain, mixed = (read_folder(folder), read_folder(folder))
    assert average([plain, mixed]).rank == 8


@pytest.mark.parametrize("prefix", ["visual.trunk.", "visual.", ""])
def test_names_behind_the_prefix_of_a_model_around_the_tower(tmp_path: Path, prefix: str) -> None:
    names = ("blocks.0.attn.qkv", "blocks.1.attn.qkv")
    adapter = read_folder(_folder(tmp_path / "peft", _factors(*names, prefix=prefix)))
    ours = adapter.on(random_tower())
    assert tuple(ours.layers) == names and ours.model is not None and ours.targets == ("blocks.*.attn.qkv",)
    assert slices_of(random_tower(), ours.targets) == {name: ((0, 3 * WIDTH),) for name in names}


@pytest.mark.parametrize(
    ("model", "q", "v", "fc2"),
    [
        (
            "vit_test_plus_patch8_dinov3_qkvb",
            "model.layer.1.attention.q_proj",
            "model.layer.1.attention.v_proj",
            "model.layer.1.mlp.down_proj",
        ),
        (
            "vit_test_patch8_siglip_32",
            "vision_model.encoder.layers.1.self_attn.q_proj",
            "vision_model.encoder.layers.1.self_attn.v_proj",
            "vision_model.encoder.layers.1.mlp.fc2",
        ),
    ],
)
def test_names_of_transformers_become_rows_of_a_fused_qkv(
    tmp_path: Path, model: str, q: str, v: str, fc2: str
) -> None:
    backbone = build_timm(model)
    width = backbone.width
    inner = backbone.get_submodule("blocks.1.mlp.fc2").weight.shape[1]
    sizes = {"q_proj": (width, width), "v_proj": (width, width), fc2.rpartition(".")[2]: (width, inner)}
    tensors = _factors(v, fc2, q, **sizes)
    adapter = read_folder(_folder(tmp_path / "peft", tensors)).on(backbone)
    assert adapter.targets == (), "no targets of a run adapt q of one block alone"
    assert adapter.layers["blocks.1.attn.qkv"][:2] == (3 * width, ((0, width), (2 * width, 3 * width)))
    change = adapter.delta("blocks.1.attn.qkv.weight").chunk(3)
    for rows, name in ((change[0], q), (change[2], v), (adapter.delta("blocks.1.mlp.fc2.weight"), fc2)):
        a, b = (tensors[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        assert relative(rows, 2 * b @ a) < 1e-6
    assert not change[1].any()
    other = _factors(q.replace("vision_model", "text_model").replace("model.layer", "decoder.layer"), **sizes)
    with pytest.raises(ValueError, match="are none of"):
        read_folder(_folder(tmp_path / "text", other)).install(backbone)


QKV = "base_model.model.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"use_dora": True}, {}, "use_dora: true: DoRA scales"),
        ({"bias": "all"}, {}, 'bias: "all": it has biases'),
        ({"lora_bias": True}, {}, "biases"),
        ({"modules_to_save": ["norm"]}, {}, "whole layers"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "'pissa_niter_4' changed the base weights"),
        ({"init_lora_weights": "olora"}, {}, "changed the base weights"),
        ({"a_key_of_next_year": 3}, {}, "a_key_of_next_year: 3: it is no plain LoRA; let PEFT merge it"),
        ({"target_parameters": ["qkv.weight"]}, {}, "target_parameters"),
        ({"peft_type": "IA3"}, {}, "peft_type: Input should be 'LORA', not 'IA3'"),
        ({"r": 0}, {}, "r: "),
        ({"lora_alpha": "8"}, {}, "lora_alpha: "),
        ({"rank_pattern": {"(": 4}}, {}, "rank_pattern: .*missing \\)"),
        ({"r": 3}, {}, r"qkv is \(4, 32\) and lora_B \(96, 4\), which is not rank 3"),
        (
            {},
            {f"{QKV}.lora_magnitude_vector.weight": torch.zeros(3)},
            "lora_magnitude_vector.weight is no part",
        ),
        ({}, {"base_model.model.norm.bias": torch.zeros(3)}, "norm.bias is no part"),
        ({}, {f"{QKV}.lora_A.weight": torch.full((4, WIDTH), math.nan)}, "NaN"),
        ({}, {f"{QKV}.lora_A.weight": torch.zeros(4, 1, WIDTH)}, r"is \(4, 1, 32\)"),
        (
            {},
            {"base_model.model.x.lora_A.weight": torch.zeros(4, 2)},
            "one of lora_A and lora_B of x is missing",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused_with_the_reason(
    tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor], message: str
) -> None:
    folder = _folder(tmp_path / "peft", _factors("blocks.0.attn.qkv") | tensors, **config)
    with pytest.raises(ValueError, match=message) as refused:
        read_folder(folder)
    assert str(refused.value).startswith(str(folder)) and "\n" not in str(refused.value)


def test_patterns_that_never_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_folder, "_MOST_SECONDS", 0.5)
    folder = _folder(tmp_path / "peft", _factors("a" * 60), alpha_pattern={"(a+)+b": 4})
    with pytest.raises(ValueError, match=r"alpha_pattern: its patterns took 0.5 s; write names of layers"):
        read_folder(folder)


def test_folders_without_a_lora_for_this_model_are_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "peft", _factors("layers.0.q_proj"))
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj.*are none of"):
        read_folder(folder).install(random_tower())
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle"):
        read_folder(folder)
    (folder / CONFIG).unlink()
    with pytest.raises(ValueError, match=f"no adapter in it, which has {CONFIG}"):
        read_folder(folder)
    grouped = _factors("blocks.0.0.conv_dw", conv_dw=(32, 1), prefix="")
    grouped = {name: value[:, :, None, None] for name, value in grouped.items()}
    model = build_timm("test_efficientnet", device="meta")
    depthwise = next(name for name, layer in model.named_modules() if getattr(layer, "groups", 1) > 1)
    named = {name.replace("blocks.0.0.conv_dw", depthwise): value for name, value in grouped.items()}
    with pytest.raises(ValueError, match=f"{depthwise} is a grouped convolution"):
        read_folder(_folder(tmp_path / "grouped", named)).install(model)


def test_a_header_that_is_wrong_is_named_with_the_file(tmp_path: Path) -> None:
    model = _adapted()
    folder = save_adapter(adapter_of(model), tmp_path / "adapter")
    file = folder / WEIGHTS
    tensors, header = load_file(file), json.loads(open_weights(file).metadata["visft_adapter"])
    slices = header["slices"]
    layer = "blocks.0.attn.qkv"
    for key, value, message in (
        ("version", 2, "version"),
        ("targets", [3], "targets"),
        ("model", 7, "model"),
        ("model", {"preset": "debug", "depth": 10**6}, "model.depth"),
        ("model", {**header["model"], "layers": [0]}, "and this model is eva_e"),
        ("slices", {}, "slices"),
        ("slices", {"absent": slices[layer]}, "its header says absent"),
        ("slices", {**slices, layer: [[0.5, 8], [64, 96]]}, "slices"),
        ("slices", {**slices, layer: [[64, 96], [0, 32]]}, "are none of 96 rows"),
        ("slices", {**slices, layer: [[0, 32], [64, 97]]}, "are none of 96 rows"),
        ("slices", {**slices, layer: [[0, 32], [32, 64]]}, "not 0 outside of the slices"),
        ("base", 5, "base"),
        ("more", 1, "more"),
    ):
        save_file(tensors, file, {"visft_adapter": json.dumps({**header, key: value})})
        with pytest.raises(ValueError, match=message) as refused:
            read_adapter(folder).install(random_tower())
        assert str(refused.value).startswith(str(file)) and "\n" not in str(refused.value)


@pytest.mark.parametrize(("side", "stride", "dilation"), [(15, 2, 1), (16, 2, 1), (16, (1, 3), 2)])
def test_a_convolution_that_pads_by_the_image_is_adapted(side: int, stride: Any, dilation: int) -> None:
    """As PEFT does: the stems of EfficientNets that come from TensorFlow."""
    layer = Conv2dSame(3, 5, (3, 4), stride=stride, dilation=dilation)
    model = nn.Sequential(layer)
    images = torch.randn(2, 3, side, side + 1)
    adapt_layers(model, {"0": ((0, 5),)}, rank=2, alpha=3.0)
    adapted = lora_layers(model)["0"]
    assert torch.equal(model(images), layer(images))
    nn.init.normal_(adapted.lora_B)
    with torch.no_grad():
        expected = model(images)
        layer.weight += 1.5 * (adapted.lora_B @ adapted.lora_A.flatten(1)).view_as(layer.weight)
        adapted.lora_B.zero_()
        assert relative(layer(images), expected) < 1e-6


def test_targets_say_what_is_adapted() -> None:
    model = random_tower()
    for targets in (("q", "v"), ("k", "fc1"), ("blocks.*.attn.qkv",), ("blocks.1.mlp.fc2",)):
        assert targets_of(model, slices_of(model, targets)) == targets
