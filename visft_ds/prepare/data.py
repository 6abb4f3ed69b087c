"""Data of a run in one place: what it learns from and in which order, its words, what it is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from visft_ds.config import Batches, ResolvedConfig
from visft_ds.config.fields import Precision
from visft_ds.config.preflight import is_url
from visft_ds.config.schema import VisftConfig
from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.features import FeatureCache
from visft_ds.data.loader import Place, StepLoader
from visft_ds.data.plan import Plan
from visft_ds.data.shards import Category, Manifest, ShardReader, manifest_path
from visft_ds.parallel import distributed
from visft_ds.prepare.datasets import (
    TrainingSet,
    cache_of,
    captioned,
    check_same_categories,
    check_samples,
    data_identity,
    first_of,
    open_training_data,
    settle_classes,
    workers_of,
)
from visft_ds.prepare.model import PreparedModel
from visft_ds.prepare.streams import pipelines_of, plan_of, settle_batches, streams_of, vocabulary_of
from visft_ds.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class RunData:
    """Data of a run."""

    sets: Mapping[str, TrainingSet]  #: the first one decides which categories there are
    streams: Mapping[str, Stream]  #: with the classes of the run's heads
    pipelines: Mapping[str, Mapping[str, SamplePipeline]]  #: stream -> set -> what makes its training batches
    plan: Plan
    vocabulary: Vocabulary | None  #: None: no task works with words
    validation: Manifest | None  #: None: no evaluation during training

    @property
    def categories(self) -> Sequence[Category]:
        """Categories that the heads know."""
        return first_of(self.sets).categories

    @property
    def vocabulary_size(self) -> int | None:
        """Number of ids; None without words."""
        return self.vocabulary.size if self.vocabulary else None

    def identity(self) -> dict[str, str]:
        """Facts that must be the same on all ranks, and when a run goes on."""
        return {
            "data set": data_identity(self.sets),
            "order of samples": self.plan.describe(),
            "vocabulary": self.vocabulary.fingerprint if self.vocabulary else "none",
        }


def open_data(config: ResolvedConfig, processes: int) -> tuple[ResolvedConfig, RunData]:
    """The data of a run on so many processes, and its configuration with the batches and classes that it decides.

    Raises ValueError for a split that is missing or damaged, lacks what a task needs, or does not fit the others.
    """
    sets = open_training_data(config.visft)
    config = settle_classes(config, first_of(sets))
    config = settle_batches(config, sets, max(1, processes // config.pipeline_stages))
    settings = config.visft
    validation, vocabulary = None, vocabulary_of(settings, *captioned(sets))
    if settings.run.eval_every:
        validation = Manifest.load(settings.data.root, settings.data.val, cache=cache_of(settings.data))
        check_samples(settings.tasks.enabled(), validation)
        check_same_categories(validation, first_of(sets))
    return config, RunData(
        sets=sets,
        streams=streams_of(settings, first_of(sets)),
        pipelines=pipelines_of(settings, sets, vocabulary),
        plan=plan_of(settings, sets),
        vocabulary=vocabulary,
        validation=validation,
    )


def is_here(config: VisftConfig) -> bool:
    """Return True if all splits of a run lie on this machine, so that they can be looked at before it."""
    data = config.data
    places = [(data.root, data.train), *((one.root, one.split) for one in data.sets)]
    places += [(data.root, data.val)] if config.run.eval_every else []
    return not any(is_url(root) or not manifest_path(Path(root), split).is_file() for root, split in places)


def open_loader(config: VisftConfig, data: RunData, batches: Batches) -> StepLoader:
    """The loader of this rank's part of each global batch."""
    place = Place.of_rank(distributed.rank(), distributed.world_size(), batches.stages)
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
) -> FeatureCache | None:
    """Let loader and model keep the features of a frozen backbone; None where geometries do not repeat.

    Heads, rates and seeds are no part of what features depend on: runs that differ in those share them.

    Raises:
        ValueError: a backbone that trains, or a folder that holds something else.
    """
    if config.features is None:
        return None
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
    features = FeatureCache(None if config.features.cache is None else Path(config.features.cache), identity)
    prepared.module.feature_cache = features
    loader.keep_features(features)
    return features
