"""Backbone and head weights: every known layout gives the same parameters, everything else is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from visft_ds.interop.backbones import load_backbone, read_tensor
from visft_ds.interop.files import all_finite, open_weights

from tests.parallel.start_case import peak
from tests.random_tower import save_backbone
from visft_ds.interop.layouts import LAYOUTS, base_parameters, find_layout, tower_in, tower_names, tower_of
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora

PREFIXES = {
    "open_clip": "visual.trunk.",
    "eva_clip": "visual.",
    "visft": "visft_heads.backbone.0.",
    "lavis": "visual_encoder.",
    "timm": "",
}
# What real files of these layouts carry beside the tower.
BESIDE = {
    "open_clip": ["text.ln_final.weight", "logit_scale", "visual.trunk.head.weight", "visual.trunk.cls_token"],
    "eva_clip": [
        *("text.transformer.resblocks.0.ln_1.bias", "logit_scale", "visual.head.bias", "visual.cls_token"),
        *("transformer.resblocks.0.ln_1.bias", "token_embedding.weight", "positional_embedding", "ln_final.bias"),
    ],
    "visft": ["visft_heads.input_proj.weight", "det_losses.empty_weight"],
    "lavis": ["Qformer.bert.embeddings.position_ids", "query_tokens", "ln_vision.weight", "visual_encoder.cls_token"],
    "timm": ["cls_token", "head.weight", "head.bias"],
}


def _tiny(seed: int = 0, **overrides: object) -> EvaViT:
    sizes = {"width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28, **overrides}
    model = build_backbone("debug", seed=None, **sizes)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def _weights(model: EvaViT) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base_parameters(model).items()}


def _equal(model: EvaViT, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in base_parameters(model).items())


@pytest.mark.parametrize("layout", PREFIXES)
def test_every_layout_loads_and_every_key_is_accounted_for(tmp_path: Path, layout: str) -> None:
    source = _tiny(1)
    tensors = {PREFIXES[layout] + name: value for name, value in _weights(source).items()}
    tensors |= {name: torch.zeros(3) for name in BESIDE[layout]}
    torch.save({"model": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "w.pth")
    model = _tiny(2)
    summary = load_backbone(model, tmp_path / "w.pth")
    assert _equal(model, _weights(source))
    assert f"layout {layout}, {len(_weights(source))} tensors" in summary and "merged" not in summary
    assert sum(map(int, re.findall(r"ignored (\d+) ", summary))) == len(BESIDE[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_files_read_back_exactly(tmp_path: Path, layout: str) -> None:
    source, path = _tiny(1, class_token=True, post_norm=True), tmp_path / "w.safetensors"
    save_backbone(source, path, layout)
    model = _tiny(2, class_token=True, post_norm=True)
    assert f"layout {layout}," in load_backbone(model, path) and _equal(model, _weights(source))
    file = open_weights(path)
    assert tower_in(file, find_layout(file)) == tower_of(source), "number of heads and norm placement must survive"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_are_cast_and_the_parameters_stay_the_same_objects(tmp_path: Path, dtype: torch.dtype) -> None:
    source, path = _tiny(1), tmp_path / "w.safetensors"
    save_backbone(source, path, dtype=dtype)
    model = _tiny(2)
    before = list(model.parameters())
    summary = load_backbone(model, path)
    assert _equal(model, {name: value.to(dtype).float() for name, value in _weights(source).items()})
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert f"({len(before)} {str(dtype).removeprefix('torch.')})" in summary


def test_adapters_in_the_model_are_left_alone(tmp_path: Path) -> None:
    source, model = _tiny(1), _tiny(2)
    save_backbone(source, tmp_path / "w.safetensors")
    inject_lora(model, rank=2)
    before = model.get_parameter("blocks.1.attn.qkv.lora_A").clone()
    load_backbone(model, tmp_path / "w.safetensors")
    assert _equal(model, _weights(source)) and torch.equal(model.get_parameter("blocks.1.attn.qkv.lora_A"), before)


def test_missing_unexpected_and_misshapen_are_all_listed(tmp_path: Path) -> None:
    tensors = _weights(_tiny(1))
    del tensors["norm.bias"]
    tensors["blocks.0.attn.qkv.bias"] = torch.zeros(96)
    tensors["blocks.1.norm1.weight"] = torch.zeros(31)
    save_file(tensors, tmp_path / "w.safetensors")
    model = _tiny(2)
    before = _weights(model)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_backbone(model, tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "Missing (1): norm.bias." in message and "Unexpected (1): blocks.0.attn.qkv.bias." in message
    assert "blocks.1.norm1.weight (31,) in the file, (32,) wanted" in message
    assert _equal(model, before)


def test_files_that_hold_no_usable_tower(tmp_path: Path) -> None:
    weights, path = _weights(_tiny(1)), tmp_path / "w.pt"
    cases: list[tuple[dict[str, Tensor], str]] = [
        ({"visual.blocks.0.attn.qkv.lora_A": torch.zeros(4, 8)}, "this is a LoRA adapter"),
        ({"conv1.weight": torch.zeros(1)}, "no EVA vision tower"),
        ({f"{prefix}{name}": value for prefix in ("", "visual.") for name, value in weights.items()}, "more than one"),
        (weights | {"norm.weight": torch.full((32,), float("nan"))}, "norm.weight holds NaN"),
        (weights | {"blocks.0.attn.qkv.weight": torch.ones(96, 32, dtype=torch.int8)}, "quantised"),
        (weights | {"blocks.0.attn.qkv.lora_A": torch.zeros(4, 32)}, "LoRA tensors beside the tower"),
    ]
    for tensors, message in cases:
        torch.save(tensors, path)
        with pytest.raises(ValueError, match=message):
            load_backbone(_tiny(2), path)


@pytest.mark.parametrize(("name", "tensors", "parameters"), [("eva_e", 837, 4348719104), ("eva_g", 525, 1011144704)])
def test_name_table_is_the_models(name: str, tensors: int, parameters: int) -> None:
    """Published counts of the two towers without class token and head."""
    model = build_backbone(name, device="meta")
    names = tower_names(tower_of(model))
    assert names == {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert len(names) == tensors and sum(torch.Size(shape).numel() for shape in names.values()) == parameters
    assert tower_of(model).preset() == name


def test_a_tensor_that_is_read_is_alone_in_memory(tmp_path: Path) -> None:
    """Of 64 MiB in 16 bit. On a CPU torch makes an fp32 copy of all that it sums in fp32: twice as much again."""
    count = 2**25
    save_file({"one": torch.full((count,), 0.5, dtype=torch.float16)}, tmp_path / "one.safetensors")
    file, sizes = open_weights(tmp_path / "one.safetensors"), dict[str, int]()
    with peak(sizes, "read"):
        value = read_tensor(file, "one", torch.bfloat16)
    assert value.nbytes == 2 * count <= sizes["read peak"] + 2**20
    assert sizes["read peak"] < 2 * count + 2**24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("place", [0, 5_000_000, -1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_found_anywhere(dtype: torch.dtype, place: int, bad: float) -> None:
    values = torch.ones(2500, 2600, dtype=dtype)
    assert all_finite(values) and all_finite(values[0, 0]) and all_finite(values[:0])
    assert all_finite(values.t())
    values.view(-1)[place] = bad
    assert not all_finite(values) and not all_finite(values.t())
