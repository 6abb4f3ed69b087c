"""PEFT is the judge of adapter folders: of ours, which it loads onto timm's models, and of its own, which we
read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.elsewhere import as_map, run_readme
from tests.random_tower import adapter_of, merge, move_adapters, random_tower, relative, save_backbone
from tests.small_timm import FAMILIES, adapted, random_base
from visft_ds.interop.card import README, card
from visft_ds.interop.peft_folder import read_folder
from visft_ds.models.eva_vit import EvaViT
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import build_timm

peft = pytest.importorskip("peft")
# fp32, two blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5


def _merged(folder: Path, targets: tuple[str, ...], **kind: bool) -> tuple[EvaViT, Path]:
    """(tower with an adapter, its folder for PEFT, which PEFT itself has verified)."""
    model = random_tower(**kind)
    save_backbone(model, folder / "base.safetensors", "visual.")
    inject_lora(model, rank=3, alpha=1.5, targets=targets)
    move_adapters(model)
    adapter = adapter_of(model)
    return model, merge(folder / "base.safetensors", adapter, folder / "out", "--format", "peft", verify=True)


def test_a_tower_whose_attention_passes_by_pefts_layers_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """timm's EVA computes the base then, without a word; README leads with what works, and then the loop."""
    ours, out = _merged(tmp_path, ("q", "v"))
    printed = capsys.readouterr()
    assert "warning: PEFT computes something else" in printed.err
    assert re.search(r"relative difference \S+e-0[678] by peft", printed.out)
    merge(tmp_path / "base.safetensors", None, out / "BASE")
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = ours.tokens(images)[0]
        for piece in (0, 1):
            names = {"timm": timm, "PeftModel": peft.PeftModel} if piece else {}
            model = run_readme(out, monkeypatch, piece=piece, **names)["model"]
            assert relative(model.forward_features(images), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "pre_norm", "word"),
    [
        (("q", "v", "proj", "fc1", "fc2"), False, "PEFT computes something else"),
        (("q", "k", "v"), True, "PEFT computes something else"),
        (("proj", "fc2"), False, ""),
    ],
)
def test_peft_computes_what_ours_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], targets: tuple[str, ...], pre_norm: bool, word: str
) -> None:
    _merged(tmp_path, targets, post_norm=not pre_norm)
    printed = capsys.readouterr().err
    assert word in printed and bool(word) == bool(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["vit_test_patch8_dinov3", "vit_test_plus_patch8_dinov3_qkvb", "test_convnext"]
)
def test_only_towers_that_need_it_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    base = random_base(name, tmp_path)
    _, adapter = adapted(name, base)
    out = merge(base, adapter, tmp_path / "out", "--format", "peft", verify=True)
    needs_it = "qkvb" in name
    assert ("PEFT computes" in capsys.readouterr().err) == needs_it
    assert ("qkv_bias_separate" in (out / README).read_text()) == needs_it


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_for_transformers_has_the_names_of_its_modules(tmp_path: Path, name: str) -> None:
    base = random_base(name, tmp_path)
    _, adapter = adapted(name, base)
    out = merge(base, adapter, tmp_path / "out", "--format", "peft_transformers", verify=True)
    again = read_folder(out).on(build_timm(name))
    assert again.slices == adapter.slices and again.targets == ("q", "v", "fc2")
    assert all(torch.equal(value, again.tensors[key]) for key, value in adapter.tensors.items())


VIT, CNN = "test_vit", "tf_efficientnet_lite0"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        (VIT, {"lora_alpha": 8, "target_modules": ["qkv", "proj"]}, ""),
        (VIT, {"use_rslora": True, "target_modules": ["qkv"]}, ""),
        (
            VIT,
            {
                "target_modules": ["qkv", "fc1"],
                "rank_pattern": {"fc1": 2, r"blocks\.0\.attn\.qkv": 6},
                "alpha_pattern": {"fc1": 3},
            },
            "",
        ),
        (VIT, {"target_modules": "all-linear"}, ""),
        (VIT, {"target_modules": ["patch_embed.proj"]}, ""),
        (VIT, {"target_modules": ["qkv"], "init_lora_weights": "orthogonal"}, ""),
        (CNN, {"target_modules": ["conv_pw", "conv_pwl"]}, ""),
        (CNN, {"target_modules": ["conv_stem"]}, ""),
        (CNN, {"target_modules": ["blocks.0.0.conv_dw"], "r": 32}, "without groups"),
        (VIT, {"use_dora": True, "target_modules": ["qkv"]}, "use_dora"),
        (VIT, {"bias": "all", "target_modules": ["qkv"]}, "biases"),
        (VIT, {"bias": "lora_only", "target_modules": ["qkv"]}, "biases"),
        (VIT, {"modules_to_save": ["norm"], "target_modules": ["qkv"]}, "whole layers"),
        (VIT, {"init_lora_weights": "pissa", "target_modules": ["qkv"]}, "pissa"),
        (VIT, {"init_lora_weights": "olora", "target_modules": ["qkv"]}, "olora"),
        (VIT, {"target_modules": [], "target_parameters": ["attn.qkv.weight"]}, "target_parameters"),
    ],
)
def test_a_folder_that_peft_wrote_computes_what_peft_computes(
    tmp_path: Path, name: str, settings: dict[str, Any], reason: str
) -> None:
    ours, images = build_timm(name, seed=1).eval(), torch.randn(2, 3, 96, 96)
    base = timm.create_model(name, num_classes=0, **({"img_size": 96} if name == VIT else {})).eval()
    ours = build_timm(name, seed=1, image_size=96 if name == VIT else None).eval()
    base.load_state_dict(ours.state_dict(), strict=False)
    theirs = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, **settings})).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    if reason:
        with pytest.raises(ValueError, match=reason):
            read_folder(tmp_path).install(ours)
        return
    with torch.no_grad():
        plain = ours(images)[0]
        read_folder(tmp_path).install(ours)
        expected = theirs.base_model.model.forward_features(images)
        got = ours(images)[0]
        assert relative(got, plain) > 1e-3 and relative(as_map(expected, got), got) < TOLERANCE


def test_a_card_keeps_its_table_whole() -> None:
    """A bare pipe would end a cell, and the value fall out of the table."""
    text = card("x", "timm", random_tower(), None, base=None, facts={"|missing| / |change|": "0.5"})
    (row,) = (line for line in text.splitlines() if "missing" in line)
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
