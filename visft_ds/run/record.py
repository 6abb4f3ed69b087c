"""Record of a run at its start: its settings, and fingerprints of what it is made with."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from visft_ds import CHECKOUT, distributed
from visft_ds.checkpoint.format import explained
from visft_ds.config import ResolvedConfig
from visft_ds.config.record import RUN_SCHEMA, Parent, RunFile
from visft_ds.config.tree import Tree
from visft_ds.files import write_text
from visft_ds.monitor.metrics import versions
from visft_ds.prepare.materialize import Start
from visft_ds.pretrained import HUB
from visft_ds.redaction import redacted, redacted_values
from visft_ds.run_files import RECORD_FILE


def write_record(
    config: ResolvedConfig,
    identity: Mapping[str, str],
    command: Sequence[str],
    start: Start | None,
    earlier: RunFile | None,
) -> None:
    """Write RUN/run.json, with paths that hold from any folder. Main process only.

    Args:
        identity: what a checkpoint of this run must have been made with, beside the settings.
        command: command line that starts this run again.
        start: what the run begins with; None: random values, or it is resumed.
        earlier: record of the start that is continued.

    Raises:
        OSError: a full disk.
    """
    run = Path(config.visft.run.out or "")
    keys = ["visft.model.weights", "visft.heads.path", "visft.data.root"]
    keys += [f"visft.data.sets.{number}.root" for number in range(len(config.visft.data.sets))]
    keys += [f"visft.tasks.{name}.vocabulary.file" for name in config.visft.tasks.enabled()]
    tree = Tree(config.to_dict())
    for key in keys:
        path = tree.value(key)
        if path and "://" not in path and not path.startswith(HUB):
            tree.assign(key, os.path.abspath(path), "")
    with explained("the record of the run", run, "The same command continues"):
        parent = None if earlier is None else earlier.parent
        if start is not None:
            parent = Parent(path=os.path.abspath(start.path), step=start.step, sha256=start.sha256)
        started = "" if earlier is None else earlier.started
        write_run(run, tree.values, distributed.world_size(), command, identity, parent, started)


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
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.check_output(
                describe, cwd=CHECKOUT, stderr=subprocess.DEVNULL, text=True, timeout=20
            ).strip()
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
