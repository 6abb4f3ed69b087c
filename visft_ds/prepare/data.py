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
from visft_ds.config import Batches, ResolvedConfig, changed
from visft_ds.config.schema import VisftConfig
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.features import FeatureCache
from visft_ds.data.fetch import Cache, is_url
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.shards import Category, Manifest, ShardReader, manifest_path
from visft_ds.distributed import PipelinePosition
from visft_ds.files import read_bytes, reading
from visft_ds.prepare.datasets import (
    TrainingSet,
    check_same_categories,
    check_samples,
    classes_of_run,
    open_training_data,
    settle_classes,
    workers_of,
)
from visft_ds.prepare.model import PreparedModel
from visft_ds.pretrained import TIMM
from visft_ds.settings.fields import Precision
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks import TASKS
from visft_ds.tasks.classes import COCO_NAMES
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import FORMAT, TOKENIZER, Vocabulary


@dataclass(frozen=True)
class RunData:
    """Data of a run."""

    sets: Mapping[str, TrainingSet]
    categories: Sequence[Category]  #: of the first set, ROOT/TRAIN: those that the heads know
    streams: Mapping[str, Stream]  #: with the classes of the run's heads
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: stream -> set -> what makes its training batches
    plan: Plan
    vocabulary: Vocabulary | None  #: None: no task works with words
    validation: Manifest | None  #: None: no evaluation during training

    def identity(self) -> dict[str, str]:
        """Facts that must be the same on all ranks, and when a run is resumed."""
        content = [[name, one.manifest.fingerprint] for name, one in self.sets.items()]
        several = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        found = {
            "data set": content[0][1] if len(content) == 1 else several,
            "order of samples": self.plan.describe(),
            "vocabulary": self.vocabulary.fingerprint if self.vocabulary else "none",
        }
        if any(one.manifest.options.get("masks_from_boxes") for one in self.sets.values()):
            found["masks"] = "ellipses drawn into boxes, where there were none"
        return found


def open_data(config: ResolvedConfig, processes: int) -> tuple[ResolvedConfig, RunData]:
    """The data of a run on so many processes, and its configuration with the batches and classes that it
    decides.

    Raises ValueError for a split that is missing or damaged, lacks what a task needs, or does not fit the
    others.
    """
    sets = open_training_data(config.visft)
    first, dp_size = next(iter(sets.values())).manifest, max(1, processes // config.pipeline_stages)
    if "maps" in first.labels or any(category.coco_id not in COCO_NAMES for category in first.categories):
        config = settle_classes(config, first)
    samples = dict[str, dict[str, SetPlan]]()
    for name, stream in config.visft.streams().items():
        samples[name] = samples_of(config.visft, stream, sets)
        images = min(len(part.samples) for part in samples[name].values())
        smaller = images // dp_size * dp_size
        if images < stream.batch_size and smaller:
            key = f"{stream.key}.batch_size"
            entry = f"{key}: {stream.batch_size} -> {smaller}, because of the number of images"
            visft = changed(config, [f"{key}={smaller}"]).visft
            config = replace(config, visft=visft, adapted=(*config.adapted, entry))
    settings, validation = config.visft, None
    classes, vocabulary = classes_of_run(settings, first.categories), vocabulary_of(settings, sets)
    if settings.run.eval_every:
        cache = Cache(settings.data.cache, settings.data.cache_bytes)
        validation = Manifest.load(settings.data.root, settings.data.val, cache)
        check_samples(settings.tasks.enabled(), validation)
        check_same_categories(validation, first)
    streams, pipelines, plans = (
        dict[str, Stream](),
        dict[str, dict[str, SamplePipeline]](),
        dict[str, TaskPlan](),
    )
    for name, stream in settings.streams().items():
        streams[name] = replace(
            stream, classes={task: classes[task] for task in stream.tasks if task in classes}
        )
        parts = parts_of(streams[name], sets)
        pipelines[name] = {
            part: pipeline_of(taught, vocabulary, train=True) for part, taught in parts.items()
        }
        plans[name] = TaskPlan(samples[name], stream.batch_size, stream.share)
    plan = Plan(plans, settings.seed, None if settings.features is None else settings.features.views)
    return config, RunData(sets, first.categories, streams, pipelines, plan, vocabulary, validation)


def is_here(config: VisftConfig) -> bool:
    """Return True if all splits of a run lie on this machine, so that they can be looked at before it."""
    data = config.data
    places = [*data.places(), *([(data.root, data.val)] if config.run.eval_every else [])]
    return not any(is_url(root) or not manifest_path(Path(root), split).is_file() for root, split in places)


def open_loader(config: VisftConfig, data: RunData, batches: Batches) -> StepLoader:
    """The loader of this rank's part of each global batch."""
    place = PipelinePosition.of_rank(distributed.rank(), distributed.world_size(), batches.stages)
    return StepLoader(
        {name: ShardReader(one.manifest) for name, one in data.sets.items()},
        data.plan,
        data.pipelines,
        dp_rank=place.dp_rank,
        dp_size=place.dp_size,
        accumulation=batches.accumulation,
        role=place.role,
        num_workers=workers_of(config.data),
        prefetch_steps=config.data.prefetch_steps,
    )


def keep_features(
    config: VisftConfig,
    sets: Mapping[str, TrainingSet],
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
            "visft.features: a parameter group trains the backbone, which changes all features: set it to null"
        )
    shape = {"preset": config.model.preset, **config.model.backbone_options()}
    streams = {stream.name: stream.image for stream in config.streams().values()}
    identity = {
        "base weights": prepared.base.identity,
        "shape": orjson.dumps(shape, option=orjson.OPT_SORT_KEYS).decode(),
        "precision": f"{precision} on {distributed.local_device().type}",
        "data": " ".join(f"{name} {one.manifest.fingerprint}" for name, one in sorted(sets.items())),
        "images": orjson.dumps(streams, option=orjson.OPT_SORT_KEYS).decode(),
    }
    if config.model.preset.startswith(TIMM):  # another release may compute otherwise
        identity["timm"] = importlib.metadata.version("timm")
    folder = None if config.features.cache is None else Path(config.features.cache)
    prepared.module.feature_cache = loader.features = FeatureCache(folder, identity)


def samples_of(config: VisftConfig, stream: Stream, sets: Mapping[str, TrainingSet]) -> dict[str, SetPlan]:
    """Data set -> its samples that teach at least one task of the stream."""
    parts = {}
    for name, part in parts_of(stream, sets).items():
        selections = {TASKS[task].config.learns_from for task in part.tasks}
        manifest = sets[name].manifest
        samples = manifest.having(selections.pop() if len(selections) == 1 else "any")
        # Mixed within a few shards at a time, each is fetched once.
        order = config.data.shuffle or ("windowed" if is_url(manifest.root) else "full")
        shards = manifest.index["shard"][samples] if order == "windowed" else None
        parts[name] = SetPlan(samples, sets[name].weight, shards)
    return parts


def parts_of(stream: Stream, sets: Mapping[str, TrainingSet]) -> dict[str, Stream]:
    """Data set -> the stream as far as the set has labels for it; without sets that have none."""
    taught = {name: tuple(task for task in stream.tasks if task in one.tasks) for name, one in sets.items()}
    return {name: replace(stream, tasks=tasks) for name, tasks in taught.items() if tasks}


def vocabulary_of(config: VisftConfig, sets: Mapping[str, TrainingSet]) -> Vocabulary | None:
    """The words of a run: those of the captions it learns from, the most frequent first and equal ones by the
    alphabet, or of a file; None where no task works with words.

    Raises ValueError for a tokenizer of another release, captions without words, or an unusable file.
    """
    words_of = config.tasks.with_words()
    if words_of is None:
        return None
    task, settings = words_of[0], words_of[1].vocabulary
    if settings.file is not None:
        return read_vocabulary(Path(settings.file))
    manifests = [one.manifest for one in sets.values() if task in one.tasks]
    where = ", ".join(f"{manifest.root}/{manifest.split}" for manifest in manifests)
    words: Counter[str] = Counter()
    for manifest in manifests:
        if manifest.options.get("tokenizer") != TOKENIZER:
            raise ValueError(
                f"{where}: captions were tokenised by {manifest.options.get('tokenizer')}, not {TOKENIZER}"
            )
        words.update(manifest.vocabulary)
    kept = sorted((-count, word) for word, count in words.items() if count >= settings.min_count)
    if not kept:
        key = f"visft.tasks.{task}.vocabulary.min_count = {settings.min_count}"
        raise ValueError(
            f"{where}, {key}: none of {len(words)} words of the captions occurs so often: lower it"
        )
    return Vocabulary(tuple(word for _, word in kept))


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
