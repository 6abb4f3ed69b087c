"""What a run reads: the vocabulary, the order of the samples, and how raw samples become batches of each stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import SHARED, Stream
from visft_ds.data.joint import JointTransform, collate_joint
from visft_ds.data.loader import Pipeline
from visft_ds.data.manifest import Manifest
from visft_ds.data.plan import Int64Array, Plan, TaskPlan
from visft_ds.data.vocabulary import FORMAT, Vocabulary
from visft_ds.tasks import TASKS


def pipeline_of(stream: Stream, vocabulary: Vocabulary | None, *, train: bool) -> Pipeline:
    """Transform and collate of a stream, with the sizes of its configuration."""
    if stream.name == SHARED:
        return Pipeline(JointTransform(train, stream.tasks, vocabulary=vocabulary, **stream.image), collate_joint)
    spec = TASKS[stream.name]
    return Pipeline(spec.build_transform(train, stream.image, vocabulary), spec.collate)


def plan_of(config: VisftConfig, manifest: Manifest) -> Plan:
    """The order of a run's samples.

    Raises:
        ValueError: fewer samples that a stream can learn from than its batch size.
    """
    tasks = {
        stream.name: TaskPlan(_samples(stream, manifest), stream.batch_size, stream.share)
        for stream in config.streams().values()
    }
    return Plan(tasks, config.seed)


def _samples(stream: Stream, manifest: Manifest) -> int | Int64Array:
    """Positions that teach at least one of the tasks; the size of the split where all of them do."""
    selections = {TASKS[task].learns_from for task in stream.tasks}
    if "any" in selections:
        return len(manifest)
    (selection,) = selections
    chosen = manifest.select(selection)
    return len(manifest) if len(chosen) == len(manifest) else chosen


def needs_vocabulary(tasks: Sequence[str] | Mapping[str, object]) -> bool:
    """Whether one of the tasks works with words."""
    return any(TASKS[task].uses_vocabulary for task in tasks)


def vocabulary_of(config: VisftConfig, manifest: Manifest) -> Vocabulary | None:
    """The words of a run: those of the training captions, or of a file; None where no task works with words.

    Raises:
        ValueError: shards without captions, a tokenizer of another release, or an unusable file.
    """
    task = config.tasks.captioning
    if task is None:
        return None
    if task.vocabulary.file is not None:
        return read_vocabulary(Path(task.vocabulary.file))
    try:
        tokenizer = str(manifest.options.get("tokenizer"))
        return Vocabulary.from_counts(manifest.vocabulary, min_count=task.vocabulary.min_count, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{manifest.root}/{manifest.split}, visft.tasks.captioning.vocabulary.min_count = "
            f"{task.vocabulary.min_count}: {error}"
        ) from error


def read_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary of ours (JSON), or the word map of a published head (JSON, word -> id).

    Raises:
        ValueError: no such file, or neither of the two.
    """
    try:
        fields = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise ValueError(f"{path}: no readable vocabulary: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a vocabulary is a JSON object, this is {type(fields).__name__}")
    try:
        return Vocabulary.from_dict(fields) if fields.get("format") == FORMAT else Vocabulary.from_word_map(fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def check_samples(tasks: Sequence[str] | Mapping[str, object], manifest: Manifest) -> None:
    """Refuse a split in which a task finds nothing.

    Raises:
        ValueError: naming the task and what the split lacks.
    """
    for task in tasks:
        selection = TASKS[task].learns_from
        if not len(manifest.select(selection)):
            raise ValueError(
                f"{manifest.root}/{manifest.split} has no sample with {selection}, which {task} needs: make the shards "
                f"with --{selection} FILE, or turn the task off with --set visft.tasks.{task}=null"
            )
