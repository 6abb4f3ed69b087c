"""Backbone weights: every known layout gives the same parameters, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.random_tower import build_backbone, header_of, random_tower
from visft_ds.interop import layouts
from visft_ds.interop.layouts import (
    MODEL,
    base_parameters,
    fill,
    load_backbone,
    model_in,
    model_of,
    open_backbone,
)
from visft_ds.interop.weights import open_weights
from visft_ds.models.eva_vit import EvaViT

#: Prefix -> what real files of these layouts carry beside the tower.
LAYOUTS = {
    "visual.trunk.": [
        "text.ln_final.weight",
        "logit_scale",
        "visual.trunk.head.weight",
        "visual.trunk.cls_token",
    ],
    "visual.": ["text.transformer.resblocks.0.ln_1.bias", "token_embedding.weight", "visual.cls_token"],
    "visft_heads.backbone.0.": ["visft_heads.input_proj.weight", "det_losses.empty_weight"],
    "visual_encoder.": [
        "Qformer.bert.embeddings.position_ids",
        "ln_vision.weight",
        "visual_encoder.cls_token",
    ],
    "": ["cls_token", "head.weight", "head.bias"],
}


def _weights(model: EvaViT) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in base_parameters(model).items()}


def _equal(model: EvaViT, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in base_parameters(model).items())


@pytest.mark.parametrize("prefix", LAYOUTS)
def test_every_layout_loads(tmp_path: Path, prefix: str) -> None:
    source, model = random_tower(1, class_token=False), random_tower(2, class_token=False)
    tensors = {prefix + name: value for name, value in _weights(source).items()}
    tensors |= {name: torch.zeros(3) for name in LAYOUTS[prefix]}
    torch.save({"model": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "w.pth")
    fill(model, open_backbone(model, tmp_path / "w.pth"))
    assert _equal(model, _weights(source))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    model, path = random_tower(1), tmp_path / "w.safetensors"
    weights = _weights(model)
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({"norm.bias": None}, "norm.bias is missing"),
        ({"blocks.0.attn.qkv.bias": torch.zeros(96)}, "blocks.0.attn.qkv.bias is unexpected"),
        ({"blocks.0.attn.qkv.lora_A": torch.zeros(4, 32)}, "lora_A is unexpected"),
        ({"blocks.1.norm1.weight": torch.zeros(31)}, r"norm1.weight is \(31,\), not \(32,\)"),
        ({"blocks.0.attn.qkv.weight": torch.ones(96, 32, dtype=torch.int8)}, "quantised"),
        ({"norm.weight": torch.full((32,), float("nan"))}, "norm.weight holds NaN"),
        ({name: None for name in weights}, "no vision tower"),
    ]
    for changes, message in cases:
        tensors = {name: value for name, value in {**weights, **changes}.items() if value is not None}
        save_file(tensors, path, header_of(model))
        with pytest.raises(ValueError, match=message):
            load_backbone(path, model_of(model))


def test_a_header_that_the_tensors_do_not_bear_out_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes of gigabytes, of the wrong type, and of another kind of model."""
    model, path = random_tower(1), tmp_path / "w.safetensors"
    told, weights = model_of(model), _weights(model)
    allocate = layouts.built

    def built(description: dict[str, object], device: str = "cpu") -> object:
        assert device == "meta", f"{description} takes memory"
        return allocate(description, device)

    monkeypatch.setattr(layouts, "built", built)
    for key, value, message in (
        ("depth", 1_000_000, "depth: Input should be less than or equal to 1000, not 1000000"),
        ("depth", -1, "depth"),
        ("depth", 3, "blocks.2.norm1.weight is missing"),
        ("width", 10_000_000, r"pos_embed is \(1, 5, 32\), not \(1, 5, 10000000\)"),
        ("width", 2**70, "width"),
        ("width", "32", "width: Input should be a valid integer, not '32'"),
        ("num_heads", 0, "num_heads"),
        ("num_heads", 5, "num_heads must divide the width"),
        ("mlp_ratio", 1e308, "overflow|Overflow|infinity"),
        ("image_size", 10**9, "image_size"),
        ("preset", "timm:resnet18", "is for towers of EVA"),
        ("preset", "../x", "preset"),
        ("preset", 3, "preset"),
        ("layers", [9], "9"),
        ("layers", "all", "layers"),
        ("\x1b[2J", 1, "Extra inputs are not permitted"),
    ):
        save_file(weights, path, {MODEL: json.dumps({**told, key: value})})
        with pytest.raises(ValueError, match=message) as refused:
            load_backbone(path)
        assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"), [("eva_e", 837, 4348719104), ("eva_g", 525, 1011144704)]
)
def test_published_towers_are_known_by_their_sizes(
    tmp_path: Path, name: str, tensors: int, parameters: int
) -> None:
    """Counts as published, without class token and head."""
    model = build_backbone(name, device="meta")
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert (
        len(shapes) == tensors and sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    )
    known = {
        f"visual.{key}": torch.empty(shapes[key], dtype=torch.int8)
        for key in ("pos_embed", "patch_embed.proj.weight")
    }
    save_file(known, tmp_path / "w.safetensors")
    assert model_in(open_weights(tmp_path / "w.safetensors")) == {"preset": name} == model_of(model)
