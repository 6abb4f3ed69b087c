"""The run folder before a run starts: nothing of another run is ever continued or overwritten by mistake."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from visft_ds.config import ResolvedConfig, identity_differences, resolve_values
from visft_ds.config.preflight import INPUTS_FOLDER
from visft_ds.config.records import as_record, parse_json
from visft_ds.files import read_bytes
from visft_ds.monitor.metrics import RUN_SCHEMA, RunFile

#: What a run leaves in <run>/export: its base (where it was random), a backbone that was trained itself, the adapter.
BACKBONE_FILE, TRAINED_BACKBONE_FILE = "backbone.safetensors", "trained_backbone.safetensors"
ADAPTER_FOLDER = "adapter"
LOCK_FILE = "run.lock"
#: Says why a run ended in good order; there is none while it trains.
ENDED_FILE = "ended"
RECORD_FILE = "run.json"
#: Everything a run writes that is its own alone, as globs; the record comes last, so that `set_aside` can be cut off
#: anywhere.
_OF_A_RUN = (
    "export",
    ENDED_FILE,
    "metrics.jsonl",
    "tensorboard",
    "tracker-*",  # under which name a tracker knows the run
    "wandb",
    "trace-*.json.gz",
    "validation",
    "bundles",  # of runs before 0.2
    "checkpoints",
    INPUTS_FOLDER,
    RECORD_FILE,
)
_ASIDE = "earlier-"
#: Largest run.json that is read, bytes.
_MOST_BYTES = 1 << 26
_SHOWN = 8  # names or differences in a message


def open_run_folder(out: Path, config: ResolvedConfig, resume: str) -> bool:
    """Check that a run may write into `out`. Reads only, so every rank can do it.

    Returns whether another run is there that saved nothing, which has to be set aside first.

    Args:
        resume: "auto" continues a run of the same settings, "must" needs one, "no" wants a fresh folder.

    Raises:
        ValueError: a folder of other things, a run of other settings (each difference is named), or a run in the way.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not out.exists() or not any(out.iterdir()):
        if resume == "must":
            raise ValueError(f"--resume must: there is no run in {out}; use --resume auto to start one")
        return False
    if not (out / RECORD_FILE).is_file():
        found = sorted(path.name for path in out.iterdir() if not path.name.startswith(_ASIDE))
        of_a_start = {"export", ENDED_FILE, INPUTS_FOLDER, "metrics.jsonl", LOCK_FILE, "run.tmp", "tensorboard"}
        if set(found) <= of_a_start | {"features"}:
            return False  # a run that ended before its first record
        raise ValueError(f"{out} is not empty and holds no run ({', '.join(found[:_SHOWN])}); choose another --out")
    if not saved_something(out):
        if resume == "must":
            raise ValueError(f"--resume must: the run in {out} has saved nothing; use --resume auto to start anew")
        return resume == "no" or _differs(out, config)
    if resume == "no":
        raise ValueError(f"--resume no: {out} holds a run; choose another --out, or --resume auto to go on with it")
    differences = identity_differences(recorded_config(out).identity(), config.identity())
    if differences:
        shown = [f"  {line}" for line in differences[:_SHOWN]]
        more = [f"  ... {len(differences) - _SHOWN} more"] if len(differences) > _SHOWN else []
        raise ValueError(
            f"{out} holds a run with other settings (there -> here):\n"
            + "\n".join([*shown, *more])
            + "\nchoose another --out, or give the settings of that run"
        )
    return False


def saved_something(out: Path) -> bool:
    """Return True if a run in `out` has left a checkpoint, damaged ones too, or exported more than its random base."""
    checkpoints = (path for path in (out / "checkpoints").glob("step_*") if path.suffix != ".tmp")
    exported = (path for path in (out / "export").glob("[!.]*") if path.name != BACKBONE_FILE)
    return (out / RECORD_FILE).is_file() and any(True for _ in (*checkpoints, *exported))


def _differs(out: Path, config: ResolvedConfig) -> bool:
    try:
        return bool(identity_differences(recorded_config(out).identity(), config.identity()))
    except ValueError:  # a torn record, or one of another release: not this run
        return True


def set_aside(out: Path) -> Path:
    """Move what a run wrote into a folder of its own inside `out`; returns that. What else lies there stays."""
    number = next(n for n in itertools.count(1) if not (out / f"{_ASIDE}{n}").exists())
    aside = out / f"{_ASIDE}{number}"
    aside.mkdir()
    for pattern in _OF_A_RUN:
        for path in list(out.glob(pattern)):
            path.rename(aside / path.name)
    return aside


def recorded_config(out: Path) -> ResolvedConfig:
    """The resolved configuration of the run in `out`.

    Raises:
        ValueError: no run there, or one written by a release with another schema.
    """
    return resolve_values(read_run(out).config, str(out / RECORD_FILE))


def read_run(out: Path) -> RunFile:
    """The record of the run in `out`. Raises ValueError as `recorded_config`."""
    record = out / RECORD_FILE
    if not record.is_file():
        raise ValueError(f"there is no run in {out}: {record} does not exist")
    try:
        data = read_bytes(record, _MOST_BYTES)
        found = parse_json(data, str(record))
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema == RUN_SCHEMA:
            return as_record(data, RunFile, str(record))
    except (OSError, ValueError) as error:
        raise ValueError(f"{out} holds no readable run record: {error}") from error
    raise ValueError(f"{record}: schema {schema}; this release reads {RUN_SCHEMA}")


def refuse_filled(out: Path) -> None:
    """Raise ValueError for a folder of results that is not new or empty."""
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and nothing in it is overwritten: choose another --out, or remove it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out")


def recorded_inputs(out: Path) -> dict[str, dict[str, Any]]:
    """Dotted key -> where the run in `out` had an input and what proves it; empty for runs before 0.2.

    An unreadable record counts as empty: `recorded_config` says what is wrong with it.
    """
    try:
        return {key: one.model_dump() for key, one in read_run(out).inputs.items()}
    except ValueError:
        return {}


def newest_step(out: Path) -> int:
    """Step of the newest checkpoint of the run in `out` by its name; 0 without any."""
    return max(named_steps(out), default=0)


def named_steps(out: Path) -> set[int]:
    """Steps of the checkpoints of the run in `out` by their names, which they get when they are whole."""
    names = [path.name[5:] for path in (out / "checkpoints").glob("step_*")]
    return {int(name) for name in names if name.isdigit()}
