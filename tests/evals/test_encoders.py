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
from safetensors.torch import load_file, save_file

from tests.clip_case import SIDE, TOWER, make_clip, save_clip
from visft_ds.evals.benchmarks.encoders import CLIP, KINDS, square_preprocess
from visft_ds.evals.benchmarks.models import load_encoder, parse_model
from visft_ds.evals.benchmarks.protocol import class_embeddings, sentences
from visft_ds.evals.benchmarks.text import text_tower_in

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
    """Class token, final norm, projection, eos pooling, causal mask: any of them wrong gives other embeddings."""
    path = save_clip(clip, tmp_path / "clip.safetensors", layout=layout)
    encoder = load_encoder(parse_model(str(path)), "fp32")
    assert encoder.kinds == KINDS and encoder.text is not None
    found = encoder.module(images, KINDS)
    torch.testing.assert_close(found["clip"], clip.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6)
    tokens = clip.visual.trunk.forward_features(images)
    torch.testing.assert_close(found["pooled"], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["patches"].flatten(2).transpose(1, 2), tokens[:, 1:], rtol=1e-5, atol=1e-5)
    wanted = clip.encode_text(open_clip.SimpleTokenizer()(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.text.encode(TEXTS, CPU), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_classes_are_those_of_open_clips_zero_shot_classifier(clip: Any, tmp_path: Path) -> None:
    tower = text_tower_in(save_clip(clip, tmp_path / "clip.safetensors"))
    assert tower is not None
    classes, templates = ["cat", "hot dog", "sea"], ["a photo of a {}.", "a bad {}"]
    ours = class_embeddings(tower.encode(sentences(classes, templates), CPU), len(templates))
    theirs = open_clip.build_zero_shot_classifier(clip, open_clip.SimpleTokenizer(), classes, templates)
    torch.testing.assert_close(ours, theirs.T, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_open_clips_own_tower(images: torch.Tensor, tmp_path: Path) -> None:
    """The embedding is that of encode_image, also beside the feature map."""
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "Tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "Tiny-test.json")
    model = open_clip.create_model("Tiny-test", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    encoder = load_encoder(parse_model(f"open_clip:Tiny-test:{tmp_path}/tiny.safetensors"), "fp32")
    wanted = model.encode_image(images, normalize=True)
    for kinds in (("clip",), KINDS):
        torch.testing.assert_close(encoder.module(images, kinds)["clip"], wanted, rtol=1e-5, atol=1e-6)
    assert encoder.module(images, KINDS)["patches"].shape == (3, 64, 2, 2) and encoder.text is not None
    wanted = model.encode_text(open_clip.SimpleTokenizer()(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.text.encode(TEXTS, CPU), wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_open_clip_around_timm_computes_all_in_one_forward(clip: Any, images: torch.Tensor) -> None:
    from visft_ds.evals.benchmarks.encoders import _OpenClipEncoder

    found = _OpenClipEncoder(clip.visual)(images, KINDS[:3])
    torch.testing.assert_close(found["clip"], clip.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6)
    assert found["patches"].shape == (3, 48, 2, 2)


@torch.no_grad()
def test_timm_vision_transformer_and_convolutions(tmp_path: Path) -> None:
    for name, side, grid in (("test_vit", 160, 10), ("test_resnet", 160, 5)):
        model = timm.create_model(name, pretrained=False, num_classes=0).eval()
        save_file({n: v.contiguous() for n, v in model.state_dict().items()}, tmp_path / f"{name}.safetensors")
        encoder = load_encoder(parse_model(f"timm:{name}:{tmp_path}/{name}.safetensors"), "fp32")
        image = torch.randn(1, 3, side, side)
        found = encoder.module(image, encoder.kinds)
        torch.testing.assert_close(found["pooled"], model(image), rtol=1e-5, atol=1e-5)
        assert found["patches"].shape[2:] == (grid, grid) and encoder.text is None


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "levit_128s"])
@torch.no_grad()
def test_the_classifier_of_a_timm_checkpoint_is_left_out_by_name(tmp_path: Path, name: str) -> None:
    """As published for ImageNet; levit has norms with its two classifiers, which are no part of what it computes."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=11).eval()
    values = {key: value.contiguous() for key, value in model.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file(values, path)
    encoder = load_encoder(parse_model(f"timm:{name}:{path}"), "fp32")
    image = torch.randn(1, 3, encoder.side, encoder.side)
    wanted = model.forward_head(model.forward_features(image), pre_logits=True)
    assert torch.equal(encoder.module(image, ("pooled",))["pooled"], wanted)
    classifier = model.pretrained_cfg["classifier"]
    own = [f"{one}.weight" for one in ([classifier] if isinstance(classifier, str) else classifier)]
    assert not set(own) & {key.removeprefix("model.") for key in encoder.module.state_dict()}
    first = next(key for key in values if key not in own)
    for tensors in (values | {"extra.weight": torch.zeros(3)}, {k: v for k, v in values.items() if k != first}):
        save_file(tensors, path)
        with pytest.raises(ValueError, match="missing or too many"):
            load_encoder(parse_model(f"timm:{name}:{path}"), "fp32")


def test_what_is_no_checkpoint_of_timm_is_told_in_one_line(tmp_path: Path) -> None:
    for name in ("page.safetensors", "page.pth", "empty.safetensors", "empty.pth"):
        (tmp_path / name).write_text("<html>" * 20 if name.startswith("page") else "")
        with pytest.raises(ValueError, match=name):
            load_encoder(parse_model(f"timm:test_vit:{tmp_path}/{name}"), "fp32")


@pytest.mark.parametrize("size", [(61, 40), (40, 61), (28, 28), (9, 200)])
def test_images_are_prepared_as_by_open_clip(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs = image_transform_v2(PreprocessCfg(size=SIDE), is_train=False)(image)
    torch.testing.assert_close(square_preprocess(SIDE, *CLIP)(image), theirs, rtol=0, atol=1e-6)


def test_half_a_text_tower_is_refused(clip: Any, tmp_path: Path) -> None:
    whole = load_file(save_clip(clip, tmp_path / "clip.safetensors"))
    for name, message in (
        ("text.ln_final.bias", "ln_final.bias"),
        ("text.text_projection", "lacks text.text_projection"),
    ):
        save_file({n: v for n, v in whole.items() if n != name}, tmp_path / "half.safetensors")
        with pytest.raises(ValueError, match=message):
            text_tower_in(tmp_path / "half.safetensors")
    save_file({**whole, "text.adapter.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"adapter.weight"):
        text_tower_in(tmp_path / "more.safetensors")
    half = tmp_path / "half.safetensors"
    save_file({n: v for n, v in whole.items() if n != "visual.trunk.head.bias"}, half, metadata={"tower": TOWER})
    with pytest.raises(ValueError, match="half there"):
        load_encoder(parse_model(str(half)), "fp32")
    save_file(whole, half)
    with pytest.raises(ValueError, match="does not tell its number of heads"):
        load_encoder(parse_model(str(half)), "fp32")
