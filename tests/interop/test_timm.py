"""timm is the judge of our `timm` files: it loads the folder and computes what our model computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from tests.elsewhere import run_readme
from tests.random_tower import (
    adapter_of,
    build_backbone,
    merge,
    move_adapters,
    random_tower,
    relative,
    save_backbone,
)
from visft_ds.interop.export import timm_model
from visft_ds.interop.layouts import fill, open_backbone
from visft_ds.interop.weights import Lazy
from visft_ds.models.lora import inject_lora

# fp32, two blocks: both sides differ by the order of additions only (measured 3e-7).
TOLERANCE = 1e-5


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("post_norm", [True, False])
def test_timm_loads_the_folder_as_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, class_token: bool, post_norm: bool
) -> None:
    ours = random_tower(1, class_token=class_token, post_norm=post_norm, image_size=56)
    base, out, images = tmp_path / "base.safetensors", tmp_path / "out", torch.randn(2, 3, 56, 56)
    save_backbone(ours, base, "visual.")
    with torch.no_grad():
        plain = ours.tokens(images)[0]
    inject_lora(ours, rank=4, alpha=2.0, targets=("q", "v", "proj", "fc1", "fc2"))
    move_adapters(ours, spread=0.1)
    merge(base, adapter_of(ours), out, verify=True)
    model = run_readme(out, monkeypatch)["model"].eval()
    with torch.no_grad():
        got, expected = model.forward_features(images), ours.tokens(images)[0]
        assert relative(expected, plain) > 1e-2, "the adapter must matter, or the next line proves nothing"
        assert relative(got, expected) < TOLERANCE
    again = random_tower(2, class_token=class_token, post_norm=post_norm, image_size=56)
    fill(again, open_backbone(again, out / "model.safetensors"))
    with torch.no_grad():
        assert relative(again.tokens(images)[0], expected) < TOLERANCE, "we read it, too"


def test_published_towers_are_timms() -> None:
    for preset, name in (
        ("eva_e", "eva02_enormous_patch14_clip_224"),
        ("eva_g", "eva_giant_patch14_clip_224"),
    ):
        ours = build_backbone(preset, device="meta", class_token=True)
        assert timm_model(ours, {n: Lazy.of(v) for n, v in ours.named_parameters()})[0] == name
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0)
        shapes = {key: value.shape for key, value in theirs.named_parameters()}
        assert shapes == {key: value.shape for key, value in ours.named_parameters()}
