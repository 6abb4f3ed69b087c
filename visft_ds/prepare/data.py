"""Data of a run: its data sets, their order, its vocabulary, and the pipelines that make batches of each
stream.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from visft_ds import distributed
from visft_ds.config import Batches
from visft_ds.config.schema import DataConfig, VisftConfig
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.features import FeatureCache
from visft_ds.data.fetch import Cache
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, TaskPlan
from visft_ds.data.shards import Category, Manifest, ShardReader
from visft_ds.distributed import PipelinePosition
from visft_ds.files import read_bytes, reading
from visft_ds.prepare.datasets import (
    TrainingSets,
    check_bands,
    check_same_categories,
    check_samples,
    classes_of_run,
    samples_of,
    streams_by_set,
)
from visft_ds.prepare.model import PreparedModel
from visft_ds.pretrained import TIMM
from visft_ds.settings.fields import Precision
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import FORMAT, TOKENIZER, Vocabulary


@dataclass(frozen=True)
class RunData:
    """Data of a run."""

    sets: TrainingSets
    categories: Sequence[Category]  #: of the first set, ROOT/TRAIN: those that the heads know
    streams: Mapping[str, Stream]  #: with the classes of the run's heads
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: stream -> set -> what makes its training batches
    plan: Plan
    vocabulary: Vocabulary | None  #: None: no task works with words
    validation: Manifest | None  #: None: no evaluation during training

    def identity(self) -> dict[str, str]:
        """Facts that must be the same on all ranks, and when a run is resumed."""
        content = [[name, training.manifest.fingerprint] for name, training in self.sets.items()]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        facts = {
            "data set": content[0][1] if len(content) == 1 else digest,
            "order of samples": self.plan.describe(),
            "vocabulary": self.vocabulary.fingerprint if self.vocabulary else "none",
        }
        if any(training.manifest.options.get("masks_from_boxes") for training in self.sets.values()):
            facts["masks"] = "ellipses drawn into boxes, where there were none"
        return facts


def open_data(config: VisftConfig, sets: TrainingSets) -> RunData:
    """The data of a run whose configuration is settled.

    Raises ValueError for a validation split that is missing or damaged, lacks what a task needs, or does not
    fit the training sets; and as `vocabulary_of`.
    """
    first = next(iter(sets.values())).manifest
    classes = classes_of_run(config, first.every_category)
    vocabulary = vocabulary_of(config, sets)
    validation = None
    if config.run.eval_every:
        cache = Cache(config.data.cache, config.data.cache_bytes)
        validation = Manifest.load(config.data.root, config.data.val, cache)
        check_samples(config.tasks.enabled(), validation)
        check_same_categories(validation, first)
        check_bands(validation, config.model.bands)
    streams = dict[str, Stream]()
    pipelines = dict[str, dict[str, SamplePipeline]]()
    plans = dict[str, TaskPlan]()
    for name, stream in config.streams().items():
        with_classes = {task: classes[task] for task in stream.tasks if task in classes}
        streams[name] = replace(stream, classes=with_classes)
        pipelines[name] = {
            set_name: pipeline_of(taught, vocabulary, train=True)
            for set_name, taught in streams_by_set(streams[name], sets).items()
        }
        plans[name] = TaskPlan(samples_of(config, stream, sets), stream.batch_size, stream.share)
    views = None if config.features is None else config.features.views
    plan = Plan(plans, config.seed, views)
    return RunData(sets, first.every_category, streams, pipelines, plan, vocabulary, validation)


def workers_of(data: DataConfig) -> int:
    """Processes that read for this one. Without a GPU they would take the cores that compute."""
    if data.num_workers is not None or distributed.local_device().type == "cpu":
        return data.num_workers or 0
    return min(8, max(1, distributed.cores() - 1))


def open_loader(config: VisftConfig, data: RunData, batches: Batches) -> StepLoader:
    """The loader of this rank's part of each global batch."""
    position = PipelinePosition.here(batches.stages)
    return StepLoader(
        {name: ShardReader(training.manifest) for name, training in data.sets.items()},
        data.plan,
        data.pipelines,
        dp_rank=position.dp_rank,
        dp_size=position.dp_size,
        accumulation=batches.accumulation,
        role=position.role,
        num_workers=workers_of(config.data),
        prefetch_steps=config.data.prefetch_steps,
    )


def keep_features(
    config: VisftConfig,
    sets: TrainingSets,
    loader: StepLoader,
    prepared: PreparedModel,
    precision: Precision,
) -> None:
    """Let loader and model keep the features of a frozen backbone, as `visft.features` says.

    Heads, rates and seeds are no part of what features depend on: runs that differ in those share them.
    Raises ValueError for a backbone that trains, or a folder that holds something else.
    """
    assert config.features is not None
    if prepared.module.train_backbone:
        raise ValueError(
            "visft.features: a parameter group trains the backbone, which changes all features: set it to "
            "null"
        )
    shape = {"preset": config.model.preset, **config.model.backbone_options()}
    streams = {stream.name: stream.image for stream in config.streams().values()}
    identity = {
        "base weights": prepared.base.identity,
        "shape": orjson.dumps(shape, option=orjson.OPT_SORT_KEYS).decode(),
        "precision": f"{precision} on {distributed.local_device().type}",
        "data": " ".join(
            f"{name} {training_set.manifest.fingerprint}" for name, training_set in sorted(sets.items())
        ),
        "images": orjson.dumps(streams, option=orjson.OPT_SORT_KEYS).decode(),
    }
    if config.model.preset.startswith(TIMM):  # another release may compute otherwise
        identity["timm"] = importlib.metadata.version("timm")
    folder = None if config.features.cache is None else Path(config.features.cache)
    prepared.module.feature_cache = loader.features = FeatureCache(folder, identity)


def vocabulary_of(config: VisftConfig, sets: TrainingSets) -> Vocabulary | None:
    """The words of a run: those of the captions it learns from, the most frequent first and equal ones by the
    alphabet, or of a file; None where no task works with words.

    Raises ValueError for a tokenizer of another release, captions without words, or an unusable file.
    """
    words_of = config.tasks.with_words()
    if words_of is None:
        return None
    task = words_of[0]
    settings = words_of[1].vocabulary
    if settings.file is not None:
        return read_vocabulary(Path(settings.file))
    manifests = [training.manifest for training in sets.values() if task in training.tasks]
    where = ", ".join(map(str, manifests))
    words: Counter[str] = Counter()
    for manifest in manifests:
        if manifest.options.get("tokenizer") != TOKENIZER:
            raise ValueError(
                f"{where}: captions were tokenised by {manifest.options.get('tokenizer')}, not {TOKENIZER}"
            )
        least = manifest.options.get("word_min_count", 1)
        if settings.min_count < least:
            raise ValueError(
                f"{manifest} lists words that occur at least {least} times: "
                f"--set visft.tasks.{task}.vocabulary.min_count={least}"
            )
        words.update(manifest.vocabulary)
    frequent = [word for word, count in words.items() if count >= settings.min_count]
    if not frequent:
        key = f"visft.tasks.{task}.vocabulary.min_count = {settings.min_count}"
        raise ValueError(
            f"{where}, {key}: none of {len(words)} words of the captions occurs so often: lower it"
        )
    return Vocabulary(tuple(sorted(frequent, key=lambda word: (-words[word], word))))


def read_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary of ours (JSON), or the word map of a published head (JSON, word -> id).

    Raises ValueError for neither of the two.
    """
    with reading(path, "the word map of a captioning head, a JSON object word -> id"):
        fields = orjson.loads(read_bytes(path))
        return (
            Vocabulary.from_dict(fields)
            if fields.get("format") == FORMAT
            else Vocabulary.from_word_map(fields)
        )
