"""What a run reads: the vocabulary, the order of the samples, and how raw samples become batches of each stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import orjson

from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import SHARED, Stream
from visft_ds.data.joint import JointTransform, collate_joint
from visft_ds.data.loader import Pipeline
from visft_ds.data.manifest import Manifest, manifest_path
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
    chosen = manifest.select(selection_of(stream))
    return len(manifest) if len(chosen) == len(manifest) else chosen


def selection_of(stream: Stream) -> str:
    """Which samples teach at least one of the tasks of a stream, as `Manifest.select` names them."""
    selections = {TASKS[task].learns_from for task in stream.tasks}
    return selections.pop() if len(selections) == 1 else "any"


def as_arguments(config: VisftConfig) -> str:
    """The streams of a run as `tools/make_shards.py which` takes them."""
    streams = config.streams().values()
    return " ".join(f"--task {s.name}:{s.share}:{s.batch_size}:{selection_of(s)}" for s in streams)


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


def known_vocabulary(config: VisftConfig) -> Vocabulary | None:
    """`vocabulary_of` before a run: None also where the shards, or the file of words, are not there yet.

    Raises:
        ValueError: as `vocabulary_of` and `check_samples`, and where the manifest of the shards is damaged.
    """
    task, data = config.tasks.captioning, config.data
    if task is None:
        return None
    if task.vocabulary.file is not None:
        path = Path(task.vocabulary.file)
        return read_vocabulary(path) if path.is_file() else None
    if not manifest_path(Path(data.root), data.train).is_file():
        return None
    manifest = Manifest.load(data.root, data.train, check_shards=False)
    check_samples(("captioning",), manifest)
    return vocabulary_of(config, manifest)


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
    ours = fields.get("format") == FORMAT
    wrong = [word for word, number in fields.items() if type(number) is not int]
    if wrong and not ours:
        raise ValueError(
            f"{path}: neither a {FORMAT} nor the word map of a captioning head, word -> id: {wrong[0]!r} is "
            f"{fields[wrong[0]]!r:.60}, which is no whole number"
        )
    try:
        return Vocabulary.from_dict(fields) if ours else Vocabulary.from_word_map(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def check_samples(tasks: Sequence[str] | Mapping[str, object], manifest: Manifest) -> None:
    """Refuse a split in which a task finds nothing.

    Raises:
        ValueError: naming the task and what the split lacks.
    """
    for task in tasks:
        selection = TASKS[task].learns_from
        if len(manifest.select(selection)):
            continue
        where = f"{manifest.root}/{manifest.split}"
        if not len(manifest):
            raise ValueError(f"{where} has no samples: make the shards anew")
        raise ValueError(
            f"{where} has no sample with {selection}, which {task} needs: make the shards "
            f"with --{selection} FILE, or turn the task off with --set visft.tasks.{task}=null"
        )
