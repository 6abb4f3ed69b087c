"""Record of a run at its start: its settings, and what makes its folder whole without the files that it was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from visft_ds import CHECKOUT
from visft_ds.checkpoint.disk import explained
from visft_ds.checkpoint.export import save_base
from visft_ds.config import ResolvedConfig
from visft_ds.config.preflight import INPUTS_FOLDER, heads_inside
from visft_ds.config.schema import VisftConfig
from visft_ds.data.shards import Category
from visft_ds.interop.heads import find_head
from visft_ds.interop.weights import sha256_file, write_atomically, write_text
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import TrainingSet
from visft_ds.prepare.model import PreparedModel
from visft_ds.prepare.places import (
    CATEGORIES_FILE,
    DATA,
    HEADS,
    VOCABULARY_FILE,
    WEIGHTS,
    WORDS,
    paths_of,
    with_paths,
)
from visft_ds.prepare.start import Start
from visft_ds.pretrained import local
from visft_ds.redaction import redacted, redacted_values
from visft_ds.run.folder import BACKBONE_FILE, RECORD_FILE, RUN_SCHEMA, read_run, saved_something
from visft_ds.run.start import record_of


@dataclass(frozen=True)
class RunRecord:
    """Content of OUT/run.json, see `RunFile`."""

    config: Mapping[str, Any]  #: the resolved configuration
    world_size: int
    command: Sequence[str]
    inputs: Mapping[str, Any] = field(default_factory=dict)  #: where its files are and what proves them
    parent: Mapping[str, Any] | None = None  #: what it began with, as `Parent`; None: nothing

    def write(self, out: str | Path) -> Path:
        """Write it in one move. An earlier record (the run was resumed) is kept under "earlier"."""
        path, earlier = Path(out) / RECORD_FILE, list[dict[str, Any]]()
        if path.is_file():
            previous = read_run(path.parent).model_dump(mode="json", by_alias=True, exclude_unset=True)
            earlier = [*previous.pop("earlier", []), previous]
        record = {
            "schema": RUN_SCHEMA,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [redacted(word) for word in self.command],
            "world_size": self.world_size,
            "versions": versions(),
            "commit": _commit(),
            "config": redacted_values(self.config),
            "inputs": dict(self.inputs),
            "earlier": earlier,
            **({} if self.parent is None else {"parent": self.parent}),
        }
        write_text(path, json.dumps(record, indent=2) + "\n")
        return path


def _commit() -> str:
    """Commit of the checkout that runs here, with "-dirty" where files differ from it; empty where it is none."""
    if CHECKOUT is None or not (CHECKOUT / ".git").exists():
        return ""
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_record(config: ResolvedConfig, data: RunData, command: Sequence[str], start: Start | None) -> None:
    """Write RUN/inputs, then RUN/run.json, with paths as they were given. Main process only.

    Args:
        config: with paths at which its inputs lie now.
        start: what the run begins with; None: drawn values, or it goes on.

    Raises:
        OSError: a full disk, a read-only folder.
    """
    run = Path(config.visft.run.out or "")
    with explained("the record of the run", run, "The same command goes on"):
        keep_inputs(run, config.visft, data.categories)
        parent = record_of(start, run)
        if start is None and saved_something(run):  # it goes on, and has begun with what its record says
            before = read_run(run).parent
            parent = None if before is None else before.model_dump(mode="json")
        elif not saved_something(run):
            (run / RECORD_FILE).unlink(missing_ok=True)  # of a start that saved nothing
        inputs = _places(run, config.visft, data.sets)
        recorded = with_paths(config, data.given).to_dict()
        RunRecord(recorded, distributed.world_size(), list(command), inputs, parent).write(run)


def keep_random_base(config: ResolvedConfig, prepared: PreparedModel) -> None:
    """Write random base weights once (an adapter is of no use without its base). Collective.

    Raises:
        OSError: a full disk.
    """
    if config.visft.model.weights is not None:
        return
    path = Path(config.visft.run.out or "") / "export" / BACKBONE_FILE
    if distributed.is_main():  # always anew: a file of an earlier try may hold other weights
        with explained("the base weights", path.parent, "The same command goes on"):
            save_base(prepared.base, prepared.module.backbone, path)
    distributed.barrier()


def keep_inputs(run: Path, config: VisftConfig, categories: Sequence[Category]) -> None:
    """Copy heads and word map into a run folder, and name the categories; of a run that saved something, they stay."""
    folder, paths = run / INPUTS_FOLDER, paths_of(config)
    if not saved_something(run):
        shutil.rmtree(folder, ignore_errors=True)  # of a start with other heads
    sources: dict[Path, Path] = {}
    if HEADS in paths:
        found = {find_head(paths[HEADS], task) for task in config.tasks.enabled()}
        sources = {heads_inside(run)[0] / path.name: path for path in found}
    for key in (key for key in paths if key.endswith(WORDS)):
        sources[folder / VOCABULARY_FILE] = Path(paths[key])
    for path, source in sources.items():
        if not path.is_file():
            with source.open("rb") as file:
                write_atomically(path, partial(shutil.copyfileobj, file))
    text = orjson.dumps([asdict(category) for category in categories], option=orjson.OPT_INDENT_2).decode()
    write_text(folder / CATEGORIES_FILE, text)


def _places(run: Path, config: VisftConfig, sets: Mapping[str, TrainingSet]) -> dict[str, dict[str, str]]:
    """Dotted key -> where an input is that has no copy, and what proves it, as `prepare.places.find` reads it."""
    names = {DATA: config.data.train}
    names |= {f"visft.data.sets.{number}.root": one.name for number, one in enumerate(config.data.sets)}
    found = {}
    for key, path in paths_of(config).items():
        if key == HEADS or key.endswith(WORDS):
            continue
        path = str(local(path)) if key == WEIGHTS else path
        found[key] = {"path": os.path.abspath(path), "beside": os.path.relpath(Path(path).resolve(), run.resolve())}
        if key in names:
            manifest = sets[names[key]].manifest
            found[key] |= {"split": manifest.split, "fingerprint": manifest.fingerprint}
            if manifest.options.get("masks_from_boxes"):
                found[key]["masks"] = "ellipses drawn into boxes, where there were none"
        else:
            found[key]["sha256"] = sha256_file(path)
    return found
