"""Checkpoint files: what trains and where the run stands, as safetensors and JSON, free of any topology.

    <run>/checkpoints/step_00000500/parameters.safetensors   fp32 values, by qualified name
                                    moments.safetensors      "exp_avg/<name>", "exp_avg_sq/<name>"
                                    state.json               step, fingerprints, sha256 of the files and of itself

A checkpoint appears under its name only when every byte is on disk: written as step_N.tmp, state.json last, synced,
renamed. One of the same step that stood there is step_N.old until then, and still counts. A folder step_N.tmp never
does: it is half written or half deleted, and the next save removes it.
Base weights are not stored; their sha256 is. Nor are generators of random numbers: every step draws from
(seed, step, rank), and the seed is in the fingerprint of the configuration. The step is also the position in the data.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from visft_ds.checkpoint.disk import explained, remove_folder, write_file
from visft_ds.files import read_bytes, reading, sync_folder
from visft_ds.interop.weights import Lazy, open_weights, safetensors_pieces, sha256_file
from visft_ds.parallel.state import MOMENTS, EngineState

FORMAT = "visft_ds.checkpoint"
VERSION = 3
_LARGEST_STATE = 2**24  # bytes
_PARAMETERS, _MOMENTS, _STATE = "parameters.safetensors", "moments.safetensors", "state.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint on disk that passed its checks."""

    path: Path
    step: int  #: optimiser steps done
    record: Mapping[str, Any]  #: state.json

    def load(self) -> EngineState:
        """The tensors. Every rank reads them; they are small (what trains, three times)."""
        parameters, found = self.parameters(), _read_tensors(self.path / _MOMENTS)
        if found.keys() != {f"{key}/{name}" for key in MOMENTS for name in parameters}:
            raise CheckpointError(f"{self.path / _MOMENTS}: its moments are not those of {_PARAMETERS}")
        return EngineState(
            parameters=parameters,
            moments={key: {name: found[f"{key}/{name}"] for name in parameters} for key in MOMENTS},
            updates=self.record["updates"],
            loss_scale=self.record["loss_scale"],
        )

    def parameters(self) -> dict[str, Tensor]:
        """The fp32 values alone, by qualified name."""
        return _read_tensors(self.path / _PARAMETERS)

    def identity(self, name: str) -> str:
        """An entry of what it was made with. Raises CheckpointError where there is none."""
        if name not in self.record["identity"]:
            raise CheckpointError(f"{self.path / _STATE}: does not say with which {name} it was made")
        found: str = self.record["identity"][name]
        return found


def save_checkpoint(
    folder: Path, step: int, state: EngineState, identity: Mapping[str, str], header: Mapping[str, str] | None = None
) -> Path:
    """Write one checkpoint; returns its folder when it is on disk. Main process only.

    Args:
        folder: <run>/checkpoints.
        identity: what must be equal for a resume, e.g. {"configuration": ..., "data": ..., "base_weights": ...}.
        header: metadata of the file of values, which describe the heads in it.

    Raises:
        OSError: a full disk, a read-only folder; earlier checkpoints are as they were, no part of this one is left.
    """
    final, temporary = checkpoint_path(folder, step), _temporary(folder, step)
    moments = {f"{key}/{name}": tensor for key, named in state.moments.items() for name, tensor in named.items()}
    kept = "Earlier checkpoints are untouched; the same command goes on from the newest"
    try:
        with explained(f"the checkpoint of step {step}", folder, kept):
            folder.mkdir(parents=True, exist_ok=True)
            _tidy(folder)
            os.mkdir(temporary)
            written = {
                _PARAMETERS: _write_tensors(temporary / _PARAMETERS, state.parameters, header or {}),
                _MOMENTS: _write_tensors(temporary / _MOMENTS, moments, {}),
            }
            record = {"format": FORMAT, "version": VERSION, "step": step, "updates": state.updates}
            record |= {"loss_scale": dict(state.loss_scale), "identity": dict(identity), "files": written}
            text = json.dumps(record | {"sha256": _digest(record)}, indent=1) + "\n"
            write_file(temporary / _STATE, [text.encode()])  # last: a folder with this file is complete
            sync_folder(temporary)
            _publish(temporary, final)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of the checkpoint of the state after `step` steps."""
    return folder / f"step_{step:08d}"


def delete_checkpoints(folder: Path, steps: Iterable[int]) -> None:
    """Delete the checkpoints of these steps, oldest first. Raises OSError for one that cannot be deleted."""
    for step in sorted(steps):
        try:
            remove_folder(checkpoint_path(folder, step), _temporary(folder, step))
        except OSError as error:
            raise OSError(f"{checkpoint_path(folder, step)} cannot be deleted: {error.strerror or error}") from error


def saved_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint under its final name, complete or damaged, in order."""
    return [step for step, final, _ in _folders(folder) if final]


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are complete, and a line for each newer one that was skipped."""
    skipped: list[str] = []
    for _, _, path in reversed(_folders(folder)):
        try:
            return open_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def open_checkpoint(path: Path) -> Checkpoint:
    """Check one checkpoint's files against their sha256.

    Raises:
        CheckpointError: missing, cut or changed files, or another format.
    """
    try:
        with reading(path / _STATE, "the state of a checkpoint"):
            record = json.loads(read_bytes(path / _STATE, _LARGEST_STATE))
            if (record["format"], record["version"]) != (FORMAT, VERSION):
                raise ValueError(f"it is {record['format']} {record['version']}; this release reads {FORMAT} {VERSION}")
            if record.pop("sha256") != _digest(record):
                raise ValueError("content does not match its sha256; the file was changed or damaged")
        for name, sha256 in record["files"].items():
            if sha256_file(path / name) != sha256:
                raise ValueError(f"{path / name}: content does not match its sha256; the file was changed or damaged")
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return Checkpoint(path, record["step"], record)


def check_identity(checkpoint: Checkpoint, identity: Mapping[str, str]) -> None:
    """Refuse to go on from a checkpoint of another configuration, data set or base model.

    Raises:
        CheckpointError: naming each difference.
    """
    recorded = checkpoint.record["identity"]
    names = sorted(name for name in recorded.keys() | identity.keys() if recorded.get(name) != identity.get(name))
    if names:
        lines = [f"  {name}: this run {identity.get(name)}, the checkpoint {recorded.get(name)}" for name in names]
        raise CheckpointError(
            f"{checkpoint.path} belongs to another run:\n" + "\n".join(lines) + "\nchoose another --out, or give the "
            "settings of that run (its resolved configuration is in run.json)"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    return {name: one.read() for name, one in open_weights(path).items()}


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    return write_file(path, safetensors_pieces({name: Lazy.of(tensor) for name, tensor in tensors.items()}, header))


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _publish(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name. At every moment one of this step can be loaded."""
    replaced = final.with_name(f"{final.name}.old")
    if final.exists():  # saved again after a resume from an earlier step, because this one was damaged
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync_folder(final.parent)
    if replaced.exists():
        remove_folder(replaced, temporary)


def _tidy(folder: Path) -> None:
    """Remove or put back what a process left that was killed while it saved."""
    for path in folder.glob("step_*"):
        if re.fullmatch(r"step_\d{8,}\.tmp", path.name):
            shutil.rmtree(path)
    for path in folder.glob("step_*.old"):
        if path.with_suffix("").exists():
            remove_folder(path, path.with_suffix(".tmp"))
        else:
            os.replace(path, path.with_suffix(""))


def _temporary(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.tmp"


def _folders(folder: Path) -> list[tuple[int, bool, Path]]:
    """(step, whether it has its final name, path) of what may be a checkpoint; the last one is the first to try."""
    found = [(re.fullmatch(r"step_(\d{8,})(\.old)?", path.name), path) for path in folder.glob("step_*")]
    named = [(int(match[1]), not match[2], path) for match, path in found if match and path.is_dir()]
    return sorted((step, final, path) for step, final, path in named)
