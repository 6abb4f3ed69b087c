"""Shipped recipes of timm's models: train in both stages, merge, load in timm, with weights out of a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_hub import Repository, fake_hub
from tests.random_tower import relative
from tests.tiny import TINY
from visft_ds import evaluate, fit, load_backbone
from visft_ds.config import resolve
from visft_ds.export.cli import main as export
from visft_ds.models.timm_backbone import build_timm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"),
]
#: Recipe -> a small model of its family.
SMALL = {
    "clip_vit_b": "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m",
    "convnext_b": "convnext_atto.d2_in1k",
    "dinov2_b": "vit_small_patch14_dinov2.lvd142m",
    "dinov3_b": "vit_small_patch16_dinov3.lvd1689m",
    "dinov3_l": "vit_small_patch16_dinov3.lvd1689m",
    "eva02_b": "eva02_tiny_patch14_224.mim_in22k",
    "pe_b": "vit_pe_core_tiny_patch16_384.fb",
    "siglip2_b": "vit_base_patch32_siglip_256.v2_webli",
    "tipsv2_b": "vit_base_patch14_reg1_tipsv2.webli",
    "tipsv2_l": "vit_small_patch14_reg4_dinov2.lvd142m",
}
STEPS = 2
SETTINGS: dict[str, Any] = {
    **{key: 64 if key.endswith("size") and "image" in key else value for key, value in TINY.items()},
    "visft.model.overrides": {},
    "scheduler.params.total_num_steps": STEPS,
    "scheduler.params.warmup_num_steps": 1,
    "visft.run.eval_every": 0,
}


def test_every_shipped_model_with_weights_on_the_hub_is_tried() -> None:
    from visft_ds.config.resolve import available

    found = [
        name for name in available("models") if resolve(stage=1, model=name).visft.model.preset[:5] == "timm:"
    ]
    assert set(SMALL) == set(found) - {"debug_convnext", "efficientnet_lite0", "small_data"}


@pytest.mark.parametrize("recipe", sorted(SMALL))
def test_a_recipe_trains_merges_and_loads_in_timm(
    recipe: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm
    from huggingface_hub import constants

    name = SMALL[recipe]
    weights = _random_weights(name, tmp_path / "random.safetensors")
    given: dict[str, Any] = {"model": recipe, "backbone": f"timm:{name}", "data": shards}
    known = resolve(stage=2, model=recipe).visft
    with fake_hub(monkeypatch, tmp_path / "cache") as hub:
        hub.repositories[f"timm/{name}"] = Repository({"model.safetensors": weights})
        first = fit(stage=1, **given, download=True, out=tmp_path / "1", settings=SETTINGS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what follows has the cache alone
    heads = {"visft.heads.path": str(first.export)}
    second = fit(stage=2, **given, out=tmp_path / "2", settings=SETTINGS | heads)
    assert first.step == second.step == STEPS
    record = json.loads((tmp_path / "2/run.json").read_text())
    assert record["config"]["visft"]["model"]["weights"] == f"hf-hub:timm/{name}/model.safetensors"
    assert record["config"]["visft"]["lora"]["targets"] == list(known.lora.targets if known.lora else ())
    assert evaluate(tmp_path / "2", data=str(shards), split="train", limit=2).metrics
    named: dict[str, Any] = {"backbone": f"timm:{name}", "heads": first.export, "tasks": ["detection"]}
    assert evaluate(**named, data=str(shards), split="train", limit=2).metrics

    merged = tmp_path / "merged"
    assert export([str(tmp_path / "2"), "--out", str(merged), "--format", "timm"]) == 0
    whole = timm.create_model(f"local-dir:{merged}", pretrained=True).eval()
    ours, images = load_backbone(tmp_path / "2"), torch.rand(1, 3, *_size(whole))
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (ours.backbone.pixel_mean, ours.backbone.pixel_std)
    )
    with torch.no_grad():
        theirs = whole.forward_features((images - mean) / std)
        if theirs.ndim == 3:
            theirs = theirs[:, whole.num_prefix_tokens :].transpose(1, 2).flatten(2)
        assert relative(ours(images).flatten(2), theirs.flatten(2)) < 1e-4
    # A folder that we wrote is a backbone by its name, too.
    again = fit(stage=1, **given | {"backbone": merged}, out=tmp_path / "3", settings=SETTINGS)
    assert again.step == STEPS


def _size(model: Any) -> tuple[int, int]:
    _, height, width = model.pretrained_cfg["input_size"]
    return height, width


def _random_weights(name: str, path: Path) -> bytes:
    """A file of all that timm's model has, classifier and pooling too, whose gains are open."""
    import timm
    from safetensors.torch import save_file

    values = timm.create_model(name).state_dict() | build_timm(name).state_dict()
    save_file({key: value.contiguous() for key, value in values.items()}, path)
    return path.read_bytes()
