"""Towers that are read after a block: what they compute, what they leave out, and who says where they end."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import finished, small_timm
from tests.elsewhere import as_map, run_readme
from tests.random_tower import (
    adapter_of,
    build_backbone,
    header_of,
    move_adapters,
    relative,
    save_adapter,
    save_backbone,
)
from visft_ds.config import resolve
from visft_ds.config.backbones import named
from visft_ds.export.cli import main as export
from visft_ds.interop.card import README
from visft_ds.interop.heads import HeadInfo, open_head, read_elsewhere, save_head
from visft_ds.interop.layouts import fill, load_backbone, open_backbone
from visft_ds.interop.published import read_adapter
from visft_ds.models import Backbone
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.predict.loading import ModelFiles, ModelSource
from visft_ds.predict.model import load
from visft_ds.prepare.model import plan_model

timm = pytest.importorskip("timm")
SMALL: dict[str, Any] = {"width": 32, "depth": 3, "num_heads": 2, "image_size": 56}
#: Model of timm -> block: tokens, a list of stages, stages that are children by name, and layers behind the
#: last stage.
ENDS = {
    "test_vit": "blocks.3",
    "test_convnext": "stages.2",
    "test_resnet": "layer3",
    "test_efficientnet": "blocks.3",
}
#: The same by number; a ResNet's stem is number 0.
NUMBERS = {"test_vit": 3, "test_convnext": 2, "test_resnet": 3, "test_efficientnet": 3}
# fp32, a few layers, the same operations on merged weights.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ENDS)
def test_a_model_of_timm_ends_after_a_block(name: str) -> None:
    """Against the whole model, stopped by a hook; and the lines that make timm's own end there."""
    cut, whole = build_timm(name, layers=(NUMBERS[name],)).eval(), build_timm(name)
    twin = timm.create_model(name, num_classes=0).eval()
    twin.load_state_dict({**cut.state_dict(), **cut.left_out})
    images, given = torch.randn(1, 3, 96, 128), list[Tensor]()
    hook = twin.get_submodule(ENDS[name]).register_forward_hook(lambda *parts: given.append(parts[-1]))
    with torch.no_grad():
        twin.forward_features(images)
        hook.remove()
        features, expected = cut(images)[0], given[0]
        expected = twin.norm(expected) if expected.ndim == 3 else expected
        assert torch.equal(features, as_map(expected, features))
        exec(cut.pruning, {"model": twin})
        again = twin.forward_features(images)
    assert torch.equal(as_map(again, features), features)
    assert features.shape[1] == cut.width and abs(features.shape[3] - 128 / cut.patch_size) <= 1
    kept = {key: value for key, value in whole.state_dict().items() if key in cut.state_dict()}
    assert len(kept) < len(whole.state_dict()) and all(
        torch.equal(v, cut.state_dict()[k]) for k, v in kept.items()
    )
    with pytest.raises(ValueError, match="no block 77"):
        build_timm(name, layers=(77,), device="meta")


def _clip_file(folder: Path) -> Path:
    """A whole CLIP under EVA-CLIP's names."""
    tower = build_backbone("debug", **SMALL, class_token=True, seed=3)
    tensors = {f"visual.{key}": value.detach() for key, value in tower.named_parameters()}
    tensors |= {"visual.head.weight": torch.randn(8, 32), "visual.head.bias": torch.randn(8)}
    tensors |= {"text.ln_final.weight": torch.randn(8), "logit_scale": torch.ones(())}
    save_file(tensors, folder / "base.safetensors", header_of(tower))
    return folder / "base.safetensors"


def _timm_file(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=7)
    save_file(
        {key: value.contiguous() for key, value in whole.state_dict().items()}, folder / "base.safetensors"
    )
    return folder / "base.safetensors"


def _adapted(backbone: Backbone, base: Path, targets: tuple[str, ...], folder: Path) -> Path:
    """A backbone with the weights of a base and a moved adapter, which is written. Returns its folder."""
    fill(backbone, open_backbone(backbone, base))
    inject_lora(backbone, rank=2, alpha=2.0, targets=targets)
    move_adapters(backbone, spread=0.2)
    return save_adapter(adapter_of(backbone, targets=targets), folder / "adapter")


def _features(files: ModelFiles, images: Tensor) -> Tensor:
    model, _ = ModelSource(files, {}).build("fp32", torch.device("cpu"))
    with torch.no_grad():
        features: Tensor = model.module.backbone(images)[0]
    return features


@pytest.mark.parametrize(
    "name", ["test_efficientnet", "eva", *(pytest.param(n, marks=pytest.mark.slow) for n in list(ENDS)[:3])]
)
def test_merged_weights_are_whole_and_say_where_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The base is whole, the adapter of a cut tower; base + adapter, the merged folder and timm give the
    same.
    """
    ours: Backbone
    if name == "eva":
        base, ours = _clip_file(tmp_path), build_backbone("debug", **SMALL, layers=(1,)).eval()
    else:
        base, ours = _timm_file(name, tmp_path), build_timm(name, layers=(NUMBERS[name],)).eval()
    targets = {"test_vit": ("q", "v"), "eva": ("q", "v"), "test_resnet": ("layer3.*.conv2",)}
    targets |= {"test_efficientnet": ("blocks.3.*.conv_pw*",), "test_convnext": ("stages.2.*.fc1",)}
    folder = _adapted(ours, base, targets[name], tmp_path)
    images, out = torch.randn(1, 3, 64, 96), tmp_path / "merged"
    with torch.no_grad():
        expected = ours(images)[0]
    known = None if name == "eva" else {"preset": f"timm:{name}"}
    assert torch.equal(_features(ModelFiles(base, tmp_path, folder, known), images), expected)
    words = ["--backbone", str(base), "--adapter", str(folder), "--out", str(out)]
    assert export([*words, "--format", "timm"]) == 0
    merged = ModelFiles(out / "model.safetensors", out, None)
    assert relative(_features(merged, images), expected) < TOLERANCE
    names = run_readme(out, monkeypatch)
    model = names["model"].eval()
    with torch.no_grad():
        for call in re.findall(r"`(model\.prune_[^`]+)`", (out / README).read_text()):
            exec(call, names)
        if name == "eva":
            square = torch.randn(1, 3, 56, 56)
            model_of = {"preset": "debug", **SMALL, "class_token": True, "layers": (1,)}
            plain = load_backbone(out / "model.safetensors", model_of).eval()
            got, expected = model.forward_features(square)[:, 1:], plain(square)[0].flatten(2).transpose(1, 2)
        else:
            got = as_map(model.forward_features(images), expected)
        assert relative(got, expected) < TOLERANCE


def test_an_adapter_knows_where_its_tower_ended(tmp_path: Path) -> None:
    cut = build_backbone("debug", **SMALL, layers=(1,))
    adapter = read_adapter(_adapted(cut, _clip_file(tmp_path), ("q", "v"), tmp_path))
    assert adapter.model["layers"] == [1] and len(adapter.layers) == 2
    with pytest.raises(ValueError, match=r"layers=\[1\]"):
        adapter.install(build_backbone("debug", **SMALL))


def test_heads_are_refused_that_learnt_to_read_another_block() -> None:
    """Width and base weights are the same, so that nothing else would show it."""
    told = HeadInfo("detection", [(32, 14)], {}, [], {"layers": [1]})
    assert read_elsewhere(told, (1,), None) is None
    assert "was trained on block 1" in (read_elsewhere(told, (), None) or "")
    assert "block 1, 3" in (read_elsewhere(told, (1, 3), None) or "")
    told = HeadInfo("detection", [(32, 14)])
    assert "was trained on the last block" in (read_elsewhere(told, (1,), None) or "")


def test_base_weights_end_where_a_name_or_all_heads_say(tmp_path: Path) -> None:
    """Without a run nothing else tells."""
    assert (named("efficientnet_lite0").description or {})["layers"] == [5]
    save_backbone(build_backbone("debug", **{**SMALL, "width": 16}), tmp_path / "base.safetensors")
    stored = finished.runs() / "stage1/export/detection.safetensors"
    head, base = open_head(stored, "detection"), tmp_path / "base.safetensors"
    info = replace(head.info, extra={"layers": [1]})
    save_head(tmp_path / "moved/detection.safetensors", info, head.build().state_dict())
    assert "layers" in load(base, heads=tmp_path / "moved").facts["backbone"]


def test_heads_and_adapters_fit_the_block_of_the_configuration() -> None:
    settings = ("visft.model.preset=timm:tf_efficientnet_lite0", "visft.model.out_indices=[5]")
    targets = 'visft.lora.targets=["blocks.[45].*.conv_pw", "blocks.[45].*.conv_pwl"]'
    for stage, more in ((1, ()), (2, (targets,))):
        config = resolve(stage=stage, model="debug_convnext", settings=(*settings, *more))
        module, groups = plan_model(config)
        backbone = module.backbone
        assert isinstance(backbone, TimmBackbone) and (backbone.width, backbone.patch_size) == (192, 32)
        assert not any("blocks.6" in name or "conv_head" in name for name, _ in backbone.named_parameters())
    names = {name for group in groups for name in group.names if name.endswith("lora_A")}
    assert len(names) == 14 and all(".conv_pw" in name for name in names)


#: Backbone -> blocks: an Eva with registers, a ViT with a class token, networks of stages, and a tower of
#: ours.
SEVERAL = {
    next(iter(small_timm.FAMILIES)): (0, 1),
    "test_vit": (1, 3, 5),
    "test_convnext": (1, 3),
    "test_efficientnet": (1, 2, 4),
    "eva": (0, 1),
}


def _of_blocks(name: str, layers: tuple[int, ...]) -> Any:
    return (
        build_backbone("debug", **SMALL, layers=layers) if name == "eva" else build_timm(name, layers=layers)
    )


@pytest.mark.parametrize("name", SEVERAL)
def test_several_maps_are_those_behind_their_blocks(name: str) -> None:
    """Those of hooks in the whole model; gradients are equal when recomputed; the last map is a shorter
    model's.
    """
    layers = SEVERAL[name]
    cut, whole = _of_blocks(name, layers).eval(), _of_blocks(name, ()).eval()
    images, given = torch.randn(2, 3, 64, 96), dict[str, Tensor]()
    for number in layers:
        block = whole.get_submodule(whole.ends()[number])
        block.register_forward_hook(lambda *parts, number=number: given.update({number: parts[-1]}))
    prefix = getattr(cut, "num_prefix_tokens", 0) if name != "eva" and cut.patch else 0
    with torch.no_grad():
        whole(images)
        (*actual,) = cut(images, prefixes=True)
        (ends,) = _of_blocks(name, layers[-1:]).eval()(images)
    assert len(actual) == len(layers) * (2 if prefix else 1) and torch.equal(actual[len(layers) - 1], ends)
    for index, number in enumerate(layers):
        expected = given[number] if given[number].ndim == 4 else whole.norm(given[number])
        width, stride = cut.shapes[index]
        assert actual[index].shape == (2, width, 64 // stride, 96 // stride)
        if expected.ndim == 3:
            if prefix:
                assert torch.equal(actual[len(layers) + index], expected[:, :prefix])
            expected = expected[:, prefix:].transpose(1, 2).unflatten(2, actual[index].shape[-2:])
        assert torch.equal(actual[index], expected)
    gradients = []
    for cut.recompute in ("none", "block"):
        cut.zero_grad()
        sum(one.square().mean() for one in cut.train()(images)).backward()
        gradients.append([parameter.grad for parameter in cut.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) and all(map(torch.equal, *gradients))


def test_adapters_of_all_blocks_that_are_read_learn() -> None:
    cut = build_timm("test_vit", layers=(0, 2))
    inject_lora(cut, rank=2, alpha=2.0, targets=("q",))
    move_adapters(cut, spread=0.2)
    names = [name for name, _ in cut.named_parameters() if name.endswith("lora_B")]
    for place, reached in ((0, 1), (1, 3)):  # a map reaches the blocks in front of it
        cut.zero_grad()
        cut(torch.randn(1, 3, 64, 64))[place].square().mean().backward()
        moved = [name for name in names if (grad := cut.get_parameter(name).grad) is not None and grad.any()]
        assert names == [f"blocks.{block}.attn.qkv.lora_B" for block in range(3)] and moved == names[:reached]
    with pytest.raises(ValueError, match="must ascend"):
        build_timm("test_vit", layers=(2, 0), device="meta")
    with pytest.raises(ValueError, match="no map"):
        build_timm("mixer_s16_224", layers=(0, 1), device="meta")
    with pytest.raises(ValueError, match="no block 3"):
        build_backbone("debug", **SMALL, layers=(3,))
