"""Checkpoint files: what trains and where the run stands, as safetensors and JSON, free of any topology.

    <run>/checkpoints/step_00000500/parameters.safetensors   fp32 values, by qualified name
                                    moments.safetensors      "exp_avg/<name>", "exp_avg_sq/<name>"
                                    state.json               step, settings, fingerprints, sha256 of files and
                                    itself

A checkpoint appears under its name only when every byte is on disk: written as step_N.tmp, state.json last,
synced, renamed. One of the same step that stood there is step_N.old until then, and still counts. A folder
step_N.tmp never does: it is half written or half deleted, and the next save removes it. Its files need no
`files.writing`: the folder is renamed as a whole. Each change goes through one function of `os`: a test ends
the process, fills the disk or cuts the power at every one.
Base weights are not stored; their sha256 is. Nor are generators of random numbers: every step draws from
(seed, step, rank), and the seed is among the settings. The step is also the position in the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from visft_ds.config import ResolvedConfig
from visft_ds.config.record import differences
from visft_ds.data.fetch import sha256_of
from visft_ds.errors import does_not_answer, retold
from visft_ds.files import read_bytes, reading, sync_folder
from visft_ds.interop.weights import Lazy, Weights, open_weights, safetensors_pieces
from visft_ds.parallel.state import EngineState
from visft_ds.run_files import MOMENTS_FILE, PARAMETERS_FILE, STATE_FILE

#: Name in an identity: the settings, by dotted key, that must be equal for a resume.
SETTINGS = "settings"
VERSION = 1  #: of state.json
_NAME = re.compile(r"step_\d{8,}(\.old)?")
_CHANGED = "content does not match its sha256; the file was changed or damaged"


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint on disk that passed its checks."""

    path: Path
    step: int  #: optimiser steps done
    record: Mapping[str, Any]  #: state.json

    def load(self) -> EngineState:
        """The tensors. Every rank reads them; they are small (what trains, three times)."""
        return EngineState(
            parameters=load_file(self.path / PARAMETERS_FILE),
            moments=load_file(self.path / MOMENTS_FILE),
            updates=self.record["updates"],
            loss_scale=self.record["loss_scale"],
        )

    def weights(self) -> Weights:
        """The fp32 values alone, by qualified name, none of them read yet."""
        return open_weights(self.path / PARAMETERS_FILE)


def save_checkpoint(
    folder: Path,
    step: int,
    state: EngineState,
    identity: Mapping[str, Any],
    header: Mapping[str, str] = {},
) -> Path:
    """Write one checkpoint; returns its folder when it is on disk. Main process only.

    Args:
        folder: <run>/checkpoints.
        identity: what must be equal for a resume, e.g. {"data": ..., "base weights": ..., SETTINGS: ...}.
        header: metadata of the file of values, which describe the heads in it.

    Raises:
        OSError: a full disk, a read-only folder; earlier checkpoints are as they were, no part of this one is
        left.
    """
    final = checkpoint_path(folder, step)
    temporary = final.with_suffix(".tmp")
    remedy = "Earlier checkpoints are untouched; the same command goes on from the newest"
    try:
        with explained(f"the checkpoint of step {step}", folder, remedy):
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder, temporary)
            os.mkdir(temporary)
            record = {
                "version": VERSION,
                "step": step,
                "updates": state.updates,
                "loss_scale": dict(state.loss_scale),
                "identity": dict(identity),
                "files": {
                    PARAMETERS_FILE: _write_tensors(temporary / PARAMETERS_FILE, state.parameters, header),
                    MOMENTS_FILE: _write_tensors(temporary / MOMENTS_FILE, state.moments),
                },
            }
            text = json.dumps(record | {"sha256": _digest(record)}, indent=1) + "\n"
            _write_file(temporary / STATE_FILE, [text.encode()])  # last: a folder with it is complete
            sync_folder(temporary)
            _publish(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of the state after `step` steps."""
    return folder / f"step_{step:08d}"


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint: renamed to step_N.tmp first, so that half of it never counts.

    One that cannot be deleted, such as one that another process reads on NFS, costs no run: a warning is
    printed, and the next save tries again.
    """
    with _warning(path):
        os.replace(path, path.with_suffix(".tmp"))
        shutil.rmtree(path.with_suffix(".tmp"))


@contextmanager
def _warning(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        text = f"warning: {path} cannot be deleted ({error}); the next save tries again"
        print(text, file=sys.stderr, flush=True)


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint under its final name, complete or damaged, in order."""
    return sorted(step for step, name in _checkpoints_in(folder) if not name.endswith(".old"))


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are complete, and a line for each newer one that was skipped."""
    skipped: list[str] = []
    # step_8.old comes after step_8, the one that took its place.
    for _, name in sorted(_checkpoints_in(folder), key=lambda entry: (-entry[0], entry[1])):
        try:
            return open_checkpoint(folder / name), skipped
        except (ValueError, OSError) as error:
            skipped.append(str(error))
    return None, skipped


def _checkpoints_in(folder: Path) -> list[tuple[int, str]]:
    """(step, name) of the folders of checkpoints, those that are being replaced among them."""
    names = [path.name for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return [(int(name.removesuffix(".old").removeprefix("step_")), name) for name in names]


def open_checkpoint(path: Path) -> Checkpoint:
    """Check one checkpoint's files against their sha256.

    Raises ValueError or OSError for missing, cut or changed files.
    """
    with reading(path / STATE_FILE, "the state of a checkpoint"):
        record = json.loads(read_bytes(path / STATE_FILE))
        version = record.get("version")
        if version != VERSION:
            raise ValueError(f"it is of version {version}; this release reads version {VERSION}")
        if record.pop("sha256") != _digest(record):
            raise ValueError(_CHANGED)
    for name, sha256 in record["files"].items():
        if sha256_of(path / name) != sha256:
            raise ValueError(f"{path / name}: {_CHANGED}")
    return Checkpoint(path, record["step"], record)


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, str], config: ResolvedConfig) -> None:
    """Raise ValueError, naming each difference, for a checkpoint of other settings, another data set or base
    model.

    Args:
        identity: what it must have been made with, beside the settings.
        config: of the run that wants to continue from it.
    """
    recorded = dict(checkpoint.record["identity"])
    with reading(checkpoint.path / STATE_FILE, "the state of a checkpoint of this release"):
        other = differences(recorded.pop(SETTINGS), config)
    for name in sorted(recorded.keys() | identity.keys()):
        if recorded.get(name) != identity.get(name):
            other.append(f"{name}: {recorded.get(name)} -> {identity.get(name)}")
    if other:
        lines = "".join(f"  {line}\n" for line in other)
        raise ValueError(
            f"{checkpoint.path} belongs to another run (the checkpoint -> this run):\n{lines}"
            "choose another --out, give the settings of that run (they are in its run.json), or start from "
            f"it with other ones: visft train --from {checkpoint.path}"
        )


@contextmanager
def explained(what: str, folder: Path, then: str) -> Iterator[None]:
    """Turn an OSError within into a line: what could not be written into a folder, why, and then where things
    stand.
    """
    try:
        yield
    except OSError as error:
        free = f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free" if folder.is_dir() else "no such folder"
        text = f"{what} cannot be written to {folder} ({free}): {error.strerror or error}. {then}"
        raise retold(text, away=does_not_answer(error)) from error


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] = {}) -> str:
    """Write a file of tensors; returns its sha256."""
    lazy = {name: Lazy.of(tensor) for name, tensor in tensors.items()}
    return _write_file(path, safetensors_pieces(lazy, header))


def _write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> str:
    """Write a new file and wait until it is on disk; returns the sha256 of what was meant to be written.

    Both hashing and writing let other threads work: this runs beside a training step.
    """
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for piece in pieces:
            digest.update(piece)
            left = memoryview(piece)
            while left:  # a write may take less than it was given
                left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name. At every moment one of this step can be loaded."""
    replaced = final.with_suffix(".old")
    if final.exists():  # saved again after a resume from an earlier step, because this one was damaged
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync_folder(final.parent)
    if replaced.exists():
        delete_checkpoint(replaced)


def _tidy(folder: Path, needed: Path) -> None:
    """Remove or put back what a process left that was killed while it saved. Raises OSError if `needed`
    stays.
    """
    for path in folder.glob("step_*.tmp"):
        with nullcontext() if path == needed else _warning(path):
            shutil.rmtree(path)
    for path in folder.glob("step_*.old"):
        if path.with_suffix("").exists():
            delete_checkpoint(path)
        else:
            os.replace(path, path.with_suffix(""))
