"""Data sets of a run: the tasks that each trains, and the classes of the heads for their categories."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from visft_ds import distributed
from visft_ds.config import ResolvedConfig
from visft_ds.config.schema import DataConfig, VisftConfig
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Category, Manifest
from visft_ds.tasks import TASKS
from visft_ds.tasks.classes import classes_of


@dataclass(frozen=True)
class TrainingSet:
    """Training set of a run."""

    manifest: Manifest
    tasks: tuple[str, ...]  #: those of the run that it teaches
    weight: float = 1.0


def open_training_data(config: VisftConfig) -> dict[str, TrainingSet]:
    """All training sets by name. The first, ROOT/TRAIN, decides which categories there are.

    Raises ValueError for a split that is missing or damaged, that lacks what a task needs, or has other
    categories.
    """
    data, enabled, sets = config.data, config.tasks.enabled(), dict[str, TrainingSet]()
    further = [(one.name, one.root, one.split, one.weight, one.tasks) for one in data.sets]
    for name, root, split, weight, stated in [
        (data.train, data.root, data.train, data.weight, None),
        *further,
    ]:
        manifest = Manifest.load(root, split, Cache(data.cache, data.cache_bytes))
        labelled = [task for task in enabled if TASKS[task].config.labels in manifest.labels]
        tasks = tuple(task for task in enabled if task in (stated or labelled))
        check_samples(tasks, manifest)
        for task in () if stated else tasks:  # a user who states the tasks of a set knows better
            if lacking := TASKS[task].config.misleads(manifest.counts, manifest.findings):
                raise ValueError(
                    f"{manifest.root}/{manifest.split} has no {lacking}, which {task} would take for background: leave "
                    f"{task} out of visft.tasks, or of visft.data.sets.N.tasks"
                )
        sets[name] = TrainingSet(manifest, tasks, weight)
    first, *others = sets.values()
    for one in others:
        if any(enabled[task].labels != "captions" for task in one.tasks):
            check_same_categories(one.manifest, first.manifest)
    check_samples(
        [task for task in enabled if not any(task in one.tasks for one in sets.values())], first.manifest
    )
    return sets


def workers_of(data: DataConfig) -> int:
    """Processes that read for this one. Without a GPU they would take the cores that compute."""
    if data.num_workers is not None or distributed.local_device().type == "cpu":
        return data.num_workers or 0
    return min(8, max(1, len(os.sched_getaffinity(0)) // distributed.processes_here() - 1))


def needs_vocabulary(tasks: Sequence[str] | Mapping[str, object]) -> bool:
    """Return True if one of the tasks uses a vocabulary."""
    return any(TASKS[task].uses_vocabulary for task in tasks)


def check_samples(tasks: Sequence[str] | Mapping[str, object], manifest: Manifest) -> None:
    """Raise ValueError for a split in which a task finds nothing, naming the task and what the split
    lacks.
    """
    for task in tasks:
        labels = TASKS[task].config.labels
        if labels not in manifest.labels or not len(manifest.having(TASKS[task].config.learns_from)):
            raise ValueError(
                f"{manifest.root}/{manifest.split} has no sample with {labels}, which {task} needs: make the shards "
                f"of data with {labels}, or turn the task off with --set visft.tasks.{task}=null"
            )


def check_same_categories(manifest: Manifest, first: Manifest) -> None:
    """Raise ValueError for a split with a category, by id and name, that ROOT/TRAIN (`first`) lacks."""
    known = {category.coco_id: category.name for category in first.categories}
    other = [category for category in manifest.categories if known.get(category.coco_id) != category.name]
    if other:
        theirs = known.get(other[0].coco_id, "absent")
        raise ValueError(
            f"{manifest.root}/{manifest.split}: category {other[0].coco_id} {other[0].name!r} is {theirs!r} in "
            f"{first.root}/{first.split} ({len(other)} such): make both from the same categories"
        )


def settle_classes(config: ResolvedConfig, first: Manifest) -> ResolvedConfig:
    """The configuration with as many classes as ROOT/TRAIN (`first`) has categories, where none are stated.

    That is for label maps, and for ids that are not COCO's.
    """
    tasks = config.visft.tasks
    for name, task in tasks.enabled().items():
        if task.labels != "captions" and "num_classes" not in task.head.model_fields_set:
            head = task.head.model_copy(update={"num_classes": len(first.categories)})
            tasks = tasks.model_copy(update={name: task.model_copy(update={"head": head})})
    return replace(config, visft=config.visft.model_copy(update={"tasks": tasks}))


def classes_of_run(config: VisftConfig, categories: Sequence[Category]) -> dict[str, tuple[int, ...]]:
    """Task -> raw ids of the classes of its head, where they are not those of the published heads.

    Raises ValueError for heads that cannot have classes for `categories`, those of ROOT/TRAIN.
    """
    names = {category.coco_id: category.name for category in categories}
    found = {
        name: classes_of(name, task.head.model_dump(), names)
        for name, task in config.tasks.enabled().items()
        if task.labels != "captions"
    }
    return {name: classes for name, classes in found.items() if classes is not None}
