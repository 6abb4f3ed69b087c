"""Kept features: rounding, files that survive kills and damage, and batches that need no pixels."""

from __future__ import annotations

import copy
import resource
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.coco_tree import make_split
from tests.options import alone
from tests.parallel.engine_case import build, samples
from visft_ds.config import resolve
from visft_ds.data import dataset as reading
from visft_ds.data import features as kept
from visft_ds.data.dataset import DataSet, SamplePipeline
from visft_ds.data.features import FeatureCache, StoredFeatures, View
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.tasks.transform import collate_joint

IDENTITY = {"base weights": "a", "data": "b"}


def some(seed: int = 0, shape: tuple[int, ...] = (3, 2, 8)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(seed: int = 0) -> StoredFeatures:
    return StoredFeatures.pack(some(seed), "bf16")


def test_rounding_is_as_small_as_it_can_be_and_keeps_what_is_no_number() -> None:
    features = some()
    assert torch.equal(StoredFeatures.pack(features, "fp32").unpack(), features)
    assert torch.equal(StoredFeatures.pack(features, "bf16").unpack(), features.bfloat16().float())
    eight_bits = StoredFeatures.pack(features, "int8").unpack()
    step = features.abs().amax(-1, keepdim=True) / 127
    assert ((eight_bits - features).abs() <= step * 0.5001).all()  # half a step, and the rounding of float32
    assert StoredFeatures.pack(torch.zeros(1, 1, 4), "int8").unpack().abs().sum() == 0
    for bad in (torch.nan, torch.inf):
        features[0, 0, 0] = bad
        for storage in ("fp32", "bf16", "int8"):
            assert not StoredFeatures.pack(features, storage).unpack()[0, 0].isfinite().all()


def test_what_one_process_keeps_others_find(tmp_path: Path) -> None:
    one, other = (FeatureCache(tmp_path, IDENTITY, "bf16") for _ in range(2))
    assert other.get(7, 3) is None
    one.put(7, 3, (42, 28), stored())
    for cache in (one, other, copy.copy(other), FeatureCache(tmp_path, IDENTITY, "bf16")):
        view = cache.get(7, 3)
        assert view is not None and view.features is not None and view.frame == (42, 28)
        assert torch.equal(view.features.values, stored().values)
    one.put(7, 3, (42, 28), stored(1))
    assert one.folder is not None
    (file,) = one.folder.glob("*.tar")
    with tarfile.open(file) as archive:  # known entries are not written again; any reader of tars opens the file
        (member,) = archive.getmembers()
        opened = archive.extractfile(member)
        assert opened is not None
        assert torch.equal(safetensors.torch.load(opened.read())["values"], stored().values)


def test_a_killed_writer_loses_its_last_entry_only(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, IDENTITY, "bf16")
    for key in range(3):
        cache.put(key, key, (42, 28), stored(key))
    assert cache.folder is not None
    (file,) = cache.folder.glob("*.tar")
    size = file.stat().st_size
    for left in (size - 1, size - 600, size - size // 3 + 100):
        with file.open("ab") as opened:
            opened.truncate(left)
        again = FeatureCache(tmp_path, IDENTITY, "bf16")
        assert len(again) == 2 and again.get(2, 2) is None and again.get(1, 1) is not None
    again.put(2, 2, (42, 28), stored(2))
    assert FeatureCache(tmp_path, IDENTITY, "bf16").get(2, 2) is not None


def test_damage_and_other_samples_are_named(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, IDENTITY, "bf16")
    cache.put(7, 3, (42, 28), stored())
    with pytest.raises(ValueError, match=r"features of sample 3 under the key of sample 4: delete"):
        cache.get(7, 4)
    assert cache.folder is not None
    (file,) = cache.folder.glob("*.tar")
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file.name}: the features at offset 512 are damaged .*: delete that file"):
        cache.get(7, 3)
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{file.name}: no entry begins at offset 0 \(bad checksum\)"):
        FeatureCache(tmp_path, IDENTITY, "bf16")


def test_a_full_disk_leaves_whole_files(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, IDENTITY, "bf16")
    cache.put(1, 1, (42, 28), stored())
    assert cache.folder is not None
    (file,) = cache.folder.glob("*.tar")
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 700, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            cache.put(2, 2, (42, 28), stored())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    cache.put(3, 3, (42, 28), stored())
    again = FeatureCache(tmp_path, IDENTITY, "bf16")
    assert len(again) == 2 and again.get(3, 3) is not None


def test_each_identity_has_a_cache_of_its_own(tmp_path: Path) -> None:
    first = FeatureCache(tmp_path, IDENTITY, "bf16")
    first.put(7, 3, (42, 28), stored())
    other = FeatureCache(tmp_path, {**IDENTITY, "base weights": "c"}, "int8")
    assert len(other) == 0 and other.get(7, 3) is None
    assert other.others() == [f"{first.folder}: of other storage, base weights"]
    monkey = FeatureCache(None, IDENTITY, "bf16")
    monkey.put(7, 3, (42, 28), stored())
    assert monkey.get(7, 3) is None and monkey.folder is None


def test_large_caches_are_divided_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_FILE_BYTES", 3000)
    cache = FeatureCache(tmp_path, IDENTITY, "bf16")
    for key in range(5):
        cache.put(key, key, (42, 28), stored(key))
    assert cache.folder is not None and len(list(cache.folder.glob("*.tar"))) > 1
    again = FeatureCache(tmp_path, IDENTITY, "bf16")
    for key in range(5):
        view = again.get(key, key)
        assert view is not None and view.features is not None
        assert torch.equal(view.features.values, stored(key).values)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardReader]:
    with ShardReader(make_split(tmp_path_factory.mktemp("split"), 8)) as reader:
        yield reader


def plan_of(reader: ShardReader, views: int | None, seed: int = 3) -> Plan:
    task = TaskPlan({"toy": SetPlan(np.arange(len(reader)))}, 4)
    return Plan({"detection": task}, seed, views=views)


def test_keys_come_again_after_so_many_epochs_whatever_the_seed(reader: ShardReader) -> None:
    def keys(views: int | None, epoch: int, seed: int = 3) -> dict[int, int]:
        plan = plan_of(reader, views, seed)
        steps = [plan.step(step) for step in (2 * epoch, 2 * epoch + 1)]
        return {i: k for one in steps for i, k in zip(one.indices.tolist(), one.keys.tolist(), strict=True)}

    assert keys(2, 0) == keys(2, 2) == keys(2, 4, seed=9) != keys(2, 1) == keys(2, 3)
    assert len({*keys(2, 0).values(), *keys(2, 1).values()}) == 2 * len(reader)
    assert keys(None, 0) != keys(None, 2)
    orders = [plan_of(reader, 2).step(step).indices.tolist() for step in (0, 4)]
    assert orders[0] != orders[1]  # only what is drawn for a sample comes again, not the order
    assert plan_of(reader, 2).fingerprint() not in (
        plan_of(reader, None).fingerprint(),
        plan_of(reader, 1).fingerprint(),
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_with_features_are_read_without_pixels(
    reader: ShardReader, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"short_sides": (30, 36), "max_long": 60, "crop_short_sides": (28,), "crop_range": (20, 30)}
    pipelines = {"detection": {"toy": SamplePipeline(alone("detection", True, **sizes), collate_joint)}}

    def steps(first: int, features: FeatureCache | None) -> list[Batch]:
        loader = StepLoader({"toy": DataSet(reader)}, plan_of(reader, 1), pipelines, num_workers=workers)
        if features is not None:
            loader.keep_features(features)
        return [batches[0] for _, batches in loader.steps(first, first + 2)]

    cache = FeatureCache(tmp_path, IDENTITY, "bf16")
    for batch in steps(0, cache):
        assert batch.views is not None and all(view.features is None for view in batch.views)
        for place, view in enumerate(batch.views):
            assert view.frame == tuple(batch.sizes[place].tolist())
            cache.put(int(batch.random_keys[place]), int(batch.indices[place]), view.frame, stored(place))
    expected = steps(2, None)  # the next epoch
    monkeypatch.setattr(reading, "decode_image", lambda data: pytest.fail("pixels are read"))
    for batch, with_pixels in zip(steps(2, cache), expected, strict=True):
        assert batch.images.shape == (4, 3, 0, 0) and batch.views is not None and with_pixels.views is None
        assert [view.frame for view in batch.views] == [tuple(size) for size in batch.sizes.tolist()]
        for name in ("sizes", "original_sizes", "indices", "image_ids", "random_keys"):
            assert torch.equal(getattr(batch, name), getattr(with_pixels, name))
        ours, theirs = batch.targets["detection"], with_pixels.targets["detection"]
        assert torch.equal(ours.boxes, theirs.boxes) and torch.equal(ours.labels, theirs.labels)


def test_features_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    """One by one, as in batches of one, whether they were kept or not; some of a batch may be known and some not."""
    module, _ = build(1)
    module.eval()
    every = [*samples(4)[:2], *samples(4, sides=((42, 70),))[2:]]
    alone = [module.features(collate_joint([sample])) for sample in every]
    module.feature_cache = FeatureCache(tmp_path, IDENTITY, "fp32")
    assert every[0].image is not None

    def viewed(known: int) -> Batch:
        parts = []
        for place, sample in enumerate(every):
            assert sample.image is not None and module.feature_cache is not None
            frame = (sample.image.shape[1], sample.image.shape[2])
            view = module.feature_cache.get(place + 1, sample.index) if place < known else None
            image = sample.image if view is None else None
            parts.append(replace(sample, random_key=place + 1, image=image, view=view or View(frame)))
        return collate_joint(parts)

    for known in (0, 2, 4):
        batch = viewed(known)
        features, valid = module.features(batch)
        for place, (expected, region) in enumerate(alone):
            h, w = expected.shape[-2:]
            assert torch.equal(features[place, :, :h, :w], expected[0]), (known, place)
            assert torch.equal(valid[place, :h, :w], region[0])
            assert not valid[place, h:].any() and not valid[place, :, w:].any()
    assert len(module.feature_cache) == 4


@pytest.mark.parametrize(
    ("stage", "engine", "settings", "message"),
    [
        (2, "zero1", [], "stage 2 changes the backbone"),
        (1, "zero3", [], "one by one"),
        (1, "pipeline", ["pipeline.stages=2"], "one by one"),
        (1, "zero1", ["visft.data.skip_damaged=1"], "must be 0 with visft.features"),
        (1, "zero1", ["visft.features.storage=int4"], "visft.features.storage"),
        (1, "zero1", ["visft.features.views=0"], "visft.features.views"),
    ],
)
def test_where_features_cannot_be_kept(stage: int, engine: str, settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(stage=stage, engine=engine, model="debug", settings=["visft.features.views=2", *settings])
