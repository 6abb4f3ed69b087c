"""Backbone in a checkpoint, for runs that have not written their export yet."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from visft_ds.checkpoint.format import newest_checkpoint, open_checkpoint
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import is_lora
from visft_ds.interop.weights import examples
from visft_ds.models import Backbone, build_empty
from visft_ds.models.lora import inject_lora
from visft_ds.run.folder import recorded_config


def adapter_of_checkpoint(folder: Path) -> Adapter:
    """The adapter in `<run>/checkpoints/step_N`, or in the newest whole checkpoint of a run.

    Raises ValueError for a damaged checkpoint, and for one of a run that trains more of its backbone, or nothing.
    """
    if not (folder / "state.json").is_file():
        checkpoint, skipped = newest_checkpoint(folder / "checkpoints")
        if checkpoint is None:
            raise ValueError(f"{folder} has no whole checkpoint and no export yet: {examples(skipped)}")
        folder = checkpoint.path
    tensors, visft = _of_backbone(folder), recorded_config(folder.resolve().parents[1]).visft
    if visft.lora is None or not all(map(is_lora, tensors)):
        raise ValueError(f"{folder}: the run trains its backbone itself: let it finish, its export has whole weights")
    empty = build_empty(visft.model.preset, torch.float32, visft.model.backbone_options())
    inject_lora(empty, **visft.lora.model_dump())
    return Adapter.of(empty, visft.lora, tensors, open_checkpoint(folder).identity("base weights"))


@torch.no_grad()
def install_checkpoint(backbone: Backbone, folder: Path) -> str:
    """Put what a checkpoint has of the backbone into one with the base weights; returns a few words about it."""
    tensors, visft = _of_backbone(folder), recorded_config(folder.resolve().parents[1]).visft
    if visft.lora is not None:
        inject_lora(backbone, **visft.lora.model_dump())
    for name, value in tensors.items():
        backbone.get_parameter(name).copy_(value)
    return f"{len(tensors)} tensors that trained"


def _of_backbone(folder: Path) -> dict[str, Tensor]:
    named = open_checkpoint(folder.resolve()).parameters()
    tensors = {n.removeprefix("backbone."): value for n, value in named.items() if n.startswith("backbone.")}
    if not tensors:
        raise ValueError(f"{folder}: the run trains nothing of its backbone")
    return tensors
