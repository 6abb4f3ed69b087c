"""Backbones by name: what a name sets, where it is looked for, and every refusal as one message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_hub import FakeHub, Repository, fake_hub
from visft_ds.config import ResolvedConfig, resolve
from visft_ds.config.backbones import named
from visft_ds.prepare.inputs import missing_inputs, render_missing
from visft_ds.prepare.settle import settle

CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
TAGGED = {"tag": "openai", "input_size": [3, 224, 224], **CLIP}


def described(**changes: Any) -> bytes:
    """config.json of a CLIP as timm writes it."""
    values = {
        "architecture": "vit_base_patch16_clip_224",
        "num_classes": 512,
        "pretrained_cfg": TAGGED,
        **changes,
    }
    return json.dumps(values).encode()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    repository = Repository({"model.safetensors": b"weights", "config.json": described()})
    with fake_hub(monkeypatch, tmp_path / "cache", some__clip=repository) as found:
        yield found


def of(*words: str, stage: int = 1) -> ResolvedConfig:
    return settle(["--stage", str(stage), *words]).config


def test_a_name_of_timm_takes_the_settings_of_the_nearest_model(hub: FakeHub) -> None:
    config = of("--backbone", "timm:vit_small_patch16_dinov3.lvd1689m")
    model, recipe = config.visft.model, resolve(stage=1, model="dinov3_b").visft
    assert (model.preset, model.name) == (
        "timm:vit_small_patch16_dinov3.lvd1689m",
        "vit_small_patch16_dinov3.lvd1689m",
    )
    assert model.weights == "hf-hub:timm/vit_small_patch16_dinov3.lvd1689m/model.safetensors"
    assert config.visft.tasks == recipe.tasks and config.visft.run.out == f"runs/stage1-{model.name}"
    convnext = of("--backbone", "timm:convnext_tiny.fb_in22k", stage=2).visft
    assert convnext.lora is not None and convnext.lora.targets == ("stages.*.mlp.fc1", "stages.*.mlp.fc2")
    assert not hub.requests


@pytest.mark.parametrize(
    "words", [("--backbone", "dinov3_b"), ("--backbone", "timm:vit_base_patch16_dinov3.lvd1689m")]
)
def test_a_name_of_a_shipped_model_is_that_model(words: tuple[str, ...]) -> None:
    assert of(*words).to_dict() == resolve(stage=1, model="dinov3_b").to_dict()


def test_another_backbone_in_a_model_with_a_shape_of_its_own() -> None:
    model = of("--model", "debug", "--backbone", "timm:test_vit.r160_in1k").visft.model
    assert model.preset == "timm:test_vit.r160_in1k" and not model.overrides.model_dump(exclude_none=True)


def test_a_file_or_a_folder_of_timm_is_other_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    model = of("--model", "dinov3_b", "--backbone", str(file)).visft.model
    assert (model.name, model.weights, named(str(file)).file()) == ("dinov3_b", str(file), file)
    (tmp_path / "config.json").write_bytes(described(pretrained_cfg={**TAGGED, "tag": None}))
    found = named(str(tmp_path))
    assert found.weights == str(file) and found.description == {"preset": "timm:vit_base_patch16_clip_224"}


def test_a_repository_says_what_model_it_is(hub: FakeHub) -> None:
    with pytest.raises(ValueError, match="add --download"):
        named("hf-hub:some/clip")
    config = of("--backbone", "hf-hub:some/clip", "--download")
    model = config.visft.model
    assert (model.preset, model.name) == ("timm:vit_base_patch16_clip_224.openai", "clip")
    assert model.overrides.image_size is None and model.weights == "hf-hub:some/clip"
    asked = len(hub.requests)
    found = named("hf-hub:some/clip")
    assert found.file().read_bytes() == b"weights" and found.description == {"preset": model.preset}
    assert len(hub.requests) == asked
    of_timm = {"in_chans": 3, "global_pool": "token"}  # as timm 1.0.31 writes of every model
    large = described(model_args={"img_size": [448, 448], "num_classes": 3, **of_timm})
    hub.repositories["some/large"] = Repository({"config.json": large})
    assert named("hf-hub:some/large", download=True).description == {
        "preset": model.preset,
        "image_size": 448,
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "has model.safetensors, and no config.json"),
        (b'{"model_type": "dinov3_vit"}', "cannot be read as timm.*--set visft.model.weights="),
        (described(model_args={"img_size": [224, 448]}), "only squares"),
        (described(model_args={"embed_dim": 9, "in_chans": 3}), "with embed_dim=9 different"),
        (described(model_args={"in_chans": 4}), "with in_chans=4 different"),
        (described(pretrained_cfg={**TAGGED, "std": [1.0, 1.0, 1.0]}), "which no weights of"),
    ],
)
def test_repositories_that_are_no_backbone(hub: FakeHub, config: bytes | None, message: str) -> None:
    files = {"model.safetensors": b"weights"}
    hub.repositories["some/other"] = Repository(files if config is None else {**files, "config.json": config})
    with pytest.raises(ValueError, match=message):
        named("hf-hub:some/other", download=True)


@pytest.mark.parametrize("name", ["dinov3b", "timm:vit_base_patch16_dinov4"])
def test_a_name_of_no_backbone(name: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean .*dinov3"):
        named(name)


def test_what_is_missing_says_how_to_get_it(hub: FakeHub, tmp_path: Path) -> None:
    assert "--download" in render_missing(missing_inputs(of("--model", "dinov3_b", "--data", str(tmp_path))))
    name = "timm:vit_small_patch16_dinov3.lvd1689m"
    text = render_missing(missing_inputs(of("--backbone", name, stage=2)))
    assert f"visft train --stage 1 --backbone {name}" in text


def test_download_fetches_what_a_configuration_names(hub: FakeHub) -> None:
    words = ["--model", "clip_vit_b", "--set", "visft.model.weights=hf-hub:some/clip"]
    of(*words, "--download", "--dry-run")
    assert not hub.requests
    config = of(*words, "--download")
    assert not any("weights" in item.what for item in missing_inputs(config))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3.lvd1689m", "resnet50.a1_in1k", "resnet50"])
def test_timms_own_names_are_models_of_timm(name: str) -> None:
    """Not EVA-ViT-E with a file of that name."""
    found, spelled = named(name), named(f"timm:{name}")
    assert (found.weights, found.description) == (spelled.weights, spelled.description)
