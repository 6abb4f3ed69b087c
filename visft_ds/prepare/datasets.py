"""Training sets of a run: the tasks that each teaches, its samples, and the classes of the heads.

Nothing here imports a tensor library: `settle` asks before a run starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from visft_ds.config.schema import DataConfig, VisftConfig
from visft_ds.data.fetch import Cache
from visft_ds.data.plan import SetPlan
from visft_ds.data.shards import Category, Manifest, categories_for
from visft_ds.settings.bands import Bands, in_words
from visft_ds.settings.task_schema import WITHOUT_MASK, Stream
from visft_ds.tasks import config_class
from visft_ds.tasks.classes import classes_of


@dataclass(frozen=True)
class TrainingSet:
    """Training set of a run."""

    manifest: Manifest
    tasks: tuple[str, ...]  #: those of the run that it teaches
    weight: float = 1.0


TrainingSets = Mapping[str, TrainingSet]  #: by name


def load_splits(data: DataConfig) -> list[Manifest]:
    """The training splits in their order. Raises ValueError for one that is missing or damaged."""
    cache = Cache(data.cache, data.cache_bytes)
    return [Manifest.load(entry.root, entry.split, cache) for entry in data.training_sets()]


def open_training_sets(config: VisftConfig, manifests: Sequence[Manifest]) -> dict[str, TrainingSet]:
    """All training sets by name. The first, ROOT/TRAIN, decides which categories there are.

    Args:
        manifests: of `load_splits`.

    Raises:
        ValueError: a split that lacks what a task needs, or has other categories.
    """
    enabled = config.tasks.enabled()
    sets = dict[str, TrainingSet]()
    for entry, manifest in zip(config.data.training_sets(), manifests, strict=True):
        if entry.tasks is None:
            tasks = tuple(task for task in enabled if config_class(task).labels in manifest.labels)
            _check_labels(tasks, manifest)
        else:  # a user who states the tasks of a set knows better
            tasks = tuple(task for task in enabled if task in entry.tasks)
        check_samples(tasks, manifest)
        sets[entry.name] = TrainingSet(manifest, tasks, entry.weight)
    first, *others = sets.values()
    for training_set in others:
        if any(enabled[task].has_classes for task in training_set.tasks):
            check_same_categories(training_set.manifest, first.manifest)
    taught = {task for training_set in sets.values() for task in training_set.tasks}
    check_samples([task for task in enabled if task not in taught], first.manifest)
    check_paste(config, sets)
    return sets


def _check_labels(tasks: Iterable[str], manifest: Manifest) -> None:
    """Raise ValueError for labels that lack something, which would teach a task something wrong."""
    for task in tasks:
        lacking = config_class(task).misleads(manifest.counts, manifest.findings)
        if lacking:
            raise ValueError(
                f"{manifest} has no {lacking}, which {task} would take for background: "
                f"leave {task} out of visft.tasks, or of visft.data.sets.N.tasks"
            )


def check_samples(tasks: Iterable[str], manifest: Manifest) -> None:
    """Raise ValueError for a split in which a task finds nothing, with the task and what the split lacks."""
    for task in tasks:
        kind = config_class(task)
        labels = kind.labels
        if labels not in manifest.labels or not len(manifest.having(kind.learns_from)):
            raise ValueError(
                f"{manifest} has no sample with {labels}, which {task} needs: make the "
                f"shards of data with {labels}, or turn the task off with --set visft.tasks.{task}=null"
            )


def check_paste(config: VisftConfig, sets: TrainingSets) -> None:
    """Raise ValueError if a stream pastes objects by their masks and none of its sets has one."""
    for stream in config.streams().values():
        manifests = [sets[name].manifest for name in streams_by_set(stream, sets)]
        if stream.image.get("paste") and not any(map(has_masks, manifests)):
            raise ValueError(
                f"{stream.key}.image.paste = {stream.image['paste']} pastes objects by their masks, and no "
                "object of the data has one: set it to 0"
            )


def has_masks(manifest: Manifest) -> bool:
    """Return True if an object of a split has a mask."""
    without_mask = manifest.findings.get(WITHOUT_MASK, (0,))[0]
    return without_mask < manifest.counts.get("trainable", 0)


def check_same_categories(manifest: Manifest, first: Manifest) -> None:
    """Raise ValueError for a split with a category, by id and name, that ROOT/TRAIN (`first`) lacks."""
    # Panoptic categories that are other labels' as well have the same names there.
    known = {category.coco_id: category.name for category in first.every_category}
    every = manifest.every_category
    unknown = [category for category in every if known.get(category.coco_id) != category.name]
    if unknown:
        category = unknown[0]
        there = known.get(category.coco_id, "absent")
        raise ValueError(
            f"{manifest}: category {category.coco_id} {category.name!r} is {there!r} "
            f"in {first} ({len(unknown)} such): make both from the same categories"
        )


def check_bands(manifest: Manifest, bands: Bands | None) -> None:
    """Raise ValueError for a split of other pictures than a model reads; its means may differ."""
    there = in_words(manifest.bands)
    if there == in_words(bands):
        return
    remedy = "give shards of such pictures"
    have = manifest.bands
    if bands is not None and have is not None and (have.count, have.kind) == (bands.count, bands.kind):
        low, high = bands.range
        numbers = ",".join(map(str, bands.numbers))
        remedy = f"build them with --range {low:g},{high:g} --bands {numbers}"
    raise ValueError(f"{manifest} has pictures of {there}, and the model reads {in_words(bands)}: {remedy}")


def streams_by_set(stream: Stream, sets: TrainingSets) -> dict[str, Stream]:
    """Data set -> the stream as far as the set has labels for it; without sets that have none."""
    streams = {}
    for name, training_set in sets.items():
        tasks = tuple(task for task in stream.tasks if task in training_set.tasks)
        if tasks:
            streams[name] = replace(stream, tasks=tasks)
    return streams


def samples_of(config: VisftConfig, stream: Stream, sets: TrainingSets) -> dict[str, SetPlan]:
    """Data set -> its samples that teach at least one task of the stream."""
    plans = {}
    for name, taught in streams_by_set(stream, sets).items():
        selections = {config_class(task).learns_from for task in taught.tasks}
        manifest = sets[name].manifest
        samples = manifest.having(selections.pop() if len(selections) == 1 else "any")
        # Mixed within a few shards at a time, each is fetched once.
        order = config.data.shuffle or ("windowed" if manifest.is_remote else "full")
        if stream.tiles is not None:
            samples = stream.tiles.samples(manifest.index, samples)
        shards = manifest.index["shard"][samples % len(manifest)] if order == "windowed" else None
        plans[name] = SetPlan(samples, sets[name].weight, shards)
    return plans


def classes_of_run(config: VisftConfig, categories: Sequence[Category]) -> dict[str, tuple[int, ...]]:
    """Task -> raw ids of the classes of its head, where they are not those of the published heads.

    Raises ValueError for heads that cannot have classes for `categories`, those of ROOT/TRAIN.
    """
    classes = {}
    for name, task in config.tasks.enabled().items():
        if task.has_classes:
            of_task = categories_for(task.labels, categories)
            names = {category.coco_id: category.name for category in of_task}
            ids = classes_of(name, task.head.model_dump(), names)
            if ids is not None:
                classes[name] = ids
    return classes
