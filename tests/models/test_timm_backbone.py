"""Models of timm as backbones: timm's own features, adapters that PEFT computes alike, files that timm
loads.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.elsewhere import as_map, run_readme
from tests.random_tower import adapter_of, fold_adapters, header_of, move_adapters, relative, save_adapter
from visft_ds.config.schema import ModelConfig
from visft_ds.export.cli import main
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import load_backbone, model_of, open_backbone
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import save_tensors
from visft_ds.models.lora import inject_lora, lora_layers, lora_parameters
from visft_ds.models.timm_backbone import TimmBackbone, build_timm
from visft_ds.prepare.materialize import open_base
from visft_ds.prepare.model import check_reached

timm = pytest.importorskip("timm")
# fp32, a few layers: both sides differ by the order of additions only (measured below 1e-6).
TOLERANCE = 1e-5
#: Model -> targets: linear layers, convolutions, slices of a fused qkv.
ADAPTED = {
    "test_convnext": ("stages.*.mlp.fc1", "stem.0"),
    "test_resnet": ("layer*.conv*",),
    "test_vit": ("q", "v", "blocks.*.mlp.fc2"),
}


def _adapted(name: str, *, targets: tuple[str, ...] | None = None) -> TimmBackbone:
    backbone = build_timm(name).eval()
    inject_lora(backbone, rank=3, alpha=1.5, targets=targets or ADAPTED[name])
    move_adapters(backbone, spread=0.1)
    return backbone


def _adapter(backbone: TimmBackbone, name: str) -> Adapter:
    return adapter_of(backbone, targets=ADAPTED[name])


def _base_file(name: str, folder: Path, **more: Tensor) -> Path:
    """All that timm's model has without classifier, as a run writes it."""
    backbone = build_timm(name)
    values = {**backbone.state_dict(), **backbone.left_out, **more}
    save_tensors(folder / "base.safetensors", values, header_of(backbone))
    return folder / "base.safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "test_convnext",
        "test_resnet",
        pytest.param("test_vit2", marks=pytest.mark.slow),
        pytest.param("test_efficientnet", marks=pytest.mark.slow),
    ],
)
def test_the_feature_map_is_timms(name: str) -> None:
    backbone = build_timm(name, seed=3).eval()
    again = build_timm(name, seed=3).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in backbone.state_dict().items())
    twin = timm.create_model(name, num_classes=0).eval()
    twin.load_state_dict({**backbone.state_dict(), **backbone.left_out})
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():
        features = backbone(images)[0]
        assert torch.equal(features, as_map(twin.forward_features(images), features))
        odd = backbone(torch.randn(1, 3, 101, 150))[0]
    stride = backbone.patch_size
    assert odd.shape[1] == backbone.width and abs(odd.shape[2] - 101 / stride) <= 1 and odd.isfinite().all()
    assert {key for key, _ in backbone.named_parameters()} <= set(twin.state_dict())


def test_published_models_by_shape() -> None:
    clip = build_timm("vit_base_patch16_clip_224.openai", device="meta")
    assert (clip.width, clip.patch_size, clip.image_size, clip.left_out) == (768, 16, 224, {})
    assert clip.pixel_mean == (0.48145466, 0.4578275, 0.40821073)
    siglip = build_timm("vit_base_patch16_siglip_224", device="meta")
    assert siglip.pixel_std == (0.5, 0.5, 0.5) and {name.partition(".")[0] for name in siglip.left_out} == {
        "attn_pool"
    }
    atto = build_timm("convnext_atto", device="meta")
    assert (atto.width, atto.patch_size) == (320, 32) and set(atto.left_out) == {
        "head.norm.weight",
        "head.norm.bias",
    }
    lite2 = build_timm(
        "tf_efficientnet_lite2", device="meta"
    )  # 9 rows of 260 pixels, the last a part of a stride
    assert (lite2.image_size, lite2.patch_size) == (260, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnxt_atto", "did you mean timm:convnext_atto"),
        ("vit_base_patch16_clip_224.opena", "Invalid pretrained tag"),
        ("vit_relpos_small_patch16_224", "follows the size of its image"),
        ("hiera_tiny_224", "follows the size of its image"),
    ],
)
def test_models_that_are_no_backbones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_timm(name, device="meta")


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        (
            "eva02_tiny_patch14_224",
            ["attn.qkv"],
        ),  # its forward reads the weight of a fused layer with biases of its own
        ("vit_small_patch16_dinov3", ["attn.qkv"]),  # gains that begin at 1e-5
        ("eva02_base_patch14_224", ["attn.q_proj", "attn.v_proj"]),
    ],
)
def test_queries_and_values_of_eva_towers_are_adapted(name: str, layers: list[str]) -> None:
    backbone, images = build_timm(name, layers=(0,)), torch.randn(1, 3, 56, 56)
    before = backbone(images)[0].detach()
    inject_lora(backbone, rank=2)
    assert list(lora_layers(backbone)) == [f"blocks.0.{layer}" for layer in layers]
    torch.testing.assert_close(backbone(images)[0].detach(), before)
    check_reached(backbone, images)


@pytest.mark.slow
def test_every_family_of_timm_works_or_says_why_not() -> None:
    from timm.models import list_models, list_modules

    made, refused = [], []
    for family in list_modules():
        names = [name for name in list_models(module=family) if not name.startswith("test_")]
        name = min(names, key=len, default=None)
        if name is None:
            continue
        try:
            made.append(build_timm(name, device="meta").name)
        except ValueError as error:
            refused.append((name, str(error)))
    assert all(f"timm's {name} " in text for name, text in refused)
    assert len(made) > len(refused) > 0


def test_statistics_of_batch_norms_do_not_move() -> None:
    backbone = build_timm("test_resnet").train()
    assert backbone.training and backbone.get_submodule("layer1.0").training
    assert not any(module.training for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    backbone(torch.randn(4, 3, 64, 64) * 5 + 1)[0].square().mean().backward()
    assert before and all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())
    assert backbone.get_parameter("layer1.0.bn1.weight").grad is not None


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_begin_as_nothing_and_merge_exactly(name: str) -> None:
    images = torch.randn(2, 3, 64, 96)
    backbone = build_timm(name).eval()
    with torch.no_grad():
        plain = backbone(images)[0]
        inject_lora(backbone, rank=3, targets=ADAPTED[name])
        assert torch.equal(backbone(images)[0], plain)
    check_reached(backbone, images)
    backbone = _adapted(name)
    with torch.no_grad():
        adapted = backbone(images)[0]
        assert relative(adapted, plain) > 1e-3
        fold_adapters(backbone)
        assert relative(backbone(images)[0], adapted) < TOLERANCE


def test_recomputing_gives_the_same_gradients() -> None:
    """Also behind a frozen stem, where a reentrant checkpoint would give none."""
    images, found = torch.randn(2, 3, 64, 64), []
    for policy in ("none", "block"):
        torch.manual_seed(0)
        backbone = _adapted("test_convnext", targets=("stages.*.mlp.fc1",)).train()
        for key, parameter in backbone.named_parameters():
            parameter.requires_grad_("lora_" in key)
        backbone.recompute = policy
        backbone(images)[0].square().mean().backward()
        found.append({key: value.grad for key, value in lora_parameters(backbone).items()})
    assert all(torch.equal(value, found[1][key]) for key, value in found[0].items())  # type: ignore[arg-type]
    assert all(value is not None and value.any() for value in found[1].values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_peft_computes_it(tmp_path: Path, name: str) -> None:
    peft = pytest.importorskip("peft")
    ours, images = _adapted(name), torch.randn(2, 3, 160, 160)
    adapter = _adapter(ours, name)
    folder = save_adapter(adapter, tmp_path / "adapter")
    model = timm.create_model(name, num_classes=0, checkpoint_path=str(_base_file(name, tmp_path)))
    theirs = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        expected, got = ours(images)[0], theirs.base_model.model.forward_features(images)
        with theirs.disable_adapter():
            plain = theirs.base_model.model.forward_features(images)
    assert relative(got, plain) > 1e-3 and relative(as_map(got, expected), expected) < TOLERANCE
    again = read_adapter(folder)
    assert again.fingerprint() == adapter.fingerprint() and again.slices == adapter.slices
    assert all(torch.equal(value, again.tensors[key]) for key, value in adapter.tensors.items())


@pytest.mark.parametrize(
    ("name", "size", "classes"),
    [("test_vit", 96, 0), ("test_convnext", None, 7)],
)
def test_timm_loads_the_folder_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, size: int | None, classes: int
) -> None:
    """A run on a checkpoint with a classifier or without one, merged into a folder, as the README in it
    says.
    """
    sized = {} if size is None else {"img_size": size}
    torch.manual_seed(0)
    whole = timm.create_model(name, num_classes=classes, **sized)
    base = tmp_path / "base.safetensors"
    save_file({key: value.contiguous() for key, value in whole.state_dict().items()}, base)
    ours = build_timm(name, image_size=size).eval()
    ours.load_state_dict({key: value for key, value in load_file(base).items() if key in ours.state_dict()})
    inject_lora(ours, rank=3, alpha=1.5, targets=ADAPTED[name])
    move_adapters(ours, spread=0.1)
    folder = save_adapter(_adapter(ours, name), tmp_path / "adapter")
    out = tmp_path / "out"
    words = ["--backbone", str(base), "--adapter", str(folder), "--out", str(out)]
    assert main([*words, "--format", "timm"]) == 0
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert loaded.num_classes == classes and tuple(loaded.pretrained_cfg["mean"]) == ours.pixel_mean
    assert loaded.state_dict().keys() == whole.state_dict().keys()
    images, printed = (
        torch.randn(1, 3, size or 160, size or 160),
        run_readme(out, monkeypatch)["model"].eval(),
    )
    with torch.no_grad():
        expected = ours(images)[0]
        for model in (loaded, printed):
            assert relative(as_map(model.forward_features(images), expected), expected) < TOLERANCE
        if classes:
            assert torch.equal(loaded.get_classifier().weight, whole.get_classifier().weight)


def test_files_are_accounted_for_key_by_key(tmp_path: Path) -> None:
    """A classifier is passed over by name; all else has to fit."""
    base = _base_file("test_convnext", tmp_path, **{"head.fc.weight": torch.zeros(5, 64)})
    empty = build_timm("test_convnext", device="meta")
    loaded = load_backbone(base)
    assert torch.equal(loaded.get_parameter("stem.0.weight"), load_file(base)["stem.0.weight"])
    model = ModelConfig(name="x", preset="timm:test_convnext", weights=str(base), precision="fp32")
    opened = open_base(model, empty, torch.bfloat16)
    assert opened.read("stem.0.bias").dtype == torch.float32 and len(opened.identity) == 64
    values = load_file(base)
    renamed = {("stages.9.x" if key == "stem.0.bias" else key): value for key, value in values.items()}
    save_file(renamed, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"stages.9.x is unexpected, stem.0.bias is missing"):
        open_backbone(empty, tmp_path / "other.safetensors")
    vit = _base_file("test_vit", tmp_path / "vit")
    with pytest.raises(ValueError, match="pos_embed"):
        open_backbone(build_timm("test_vit", image_size=96, device="meta"), vit)
    small = build_timm("test_vit", image_size=96, device="meta")
    assert model_of(small) == {"preset": "timm:test_vit", "image_size": 96} and small.pos_embed.shape[1] == 37


def test_statistics_of_a_file_in_half_precision_are_fp32(tmp_path: Path) -> None:
    values = load_file(_base_file("test_resnet", tmp_path))
    halves = {key: value.half() if value.is_floating_point() else value for key, value in values.items()}
    save_file(halves, tmp_path / "half.safetensors")
    loaded = load_backbone(tmp_path / "half.safetensors", {"preset": "timm:test_resnet"})
    kinds = {(name.rpartition(".")[2], value.dtype) for name, value in loaded.named_buffers()}
    statistics = {(name, torch.float32) for name in ("running_mean", "running_var")}
    assert kinds == {*statistics, ("num_batches_tracked", torch.int64)}


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("test_convnext", ("q",), "no layer for 'q'"),
        ("test_convnext", ("stages.*.conv_dw",), "grouped convolution"),
        ("test_vit", ("q", "blocks.*.attn.qkv"), "blocks.0.attn.qkv is adapted by two"),
        ("test_vit", ("norm",), "no layer for"),
    ],
)
def test_targets_that_are_none(name: str, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inject_lora(build_timm(name, device="meta"), rank=2, targets=targets)
