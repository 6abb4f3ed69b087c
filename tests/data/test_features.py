"""Kept features: files that kills and damage leave whole, and batches that need no pixels."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.coco_tree import make_split
from tests.options import alone
from tests.parallel.engine_case import build, samples
from visft_ds.config import resolve
from visft_ds.data import dataset as reading
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.features import FeatureCache, View
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.model import MultiTaskModel
from visft_ds.models.timm_backbone import build_timm
from visft_ds.tasks.paste import pasted
from visft_ds.tasks.transform import collate_joint

IDENTITY = {"base weights": "a", "data": "b"}


def some(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A map and tokens in front of it."""
    drawn = torch.randn((3, 2, 8), generator=torch.Generator().manual_seed(seed)).bfloat16()
    return drawn, drawn[0].clone()


def test_what_one_process_keeps_others_find(tmp_path: Path) -> None:
    one, other = (FeatureCache(tmp_path, IDENTITY) for _ in range(2))
    assert other.get(7, 3) is None
    one.put(7, 3, (42, 28), some())
    one.put(7, 3, (42, 28), some(1))  # known ones are not written again
    for cache in (one, other, pickle.loads(pickle.dumps(other))):  # noqa: S301
        view = cache.get(7, 3)
        assert view is not None and view.features is not None and view.frame == (42, 28)
        assert all(map(torch.equal, view.features, some()))
    elsewhere = FeatureCache(tmp_path, {**IDENTITY, "base weights": "c"})
    assert elsewhere.get(7, 3) is None and elsewhere.folder != one.folder
    nowhere = FeatureCache(None, IDENTITY)
    nowhere.put(7, 3, (42, 28), some())
    assert nowhere.get(7, 3) is None


def test_a_power_cut_leaves_whole_features_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are on the disk before the name is, and the name before the next step."""
    done: list[str] = []
    sync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append("name")
        return rename(path, target)

    cache = FeatureCache(tmp_path, {})
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    cache.put(7, 1, (56, 56), some())
    assert done == ["file", "name", "folder"]


def test_a_miss_lists_no_folder_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path, IDENTITY)
    for key in range(300):
        cache.put(key, key, (42, 28), some(key))
    assert (
        cache.folder is not None and max(len(list(path.iterdir())) for path in cache.folder.glob("*/")) < 10
    )
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "scandir", lambda *_: pytest.fail("a folder is listed"))
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("a folder is listed"))
    assert all(cache.get(key, key) for key in range(300)) and cache.get(300, 300) is None
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == before


def test_damage_and_other_samples_are_named(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, IDENTITY)
    cache.put(7, 3, (42, 28), some())
    with pytest.raises(ValueError, match="sample 4"):
        cache.get(7, 4)
    assert cache.folder is not None
    (file,) = cache.folder.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=file.name):
        cache.get(7, 3)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return ShardReader(make_split(tmp_path_factory.mktemp("split"), 8))


def plan_of(reader: ShardReader, views: int | None, seed: int = 3) -> Plan:
    task = TaskPlan({"toy": SetPlan(np.arange(len(reader)))}, 4)
    return Plan({"detection": task}, seed, views=views)


def test_keys_come_again_after_so_many_epochs_whatever_the_seed(reader: ShardReader) -> None:
    def keys(views: int | None, epoch: int, seed: int = 3) -> dict[int, int]:
        plan = plan_of(reader, views, seed)
        steps = [plan.step(step) for step in (2 * epoch, 2 * epoch + 1)]
        return {
            i: k for step in steps for i, k in zip(step.indices.tolist(), step.keys.tolist(), strict=True)
        }

    assert keys(2, 0) == keys(2, 2) == keys(2, 4, seed=9) != keys(2, 1) == keys(2, 3)
    assert len({*keys(2, 0).values(), *keys(2, 1).values()}) == 2 * len(reader)
    assert keys(None, 0) != keys(None, 2)
    orders = [plan_of(reader, 2).step(step).indices.tolist() for step in (0, 4)]
    assert orders[0] != orders[1]  # only what is drawn for a sample comes again, not the order


def test_samples_with_features_are_read_without_pixels(
    reader: ShardReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {
        "min_size_train": (30, 36),
        "max_size_train": 60,
        "crop_min_size": (28,),
        "crop_size": (20, 30),
    }
    pipeline = SamplePipeline(alone("detection", True, **sizes), collate_joint, paste=partial(pasted, most=3))
    pipelines = {"detection": {"toy": pipeline}}

    def steps(first: int, features: FeatureCache | None) -> list[Batch]:
        loader = StepLoader({"toy": reader}, plan_of(reader, 1), pipelines)
        if features is not None:
            loader.features = features
        return [batches[0] for _, batches in loader.steps(first, first + 2)]

    cache = FeatureCache(tmp_path, IDENTITY)
    for batch in steps(0, cache):
        assert batch.views is not None and all(view.features is None for view in batch.views)
        for index, view in enumerate(batch.views):
            assert view.frame == tuple(batch.sizes[index].tolist())
            cache.put(int(batch.random_keys[index]), int(batch.indices[index]), view.frame, some(index))
    expected = steps(2, None)  # the next epoch
    monkeypatch.setattr(reading, "stored_pixels", lambda *_, **__: pytest.fail("pixels are read"))
    for batch, with_pixels in zip(steps(2, cache), expected, strict=True):
        assert batch.images.shape == (4, 3, 0, 0) and batch.views is not None and with_pixels.views is None
        assert [view.frame for view in batch.views] == [tuple(size) for size in batch.sizes.tolist()]
        for name in ("sizes", "original_sizes", "indices", "image_ids", "random_keys"):
            assert torch.equal(getattr(batch, name), getattr(with_pixels, name))
        ours, theirs = batch.targets["detection"], with_pixels.targets["detection"]
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize("preset", ["debug", "timm:test_vit"])
def test_features_do_not_depend_on_the_batch(preset: str, tmp_path: Path) -> None:
    """One by one, as in a batch, whether all were kept or some or none; several maps and the tokens in front,
    too.
    """
    module, _ = build(1)
    if preset != "debug":
        tower = build_timm("test_vit", layers=(0, 2))
        module = MultiTaskModel(tower, {}, train_backbone=False, heads_active=False)
    module.eval()
    every = [*samples(4)[:2], *samples(4, sides=((42, 70),))[2:]]
    single = [module.features(collate_joint([sample])) for sample in every]
    module.feature_cache = FeatureCache(tmp_path, IDENTITY)
    for known in (0, 2, 4):
        parts = []
        for index, sample in enumerate(every):
            assert sample.image is not None
            view = module.feature_cache.get(index + 1, sample.index) if index < known else None
            assert (view is not None) == (index < known)
            frame = (sample.image.shape[1], sample.image.shape[2])
            image = sample.image if view is None else None
            parts.append(replace(sample, random_key=index + 1, image=image, view=view or View(frame)))
        for level, actual in enumerate(module.features(collate_joint(parts))):
            assert (actual.prefix is None) == (preset == "debug")
            for index, maps in enumerate(single):
                one, (h, w) = maps[level], maps[level].features.shape[-2:]
                expected = one.features[0].bfloat16().float()
                assert torch.equal(actual.features[index, :, :h, :w], expected), (known, index)
                assert torch.equal(actual.valid[index, :h, :w], one.valid[0])
                assert not actual.valid[index, h:].any() and not actual.valid[index, :, w:].any()
                if actual.prefix is not None and one.prefix is not None:
                    assert torch.equal(actual.prefix[index], one.prefix[0].bfloat16().float())


@pytest.mark.parametrize(
    ("stage", "engine", "settings", "message"),
    [
        (2, "zero1", [], "stage 2"),
        (1, "zero3", [], "ZeRO-3"),
        (1, "pipeline", ["pipeline.stages=2"], "ZeRO-3"),
        (1, "zero1", ["visft.features.views=0"], "visft.features.views"),
    ],
)
def test_where_features_cannot_be_kept(stage: int, engine: str, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(stage=stage, engine=engine, model="debug", settings=["visft.features.views=2", *settings])
