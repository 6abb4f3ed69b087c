"""timm's DINOv3, CLIP and SigLIP as transformers has them, and every library that is to load an export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.elsewhere import as_map, run_readme
from tests.random_tower import adapter_of, merge, move_adapters, random_tower, relative, save_backbone
from tests.small_timm import FAMILIES, adapted, random_base
from visft_ds.cli import main
from visft_ds.interop import transformers_names
from visft_ds.interop.card import README, repository_of
from visft_ds.interop.layouts import MODEL
from visft_ds.interop.weights import Lazy, Weights
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import build_timm

transformers = pytest.importorskip("transformers")
# fp32, two blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5


def _export(
    name: str, folder: Path, *forms: str, layers: tuple[int, ...] = (), behind: tuple[str, ...] = ()
) -> tuple[Any, *tuple[Path, ...]]:
    """(backbone with its adapter, an export of each form); `behind`: names that begin so are not in the
    base.
    """
    base = random_base(name, folder)
    if behind:
        save_file({key: value for key, value in load_file(base).items() if not key.startswith(behind)}, base)
    backbone, adapter = adapted(name, base, layers)
    return backbone, *(merge(base, adapter, folder / form, "--format", form, verify=True) for form in forms)


def _images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_the_folder_by_itself(tmp_path: Path, name: str) -> None:
    backbone, out = _export(name, tmp_path, "transformers")
    model, actual = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    assert not any(actual.values()), actual
    with torch.no_grad():
        expected = backbone(_images())[0]
        tokens = model.eval()(pixel_values=_images()).last_hidden_state
        if "clip" in name:
            tokens = model.post_layernorm(tokens)
    assert relative(as_map(tokens, expected), expected) < TOLERANCE
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    pixels = processor(torch.zeros(3, 40, 50, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.allclose(
        pixels.mean((0, 2, 3)), -torch.tensor([0.4, 0.5, 0.6]) / torch.tensor([0.2, 0.3, 0.25])
    )


def test_siglip_keeps_its_pooling(tmp_path: Path) -> None:
    _, out, other = _export("vit_test_patch8_siglip_32", tmp_path, "transformers", "timm")
    whole = timm.create_model(f"local-dir:{other}", pretrained=True).eval()
    with torch.no_grad():
        got = transformers.AutoModel.from_pretrained(out).eval()(pixel_values=_images()).pooler_output
        assert relative(got, whole(_images())) < TOLERANCE


def test_a_tower_that_ends_early_is_a_shorter_model(tmp_path: Path) -> None:
    short, out = _export("vit_test_patch8_clip_quickgelu_32", tmp_path, "transformers", layers=(0,))
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        tokens = model.post_layernorm(model(pixel_values=_images()).last_hidden_state)
        expected = short(_images())[0]
        assert relative(as_map(tokens, expected), expected) < TOLERANCE
    assert model.config.num_hidden_layers == 1 and "what `blocks.0` gives" in (out / README).read_text()


@pytest.mark.parametrize(
    ("name", "layers", "behind"),
    [
        ("vit_test_plus_patch8_dinov3_qkvb", (0,), ("blocks.1.",)),
        ("vit_test_patch8_siglip_32", (0,), ("blocks.1.", "attn_pool.")),
        pytest.param("vit_test_patch8_clip_quickgelu_32", (0,), ("blocks.1.",), marks=pytest.mark.slow),
        pytest.param("vit_test_patch8_siglip_32", (), ("attn_pool.",), marks=pytest.mark.slow),
    ],
)
def test_a_base_that_ends_early_is_a_shorter_model_of_timm(
    tmp_path: Path, name: str, layers: tuple[int, ...], behind: tuple[str, ...]
) -> None:
    """As a run exports a backbone that trained itself: nothing may be filled with random numbers."""
    ours, out = _export(name, tmp_path, "timm", layers=layers, behind=behind)
    again = merge(tmp_path / "base.safetensors", adapter_of(ours), tmp_path / "again")
    models = [timm.create_model(f"local-dir:{folder}", pretrained=True).eval() for folder in (out, again)]
    with torch.no_grad():
        expected = ours(_images())[0]
        for model in models:
            assert relative(as_map(model.forward_features(_images()), expected), expected) < TOLERANCE
        assert torch.equal(models[0](_images()), models[1](_images())), "nor the pooling"


def test_a_convolutional_base_that_ends_early_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = random_base("test_convnext", tmp_path)
    whole = load_file(base)
    save_file({key: value for key, value in whole.items() if not key.startswith("stages.3.")}, base)
    save_file(load_file(base), base, {MODEL: json.dumps({"preset": "timm:test_convnext", "layers": [2]})})
    assert main(["export", "--backbone", str(base), "--format", "timm", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert (
        "lacks stages.3.downsample.1.weight" in printed
        and "--tasks none" in printed
        and not (tmp_path / "out").exists()
    )


def test_several_maps_come_out_of_what_is_exported(tmp_path: Path) -> None:
    """Those of training, by transformers' backbone with `out_indices`, and by timm with the line of the
    card.
    """
    ours, out, other = _export("vit_test_patch8_dinov3", tmp_path, "transformers", "timm", layers=(0, 1))
    theirs = transformers.DINOv3ViTBackbone.from_pretrained(out, out_indices=(1, 2)).eval()
    model = timm.create_model(f"local-dir:{other}", pretrained=True).eval()
    (call,) = re.findall(r"`(model\.forward_intermediates[^`]+)`", (other / README).read_text())
    with torch.no_grad():
        expected, names = ours.eval()(_images()), {"model": model, "images": _images()}
        exec(f"maps = {call}", names)
        for actual in (theirs(_images()).feature_maps, names["maps"]):
            assert len(actual) == 2 == len(expected)
            assert all(relative(one, want) < TOLERANCE for one, want in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_plus_patch16_dinov3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "vit_base_patch32_clip_quickgelu_224.openai",
                "vit_base_patch16_siglip_224.v2_webli",
                *(
                    "vit_7b_patch16_dinov3.lvd1689m",
                    "vit_base_patch16_dinov3_qkvb",
                    "vit_huge_patch14_clip_224",
                ),
                *(
                    "vit_xsmall_patch16_clip_224",
                    "vit_base_patch16_plus_clip_240",
                    "vit_so400m_patch14_siglip_gap_378",
                ),
                *("vit_giantopt_patch16_siglip_384", "vit_so400m_patch16_siglip_512"),
            )
        ),
    ],
)
def test_published_sizes_have_names_and_shapes_of_transformers(name: str) -> None:
    backbone = build_timm(name, device="meta")
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0).state_dict()
    tower = Weights({key: Lazy.of(value) for key, value in whole.items()}, Path("x"))
    written = transformers_names.written(tower, tower, backbone)
    config = written.files["config.json"]
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    got = {
        re.sub(r"^vision_model\.", "", re.sub(r"^layer\.", "model.layer.", key)): one.shape
        for key, one in written.tensors.items()
    }
    assert got == expected and config.get("vision_use_head", False) == (
        "siglip" in name and "gap" not in name
    )


def test_blip2_reads_a_tower_of_eva(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the code of the card: as many blocks as BLIP-2 has (39 of 40 in EVA-G), under a last norm of its
    own.
    """
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    }
    config = transformers.Blip2Config(
        vision_config={**sizes, "image_size": 28},
        qformer_config={**sizes, "vocab_size": 64, "encoder_hidden_size": 32},
        text_config={**text, "num_attention_heads": 2, "max_position_embeddings": 64, "model_type": "opt"},
        num_query_tokens=4,
        image_token_index=90,
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path / "blip2")
    ours = random_tower(depth=3, post_norm=False)
    save_backbone(ours, tmp_path / "base.safetensors")
    inject_lora(ours, rank=3, alpha=1.5)
    move_adapters(ours)
    out = merge(
        *(tmp_path / "base.safetensors", adapter_of(ours), tmp_path / "out"),
        *("--format", "transformers"),
        verify=True,
    )
    tower = transformers.Blip2VisionModel.from_pretrained(out).eval()
    images = _images(28)
    ours.blocks = ours.blocks[:2]
    ours.depth = 2
    with torch.no_grad():
        tokens = ours.tokens(images)[0]
        assert relative(tower(pixel_values=images).last_hidden_state, tokens) > 1e-2, (
            "the third block matters"
        )
    names = run_readme(out, monkeypatch, "Salesforce/blip2-opt-2.7b", str(tmp_path / "blip2"))
    vision = names["model"].vision_model.eval()
    with torch.no_grad():
        assert not torch.equal(vision.post_layernorm.weight, ours.norm.weight), "BLIP-2's own"
        vision.post_layernorm = ours.norm
        assert relative(vision(pixel_values=images).last_hidden_state, tokens) < TOLERANCE


@pytest.mark.parametrize("name", ["vit_test_plus_patch8_dinov3_qkvb", "test_convnext"])
def test_transformers_loads_a_folder_for_timm(tmp_path: Path, name: str) -> None:
    """By its wrapper around timm's models; a run's own base weights have no last norm of a ConvNeXt."""
    side = 32 if "dinov3" in name else 160
    backbone, out = _export(name, tmp_path, "timm", behind=("head.norm",))
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        got, expected = model(pixel_values=_images(side)).last_hidden_state, backbone(_images(side))[0]
    assert (
        type(model).__name__ == "TimmWrapperModel" and relative(as_map(got, expected), expected) < TOLERANCE
    )


def test_a_base_has_a_name_where_its_weights_tell_it() -> None:
    assert repository_of("hf-hub:timm/vit_base_patch16_dinov3.lvd1689m/model.safetensors") == (
        "timm/vit_base_patch16_dinov3.lvd1689m"
    )
    assert repository_of("weights/EVA02_CLIP_E_psz14_plus_s9B.pt") == "QuanSun/EVA-CLIP"
    assert repository_of("own.safetensors") is None and repository_of(None) is None
