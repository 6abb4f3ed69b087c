"""Names of the files of a run, and what they say about it before any of them is read.

RUN/run.json                       its record: settings, and fingerprints of what it was made with
    metrics.jsonl                  a line for each step, evaluation and save
    run.lock                       held by the process that writes here
    checkpoints/step_00000500/     parameters.safetensors, moments.safetensors, state.json
    export/                        export.json (a copy of the record, written last), <task>.safetensors,
                                   adapter/, backbone.safetensors, trained_backbone.safetensors
"""

from __future__ import annotations

from pathlib import Path

RECORD_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = "run.lock"

CHECKPOINTS = "checkpoints"
PARAMETERS_FILE = "parameters.safetensors"
MOMENTS_FILE = "moments.safetensors"
STATE_FILE = "state.json"

EXPORT = "export"
#: Copy of the record in a whole export, which is written last.
EXPORT_RECORD_FILE = "export.json"
ADAPTER_FOLDER = "adapter"
BACKBONE_FILE = "backbone.safetensors"  #: base weights, if they were random
TRAINED_BACKBONE_FILE = "trained_backbone.safetensors"  #: a backbone that was trained itself


def check_exists(path: Path) -> None:
    """Raise ValueError for a model that is not there."""
    if not path.exists():
        files = (*path.parent.glob(f"*/{RECORD_FILE}"), *path.parent.glob(f"*/{STATE_FILE}"))
        beside = sorted({file.parent.name for file in files})
        listed = ", ".join(beside[:10]) + (", ..." if len(beside) > 10 else "")
        way = f"beside it: {listed}" if beside else "visft train makes a run"
        raise ValueError(f"{path}: no such run, checkpoint, export folder or weight file; {way}")


def check_new(out: Path) -> None:
    """Raise ValueError for an output that is there already."""
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten: choose another --out")


def folder_of_run(path: Path) -> Path:
    """The folder of the run that a path is, or is a checkpoint of, there or gone."""
    return path.parent.parent if path.parent.name == CHECKPOINTS else path


def run_of(path: Path) -> Path | None:
    """The run folder, or export, that a path is, or that it is a checkpoint of; None for anything else."""
    run = folder_of_run(path)
    return run if any((run / name).is_file() for name in (RECORD_FILE, EXPORT_RECORD_FILE)) else None


def run_around(path: Path) -> Path | None:
    """The run, or the export of one, that a path is or lies inside of."""
    path = path.resolve()
    for folder in (path, *path.parents):
        if run_of(folder) == folder:
            return folder
    return None


def export_of(run: Path) -> Path:
    """The folder of what a run has exported or will export; an export is its own."""
    return run if (run / EXPORT_RECORD_FILE).is_file() else run / EXPORT


def saved_something(run: Path) -> bool:
    """Return True if a run has left a checkpoint, damaged ones too, or a whole export."""
    if not (run / RECORD_FILE).is_file():
        return False
    if (run / EXPORT / EXPORT_RECORD_FILE).is_file():
        return True
    return any(path.suffix != ".tmp" for path in (run / CHECKPOINTS).glob("step_*"))


def named_steps(run: Path) -> set[int]:
    """Steps of the checkpoints of a run by their names, which they get when they are whole."""
    names = [path.name.removeprefix("step_") for path in (run / CHECKPOINTS).glob("step_*")]
    return {int(name) for name in names if name.isdigit()}
