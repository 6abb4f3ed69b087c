"""Input of a run: the vocabulary, the order of the samples, and the pipelines from raw samples to batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import orjson

from visft_ds.config import ResolvedConfig, changed
from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.shards import Manifest
from visft_ds.files import read_bytes, reading
from visft_ds.prepare.datasets import TrainingSet, classes_of_run, first_of, windowed
from visft_ds.tasks import TASKS
from visft_ds.tasks.transform import collate_joint, transform_of
from visft_ds.tasks.vocabulary import FORMAT, TOKENIZER, Vocabulary


def pipeline_of(stream: Stream, vocabulary: Vocabulary | None, *, train: bool) -> SamplePipeline:
    """Transform and collate of a stream, with the sizes of its configuration."""
    return SamplePipeline(transform_of(stream, vocabulary, train=train), collate_joint)


def streams_of(config: VisftConfig, first: Manifest) -> dict[str, Stream]:
    """The streams of a run with the classes of its heads, which the categories of ROOT/TRAIN (`first`) decide.

    Raises ValueError, see `visft_ds.tasks.classes.classes_of`.
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

    Raises ValueError for fewer samples that a stream can learn from than its batch size.
    """
    tasks = {
        stream.name: TaskPlan(_samples_of(config, stream, sets), stream.batch_size, stream.share)
        for stream in config.streams().values()
    }
    return Plan(tasks, config.seed, None if config.features is None else config.features.views)


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

    Raises ValueError for a tokenizer of another release, captions without words, or an unusable file.
    """
    words_of = config.tasks.with_words()
    if words_of is None:
        return None
    settings = words_of[1].vocabulary
    if settings.file is not None:
        return read_vocabulary(Path(settings.file))
    where = ", ".join(f"{manifest.root}/{manifest.split}" for manifest in manifests)
    words: Counter[str] = Counter()
    for manifest in manifests:
        if manifest.options.get("tokenizer") != TOKENIZER:
            raise ValueError(
                f"{where}: captions cut into words by {manifest.options.get('tokenizer')}, not {TOKENIZER}"
            )
        words.update(manifest.vocabulary)
    try:
        return Vocabulary.from_counts(words, min_count=settings.min_count)
    except ValueError as error:
        key = f"visft.tasks.{words_of[0]}.vocabulary.min_count"
        raise ValueError(f"{where}, {key} = {settings.min_count}: {error}") from error


def read_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary of ours (JSON), or the word map of a published head (JSON, word -> id).

    Raises ValueError for neither of the two.
    """
    with reading(path, "the word map of a captioning head, a JSON object word -> id"):
        fields = orjson.loads(read_bytes(path))
        return Vocabulary.from_dict(fields) if fields.get("format") == FORMAT else Vocabulary.from_word_map(fields)
