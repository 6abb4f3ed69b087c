"""Record of a run at its start: its settings, and what makes its folder whole without the files that it was given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import orjson

from visft_ds.checkpoint.disk import explained
from visft_ds.checkpoint.export import save_base
from visft_ds.config import ResolvedConfig
from visft_ds.config.preflight import INPUTS_FOLDER, heads_inside
from visft_ds.config.schema import VisftConfig
from visft_ds.data.shards import Category
from visft_ds.interop.heads import find_head
from visft_ds.interop.weights import remove_unfinished, sha256_file, write_atomically, write_text
from visft_ds.monitor.metrics import RunRecord
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
from visft_ds.run.folder import BACKBONE_FILE, read_run, saved_something
from visft_ds.run.start import record_of


def write_record(config: ResolvedConfig, data: RunData, command: Sequence[str], start: Start | None) -> None:
    """Write RUN/inputs, then RUN/run.json, with paths as they were given. Main process only.

    Args:
        config: with paths at which its inputs lie now.
        start: what the run begins with; None: drawn values, or it goes on.

    Raises:
        OSError: a full disk, a read-only folder.
    """
    run = Path(config.visft.run.out or "")
    with explained("copies of the heads and words", run / INPUTS_FOLDER, "The same command goes on"):
        keep_inputs(run, config.visft, data.categories)
    inputs = _places(run, config.visft, data.sets)
    with explained("the record of the run", run, "Nothing else was changed"):
        recorded, parent = with_paths(config, data.given).to_dict(), record_of(start, run)
        if start is None and saved_something(run):  # it goes on, and has begun with what its record says
            before = read_run(run).parent
            parent = None if before is None else before.model_dump(mode="json")
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
    """Copy heads and word map into a run folder, and name the categories; what is there already stays untouched.

    Each copy gets its name when it is whole. Raises OSError for a full disk.
    """
    folder, paths = run / INPUTS_FOLDER, paths_of(config)
    sources: dict[Path, Path] = {}
    if HEADS in paths:
        found = {find_head(paths[HEADS], task) for task in config.tasks.enabled()}
        sources = {heads_inside(run)[0] / path.name: path for path in found}
    for key in (key for key in paths if key.endswith(WORDS)):
        sources[folder / VOCABULARY_FILE] = Path(paths[key])
    remove_unfinished(folder)
    for path, source in sources.items():
        if not path.is_file() or sha256_file(path) != sha256_file(source):
            with source.open("rb") as file:
                write_atomically(path, partial(shutil.copyfileobj, file))
    named = folder / CATEGORIES_FILE
    for path in folder.rglob("*"):
        if path.is_file() and path not in (*sources, named):
            path.unlink()  # of a start with other heads, before anything was saved
    text = orjson.dumps([asdict(category) for category in categories], option=orjson.OPT_INDENT_2).decode()
    if not named.is_file() or named.read_text(encoding="utf-8") != text:
        write_text(named, text)


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
