"""What a run of `visft.init_from` begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.random_tower import SIZES, adapter_of, build_backbone, move_adapters, save_adapter
from visft_ds.config import resolve
from visft_ds.config.schema import VisftConfig
from visft_ds.models.lora import inject_lora
from visft_ds.run.folder import EarlierStarts
from visft_ds.run.start import open_start


def _config(folder: Path, lora: str) -> VisftConfig:
    path = json.dumps({"path": str(folder)})
    settings = (f"visft.model.overrides={json.dumps(SIZES)}", f"visft.init_from={path}", f"visft.lora={lora}")
    return resolve(stage=2, model="debug", settings=settings).visft


def test_a_folder_of_peft_is_a_start_with_its_own_settings(tmp_path: Path) -> None:
    """It names no targets: any that adapt the same rows are right, and the message has the shortest."""
    model = build_backbone("debug", **SIZES)
    inject_lora(model, rank=3, alpha=1.5, targets=("blocks.*.attn.qkv", "fc1"))
    move_adapters(model)
    adapter = adapter_of(model, targets=("blocks.*.attn.qkv", "fc1"))
    file = save_adapter(adapter, tmp_path / "peft") / "adapter_model.safetensors"
    save_file(load_file(file), file)  # as PEFT saves it, without our header
    data = cast(Any, None)
    with pytest.raises(ValueError, match="has other settings") as refused:
        open_start(
            _config(tmp_path / "peft", '{"rank":3,"alpha":1.5,"targets":["q"]}'), data, EarlierStarts()
        )
    text = str(refused.value).partition("visft.lora=")[2].removesuffix("'")
    assert json.loads(text) == {"rank": 3, "alpha": 1.5, "targets": ["fc1", "blocks.*.attn.qkv"]}
    for lora in (text, '{"rank":3,"alpha":1.5,"targets":["*.qkv","blocks.*.mlp.fc1"]}'):
        start = open_start(_config(tmp_path / "peft", lora), data, EarlierStarts())
        assert start is not None and start.base is None
        for name, value in adapter.tensors.items():
            assert torch.equal(start.tensors[f"backbone.{name}"].read(), value)
