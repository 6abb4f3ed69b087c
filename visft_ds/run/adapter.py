"""Change of a run's backbone, finished or not, for tools that merge it: an adapter, or weights that trained
themselves. A path may also name an adapter of any other kind.
"""

from __future__ import annotations

from pathlib import Path

from visft_ds.interop import peft
from visft_ds.interop.merge import read_adapter
from visft_ds.interop.tuned import Change, read_tuned
from visft_ds.prepare.places import WEIGHTS, find
from visft_ds.run.folder import ADAPTER_FOLDER, BACKBONE_FILE, TRAINED_BACKBONE_FILE, recorded_config


def place_of(path: Path) -> Path:
    """Resolve a path to the change it names: of a run its export, where it has one, or else its newest whole
    checkpoint. Raises ValueError for a run without either.
    """
    if not (path / "run.json").is_file():
        return path
    export = path / "export"
    if (export / ADAPTER_FOLDER / peft.FILE).is_file():
        return export / ADAPTER_FOLDER
    if recorded_config(path).visft.lora is None and (export / TRAINED_BACKBONE_FILE).is_file():
        return export / TRAINED_BACKBONE_FILE
    from visft_ds.checkpoint.adapter import newest_checkpoint_folder  # imports deepspeed: costs seconds

    return newest_checkpoint_folder(path)


def read_change(place: Path) -> Change:
    """The change at a place. Raises ValueError where there is none, or a damaged one."""
    if place.name == TRAINED_BACKBONE_FILE:
        return read_tuned(place)
    if (place / "state.json").is_file():
        from visft_ds.checkpoint.adapter import change_of_checkpoint

        return change_of_checkpoint(place)
    return read_adapter(place)


def base_of(path: Path) -> Path | None:
    """The weights that the change of a run, or of something inside its folder, comes on top of; None for all that
    belongs to no run. Raises ValueError where they are not found any more.
    """
    path = path.resolve()
    run = next((folder for folder in (path, *path.parents) if (folder / "run.json").is_file()), None)
    if run is None:
        return None
    visft, export = recorded_config(run).visft, run / "export"
    if visft.lora is not None and (export / TRAINED_BACKBONE_FILE).is_file():  # trained beside its adapter
        return export / TRAINED_BACKBONE_FILE
    return export / BACKBONE_FILE if visft.model.weights is None else find(run, visft, WEIGHTS)
