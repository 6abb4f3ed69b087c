"""The adapter of a run, finished or not, and the weights that it comes on top of, for tools that merge."""

from __future__ import annotations

from pathlib import Path

from visft_ds.config.record import recorded_config
from visft_ds.interop.adapter import Adapter
from visft_ds.interop.peft_folder import read_folder
from visft_ds.interop.published import read_adapter
from visft_ds.pretrained import local
from visft_ds.run_files import (
    ADAPTER_FOLDER,
    BACKBONE_FILE,
    EXPORT_RECORD_FILE,
    RECORD_FILE,
    STATE_FILE,
    TRAINED_BACKBONE_FILE,
    export_of,
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
            raise ValueError(f"{path}: the run trained no part of its backbone")
        return None
    if (path / RECORD_FILE).is_file() or (path / STATE_FILE).is_file():
        from visft_ds.checkpoint.export import adapter_of_checkpoint  # imports deepspeed: costs seconds

        return adapter_of_checkpoint(path)
    return read_adapter(path)


def base_of(path: Path) -> Path:
    """The base weights of a run, by its folder or a path inside; a backbone that was trained itself is a
    base, too.

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
        return export / TRAINED_BACKBONE_FILE
    base = export / BACKBONE_FILE if weights is None else local(weights)
    if not base.is_file():
        raise ValueError(f"{base}, the base weights of {run}, are missing: give --backbone FILE")
    return base
