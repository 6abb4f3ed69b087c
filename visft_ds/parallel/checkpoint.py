"""Checkpoint files: what trains and where the run stands, as safetensors and JSON, free of any topology.

    <run>/checkpoints/step_00000500/parameters.safetensors   fp32 values, by qualified name
                                    moments.safetensors      "exp_avg/<name>", "exp_avg_sq/<name>"
                                    state.json               step, fingerprints, sha256 of the two files

A checkpoint appears under its name only when every byte is on disk: written as step_N.tmp, synced, renamed.
Base weights are not stored; their sha256 is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from visft_ds.parallel.engine_state import MOMENTS, EngineState

FORMAT = "visft_ds.checkpoint"
VERSION = 1
_FILES = ("parameters.safetensors", "moments.safetensors")


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk that passed its checks."""

    path: Path
    step: int  #: optimiser steps done
    record: Mapping[str, Any]  #: state.json

    def load(self) -> EngineState:
        """The tensors. Every rank reads them; they are small (what trains, three times)."""
        parameters = load_file(self.path / _FILES[0])
        moments: dict[str, dict[str, Any]] = {key: {} for key in MOMENTS}
        for name, tensor in load_file(self.path / _FILES[1]).items():
            key, _, parameter = name.partition("/")
            moments[key][parameter] = tensor
        return EngineState(parameters, moments, self.record["updates"], self.record["loss_scale"])


def save_checkpoint(folder: Path, step: int, state: EngineState, identity: Mapping[str, str], keep_last: int) -> Path:
    """Write one checkpoint and delete the oldest beyond `keep_last` (0 keeps all). Main process only.

    Args:
        folder: <run>/checkpoints.
        identity: what must be equal for a resume, e.g. {"configuration": ..., "data": ..., "base_weights": ...}.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f"{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(dict(state.parameters), temporary / _FILES[0])
    flat = {f"{key}/{name}": tensor for key, named in state.moments.items() for name, tensor in named.items()}
    save_file(flat, temporary / _FILES[1])
    record = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "updates": state.updates,
        "loss_scale": dict(state.loss_scale),
        "identity": dict(identity),
        "files": {
            name: {"sha256": _sha256(temporary / name), "bytes": (temporary / name).stat().st_size} for name in _FILES
        },
    }
    (temporary / "state.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if final.exists():  # the same step saved twice (a rerun after a resume): the new one is as good
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(folder)
    if keep_last:
        # Counted back from the one just written: newer ones (damaged, passed over by a resume) do not push it out.
        kept = [path for path in _folders(folder) if int(path.name[5:]) <= step]
        for old in kept[:-keep_last]:
            shutil.rmtree(old)
    return final


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are whole, and one line for each newer one that was passed over."""
    skipped: list[str] = []
    for path in reversed(_folders(folder)):
        try:
            return open_checkpoint(path), skipped
        except CheckpointError as error:
            skipped.append(str(error))
    return None, skipped


def open_checkpoint(path: Path) -> Checkpoint:
    """Check one checkpoint's files against their sha256.

    Raises:
        CheckpointError: missing, cut or changed files, or a newer format.
    """
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: state.json cannot be read ({error})") from error
    if record.get("format") != FORMAT or record.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format {record.get('format')} {record.get('version')}; this release reads {FORMAT} {VERSION}"
        )
    for name in _FILES:
        file, expected = path / name, record["files"][name]
        size = file.stat().st_size if file.exists() else None
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{file}: {'missing' if size is None else f'{size} bytes'}, expected {expected['bytes']}"
            )
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{file}: content does not match its sha256; the file was changed or damaged")
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


def _folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    named = [path for path in folder.glob("step_*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(named, key=lambda path: int(path.name[5:]))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:
    # hashlib.file_digest came with Python 3.11
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
