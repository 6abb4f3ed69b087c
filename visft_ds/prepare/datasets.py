"""The data sets a run trains on: which tasks each teaches, and what its categories mean to the heads."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from visft_ds.config import ResolvedConfig
from visft_ds.config.preflight import is_url
from visft_ds.config.schema import DataConfig, DataSetConfig, VisftConfig
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Category, Manifest, manifest_path
from visft_ds.files import read_bytes, reading
from visft_ds.parallel import distributed
from visft_ds.tasks import TASKS
from visft_ds.tasks.classes import classes_of, have_ids_of_coco


@dataclass(frozen=True)
class TrainingSet:
    """Training set of a run."""

    manifest: Manifest
    tasks: tuple[str, ...]  #: those of the run that it teaches
    weight: float = 1.0
    categories: Mapping[int, int | None] | None = None  #: raw id -> id of the heads, None: left out; None: as they are

    def identity(self) -> str:
        """Digest of what is learnt from it."""
        if self.categories is None:
            return self.manifest.fingerprint
        return hashlib.sha256(f"{self.manifest.fingerprint} {sorted(self.categories.items())}".encode()).hexdigest()


def open_training_data(config: VisftConfig) -> dict[str, TrainingSet]:
    """All training sets by name. The first, ROOT/TRAIN, decides which categories there are.

    Raises:
        ValueError: a split that is missing or damaged, that lacks what a task needs, or whose categories do not fit.
    """
    data, enabled = config.data, tuple(config.tasks.enabled())
    cache = cache_of(data)
    first = Manifest.load(data.root, data.train, cache=cache)
    others = [Manifest.load(one.root, one.split, cache=cache) for one in data.sets]
    sets = {data.train: TrainingSet(first, _taught(first, enabled), data.weight)}
    check_samples(sets[data.train].tasks, first)
    _check_labels(first, sets[data.train].tasks, "leave {task} out of visft.tasks")
    for one, manifest in zip(data.sets, others, strict=True):
        tasks = tuple(task for task in enabled if task in one.tasks) if one.tasks else _taught(manifest, enabled)
        check_samples(tasks, manifest)
        if one.tasks is None:
            _check_labels(manifest, tasks, f"state visft.data.sets.N.tasks of {one.name}, without it or with it")
        categories = _categories(one, manifest, first) if needs_categories(tasks) else None
        sets[one.name] = TrainingSet(manifest, tasks, one.weight, categories)
    check_samples([task for task in enabled if not any(task in one.tasks for one in sets.values())], first)
    return sets


def captioned(sets: Mapping[str, TrainingSet]) -> list[Manifest]:
    """The splits whose words a captioning head has to know."""
    return [one.manifest for one in sets.values() if needs_vocabulary(one.tasks)]


def cache_of(data: DataConfig) -> Cache:
    """Where copies of remote shards are kept."""
    return Cache(Cache.folder if data.cache is None else Path(data.cache), data.cache_bytes)


def data_identity(sets: Mapping[str, TrainingSet]) -> str:
    """Digest of the content of all sets, which a run must have been made with to be resumed."""
    if len(sets) == 1:
        return next(iter(sets.values())).identity()
    return hashlib.sha256(json.dumps([[name, one.identity()] for name, one in sets.items()]).encode()).hexdigest()


def windowed(data: DataConfig, root: str) -> bool:
    """Return True if the samples of a set are mixed within a few shards at a time, so that each is fetched once."""
    return is_url(root) if data.shuffle is None else data.shuffle == "windowed"


def workers_of(data: DataConfig) -> int:
    """Processes that read for this one. Without a GPU they would take the cores that compute."""
    if data.num_workers is not None or distributed.local_device().type == "cpu":
        return data.num_workers or 0
    return min(8, max(1, len(os.sched_getaffinity(0)) // distributed.processes_here() - 1))


def needs_categories(tasks: Sequence[str]) -> bool:
    """Return True if one of the tasks learns from annotated objects."""
    return any(TASKS[task].config.labels == "annotations" for task in tasks)


def needs_vocabulary(tasks: Sequence[str] | Mapping[str, object]) -> bool:
    """Return True if one of the tasks uses a vocabulary."""
    return any(TASKS[task].uses_vocabulary for task in tasks)


def check_samples(tasks: Sequence[str] | Mapping[str, object], manifest: Manifest) -> None:
    """Refuse a split in which a task finds nothing.

    Raises:
        ValueError: naming the task and what the split lacks.
    """
    where = f"{manifest.root}/{manifest.split}"
    for task in tasks:
        if not len(manifest):
            raise ValueError(f"{where} has no samples: make the shards anew")
        labels = TASKS[task].config.labels
        if labels not in manifest.labels or not len(manifest.having(TASKS[task].config.learns_from)):
            option = {"annotations": "instances"}.get(labels, labels)
            raise ValueError(
                f"{where} has no sample with {labels}, which {task} needs: make the shards "
                f"with --{option} FILE, or turn the task off with --set visft.tasks.{task}=null"
            )


def settle_classes(config: ResolvedConfig, first: Manifest) -> ResolvedConfig:
    """The configuration with as many classes as ROOT/TRAIN (`first`) has categories, where their ids are not COCO's and
    `num_classes` is not stated.

    Raises:
        ValueError: heads that cannot have classes for these categories.
    """
    names, tasks = _names(first.categories), config.visft.tasks
    for name, task in tasks.enabled().items():
        if needs_categories([name]) and not have_ids_of_coco(names) and "num_classes" not in task.head.model_fields_set:
            head = task.head.model_copy(update={"num_classes": len(names)})
            tasks = tasks.model_copy(update={name: task.model_copy(update={"head": head})})
    settled = replace(config, visft=config.visft.model_copy(update={"tasks": tasks}))
    classes_of_run(settled.visft, first.categories)
    return settled


def known_classes(config: ResolvedConfig) -> ResolvedConfig:
    """`settle_classes` before a run: as it is where the shards are not there yet, or far away."""
    data = config.visft.data
    if is_url(data.root) or not manifest_path(Path(data.root), data.train).is_file():
        return config
    return settle_classes(config, Manifest.load(data.root, data.train))


def classes_of_run(config: VisftConfig, categories: Sequence[Category]) -> dict[str, tuple[int, ...]]:
    """Task -> raw ids of the classes of its head, where they are not those of the published heads.

    Raises:
        ValueError: heads that cannot have classes for `categories`, those of ROOT/TRAIN.
    """
    names = _names(categories)
    found = {
        name: classes_of(name, task.head.model_dump(), names)
        for name, task in config.tasks.enabled().items()
        if needs_categories([name])
    }
    return {name: classes for name, classes in found.items() if classes is not None}


def first_of(sets: Mapping[str, TrainingSet]) -> Manifest:
    """The split whose categories are those of the heads."""
    return next(iter(sets.values())).manifest


def _names(categories: Sequence[Category]) -> dict[int, str]:
    return {category.coco_id: category.name for category in categories}


def _taught(manifest: Manifest, enabled: Sequence[str]) -> tuple[str, ...]:
    """The tasks that a split has labels for."""
    return tuple(task for task in enabled if TASKS[task].config.labels in manifest.labels)


def _check_labels(manifest: Manifest, tasks: Sequence[str], remedy: str) -> None:
    """Raise ValueError for a split whose labels would teach a task something wrong."""
    for task in tasks:
        lacking = TASKS[task].config.misleads(manifest.counts, manifest.findings)
        if lacking is not None:
            where = f"{manifest.root}/{manifest.split} has no {lacking}"
            raise ValueError(f"{where}, which {task} would take for background: {remedy.format(task=task)}")


def _categories(one: DataSetConfig, manifest: Manifest, first: Manifest) -> dict[int, int | None] | None:
    """Raw ids of a set -> ids of the first set."""
    table, own = _names(first.categories), _names(manifest.categories)
    where = f"data set {one.name} ({manifest.root}/{manifest.split})"
    if not table:
        raise ValueError(
            f"{first.root}/{first.split} has no categories for {where}: make the set whose categories are those of the "
            "heads ROOT/TRAIN (visft.data.root and train), and the other one an entry of visft.data.sets"
        )
    if one.categories is None:
        other = [(number, name) for number, name in own.items() if table.get(number) != name]
        if other:
            number, name = other[0]
            raise ValueError(
                f"{where}: category {number} {name!r} is {table.get(number, 'absent')!r} in {first.root}/{first.split} "
                f"({len(other)} such): give visft.data.sets.N.categories, a JSON file of its names -> ids there or null"
            )
        return None
    given = _read_map(Path(one.categories))
    rest = given.pop("*", "absent")
    missing = [name for name in own.values() if name not in given] if rest == "absent" else []
    unknown = sorted(given.keys() - set(own.values()))
    wrong = sorted({target for target in given.values() if target is not None and target not in table})
    if missing or unknown or wrong or rest not in ("absent", None):
        problems = [
            f"no entry for {', '.join(map(repr, missing[:3]))} ({len(missing)} such; '\"*\": null' leaves them out)"
            * bool(missing),
            f"no category {', '.join(map(repr, unknown[:3]))} in the set" * bool(unknown),
            f"no id {', '.join(map(str, wrong[:3]))} in {first.root}/{first.split}" * bool(wrong),
            f'"*" may only be null, not {rest!r}' * (rest not in ("absent", None)),
        ]
        raise ValueError(f"{where}: {one.categories}: {'; '.join(problem for problem in problems if problem)}")
    mapped = {number: given.get(name) for number, name in own.items()}
    if all(target is None for target in mapped.values()):
        raise ValueError(f"{where}: {one.categories} leaves all its categories out: nothing would be learnt from it")
    return mapped


def _read_map(path: Path) -> dict[str, Any]:
    with reading(path, "a map of categories"):
        content = orjson.loads(read_bytes(path, 2**24))
    good = isinstance(content, dict) and all(
        target is None or (isinstance(target, int) and not isinstance(target, bool)) for target in content.values()
    )
    if not good:
        raise ValueError(f'{path}: a map of categories is a JSON object, name -> id or null, such as {{"person": 1}}')
    return dict(content)
