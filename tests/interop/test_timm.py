"""timm is the judge of our `timm` files: it loads them strictly and computes what our model computes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from visft_ds.interop.backbones import load_backbone
from visft_ds.interop.merge import merge_into_file
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.timm_names import create_model_call, model_arguments

from tests.random_tower import move_adapters, random_tower, relative, save_backbone
from tools.merge_lora import main
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.layouts import tower_of
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora

timm = pytest.importorskip("timm")
# fp32, two blocks: both sides differ by the order of additions only (measured 3e-7).
TOLERANCE = 1e-5


def _load_into_timm(path: Path, model: EvaViT, **more: Tensor) -> torch.nn.Module:
    weights = load_file(path)
    if model.cls_token is None:
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    name, arguments = model_arguments(tower_of(model))
    theirs = timm.create_model(name, **arguments)
    theirs.load_state_dict(weights | more)  # strict
    return theirs.eval()


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("post_norm", [True, False])
def test_timm_loads_our_file_and_computes_the_same(tmp_path: Path, class_token: bool, post_norm: bool) -> None:
    ours = random_tower(1, class_token=class_token, post_norm=post_norm, image_size=56)
    path = tmp_path / "w.safetensors"
    save_backbone(ours, path, "timm")
    theirs = _load_into_timm(path, ours)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert relative(ours.tokens(images), theirs.forward_features(images)) < TOLERANCE


@pytest.mark.parametrize("post_norm", [True, False])
def test_we_load_what_timm_saves_with_its_head(tmp_path: Path, post_norm: bool) -> None:
    ours = random_tower(1, post_norm=post_norm, image_size=56)
    name, arguments = model_arguments(tower_of(ours), num_classes=7)
    theirs = timm.create_model(name, **arguments).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    assert load_backbone(ours, tmp_path / "timm.pth").endswith("; ignored 2 (CLIP projection)")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        assert relative(ours.tokens(images), theirs.forward_features(images)) < TOLERANCE


@pytest.mark.parametrize("post_norm", [True, False])
def test_timm_computes_base_plus_adapter_from_a_merged_file(tmp_path: Path, post_norm: bool) -> None:
    ours = random_tower(1, post_norm=post_norm, image_size=56)
    save_backbone(ours, tmp_path / "base.safetensors", "eva_clip")
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        plain = ours.tokens(images)
    inject_lora(ours, rank=4, alpha=2.0, targets=("q", "v", "proj", "fc1", "fc2"))
    move_adapters(ours, spread=0.1)
    out = tmp_path / "merged.safetensors"
    merge_into_file(tmp_path / "base.safetensors", adapter_of(ours), out, layout="timm")
    theirs = _load_into_timm(out, ours)
    with torch.no_grad():
        wanted, got = ours.tokens(images), theirs.forward_features(images)
    assert relative(wanted, plain) > 1e-2, "the adapter must matter, or the next line proves nothing"
    assert relative(got, wanted) < TOLERANCE


@pytest.mark.parametrize("class_token", [True, False])
def test_timm_loads_the_folder_as_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, class_token: bool
) -> None:
    ours = random_tower(1, class_token=class_token, image_size=56)
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    save_backbone(ours, base)
    inject_lora(ours, rank=4, alpha=2.0)
    move_adapters(ours, spread=0.1)
    save_peft_adapter(adapter_of(ours), tmp_path / "adapter", tower_of(ours))
    given = ["--base", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(out)]
    assert main(given) == 0
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert ("local-dir" in snippet) == (out / "config.json").is_file() == class_token
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        got = names["model"].eval().forward_features(images)
        assert relative(got, ours.tokens(images)) < TOLERANCE


def test_published_towers_need_no_sizes() -> None:
    for preset, name in (("eva_e", "eva02_enormous_patch14_clip_224"), ("eva_g", "eva_giant_patch14_clip_224")):
        tower = tower_of(build_backbone(preset, device="meta", class_token=True))
        assert model_arguments(tower, num_classes=1024) == (name, {"num_classes": 1024})
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0)
        ours = build_backbone(preset, device="meta", class_token=True)
        shapes = {key: value.shape for key, value in theirs.named_parameters()}
        assert shapes == {key: value.shape for key, value in ours.named_parameters()}
        assert create_model_call(tower) == f'timm.create_model("{name}", num_classes=0)'
