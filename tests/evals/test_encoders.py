"""Features for benchmarks equal those of the libraries that the weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file

from tests.clip_case import SIDE, make_clip, save_clip
from visft_ds.evals.judge.encoders import CLIP, KINDS, square_preprocess
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.ranking import class_embeddings, sentences
from visft_ds.interop.layouts import MODEL

CPU = torch.device("cpu")
TEXTS = ["a photo of a cat", "two dogs on a red sofa", ""]


@pytest.fixture(scope="module")
def clip() -> Any:
    return make_clip()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layout", ["open_clip", "eva_clip"])
@torch.no_grad()
def test_our_tower_and_the_text_side_of_its_file_are_open_clips(
    clip: Any, images: torch.Tensor, tmp_path: Path, layout: str
) -> None:
    """Class token, final norm, projection, eos pooling, causal mask: any of them wrong gives other
    embeddings.
    """
    path = save_clip(clip, tmp_path / "clip.safetensors", layout=layout)
    encoder = load_encoder(parse_model(str(path)), "fp32")
    assert encoder.kinds == KINDS and encoder.text is not None
    actual = encoder.module(images, KINDS)
    torch.testing.assert_close(
        actual["clip"], clip.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6
    )
    tokens = clip.visual.trunk.forward_features(images)
    torch.testing.assert_close(actual["pooled"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        actual["patches"].flatten(2).transpose(1, 2), tokens[:, 1:], rtol=1e-5, atol=1e-5
    )
    expected = clip.encode_text(open_clip.SimpleTokenizer()(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.text.encode(TEXTS, CPU), expected, rtol=1e-5, atol=1e-6)
    classes, templates = ["cat", "hot dog", "sea"], ["a photo of a {}.", "a bad {}"]
    ours = class_embeddings(encoder.text.encode(sentences(classes, templates), CPU), len(templates))
    theirs = open_clip.build_zero_shot_classifier(clip, open_clip.SimpleTokenizer(), classes, templates)
    torch.testing.assert_close(ours, theirs.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooler", [{}, {"attentional_pool": True, "attn_pooler_heads": 4}])
@torch.no_grad()
def test_open_clips_own_tower(images: torch.Tensor, tmp_path: Path, pooler: dict[str, Any]) -> None:
    """The embedding is that of encode_image, also beside the feature map; CoCa's pooler has none."""
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "patch_size": 14, **pooler},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "Tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Tiny-test.json")
    model = open_clip.create_model("Tiny-test", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    encoder = load_encoder(parse_model(f"open_clip:Tiny-test:{tmp_path}/tiny.safetensors"), "fp32")
    expected = model.encode_image(images, normalize=True)
    for kinds in (("clip",),) if pooler else (("clip",), KINDS):
        torch.testing.assert_close(encoder.module(images, kinds)["clip"], expected, rtol=1e-5, atol=1e-6)
    assert pooler or encoder.module(images, KINDS)["patches"].shape == (3, 64, 2, 2)
    assert encoder.text is not None
    expected = model.encode_text(open_clip.SimpleTokenizer()(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.text.encode(TEXTS, CPU), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "grid"), [("test_vit", 10), ("test_vit2", 10), ("test_convnext", 5)])
@torch.no_grad()
def test_a_model_of_timm_without_its_classifier(tmp_path: Path, name: str, grid: int) -> None:
    """One vector is the class token, or the mean of the map: the one token that test_vit2 has is a
    register.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=11).eval()
    path = _saved(model, tmp_path)
    encoder = load_encoder(parse_model(f"timm:{name}:{path}"), "fp32")
    image = torch.randn(1, 3, encoder.side, encoder.side)
    actual, features = encoder.module(image, encoder.kinds), model.forward_features(image)
    expected = features[:, 0] if name == "test_vit" else features[:, 1:].mean(dim=1)
    expected = features.mean(dim=(2, 3)) if features.ndim == 4 else expected
    torch.testing.assert_close(actual["pooled"], expected)
    assert actual["patches"].shape[2:] == (grid, grid) and encoder.text is None
    classifier = model.pretrained_cfg["classifier"]
    own = [f"{one}.weight" for one in ([classifier] if isinstance(classifier, str) else classifier)]
    assert not set(own) & {key.removeprefix("backbone.") for key in encoder.module.state_dict()}


def test_the_size_of_a_model_of_timm_is_that_of_its_file(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=64)
    header = {MODEL: json.dumps({"preset": "timm:test_vit", "image_size": 64, "layers": [0]})}
    save_file(model.state_dict(), tmp_path / "model.safetensors", header)
    encoder = load_encoder(parse_model(f"timm:test_vit:{tmp_path}/model.safetensors"), "fp32")
    assert encoder.side == 64
    features = encoder.module(torch.randn(1, 3, 64, 64), encoder.kinds)
    assert features["patches"].shape[2:] == (4, 4), "read after its last block, as before"


def test_a_model_of_timm_without_a_map_is_refused(tmp_path: Path) -> None:
    path = _saved(timm.create_model("levit_128s", pretrained=False), tmp_path)
    with pytest.raises(ValueError, match="no map"):
        load_encoder(parse_model(f"timm:levit_128s:{path}"), "fp32")


def _saved(model: Any, folder: Path) -> Path:
    path = folder / "model.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (28, 28), (9, 200)])
def test_images_are_prepared_as_by_open_clip(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = image_transform_v2(PreprocessCfg(size=SIDE), is_train=False)(image)
    torch.testing.assert_close(square_preprocess(SIDE, *CLIP)(image), theirs, rtol=0, atol=1e-6)
