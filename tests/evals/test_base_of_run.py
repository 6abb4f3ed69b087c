"""A run's settings say where its base is read, whatever the header of the base file holds."""

from __future__ import annotations

from pathlib import Path

import torch

from visft_ds.evals.model import ModelFiles, _load_backbone
from visft_ds.interop.efficientnet import installed


def test_a_base_is_read_where_its_run_read_it() -> None:
    model = {"preset": "timm:tf_efficientnet_lite0", "layers": [4]}
    backbone, _ = _load_backbone(ModelFiles(Path(installed()), Path("heads"), None, model), {}, torch.float32)
    assert tuple(backbone.layers_read) == (4,) and backbone.width == 112
