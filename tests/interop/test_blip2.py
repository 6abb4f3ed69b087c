"""transformers and LAVIS are the judges of our files for BLIP-2: they load them and compute what our model computes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import types
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.random_tower import move_adapters, random_tower, relative, save_backbone
from tools.merge_lora import main
from visft_ds.interop.adapter import Adapter, adapter_of
from visft_ds.interop.backbones import load_backbone
from visft_ds.interop.layouts import Tower, tower_of
from visft_ds.interop.merge import merge_into_file
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.towers import open_tower, resolve_tower
from visft_ds.interop.transformers import settings
from visft_ds.models.eva_vit import EvaViT, build_backbone
from visft_ds.models.lora import inject_lora

# fp32, three blocks: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5
WIDTH, DEPTH, HEADS, IMAGE = 32, 3, 2, 28


def _tiny(seed: int = 1) -> EvaViT:
    sizes = {"width": WIDTH, "depth": DEPTH, "num_heads": HEADS, "image_size": IMAGE}
    return random_tower(seed, post_norm=False, **sizes)


def _adapted(model: EvaViT) -> Adapter:
    inject_lora(model, rank=3, alpha=1.5)
    move_adapters(model)
    return adapter_of(model)


def _merged(folder: Path, layout: str, out: str) -> tuple[EvaViT, Path]:
    """(model with its adapter, the merged file) of a base as LAVIS has it, with a head."""
    model = _tiny()
    base = folder / "base.safetensors"
    save_backbone(model, base)
    save_file(load_file(base) | {"head.weight": torch.randn(7, WIDTH), "head.bias": torch.randn(7)}, base)
    adapter = _adapted(model)
    merge_into_file(base, adapter, folder / out, layout=layout, tower=tower_of(model))
    with torch.no_grad():
        plain = _tiny().tokens(_images())
        assert relative(model.tokens(_images()), plain) > 1e-2, "the adapter must matter, or nothing is proved"
    return model, folder / out


def _images() -> Tensor:
    return torch.randn(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(5))


def _blip2(tower: Tower) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.Blip2VisionModel(transformers.Blip2VisionConfig(**settings(tower, torch.float32))).eval()


def test_transformers_loads_merged_weights_and_computes_the_same(tmp_path: Path) -> None:
    ours, path = _merged(tmp_path, "transformers", "model.safetensors")
    theirs = _blip2(tower_of(ours))
    theirs.load_state_dict(load_file(path))  # strict
    with torch.no_grad():
        got = theirs(pixel_values=_images()).last_hidden_state
        assert relative(got, ours.tokens(_images())) < TOLERANCE


@pytest.mark.parametrize("shards", [(), ("--max-shard-size", "20KB")], ids=["one file", "shards"])
def test_transformers_loads_the_folder_as_its_card_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: tuple[str, ...]
) -> None:
    pytest.importorskip("transformers")
    model = _tiny()
    base, out = tmp_path / "base.safetensors", tmp_path / "out"
    save_backbone(model, base)
    save_peft_adapter(_adapted(model), tmp_path / "adapter", tower_of(model))
    given = ["--base", str(base), "--adapter", str(tmp_path / "adapter"), "--out", str(out), *shards]
    assert main([*given, "--format", "transformers"]) == 0
    assert (out / "model.safetensors.index.json").is_file() == bool(shards)
    (snippet,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    with torch.no_grad():
        got = names["model"].eval()(pixel_values=_images()).last_hidden_state
        assert relative(got, model.tokens(_images())) < TOLERANCE


@pytest.mark.parametrize("whole", [False, True], ids=["vision model alone", "inside BLIP-2"])
def test_we_load_what_transformers_saves(tmp_path: Path, whole: bool) -> None:
    ours = _tiny(seed=2)
    theirs = _blip2(tower_of(ours))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.2)
            if "qkv.bias" in name:  # trained by its owner: without effect, as reading assumes
                assert parameter[WIDTH : 2 * WIDTH].any()
    tensors = {("vision_model." if whole else "") + name: value for name, value in theirs.state_dict().items()}
    rest = {
        name: torch.zeros(2) for name in ("qformer.layernorm.weight", "query_tokens", "language_model.lm_head.weight")
    }
    save_file(tensors | (rest if whole else {}), tmp_path / "model.safetensors")
    summary = load_backbone(ours, tmp_path / "model.safetensors")
    ignored = sum(map(int, re.findall(r"ignored (\d+) ", summary)))
    assert "layout transformers," in summary and ignored == (len(rest) if whole else 0)
    with torch.no_grad():
        wanted = theirs(pixel_values=_images()).last_hidden_state
        assert relative(ours.tokens(_images()), wanted) < TOLERANCE


def test_a_blip2_base_is_merged_into_a_blip2_tower_again(tmp_path: Path) -> None:
    """Base and result in transformers' names: everything comes back, the bias of k as zero."""
    model = _tiny()
    theirs = _blip2(tower_of(model))
    save_file(dict(theirs.state_dict()), tmp_path / "base.safetensors")
    inject_lora(model, rank=3, alpha=1.5)  # lora_B is zero: nothing changes
    file, layout = open_tower(tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    merge_into_file(file.path, adapter_of(model), out, layout="transformers", tower=tower_of(model))
    before, after = load_file(file.path), load_file(out)
    assert layout.name == "transformers" and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_half_a_blip2_is_refused_by_name(tmp_path: Path) -> None:
    tensors = dict(_blip2(tower_of(_tiny())).state_dict())
    del tensors["encoder.layers.1.self_attn.qkv.bias"]
    tensors["encoder.layers.1.self_attn.gate"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"Missing \(2\): .*blocks\.1\.attn\.q_bias") as caught:
        load_backbone(_tiny(), tmp_path / "model.safetensors")
    assert "Unexpected (1): encoder.layers.1.self_attn.gate" in str(caught.value)


def test_published_sizes_are_transformers_own() -> None:
    """BLIP-2's tower is the giant without its last block: transformers' default configuration."""
    transformers = pytest.importorskip("transformers")
    giant = tower_of(build_backbone("eva_g", device="meta", depth=39, class_token=True))
    bare = Tower(giant.width, giant.depth, giant.hidden, giant.patch_size, giant.positions, True)
    tower = resolve_tower(bare)
    ours = {
        key: value for key, value in settings(tower, torch.float32).items() if key not in ("architectures", "dtype")
    }
    default = transformers.Blip2VisionConfig().to_dict()
    assert {key: default[key] for key in ours} == ours


class _Lavis(nn.Module):
    """LAVIS' tower by its documented facts: names of its file, pre-norm, no final norm, no head, class token first."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        positions = 1 + (IMAGE // 14) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, WIDTH))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, 14, 14)})
        self.blocks = nn.ModuleList(self._block() for _ in range(depth))

    @staticmethod
    def _block() -> nn.Module:
        attention = nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH, bias=False), "proj": nn.Linear(WIDTH, WIDTH)})
        attention.q_bias, attention.v_bias = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 2 * WIDTH), "fc2": nn.Linear(2 * WIDTH, WIDTH)})
        norms = {name: nn.LayerNorm(WIDTH, eps=1e-6) for name in ("norm1", "norm2")}
        return nn.ModuleDict({**norms, "attn": attention, "mlp": mlp})

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed["proj"](images).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            a = block["attn"]
            bias = torch.cat((a.q_bias, torch.zeros(WIDTH), a.v_bias))
            q, k, v = (a["qkv"](block["norm1"](x)) + bias).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed = ((q @ k.mT) * (WIDTH // HEADS) ** -0.5).softmax(-1) @ v
            x = x + a["proj"](mixed.transpose(1, 2).flatten(2))
            x = x + block["mlp"]["fc2"](nn.functional.gelu(block["mlp"]["fc1"](block["norm2"](x))))
        return x


def _lavis_itself(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`lavis/models/eva_vit.py` of an installed LAVIS, alone: LAVIS as a whole needs versions of 2023."""
    try:
        files = importlib.metadata.files("salesforce-lavis") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("LAVIS is not installed (pip install --no-deps salesforce-lavis==1.0.2)")
    (place,) = [file.locate() for file in files if str(file) == "lavis/models/eva_vit.py"]
    download = types.ModuleType("lavis.common.dist_utils")
    download.download_cached_file = lambda *_, **__: pytest.fail("nothing is downloaded here")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lavis.common.dist_utils", download)
    for name in ("lavis", "lavis.common"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    spec = importlib.util.spec_from_file_location("eva_vit_of_lavis", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names of timm that have moved since
        spec.loader.exec_module(module)
    return module.VisionTransformer(
        img_size=IMAGE,
        patch_size=14,
        use_mean_pooling=False,
        embed_dim=WIDTH,
        depth=DEPTH - 1,
        num_heads=HEADS,
        mlp_ratio=2.0,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )


@pytest.mark.parametrize("judge", ["by its facts", "itself"])
def test_lavis_loads_merged_weights_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: str
) -> None:
    """It builds one block less than the file has, and no final norm; it reads with strict=False."""
    ours, path = _merged(tmp_path, "lavis", "eva_vit_g.pth")
    theirs = (_lavis_itself(monkeypatch) if judge == "itself" else _Lavis(DEPTH - 1)).eval()
    result = theirs.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    last = {name for name in dict(_tiny().named_parameters()) if name.startswith(f"blocks.{DEPTH - 1}.")}
    assert not result.missing_keys
    assert set(result.unexpected_keys) == last | {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    with torch.no_grad():
        wanted = ours.embed(_images())
        for block in ours.blocks[:-1]:
            wanted = block(wanted)
        assert relative(theirs(_images()), wanted) < TOLERANCE


def test_blip2_of_lavis_brings_its_last_norm_from_outside_the_tower(tmp_path: Path) -> None:
    ours = _tiny(seed=3)
    tensors = {f"visual_encoder.{name}": value for name, value in load_state(ours).items()}
    for part in ("weight", "bias"):
        tensors[f"ln_vision.{part}"] = tensors.pop(f"visual_encoder.norm.{part}")
    tensors["Qformer.bert.pooler.dense.bias"] = torch.zeros(2)
    torch.save({"model": tensors}, tmp_path / "blip2.pth")
    model = _tiny(seed=4)
    summary = load_backbone(model, tmp_path / "blip2.pth")
    assert "layout lavis," in summary and summary.endswith("; ignored 1 (rest of BLIP-2)")
    assert all(torch.equal(value, load_state(ours)[name]) for name, value in load_state(model).items())


def load_state(model: EvaViT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layout", ["lavis", "transformers"])
def test_towers_that_blip2_has_not_are_refused(tmp_path: Path, layout: str) -> None:
    out = tmp_path / ("out.pth" if layout == "lavis" else "out.safetensors")
    for kind, message in (
        ({"class_token": True, "post_norm": True}, "pre-norm tower of EVA-CLIP-g only"),
        ({"class_token": False, "post_norm": False}, "no class token"),
    ):
        model = build_backbone("debug", width=32, depth=2, num_heads=2, image_size=28, **kind)
        base = tmp_path / f"{kind}.safetensors"
        save_backbone(model, base)
        with pytest.raises(ValueError, match=message):
            merge_into_file(base, _adapted(model), out, layout=layout)
    assert not out.exists()
