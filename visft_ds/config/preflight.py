"""Names and places of the files that a run leaves."""

from __future__ import annotations

from pathlib import Path

from visft_ds.files import reading
from visft_ds.tasks import config_class

#: Record of a run in its folder; the copy in a whole export, which is written last.
RECORD_FILE = "run.json"
EXPORT_RECORD_FILE = "export.json"


def folder_of_run(place: Path) -> Path:
    """The folder of the run that a place is, or is a checkpoint of, there or gone."""
    return place.parent.parent if place.parent.name == "checkpoints" else place


def run_of(place: Path) -> Path | None:
    """The run folder, or export, that a place is, or that it is a checkpoint of; None for anything else."""
    run = folder_of_run(place)
    return run if any((run / name).is_file() for name in (RECORD_FILE, EXPORT_RECORD_FILE)) else None


def head_files(folder: Path, task: str) -> list[Path]:
    """Files that may hold a task's head: ours, a checkpoint's, else those named as the published ones.

    `folder` may be a file.
    """
    if folder.is_file():
        return [folder]
    values = folder / "parameters.safetensors"
    if values.is_file():
        from safetensors import safe_open  # it costs what --help has not

        with reading(values, "values of a checkpoint"), safe_open(values, framework="numpy") as file:
            return [values] if f"visft_head.{task}" in (file.metadata() or {}) else []
    ours = folder / f"{task}.safetensors"
    if ours.is_file():
        return [ours]
    word = config_class(task).published
    published = [folder / f"eva_{tower}_{word}_heads.ckpt" for tower in "eg"]
    if task == "segmentation":
        published.append(folder / "pytorch_model.bin")  # of PMT
    return [path for path in published if path.is_file()]
