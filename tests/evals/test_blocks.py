"""Models read after a block, against the libraries' own inner features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.clip_case import SIDE, make_clip, save_clip
from tests.random_tower import adapter_of, merge, move_adapters, relative, save_adapter
from visft_ds.evals.judge.encoders import KINDS_WITHOUT_TEXT
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
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
    """An adapter on both blocks, read in front of the second: base + adapter at a scale, and what is merged
    of it.
    """
    path, images = save_clip(make_clip(), tmp_path / "clip.safetensors"), torch.randn(1, 3, SIDE, SIDE)
    _, adapter = _adapted(tmp_path, str(path))
    merge(path, adapter.scaled(0.5), tmp_path / "merged.safetensors")
    first = _read(f"{path}+{tmp_path}/adapter#0@0.5", images)["patches"]
    assert relative(_read(f"merged={tmp_path}/merged.safetensors#0", images)["patches"], first) < 1e-5
    assert relative(_read(f"{path}#0", images)["patches"], first) > 1e-3
    # What was trained up to a block is read there, by what the adapter and the header of the merged file say.
    backbone, adapter = _adapted(tmp_path, f"{path}#0")
    merge(path, adapter, tmp_path / "short.safetensors")
    expected = backbone(images)[0]
    for model in (f"{path}+{tmp_path}/adapter", f"{tmp_path}/short.safetensors"):
        assert relative(_read(model, images)["patches"], expected) < 1e-5
    assert relative(_read(f"{tmp_path}/short.safetensors#1", images)["patches"], expected) > 1e-2


@pytest.mark.parametrize(("name", "index"), [("test_vit", 2), ("test_efficientnet", 3)])
@torch.no_grad()
def test_models_of_timm(tmp_path: Path, name: str, index: int) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    images = torch.randn(1, 3, 160, 160)
    is_vit = name == "test_vit"
    options = {"norm": True, "return_prefix_tokens": True} if is_vit else {}
    (expected,) = model.forward_intermediates(images, indices=[index], intermediates_only=True, **options)
    expected, token = (expected[0], expected[1][:, 0]) if is_vit else (expected, expected.mean(dim=(2, 3)))
    actual = _read(f"timm:{name}:{tmp_path}/w.safetensors#{index}", images)
    assert torch.equal(actual["patches"], expected)
    torch.testing.assert_close(actual["pooled"], token)
    # A folder as timm's `save_for_hf` leaves it, which stands for `hf-hub:`, too.
    config = {"architecture": name, "num_classes": 5, "pretrained_cfg": dict(model.pretrained_cfg)}
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/config.json").write_text(json.dumps(config))
    (tmp_path / "w.safetensors").rename(tmp_path / "hub/model.safetensors")
    assert torch.equal(_read(f"timm:local-dir:{tmp_path}/hub#{index}", images)["patches"], expected)
