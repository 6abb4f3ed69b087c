"""Files in the forms that ViSFT published, written for tests of their readers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from visft_ds.interop.adapter import Adapter
from visft_ds.interop.published import published_name


def save_published_lora(adapter: Adapter, path: Path) -> None:
    """Write the LoRA of q and v as it was published; the file means alpha 1, so the scale goes into
    lora_B.
    """
    tensors = {
        f"visual.{name}": value.float() * (adapter.alpha if name.endswith("lora_B") else 1.0)
        for name, value in adapter.tensors.items()
    }
    torch.save(tensors, path)


def save_published_head(head: nn.Module, task: str, path: Path) -> None:
    """Write one head under its published names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({published_name(task, name): value for name, value in head.state_dict().items()}, path)
