"""Models read after a block, and the block that is best to read: against the libraries' own inner features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.clip_case import SIDE, make_clip, save_clip
from tests.random_tower import move_adapters, relative
from visft_ds.evals.benchmarks.encoders import KINDS_WITHOUT_TEXT
from visft_ds.evals.benchmarks.models import LoadOptions, load_encoder, parse_model
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.layouts import tower_in, tower_of
from visft_ds.interop.merge import merge_into_file, read_adapter
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.towers import open_tower, resolve_tower
from visft_ds.models.lora import inject_lora

OPTIONS = LoadOptions("fp32")
TINY = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 64, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


def _read(model: str, images: Tensor) -> dict[str, Tensor]:
    encoder = load_encoder(parse_model(model), OPTIONS)
    assert encoder.kinds == KINDS_WITHOUT_TEXT and encoder.text is None and "read" in encoder.facts
    with torch.no_grad():
        found: dict[str, Tensor] = encoder.module(images, KINDS_WITHOUT_TEXT)
    return found


@torch.no_grad()
def test_a_tower_of_ours_and_the_same_in_open_clip(tmp_path: Path) -> None:
    """Its trunk is one of timm, whose own inner features both are."""
    clip, images = make_clip(), torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    path = save_clip(clip, tmp_path / "clip.safetensors")
    (tokens,) = clip.visual.trunk.forward_intermediates(
        images, indices=[0], norm=True, intermediates_only=True, output_fmt="NCHW"
    )
    found = _read(f"{path}#blocks.0", images)
    assert relative(found["patches"], tokens) < 1e-5
    assert found["pooled"].shape == (2, tokens.shape[1])
    with pytest.raises(ValueError, match=r"cannot end after 'blocks.7'"):
        _read(f"{path}#blocks.7", images)


@torch.no_grad()
def test_adapted_and_merged_towers(tmp_path: Path) -> None:
    """An adapter on both blocks, read in front of the second: base + adapter at a scale, and what is merged of it."""
    path, images = save_clip(make_clip(), tmp_path / "clip.safetensors"), torch.randn(1, 3, SIDE, SIDE)
    backbone: Any = load_encoder(parse_model(str(path)), OPTIONS).module.backbone
    inject_lora(backbone, rank=2, alpha=2, targets=("q", "v"))
    move_adapters(backbone, spread=0.5)
    save_peft_adapter(adapter_of(backbone), tmp_path / "adapter", tower_of(backbone))
    adapter = read_adapter(tmp_path / "adapter").scaled(0.5)
    merge_into_file(path, adapter, tmp_path / "merged.safetensors", tower=tower_of(backbone))
    spec = parse_model(f"{path}+{tmp_path}/adapter#blocks.0@0.5")
    assert (spec.label, spec.block, spec.scale) == ("clip+adapter#blocks.0", "blocks.0", 0.5)
    first = _read(f"{path}+{tmp_path}/adapter@0.5#blocks.0", images)["patches"]
    assert relative(_read(f"merged={tmp_path}/merged.safetensors#blocks.0", images)["patches"], first) < 1e-5
    assert relative(_read(f"{path}#blocks.0", images)["patches"], first) > 1e-3


@torch.no_grad()
def test_what_was_trained_up_to_a_block_is_read_there(tmp_path: Path) -> None:
    """By what adapter and header of the merged file say. No embedding: the projection reads the last block."""
    path, images = save_clip(make_clip(), tmp_path / "clip.safetensors"), torch.randn(1, 3, SIDE, SIDE)
    backbone: Any = load_encoder(parse_model(f"{path}#blocks.0"), OPTIONS).module.backbone
    inject_lora(backbone, rank=2, alpha=2, targets=("q", "v"))
    move_adapters(backbone, spread=0.5)
    save_peft_adapter(adapter_of(backbone), tmp_path / "adapter", tower_of(backbone))
    whole = resolve_tower(tower_in(*open_tower(path)))
    merge_into_file(path, read_adapter(tmp_path / "adapter"), tmp_path / "merged.safetensors", tower=whole)
    wanted = backbone(images)
    for model in (f"{path}+{tmp_path}/adapter", f"{tmp_path}/merged.safetensors"):
        encoder = load_encoder(parse_model(model), OPTIONS)
        assert encoder.kinds == KINDS_WITHOUT_TEXT and encoder.settings["until"] == "blocks.0"
        assert relative(encoder.module(images, ["patches"])["patches"], wanted) < 1e-5
    behind = _read(f"{tmp_path}/merged.safetensors#blocks.1", images)["patches"]
    assert relative(behind, wanted) > 1e-2
    with pytest.raises(ValueError, match=r"cannot end after 'blocks.1': it has blocks.0 to blocks.0"):
        _read(f"{path}+{tmp_path}/adapter#blocks.1", images)


@torch.no_grad()
def test_open_clips_own_tower(tmp_path: Path) -> None:
    (tmp_path / "Tiny-layers.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "Tiny-layers.json")
    model = open_clip.create_model("Tiny-layers", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    images = torch.randn(2, 3, SIDE, SIDE)
    wanted = model.visual.forward_intermediates(images, indices=[1], normalize_intermediates=True)
    found = _read(f"open_clip:{tmp_path}/Tiny-layers.json:{tmp_path}/tiny.safetensors#blocks.1", images)
    assert relative(found["patches"], wanted["image_intermediates"][0]) < 1e-5


@pytest.mark.parametrize(
    ("name", "block", "index"), [("test_vit", "blocks.2", 2), ("test_efficientnet", "blocks.3", 3)]
)
@torch.no_grad()
def test_models_of_timm(tmp_path: Path, name: str, block: str, index: int) -> None:
    model = timm.create_model(name, num_classes=5).eval()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 160, 160)
    (wanted,) = model.forward_intermediates(
        images, indices=[index], norm=name == "test_vit", intermediates_only=True, output_fmt="NCHW"
    )
    assert torch.equal(_read(f"timm:{name}:{tmp_path}/w.safetensors#{block}", images)["patches"], wanted)
