"""Start of a run from another one or from an adapter (`visft.start`): what it is, whether it fits, and its record."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from visft_ds.checkpoint.format import Checkpoint, newest_checkpoint, open_checkpoint
from visft_ds.config import ResolvedConfig
from visft_ds.config.preflight import INPUTS_FOLDER, run_of
from visft_ds.config.schema import LoraConfig, VisftConfig
from visft_ds.data.shards import Category
from visft_ds.files import read_bytes, reading
from visft_ds.interop.layouts import described, model_of
from visft_ds.interop.published import read_adapter
from visft_ds.interop.weights import examples, open_weights
from visft_ds.models import build_empty
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import classes_of_run
from visft_ds.prepare.places import CATEGORIES_FILE
from visft_ds.prepare.start import Start
from visft_ds.run.folder import newest_step, open_run_folder, recorded_config
from visft_ds.tasks import TASKS
from visft_ds.tasks.classes import ids_of_classes

_OTHER = "--reset-heads remap keeps the classes of the same name and draws the others, --reset-heads draws the heads"


def open_run(resolved: ResolvedConfig, resume: str, data: RunData) -> Start | None:
    """Open a run's folder, and the values that it begins with; None for one that goes on, or begins with drawn ones.

    Raises:
        ValueError: as `open_run_folder`; nothing to start from; a run of other categories, words or adapters.
    """
    config = resolved.visft
    open_run_folder(Path(config.run.out or ""), resolved, resume)
    if config.start is None or newest_step(Path(config.run.out or "")):
        return None
    place = Path(config.start.path)
    run = run_of(place)
    if run is None:
        return _of_adapter(config, place)
    checkpoint, skipped = (open_checkpoint(place), []) if run != place else newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise ValueError(
            f"visft.start: {run} has no whole checkpoint to start from {examples(skipped)}; of an adapter alone give "
            f"the folder {run}/export/adapter"
        )
    return _of_run(config, data, run, checkpoint)


def record_of(start: Start | None, out: Path) -> dict[str, Any] | None:
    """The parent of a run for its record: where it is, its step, the hash of what was read."""
    if start is None:
        return None
    return {
        "path": os.path.abspath(start.place),
        "beside": os.path.relpath(start.place.resolve(), out.resolve()),
        "step": start.step,
        "sha256": start.sha256,
    }


def _of_adapter(config: VisftConfig, place: Path) -> Start:
    if config.stage == 1 or config.lora is None:
        raise ValueError(f"visft.start: {place} is an adapter, and this run trains none: give it to stage 2")
    adapter, backbone = (
        read_adapter(place),
        build_empty(config.model.preset, torch.float32, config.model.backbone_options()),
    )
    if adapter.model != model_of(backbone):
        raise ValueError(f"visft.start: the adapter in {place} is of {described(adapter.model)}, not of this model")
    there = LoraConfig(rank=adapter.rank, alpha=adapter.alpha, targets=adapter.targets)
    _check_lora(place, there, config.lora)
    tensors = {f"backbone.{name}": value for name, value in adapter.tensors.items()}
    return Start(
        place=place,
        sha256=adapter.fingerprint(),
        shapes={name: tuple(value.shape) for name, value in tensors.items()},
        read=lambda name: tensors[name].float(),
        base=adapter.base,
        notes=(f"started from the adapter in {place} ({adapter.describe()})",),
    )


def _of_run(config: VisftConfig, data: RunData, run: Path, checkpoint: Checkpoint) -> Start:
    assert config.start is not None
    there, how = recorded_config(run).visft, config.start.heads
    file = open_weights(checkpoint.path / "parameters.safetensors")
    shapes = {name: one.shape for name, one in file.items()}
    heads = {name.split(".")[1] for name in shapes if name.startswith("heads.")}
    if how != "keep" and not heads:
        raise ValueError(
            f"visft.start.heads={how}: {run} trains no heads, its stage 2 learns under those of visft.heads: start a "
            "stage 1 from the run that trained them, and a stage 2 on its heads"
        )
    gone = heads if how == "reset" else heads - config.tasks.enabled().keys()
    shapes = {
        name: shape for name, shape in shapes.items() if not name.startswith(tuple(f"heads.{task}." for task in gone))
    }
    if any(name.startswith("backbone.") for name in shapes):
        _check_lora(run, there.lora, config.lora)
    start = Start(
        place=checkpoint.path,
        sha256=checkpoint.record["files"]["parameters.safetensors"]["sha256"],
        shapes=shapes,
        read=lambda name: file.tensor(name, torch.float32),
        base=checkpoint.identity("base weights"),
        step=checkpoint.step,
    )
    kept = [task for task in config.tasks.enabled() if task in heads - gone]
    notes = [f"started from step {checkpoint.step} of {run}" + f"; heads kept: {', '.join(kept)}" * (how == "keep")]
    rows: dict[str, Sequence[int | None]] = {}
    for task in kept:
        if TASKS[task].uses_vocabulary:
            if checkpoint.identity("vocabulary") != (data.vocabulary.fingerprint if data.vocabulary else "none"):
                raise ValueError(
                    f"visft.start: the captions have other words than those that the {task} head of {run} knows: start "
                    "its heads anew (--reset-heads), or leave the task out (--tasks)"
                )
            continue
        mapped, names = _rows(task, config, data.categories, there, _categories(run), start)
        if mapped is None:
            continue
        if how == "keep":
            raise ValueError(f"visft.start: the {task} head of {run} knows other classes: {names}. {_OTHER}")
        rows |= mapped
        notes.append(f"{task} classes by name: {names}")
    return replace(start, rows=rows, notes=tuple(notes))


def _rows(
    task: str,
    config: VisftConfig,
    categories: Sequence[Category],
    there: VisftConfig,
    known: Sequence[Category],
    start: Start,
) -> tuple[Mapping[str, Sequence[int | None]] | None, str]:
    """(parameter -> rows as in `Start`, what became of the classes in words); None where they are the same."""
    if task not in there.tasks.enabled() or "num_classes" not in TASKS[task].sizes.options:
        return None, ""
    here_ids = _ids(task, config, categories)
    there_ids = _ids(task, there, known)
    here, before = ({c.coco_id: c.name for c in those} for those in (categories, known))
    if here_ids == there_ids and all(before.get(id_) == name for id_, name in here.items()):
        return None, ""
    place = {before[id_]: row for row, id_ in reversed(list(enumerate(there_ids))) if id_ in before}
    classes = [place.get(here[id_]) if id_ in here else None for id_ in here_ids]
    kept = [here[id_] for id_, row in zip(here_ids, classes, strict=True) if row is not None]
    new = [name for name in here.values() if name not in kept]
    parameter = f"heads.{task}.{TASKS[task].sizes.options['num_classes'][0]}"
    module = parameter.rpartition(".")[0]
    rows = [*classes, *range(len(there_ids), start.shapes[parameter][0])]  # a last row is "no object"
    return {name: rows for name in start.shapes if name.rpartition(".")[0] == module}, (
        f"of the same name are {examples(kept) if kept else 'none'}; new are {examples(new) if new else 'none'}"
    )


def _ids(task: str, config: VisftConfig, categories: Sequence[Category]) -> tuple[int, ...]:
    """The raw id of each class of a head."""
    options = config.tasks.enabled()[task].head.model_dump()
    return classes_of_run(config, categories).get(task) or ids_of_classes(task, options)


def _categories(run: Path) -> list[Category]:
    file = run / INPUTS_FOLDER / CATEGORIES_FILE
    with reading(file, "the categories of a run"):
        return TypeAdapter(list[Category]).validate_json(read_bytes(file))


def _settings(lora: LoraConfig | None) -> dict[str, Any] | None:
    """Settings of adapters, in whose targets the order means nothing."""
    return None if lora is None else {**lora.model_dump(), "targets": sorted(lora.targets)}


def _check_lora(place: Path, there: LoraConfig | None, here: LoraConfig | None) -> None:
    if _settings(there) != _settings(here):
        told = "null" if there is None else there.model_dump_json()
        raise ValueError(f"visft.start: the adapter in {place} has other settings: --set 'visft.lora={told}'")
