"""open_clip is the judge of our `open_clip` files: it builds the model, loads them strictly, computes the
same.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import torch

from tests.clip_case import CONFIG, SIDE, make_clip, save_clip, small_towers
from tests.random_tower import adapter_of, build_backbone, merge, move_adapters, relative
from visft_ds.interop.export import CONTENT
from visft_ds.interop.layouts import load_backbone, model_in
from visft_ds.interop.weights import Lazy, Weights, open_weights
from visft_ds.models.lora import inject_lora

# fp32, two blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5


@pytest.mark.parametrize("layout", ["open_clip", "eva_clip"])
def test_open_clip_computes_base_plus_adapter_from_a_merged_folder(tmp_path: Path, layout: str) -> None:
    whole = make_clip()
    base = save_clip(whole, tmp_path / "clip.safetensors", layout=layout)
    ours = load_backbone(base, {**model_in(open_weights(base)), "class_token": True}).eval()
    images, text = torch.randn(2, 3, SIDE, SIDE), torch.randint(1, 40, (2, 77))
    with torch.no_grad():
        plain, wanted_text = ours.tokens(images)[0], whole.encode_text(text)
        assert relative(plain, whole.visual.trunk.forward_features(images)) < TOLERANCE, "reading their file"
    inject_lora(ours, rank=4, alpha=2.0)
    move_adapters(ours, spread=0.2)
    with small_towers(), mock.patch("open_clip.get_model_config", return_value=deepcopy(CONFIG)):
        out = merge(base, adapter_of(ours), tmp_path / "merged", "--format", "open_clip", verify=True)
        got: Any = open_clip.create_model(f"local-dir:{out}", require_pretrained=True).eval()
    with torch.no_grad():
        expected = ours.tokens(images)[0]
        assert relative(expected, plain) > 1e-2, "the adapter must matter, or the next line proves nothing"
        assert relative(got.visual.trunk.forward_features(images), expected) < TOLERANCE
        assert torch.equal(got.encode_text(text), wanted_text), "the text tower is untouched"
        # Class token -> CLIP projection, which the tower of ours does not have.
        assert relative(got.encode_image(images), whole.visual.trunk.head(expected[:, 0])) < TOLERANCE


@pytest.mark.parametrize(("preset", "name"), [("eva_e", "EVA02-E-14-plus"), ("eva_g", "EVA01-g-14-plus")])
def test_our_configuration_of_published_models_is_open_clips(preset: str, name: str) -> None:
    expected = open_clip.get_model_config(name)
    with torch.device("meta"):
        theirs = open_clip.factory.CustomTextCLIP(
            **{key: value for key, value in expected.items() if key != "custom_text"}
        )
    file = Weights({key: Lazy.of(value) for key, value in theirs.state_dict().items()}, Path("published"))
    backbone = build_backbone(preset, device="meta", class_token=True)
    written = CONTENT["open_clip"](file.under("visual.trunk."), file, backbone)
    assert list(written.files) == ["open_clip_config.json"] and written.tensors.keys() == file.keys()
    config = written.files["open_clip_config.json"]
    assert config["model_cfg"] == expected | {"custom_text": True}
    from open_clip import constants

    assert tuple(config["preprocess_cfg"]["mean"]) == constants.OPENAI_DATASET_MEAN
    assert tuple(config["preprocess_cfg"]["std"]) == constants.OPENAI_DATASET_STD
