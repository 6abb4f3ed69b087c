"""What a checkpoint has of a run's backbone, for runs that have not written their export yet."""

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
    """The adapter in `<run>/checkpoints/step_N`, whose files are checked; settings come from the run's record.

    Raises ValueError for a damaged checkpoint, and for one of a run that trains more of its backbone, or nothing.
    """
    tensors, checkpoint = backbone_of_checkpoint(folder), open_checkpoint(folder)
    visft = recorded_config(folder.resolve().parents[1]).visft
    if visft.lora is None or not all(map(is_lora, tensors)):
        raise ValueError(f"{folder}: the run trains its backbone itself: let it finish, its export has whole weights")
    empty = build_empty(visft.model.preset, torch.float32, visft.model.backbone_options())
    inject_lora(empty, **visft.lora.model_dump())
    return Adapter.of(empty, visft.lora, tensors, checkpoint.identity("base weights"))


def backbone_of_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All that a checkpoint has of the backbone, by its names. Raises ValueError where that is nothing."""
    named = open_checkpoint(folder.resolve()).parameters()
    prefix = "backbone."
    tensors = {name.removeprefix(prefix): value.float() for name, value in named.items() if name.startswith(prefix)}
    if not tensors:
        raise ValueError(f"{folder}: the run trains nothing of its backbone")
    return tensors


@torch.no_grad()
def install_checkpoint(backbone: Backbone, folder: Path) -> str:
    """Put what a checkpoint has of the backbone into one with the base weights; returns a few words about it."""
    tensors, visft = backbone_of_checkpoint(folder), recorded_config(folder.resolve().parents[1]).visft
    if visft.lora is not None:
        inject_lora(backbone, **visft.lora.model_dump())
    parameters = dict(backbone.named_parameters())
    for name, value in tensors.items():
        parameters[name].copy_(value)
    return f"{len(tensors)} tensors that trained"


def newest_checkpoint_folder(run: Path) -> Path:
    """The newest complete checkpoint of a run. Raises ValueError where there is none."""
    checkpoint, skipped = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"{run} has no whole checkpoint and no export yet: {examples(skipped)}")
    return checkpoint.path
