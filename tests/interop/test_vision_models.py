"""timm's DINOv3, CLIP and SigLIP as transformers has them, and every library that is to load an export."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml

from tests.random_tower import move_adapters, random_tower, relative, save_backbone
from tests.small_timm import FAMILIES, adapted, random_base
from tools.merge_lora import main
from visft_ds.interop import onnx, vision_models
from visft_ds.interop.adapter import adapter_of
from visft_ds.interop.backbones import load_backbone
from visft_ds.interop.card_data import Publication, front_matter, publication_of
from visft_ds.interop.files import TensorInfo, WeightFile
from visft_ds.interop.layouts import tower_of
from visft_ds.interop.loaders import load_onnx
from visft_ds.interop.peft import CONFIG, README, save_peft_adapter
from visft_ds.interop.towers import build_tower
from visft_ds.interop.vision_models import export_entries, has_pooling, settings
from visft_ds.interop.writing import save_tensors
from visft_ds.models.lora import inject_lora
from visft_ds.models.timm_backbone import build_timm

transformers = pytest.importorskip("transformers")
# fp32, two blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5


def _run(*words: object) -> int:
    return main([str(word) for word in words])


def _export(name: str, folder: Path, form: str, *more: object) -> tuple[Any, Path]:
    """(backbone with its adapter, the export)."""
    base = random_base(name, folder)
    backbone, adapter = adapted(name, base)
    save_peft_adapter(adapter, folder / "adapter")
    out = folder / "out"
    assert _run("--base", base, "--adapter", folder / "adapter", "--out", out, "--format", form, "--verify", *more) == 0
    return backbone, out


def _images(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_loads_the_folder_by_itself(tmp_path: Path, name: str) -> None:
    backbone, out = _export(name, tmp_path, "transformers")
    model, found = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(model).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    assert not any(found.values()), found
    with torch.no_grad():
        wanted = backbone(_images())
        tokens = model.eval()(pixel_values=_images()).last_hidden_state
        if "clip" in name:
            tokens = model.post_layernorm(tokens)
    got = tokens[:, -16:].transpose(1, 2).unflatten(2, (4, 4))
    assert relative(got, wanted) < TOLERANCE
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    pixels = processor(torch.zeros(3, 40, 50, dtype=torch.uint8), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert torch.allclose(pixels.mean((0, 2, 3)), -torch.tensor([0.4, 0.5, 0.6]) / torch.tensor([0.2, 0.3, 0.25]))


def test_siglip_keeps_its_pooling(tmp_path: Path) -> None:
    name = "vit_test_patch8_siglip_32"
    _, out = _export(name, tmp_path, "transformers")
    assert (
        _run("--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter", "--out", tmp_path / "t") == 0
    )
    whole = timm.create_model(f"local-dir:{tmp_path / 't'}", pretrained=True).eval()
    with torch.no_grad():
        got = transformers.AutoModel.from_pretrained(out).eval()(pixel_values=_images()).pooler_output
        assert relative(got, whole(_images())) < TOLERANCE


def test_a_tower_that_ends_early_is_a_shorter_model(tmp_path: Path) -> None:
    name = "vit_test_patch8_clip_quickgelu_32"
    base = random_base(name, tmp_path)
    short, adapter = adapted(name, base, layers=(0,))
    save_peft_adapter(adapter, tmp_path / "adapter")
    given = ("--base", base, "--adapter", tmp_path / "adapter", "--format", "transformers", "--verify")
    assert _run(*given, "--out", tmp_path / "out") == 0
    model = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        tokens = model.post_layernorm(model(pixel_values=_images()).last_hidden_state)
        assert relative(tokens[:, 1:].mT.unflatten(2, (4, 4)), short(_images())) < TOLERANCE
    assert model.config.num_hidden_layers == 1 and "ends after blocks.0" in (tmp_path / "out" / README).read_text()


@pytest.mark.parametrize(
    "name",
    [
        "vit_small_plus_patch16_dinov3",
        "vit_base_patch32_clip_quickgelu_224.openai",
        "vit_base_patch16_siglip_224.v2_webli",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("vit_7b_patch16_dinov3.lvd1689m", "vit_base_patch16_dinov3_qkvb", "vit_huge_patch14_clip_224"),
                *("vit_xsmall_patch16_clip_224", "vit_base_patch16_plus_clip_240", "vit_so400m_patch14_siglip_gap_378"),
                *("vit_giantopt_patch16_siglip_384", "vit_so400m_patch16_siglip_512"),
            )
        ),
    ],
)
def test_published_sizes_have_names_and_shapes_of_transformers(name: str) -> None:
    backbone = build_timm(name, device="meta")
    with torch.device("meta"):
        whole = timm.create_model(name, num_classes=0).state_dict()
    file = WeightFile(Path("x"), {key: TensorInfo.of(value) for key, value in whole.items()}, whole.__getitem__, {})
    pooled = has_pooling(file, backbone)
    files = settings(backbone, pooled=pooled, dtype=torch.float32)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**files["config.json"]))
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    entries = export_entries(file, backbone)
    got = {
        re.sub(r"^vision_model\.", "", re.sub(r"^layer\.", "model.layer.", key)): entry.info.shape
        for key, entry in entries.items()
    }
    assert got == wanted and pooled == ("siglip" in name and "gap" not in name)


def test_what_its_library_computes_otherwise_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = random_base("vit_test_patch8_dinov3", tmp_path)
    save_peft_adapter(adapted("vit_test_patch8_dinov3", base)[1], tmp_path / "adapter")
    entry = vision_models.VISION_MODELS[0]
    swapped = {**entry.inside, "gamma_1": entry.inside["gamma_2"], "gamma_2": entry.inside["gamma_1"]}
    monkeypatch.setattr(vision_models, "VISION_MODELS", (replace(entry, inside=swapped),))
    given = ("--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "out", "--format", "transformers")
    assert _run(*given, "--verify") == 1 and not (tmp_path / "out").exists()
    said = capsys.readouterr()
    assert "by transformers 5" in said.out and "does not compute what base + change does" in said.err


@pytest.mark.parametrize("name", ["vit_test_plus_patch8_dinov3_qkvb", "test_convnext"])
def test_transformers_loads_a_folder_for_timm(tmp_path: Path, name: str) -> None:
    """By its wrapper around timm's models; the card says so."""
    side = 32 if "dinov3" in name else 160
    backbone, out = _export(name, tmp_path, "timm")
    model = transformers.AutoModel.from_pretrained(out).eval()
    with torch.no_grad():
        got, wanted = model(pixel_values=_images(side)).last_hidden_state, backbone(_images(side))
    got = got if got.ndim == 4 else got[:, -16:].mT.unflatten(2, (4, 4))
    assert type(model).__name__ == "TimmWrapperModel" and relative(got, wanted) < TOLERANCE
    assert "AutoModel.from_pretrained(FOLDER)" in (out / README).read_text()


def test_peft_has_an_effect_on_timms_dinov3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its attention reads the fused weight past its layer: without a line of the README PEFT does nothing."""
    backbone, out = _export("vit_test_plus_patch8_dinov3_qkvb", tmp_path, "peft")
    assert "by peft" in capsys.readouterr().out
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / README).read_text(), flags=re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(compile(snippet.replace("model.safetensors", str(tmp_path / "base.safetensors")), README, "exec"), names)
    with torch.no_grad():
        got = names["model"].base_model.model.forward_features(_images())[:, -16:].mT.unflatten(2, (4, 4))
        assert relative(got, backbone(_images())) < TOLERANCE


def test_a_base_has_a_name_where_its_tag_tells_it(tmp_path: Path) -> None:
    plain, drawn = tmp_path / "plain.safetensors", tmp_path / "drawn.safetensors"
    save_tensors(plain, {"x": torch.zeros(1)}, {})
    save_tensors(drawn, {"x": torch.zeros(1)}, {"drawn_as": "recipe"})
    name = "vit_base_patch16_dinov3.lvd1689m"
    dinov3 = Publication(f"timm/{name}", "dinov3-license")
    assert publication_of(plain, name) == dinov3
    for base, model in ((drawn, name), (plain, name.partition(".")[0]), (plain, None), (None, name)):
        assert publication_of(base, model) is None
    cached = tmp_path / "models--org--some--name" / "model.safetensors"
    cached.parent.mkdir()
    save_tensors(cached, {"x": torch.zeros(1)}, {})
    assert publication_of(cached, name) == publication_of(cached, None) == Publication("org/some--name")
    eva = tmp_path / "EVA02_CLIP_E_psz14_plus_s9B.pt"
    eva.touch()
    assert publication_of(eva, None) == Publication("QuanSun/EVA-CLIP", "mit")
    lines = front_matter("out", "peft", dinov3, merged=False)
    front = yaml.safe_load("\n".join(lines[1:-2]))
    assert front["base_model"] == f"timm/{name}" and front["base_model_relation"] == "adapter"
    assert front["license"] == "other" and front["license_name"] == "dinov3-license"


@pytest.mark.parametrize("known", [True, False])
def test_a_folder_for_peft_names_its_base(tmp_path: Path, known: bool) -> None:
    base = random_base("test_vit", tmp_path)
    _, adapter = adapted("test_vit", base)
    published = Publication("timm/test_vit.r160_in1k", "apache-2.0") if known else None
    folder = save_peft_adapter(adapter, tmp_path / "adapter", base_model=published)
    config, card = json.loads((folder / CONFIG).read_text()), (folder / README).read_text()
    assert config["base_model_name_or_path"] == ("timm/test_vit.r160_in1k" if known else None)
    assert ("license: apache-2.0" in card) == known and ("names no base model" in card) != known
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(folder).base_model_name_or_path == config["base_model_name_or_path"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_test_plus_patch8_dinov3_qkvb", "vit_test_patch8_siglip_32", "test_convnext"])
def test_onnxruntime_computes_the_same_for_any_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    side = 160 if name == "test_convnext" else 32
    backbone, out = _export(name, tmp_path, "onnx")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.onnx"]
    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, side, side)
    with torch.no_grad():
        assert (
            relative(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), backbone(images)) < TOLERANCE
        )
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / README).read_text(), flags=re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {"images": images.numpy()}
    exec(compile(snippet.replace("# features", "features"), README, "exec"), names)
    assert names["features"].shape == tuple(backbone(images).shape)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [(), (0,)])
def test_a_tower_of_ours_as_a_graph(tmp_path: Path, layers: tuple[int, ...]) -> None:
    """It is that of `visft_ds.load_backbone`: without the class token that its base has."""
    pytest.importorskip("onnxruntime")
    save_backbone(random_tower(1), tmp_path / "base.safetensors")
    ours = build_tower(replace(tower_of(random_tower(1)), class_token=False), layers=layers).eval()
    load_backbone(ours, tmp_path / "base.safetensors")
    inject_lora(ours, rank=3, alpha=1.5)
    move_adapters(ours)
    save_peft_adapter(adapter_of(ours), tmp_path / "adapter", tower_of(random_tower(1)))
    out = tmp_path / "tower.onnx"
    given = ("--base", tmp_path / "base.safetensors", "--adapter", tmp_path / "adapter", "--format", "onnx", "--verify")
    assert _run(*given, "--out", out) == 0
    with torch.no_grad():
        assert relative(load_onnx(out)(_images(28)), ours(_images(28))) < TOLERANCE


@pytest.mark.slow
def test_weights_beyond_the_bound_of_protobuf_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx, "_LARGEST", 1000)
    ours = random_tower(1)
    files = onnx.write_onnx(ours, tmp_path / "tower.onnx")
    assert [path.name for path in files] == ["tower.onnx.data", "tower.onnx"]
    with torch.no_grad():
        assert relative(load_onnx(files[-1])(_images(28)), ours(_images(28))) < TOLERANCE
