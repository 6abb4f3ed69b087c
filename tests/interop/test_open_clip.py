"""open_clip is the judge of our `open_clip` files: it builds the model, loads them strictly, computes the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from visft_ds.interop.backbones import load_backbone
from visft_ds.interop.files import TensorInfo, WeightFile, sha256_file
from visft_ds.interop.merge import merge_into_file
from visft_ds.interop.open_clip import CONFIG, FILE, LAYOUT, settings
from visft_ds.interop.peft import save_peft_adapter

from tests.clip_case import write_folder
from tests.random_tower import move_adapters, relative
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.cli import main
from visft_ds.interop.layouts import tower_of
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")
# fp32, two blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5
SIZES = {"width": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "image_size": 28}
#: open_clip builds towers by a name that timm knows; these are EVA02-E's and EVA01-g's architectures, small.
NAMES = {True: "visft_ds_tiny_post_norm", False: "visft_ds_tiny_pre_norm"}
TEXT = {"context_length": 9, "vocab_size": 40, "width": 64, "heads": 1, "layers": 2}


@pytest.fixture(autouse=True)
def _tiny_towers_in_timm() -> Iterator[None]:
    from timm.models import _registry
    from timm.models.eva import Eva

    def build(post_norm: bool) -> Any:
        def create(pretrained: bool = False, num_classes: int = 0, global_pool: str = "token", **_: Any) -> Eva:
            assert not pretrained
            return Eva(
                img_size=28,
                patch_size=14,
                embed_dim=32,
                depth=2,
                num_heads=2,
                mlp_ratio=2.0,
                qkv_bias=True,
                use_post_norm=post_norm,
                num_classes=num_classes,
                global_pool=global_pool,
            )

        return create

    for post_norm, name in NAMES.items():
        _registry._model_entrypoints[name] = build(post_norm)
        _registry._module_to_models["eva"].add(name)
    yield
    for name in NAMES.values():
        del _registry._model_entrypoints[name]
        _registry._module_to_models["eva"].discard(name)


def _config(post_norm: bool) -> dict[str, Any]:
    vision = {"image_size": 28, "timm_model_name": NAMES[post_norm], "timm_pool": "token", "timm_proj": None}
    return {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT, "custom_text": True}}


def _theirs(folder: Path, post_norm: bool, *, load: bool) -> Any:
    (folder / CONFIG).write_text(json.dumps(_config(post_norm)), encoding="utf-8")
    model = open_clip.create_model(f"local-dir:{folder}", require_pretrained=load, load_weights=load)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not load and not name.startswith("logit"):
                parameter.normal_(std=0.2)
    return model.eval()


def _ours(post_norm: bool) -> EvaViT:
    return build_backbone("debug", class_token=True, post_norm=post_norm, **SIZES).eval()


@pytest.mark.parametrize("post_norm", [True, False])
@pytest.mark.parametrize("prefix", ["visual.trunk.", "visual."], ids=["base of open_clip", "base of EVA-CLIP"])
def test_open_clip_computes_base_plus_adapter_from_a_merged_file(tmp_path: Path, post_norm: bool, prefix: str) -> None:
    whole = _theirs(tmp_path, post_norm, load=False)
    base = {name.replace("visual.trunk.", prefix): value for name, value in whole.state_dict().items()}
    save_file(base, tmp_path / "base.st.safetensors")
    ours, images, text = _ours(post_norm), torch.randn(2, 3, 28, 28), torch.randint(1, 40, (2, 9))
    load_backbone(ours, tmp_path / "base.st.safetensors")
    with torch.no_grad():
        plain = ours.tokens(images)
        assert relative(plain, whole.visual.trunk.forward_features(images)) < TOLERANCE, "reading their file"
        wanted_text = whole.encode_text(text)
    inject_lora(ours, rank=4, alpha=2.0)
    move_adapters(ours, spread=0.2)
    out = tmp_path / "merged"
    out.mkdir()
    report = merge_into_file(tmp_path / "base.st.safetensors", adapter_of(ours), out / FILE, layout="open_clip")
    assert not report.left_out
    got = _theirs(out, post_norm, load=True)
    with torch.no_grad():
        wanted = ours.tokens(images)
        assert relative(wanted, plain) > 1e-2, "the adapter must matter, or the next line proves nothing"
        assert relative(got.visual.trunk.forward_features(images), wanted) < TOLERANCE
        assert torch.equal(got.encode_text(text), wanted_text), "the text tower is untouched"
        # Class token -> CLIP projection, which the tower of ours does not have.
        projection = whole.visual.trunk.head
        assert relative(got.encode_image(images), projection(wanted[:, 0])) < TOLERANCE


def test_open_clip_loads_a_merged_tower_of_a_size_of_its_own_from_its_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "clip")
    ours = build_backbone("debug", class_token=True)
    load_backbone(ours, tmp_path / "clip" / FILE)
    inject_lora(ours, rank=4, alpha=2.0)
    move_adapters(ours, spread=0.2)
    adapter = adapter_of(ours, base_sha256=sha256_file(tmp_path / "clip" / FILE))
    save_peft_adapter(adapter, tmp_path / "adapter", tower_of(ours))
    out = tmp_path / "merged"
    words = f"--base {tmp_path}/clip/{FILE} --adapter {tmp_path}/adapter --format open_clip --out {out}"
    assert main(words.split()) == 0
    card = (out / "README.md").read_text(encoding="utf-8")
    assert 'open_clip.create_model(f"local-dir:{FOLDER}")' in card and "timm_model_name" in card
    got = open_clip.create_model(f"local-dir:{out}", require_pretrained=True).eval()
    images = torch.randn(2, 3, ours.image_size, ours.image_size)
    with torch.no_grad():
        assert relative(got.visual.trunk.forward_features(images), ours.eval().tokens(images)) < TOLERANCE


def test_a_tower_alone_is_no_model_for_open_clip(tmp_path: Path) -> None:
    ours = _ours(True)
    tensors = {f"visual.{name}": parameter.detach() for name, parameter in ours.named_parameters()}
    save_file(tensors, tmp_path / "tower.safetensors")
    inject_lora(ours, rank=2)
    with pytest.raises(ValueError, match=r"has no CLIP projection, text tower, .*loads whole models only"):
        merge_into_file(
            tmp_path / "tower.safetensors", adapter_of(ours), tmp_path / "out.safetensors", layout="open_clip"
        )
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(("preset", "name"), [("eva_e", "EVA02-E-14-plus"), ("eva_g", "EVA01-g-14-plus")])
def test_our_configuration_of_published_models_is_open_clips(preset: str, name: str) -> None:
    with torch.device("meta"):
        theirs = open_clip.factory.CustomTextCLIP(
            **{key: value for key, value in open_clip.get_model_config(name).items() if key != "custom_text"}
        )
    infos = {key: TensorInfo.of(value) for key, value in theirs.state_dict().items()}
    file = WeightFile(Path("published"), infos, lambda _: torch.empty(0), {})
    files = settings(file, tower_of(build_backbone(preset, device="meta", class_token=True)), Path("anywhere"))
    assert list(files) == [CONFIG]
    config = files[CONFIG]
    wanted, got = open_clip.get_model_config(name), config["model_cfg"]
    if preset == "eva_g":  # the same tower under two names of timm
        assert wanted["vision_cfg"].pop("timm_model_name") == "eva_giant_patch14_224"
        assert got["vision_cfg"].pop("timm_model_name") == "eva_giant_patch14_clip_224"
    assert got == wanted
    assert LAYOUT.prefix + "cls_token" in infos
    from open_clip import constants

    assert tuple(config["preprocess_cfg"]["mean"]) == constants.OPENAI_DATASET_MEAN
    assert tuple(config["preprocess_cfg"]["std"]) == constants.OPENAI_DATASET_STD
