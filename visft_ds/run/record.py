"""Record of a run at its start: its settings, and fingerprints of what it is made with."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from visft_ds import CHECKOUT, distributed
from visft_ds.checkpoint.format import explained
from visft_ds.config import ResolvedConfig, changed
from visft_ds.config.record import RUN_SCHEMA, Parent, RunFile, read_run
from visft_ds.files import write_text
from visft_ds.monitor.metrics import versions
from visft_ds.prepare.materialize import Start
from visft_ds.pretrained import HUB
from visft_ds.redaction import redacted, redacted_values
from visft_ds.run_files import RECORD_FILE, saved_something


def write_record(
    config: ResolvedConfig, identity: Mapping[str, str], command: Sequence[str], start: Start | None
) -> None:
    """Write RUN/run.json, with paths that hold from any folder. Main process only. Raises OSError: a full
    disk.

    `start` is what the run begins with; None: random values, or it is resumed.
    """
    visft, run = config.visft, Path(config.visft.run.out or "")
    parent, started = None, ""
    inputs = {
        "model.weights": visft.model.weights,
        "heads.path": visft.heads.path,
        "data.root": visft.data.root,
    }
    inputs |= {f"data.sets.{number}.root": one.root for number, one in enumerate(visft.data.sets)}
    if words := visft.tasks.with_words():
        inputs[f"tasks.{words[0]}.vocabulary.file"] = words[1].vocabulary.file
    here = {
        key: path for key, path in inputs.items() if path and "://" not in path and not path.startswith(HUB)
    }
    with explained("the record of the run", run, "The same command continues"):
        if start is not None:
            parent = Parent(path=os.path.abspath(start.place), step=start.step, sha256=start.sha256)
        if saved_something(run):
            earlier = read_run(run)
            parent, started = parent or earlier.parent, earlier.started
        absolute = changed(
            config, [f"visft.{key}={json.dumps(os.path.abspath(path))}" for key, path in here.items()]
        )
        write_run(run, absolute.to_dict(), distributed.world_size(), command, identity, parent, started)


def write_run(
    out: Path,
    config: Mapping[str, Any],
    world_size: int,
    command: Sequence[str],
    identity: Mapping[str, str] | None = None,
    parent: Parent | None = None,
    started: str = "",
) -> Path:
    """Write OUT/run.json in one move. `started` is when the run first began; "": now."""
    commit = ""
    if CHECKOUT is not None and (CHECKOUT / ".git").exists():
        describe = [
            "git",
            "-C",
            str(CHECKOUT),
            "describe",
            "--always",
            "--dirty",
            "--abbrev=40",
            "--exclude=*",
        ]
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(
                describe, capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
    record = RunFile(
        schema=RUN_SCHEMA,
        started=started or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        command=[redacted(word) for word in command],
        world_size=world_size,
        versions=versions(),
        commit=commit,
        config=redacted_values(config),
        identity=dict(identity or {}),
        parent=parent,
    )
    write_text(out / RECORD_FILE, record.model_dump_json(indent=2, by_alias=True) + "\n")
    return out / RECORD_FILE
