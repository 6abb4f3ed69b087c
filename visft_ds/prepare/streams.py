"""Input of a run: the vocabulary, the order of the samples, and the pipelines from raw samples to batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import orjson

from visft_ds.config import ResolvedConfig, changed
from visft_ds.config.preflight import is_url
from visft_ds.config.schema import DataConfig, VisftConfig
from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.shards import Manifest, manifest_path
from visft_ds.files import read_bytes, reading
from visft_ds.prepare.datasets import TrainingSet, captioned, classes_of_run, first_of, open_training_data, windowed
from visft_ds.tasks import TASKS
from visft_ds.tasks.transform import collate_joint, transform_of
from visft_ds.tasks.vocabulary import FORMAT, TOKENIZER, Vocabulary

#: Bytes of a word map.
_LARGEST_WORDS = 2**28


def pipeline_of(stream: Stream, vocabulary: Vocabulary | None, *, train: bool) -> SamplePipeline:
    """Transform and collate of a stream, with the sizes of its configuration."""
    return SamplePipeline(transform_of(stream, vocabulary, train=train), collate_joint)


def streams_of(config: VisftConfig, first: Manifest) -> dict[str, Stream]:
    """The streams of a run with the classes of its heads, which the categories of ROOT/TRAIN (`first`) decide.

    Raises:
        ValueError: see `visft_ds.tasks.classes.classes_of`.
    """
    found = classes_of_run(config, first.categories)
    return {
        name: replace(stream, classes={task: found[task] for task in stream.tasks if task in found})
        for name, stream in config.streams().items()
    }


def pipelines_of(
    config: VisftConfig, sets: Mapping[str, TrainingSet], vocabulary: Vocabulary | None
) -> dict[str, dict[str, SamplePipeline]]:
    """Stream -> data set -> what makes its training batches, with targets of those tasks only that the set teaches."""
    return {
        stream.name: {name: pipeline_of(part, vocabulary, train=True) for name, part in parts_of(stream, sets).items()}
        for stream in streams_of(config, first_of(sets)).values()
    }


def plan_of(config: VisftConfig, sets: Mapping[str, TrainingSet]) -> Plan:
    """The order of a run's samples.

    Raises:
        ValueError: fewer samples that a stream can learn from than its batch size.
    """
    tasks = {
        stream.name: TaskPlan(_samples_of(config, stream, sets), stream.batch_size, stream.share)
        for stream in config.streams().values()
    }
    views = None if config.features is None else config.features.views
    return Plan(tasks, config.seed, views)


def settle_batches(config: ResolvedConfig, sets: Mapping[str, TrainingSet], dp_size: int) -> ResolvedConfig:
    """The configuration with batches that are no larger than a data set, and that so many processes can share."""
    for stream in config.visft.streams().values():
        images = min(len(part.samples) for part in _samples_of(config.visft, stream, sets).values())
        smaller = images // dp_size * dp_size
        if images < stream.batch_size and smaller:
            key = f"{stream.key}.batch_size"
            entry = f"{key}: {stream.batch_size} -> {smaller}, because of the number of images"
            visft = changed(config, [f"{key}={smaller}"]).visft
            config = replace(config, visft=visft, adapted=(*config.adapted, entry))
    return config


def _samples_of(config: VisftConfig, stream: Stream, sets: Mapping[str, TrainingSet]) -> dict[str, SetPlan]:
    """Data set -> its samples that teach at least one task of the stream."""
    parts = {}
    for name, part in parts_of(stream, sets).items():
        selections = {TASKS[task].config.learns_from for task in part.tasks}
        manifest = sets[name].manifest
        samples = manifest.having(selections.pop() if len(selections) == 1 else "any")
        shards = manifest.index["shard"][samples] if windowed(config.data, str(manifest.root)) else None
        parts[name] = SetPlan(samples, sets[name].weight, shards)
    return parts


def parts_of(stream: Stream, sets: Mapping[str, TrainingSet]) -> dict[str, Stream]:
    """Data set -> the stream as far as the set has labels for it; without sets that have none."""
    taught = {name: tuple(task for task in stream.tasks if task in one.tasks) for name, one in sets.items()}
    return {name: replace(stream, tasks=tasks) for name, tasks in taught.items() if tasks}


def vocabulary_of(config: VisftConfig, *manifests: Manifest) -> Vocabulary | None:
    """The words of a run: those of the captions of `manifests`, or of a file; None where no task works with words.

    Raises:
        ValueError: shards without captions, a tokenizer of another release, or an unusable file.
    """
    words_of = config.tasks.with_words()
    if words_of is None:
        return None
    name, task = words_of
    if task.vocabulary.file is not None:
        return read_vocabulary(Path(task.vocabulary.file))
    where = ", ".join(f"{manifest.root}/{manifest.split}" for manifest in manifests)
    tokenizers = {str(manifest.options.get("tokenizer")) for manifest in manifests}
    if tokenizers != {TOKENIZER}:
        raise ValueError(f"{where}: captions cut into words by {' and '.join(sorted(tokenizers))}, not by {TOKENIZER}")
    words: Counter[str] = Counter()
    for manifest in manifests:
        words.update(manifest.vocabulary)
    try:
        return Vocabulary.from_counts(words, min_count=task.vocabulary.min_count)
    except ValueError as error:
        raise ValueError(
            f"{where}, visft.tasks.{name}.vocabulary.min_count = {task.vocabulary.min_count}: {error}"
        ) from error


def known_vocabulary(config: VisftConfig) -> Vocabulary | None:
    """`vocabulary_of` before a run: None also where the shards, or the file of words, are not there yet.

    Raises:
        ValueError: as `vocabulary_of` and `open_training_data`.
    """
    words_of, data = config.tasks.with_words(), config.data
    if words_of is None:
        return None
    task = words_of[1]
    if task.vocabulary.file is not None:
        path = Path(task.vocabulary.file)
        return read_vocabulary(path) if path.is_file() else None
    if not shards_are_here(data):
        return None
    return vocabulary_of(config, *captioned(open_training_data(config)))


def shards_are_here(data: DataConfig) -> bool:
    """Return True if all training sets lie on this machine, so that they can be looked at before a run."""
    places = [(data.root, data.train), *((one.root, one.split) for one in data.sets)]
    return not any(is_url(root) or not manifest_path(Path(root), split).is_file() for root, split in places)


def read_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary of ours (JSON), or the word map of a published head (JSON, word -> id).

    Raises:
        ValueError: no such file, or neither of the two.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the word map of a captioning head, a JSON object word -> id")
    with reading(path, "the word map of a captioning head, a JSON object word -> id"):
        fields = orjson.loads(read_bytes(path, _LARGEST_WORDS))
        if fields.get("format") == FORMAT:
            return Vocabulary.from_dict(fields)
        if any(type(number) is not int for number in fields.values()):
            raise ValueError("an id is no whole number")
        return Vocabulary.from_word_map(fields)
