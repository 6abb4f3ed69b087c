"""The adapter of a run, finished or not, and the weights that it comes on top of, for tools that merge."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from visft_ds.config.record import recorded_config
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.layouts import is_lora
from visft_ds.interop.peft_folder import read_folder
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import examples
from visft_ds.models import build_empty
from visft_ds.pretrained import local
from visft_ds.run_files import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    CHECKPOINTS,
    EXPORT_RECORD_FILE,
    RECORD_FILE,
    STATE_FILE,
    TRAINED_BACKBONE_FILE,
    export_of,
    folder_of_run,
    run_around,
)


def adapter_at(path: Path) -> Adapter | None:
    """The adapter that a path names: of a run its export, else its newest whole checkpoint; or of any other
    kind.

    None for a run that trained its backbone itself, whose export is a base. Raises ValueError if there is
    none.
    """
    export = export_of(path)
    if (export / EXPORT_RECORD_FILE).is_file():
        if (export / ADAPTER_FOLDER).is_dir():
            return read_folder(export / ADAPTER_FOLDER)
        if not (export / TRAINED_BACKBONE_FILE).is_file():
            raise ValueError(f"{path}: the run trained no part of its backbone: give a run of stage 2")
        return None
    if (path / RECORD_FILE).is_file() or (path / STATE_FILE).is_file():
        return _adapter_of_checkpoint(path)
    return read_adapter(path)


def _adapter_of_checkpoint(folder: Path) -> Adapter:
    """The adapter in `<run>/checkpoints/step_N`, or in the newest whole checkpoint of a run.

    Raises ValueError for a damaged checkpoint, and for one of a run that trains more of its backbone, or
    nothing.
    """
    from visft_ds.checkpoint.export import install_checkpoint  # imports deepspeed: costs seconds
    from visft_ds.checkpoint.format import newest_checkpoint

    if not (folder / STATE_FILE).is_file():
        checkpoint, skipped = newest_checkpoint(folder / CHECKPOINTS)
        if checkpoint is None:
            raise ValueError(f"{folder} has no whole checkpoint and no export yet: {examples(skipped)}")
        folder = checkpoint.path
    visft = recorded_config(folder_of_run(folder.resolve())).visft
    empty = build_empty(visft.model.preset, torch.float32, visft.model.backbone_options())
    checkpoint, tensors = install_checkpoint(empty, folder)
    if visft.lora is None or not all(map(is_lora, tensors)):
        raise ValueError(
            f"{folder}: the run trains its backbone itself: let it finish, its export has whole weights"
        )
    base = checkpoint.record["identity"]["base weights"]
    return replace(Adapter.of(empty, visft.lora, tensors, base, checkpoint.step), path=folder)


def base_of(path: Path) -> tuple[Path, str | None]:
    """The base weights of a run, by its folder or a path inside, and how its record calls them; a backbone
    that was trained itself is a base, too.

    Raises ValueError for a path that belongs to no run, and if the weights have moved.
    """
    run = run_around(path)
    if run is None:
        raise ValueError(
            f"--backbone FILE is needed: {path} is not inside a run, which records its base weights"
        )
    weights = recorded_config(run).visft.model.weights
    export = export_of(run)
    if (export / TRAINED_BACKBONE_FILE).is_file():
        return export / TRAINED_BACKBONE_FILE, weights
    base = export / BACKBONE_FILE if weights is None else local(weights)
    if not base.is_file():
        raise ValueError(f"{base}, the base weights of {run}, are missing: give --backbone FILE")
    return base, weights
