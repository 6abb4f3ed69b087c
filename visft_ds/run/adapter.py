"""The adapter of a run, finished or not, and the weights that it comes on top of, for tools that merge."""

from __future__ import annotations

from pathlib import Path

from visft_ds.interop.adapter import FILE, Adapter
from visft_ds.interop.published import read_adapter
from visft_ds.prepare.places import WEIGHTS, find
from visft_ds.run.folder import ADAPTER_FOLDER, BACKBONE_FILE, RECORD_FILE, TRAINED_BACKBONE_FILE, recorded_config


def adapter_at(path: Path) -> Adapter | None:
    """The adapter that a path names: of a run its export, else its newest whole checkpoint; or of any other kind.

    None for a run that trained its backbone itself, whose export is a base. Raises ValueError where there is none.
    """
    if (path / RECORD_FILE).is_file():
        if recorded_config(path).visft.lora is None and (path / "export" / TRAINED_BACKBONE_FILE).is_file():
            return None
        if (path / "export" / ADAPTER_FOLDER / FILE).is_file():
            return Adapter.load(path / "export" / ADAPTER_FOLDER)
        from visft_ds.checkpoint.adapter import newest_checkpoint_folder  # imports deepspeed: costs seconds

        path = newest_checkpoint_folder(path)
    if (path / "state.json").is_file():
        from visft_ds.checkpoint.adapter import adapter_of_checkpoint

        return adapter_of_checkpoint(path)
    return read_adapter(path)


def run_around(path: Path) -> Path | None:
    """The run that a path is, or lies inside of."""
    path = path.resolve()
    return next((folder for folder in (path, *path.parents) if (folder / RECORD_FILE).is_file()), None)


def base_of(path: Path) -> Path:
    """The weights under the adapter of a run, or of something inside its folder; those that trained are a base, too.

    Raises ValueError for what belongs to no run, and where the weights are not found any more.
    """
    run = run_around(path)
    if run is None:
        raise ValueError(f"--base FILE is needed: {path} is not inside a run, which knows its base weights")
    visft, export = recorded_config(run).visft, run / "export"
    if (export / TRAINED_BACKBONE_FILE).is_file():
        return export / TRAINED_BACKBONE_FILE
    return export / BACKBONE_FILE if visft.model.weights is None else find(run, visft, WEIGHTS)
