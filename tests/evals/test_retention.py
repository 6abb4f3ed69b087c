"""Answers that stay, and one model at several scales: against timm's own model, and models loaded one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.evals.test_benchmarks import _record, _run, world
from visft_ds.config.schema import LoraConfig
from visft_ds.evals.benchmarks.models import LoadOptions, ModelSpec, load_encoder, parse_model
from visft_ds.evals.benchmarks.retention import load_classifier, read_images
from visft_ds.evals.benchmarks.run import tensors_of
from visft_ds.evals.benchmarks.scales import Scales
from visft_ds.interop.adapter import adapter_of_run
from visft_ds.interop.cli import main as merge_main
from visft_ds.interop.layouts import tower_metadata
from visft_ds.interop.merge import merge_timm, read_adapter
from visft_ds.interop.peft import save_peft_adapter
from visft_ds.interop.writing import save_tensors
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.models.timm_backbone import build_timm

__all__ = ["world"]  # the fixture
NAME, LATE = "test_efficientnet", ("blocks.[34].*.conv_pw",)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a classifier, an adapter of the last stages, its merge, a bare backbone, and pictures."""
    root = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=7).eval()
    values = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_tensors(root / "base.safetensors", values, tower_metadata(build_timm(NAME)))
    _adapter(NAME, LATE, root / "adapter")
    merge_timm(root / "base.safetensors", read_adapter(root / "adapter"), root / "merged.safetensors")
    bare = {key: value for key, value in load_file(root / "merged.safetensors").items() if "classifier" not in key}
    save_tensors(root / "bare.safetensors", bare, tower_metadata(build_timm(NAME)))
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(24):
        pixels = (rng.integers(0, 120, 3) + rng.integers(0, 135, (170, 200, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"pictures/{number:02d}.png")
    return root


def _adapter(name: str, targets: tuple[str, ...], folder: Path, spread: float = 0.5) -> None:
    backbone = build_timm(name).eval()
    lora = LoraConfig(rank=2, alpha=2, targets=targets)
    inject_lora(backbone, rank=2, alpha=2, targets=targets)
    generator = torch.Generator().manual_seed(0)
    tensors = {key: spread * torch.randn(p.shape, generator=generator) for key, p in lora_parameters(backbone).items()}
    save_peft_adapter(adapter_of_run(lora, tensors, backbone), folder)


def test_answers_are_those_of_timms_own_models(net: Path, tmp_path: Path) -> None:
    """Base, adapter, merge with and without classifier; times nothing, every answer stays."""
    base = net / "base.safetensors"
    command = [f"base=timm:{NAME}:{base}", f"own={base}+{net}/adapter", f"half={base}+{net}/adapter@0.5"]
    command += [f"merged={net}/merged.safetensors", f"bare={net}/bare.safetensors", f"none={base}+{net}/adapter@0"]
    arguments = [word for model in command for word in ("--model", model)]
    status, _, errors = _run(*arguments, "--benchmark", f"retention={net}/pictures", "--out", tmp_path)
    assert (status, errors) == (0, "")
    said = []
    for path in (base, net / "merged.safetensors"):
        model = timm.create_model(NAME, num_classes=7, checkpoint_path=str(path)).eval()
        prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        images = [Image.open(one) for one in sorted((net / "pictures").iterdir())]
        with torch.no_grad():
            said.append(model(torch.stack([prepare(image) for image in images])).argmax(dim=1))
    kept = float((said[0] == said[1]).double().mean())
    assert 0 < kept < 1
    (row,) = _record(tmp_path)["rows"]
    assert row["name"] == "retention/pictures answers kept" and row["items"] == 24
    found = {label: of["value"] for label, of in row["values"].items()}
    assert found == {"base": 1, "own": kept, "merged": kept, "bare": kept, "none": 1, "half": found["half"]}
    assert row["differences"]["own"]["value"] == pytest.approx(kept - 1)


def test_a_tower_that_ended_early_lends_what_it_has(net: Path, tmp_path: Path) -> None:
    """Tensors of the other file replace those of the same name, all others stay the first model's."""
    base = load_file(net / "base.safetensors")
    part = {key: value + 1 for key, value in base.items() if key.startswith("blocks.0.") and value.is_floating_point()}
    save_tensors(tmp_path / "part.safetensors", part, tower_metadata(build_timm(NAME)))
    first = ModelSpec("base", "timm", NAME, str(net / "base.safetensors"))
    found = load_classifier(ModelSpec("part", "visft_ds", str(tmp_path / "part.safetensors")), first)
    values = {key.removeprefix("model."): value for key, value in found.module.state_dict().items()}
    assert values.keys() == base.keys()
    for key, value in values.items():
        torch.testing.assert_close(value, part.get(key, base[key]), rtol=0, atol=0)


def test_who_has_no_classifier_is_told_in_one_line(world: Path, net: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({key: value.contiguous() for key, value in timm.create_model("test_resnet").state_dict().items()}, other)
    base, clip = f"timm:{NAME}:{net}/base.safetensors", str(world / "clip.safetensors")
    for models, message in (
        ([clip], "clip brings none: it is no model of timm with weights"),
        ([f"timm:{NAME}:random"], f"{NAME} brings none"),
        ([f"{net}/bare.safetensors"], f"bare.safetensors has no classifier of timm's {NAME}"),
        ([base, clip], "clip cannot be asked: it is no model of timm"),
        ([base, f"timm:test_resnet:{other}"], "test_resnet is timm's test_resnet, which cannot feed the classifier"),
    ):
        arguments = [word for model in models for word in ("--model", model)]
        status, _, errors = _run(*arguments, "--benchmark", f"retention={net}/pictures", "--out", tmp_path / "out")
        assert status == 2 and message in errors, (message, errors)
        assert "answers of the first" in errors or "cannot feed" in errors


def test_pictures_of_any_folder(net: Path, tmp_path: Path) -> None:
    assert len(read_images(str(net))) == 24  # one folder below
    for number, folder in enumerate(("a", "b", "b", "val2017")):
        if folder == "val2017":
            assert len(read_images(str(tmp_path / "tree"))) == 3
        (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / folder / f"{number}.png").write_bytes((net / "pictures/00.png").read_bytes())
    assert read_images(str(tmp_path / "tree")).names == ["val2017/3.png"]
    assert read_images(str(net / "pictures")).names[0] == "00.png"
    with pytest.raises(ValueError, match="no such folder"):
        read_images(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images"):
        read_images(str(tmp_path / "empty"))


def _specs(text: str, scales: tuple[float, ...]) -> list[ModelSpec]:
    spec = parse_model(text)
    return [replace(spec, label=f"{scale}", scale=scale) for scale in scales]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (NAME, LATE),
        ("test_resnet", ("layer2.*.downsample.1",)),  # its sum is computed in place, into what came before
        ("test_vit", ("q", "v", "blocks.1.mlp.fc2")),
        ("test_convnext", ("stages.3.*.mlp.fc1",)),
    ],
)
def test_scales_of_one_module_are_models_of_their_own(
    name: str, targets: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, batch by batch, in any order of scales."""
    backbone = build_timm(name)
    values = {**backbone.state_dict(), **backbone.left_out}
    save_tensors(tmp_path / "base.safetensors", values, tower_metadata(backbone))
    _adapter(name, targets, tmp_path / "adapter")
    specs = _specs(f"{tmp_path}/base.safetensors+{tmp_path}/adapter", (1.0, 0.0, -0.5))
    alone = [load_encoder(spec, LoadOptions("fp32")).module for spec in specs]
    shared = load_encoder(specs[0], LoadOptions("fp32")).module
    scales = Scales(shared, [tensors_of(spec) for spec in specs])
    for _ in range(2):
        images = torch.randn(2, 3, 96, 96)
        for number, module in enumerate(alone):
            with torch.inference_mode():
                scales.use(number)
                found, wanted = (one(images, ("pooled", "patches")) for one in (shared, module))
            assert all(torch.equal(found[kind], wanted[kind]) for kind in wanted), number


def test_trainings_of_one_recipe_take_turns_in_one_module(net: Path, tmp_path: Path) -> None:
    """Seeds, scales and averages through the command: each is what it is alone, and the average what its parts give."""
    _adapter(NAME, LATE, tmp_path / "other", spread=0.3)
    models = [f"one={net}/base.safetensors+{net}/adapter", f"two={net}/base.safetensors+{tmp_path}/other@0.5"]
    base = f"base=timm:{NAME}:{net}/base.safetensors"
    kept = {}
    for number, group in enumerate([models, *([model] for model in models)]):
        words = [word for model in (base, *group) for word in ("--model", model)]
        out = tmp_path / str(number)
        assert _run(*words, "--benchmark", f"retention={net}/pictures", "--out", out)[0] == 0
        record = _record(out)
        kept[number] = {label: of["value"] for label, of in record["rows"][0]["values"].items()}
        assert all(f"{part}" in str(record["models"]) for part in ([net / "adapter"] if number < 2 else []))
    assert kept[0] == kept[1] | kept[2] and len(set(kept[0].values())) == 3
    words = ["--adapter", str(net / "adapter"), "--adapter", str(tmp_path / "other"), "--weights", "0.25", "0.5"]
    words += ["--base", str(net / "base.safetensors"), "--format", "peft", "--out", str(tmp_path / "soup")]
    assert merge_main(words) == 0
    parts = [read_adapter(path) for path in (tmp_path / "soup", net / "adapter", tmp_path / "other")]
    for weight in parts[0].weights():
        changes = [part.delta(weight) for part in parts]
        torch.testing.assert_close(changes[0], 0.25 * changes[1] + 0.5 * changes[2])


def test_what_comes_before_the_adapter_is_computed_once(net: Path) -> None:
    module: Any = load_encoder(parse_model(f"{net}/base.safetensors+{net}/adapter"), LoadOptions("fp32")).module
    counted = {"blocks.2.0.conv_pwl": 0, "blocks.3.0.conv_pw": 0, "blocks.4.0.conv_dw": 0}
    for part in counted:
        module.backbone.get_submodule(part).register_forward_pre_hook(
            lambda *_, part=part: counted.__setitem__(part, counted[part] + 1)
        )
    specs = _specs(f"{net}/base.safetensors+{net}/adapter", (0.0, 0.5, 1.0))
    scales = Scales(module, [tensors_of(spec) for spec in specs])
    for number in range(3):
        scales.use(number)
        module(torch.randn(1, 3, 96, 96), ("patches",))
    assert list(counted.values()) == [1, 3, 3]
