"""Batches depend on the plan alone: not on ranks, micro-batches, workers, roles or where a run resumed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.coco_tree import make_split
from tests.options import alone
from tests.ranks import finish, start_ranks
from visft_ds.data.dataset import SamplePipeline, read_raw
from visft_ds.data.loader import StepLoader, evaluation_batches
from visft_ds.data.plan import Plan, SetPlan, StepPlan, TaskPlan
from visft_ds.data.samples import Batch
from visft_ds.data.shards import DamagedSample, Manifest, ShardReader
from visft_ds.errors import RankError
from visft_ds.tasks.paste import pasted
from visft_ds.tasks.transform import collate_joint

SIZES: dict[str, Any] = {
    "min_size_train": (30, 36),
    "max_size_train": 60,
    "crop_min_size": (28,),
    "crop_size": (20, 30),
}
TRAIN = SamplePipeline(alone("detection", True, **SIZES), collate_joint)
EVALUATE = SamplePipeline(alone("detection", False, min_size_test=30, max_size_test=48), collate_joint)
#: Of the two tasks, "other" stands for any second one.
PIPELINES = {"detection": {"toy": TRAIN}, "other": {"toy": TRAIN}}
PASTING = {task: {"toy": replace(TRAIN, paste=partial(pasted, most=3))} for task in PIPELINES}
Samples = dict[tuple[int, int], list[Any]]


def one(samples: int, batch_size: int, ratio: float = 1) -> TaskPlan:
    return TaskPlan({"toy": SetPlan(np.arange(samples))}, batch_size, ratio)


def loader_of(reader: ShardReader, plan: Plan, pipelines: Any = PIPELINES, **options: Any) -> StepLoader:
    return StepLoader({"toy": reader}, plan, pipelines, **options)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    return ShardReader(make_split(tmp_path_factory.mktemp("split"), 18))


@pytest.fixture(scope="module")
def plan(reader: ShardReader) -> Plan:
    return Plan({"detection": one(len(reader), 4, 2), "other": one(len(reader), 8, 1)}, seed=3)


def _collect(
    reader: ShardReader, plan: Plan, start: int, stop: int, **options: Any
) -> list[tuple[StepPlan, Batch]]:
    """With objects of other pictures, unless `pipelines` are others."""
    steps = loader_of(reader, plan, **{"pipelines": PASTING, **options}).steps(start, stop)
    return [(step_plan, batch) for step_plan, batches in steps for batch in batches]


def _by_sample(batches: list[tuple[StepPlan, Batch]]) -> Samples:
    """(step, index) -> everything about that sample, without what depends on its neighbours (padding)."""
    table = {}
    for step_plan, batch in batches:
        boxes = batch.targets["detection"].boxes.split(batch.targets["detection"].counts.tolist())
        for position, index in enumerate(batch.indices.tolist()):
            height, width = batch.sizes[position].tolist()
            image = batch.images[position, :, :height, :width]
            table[step_plan.step, index] = [
                image.tolist(),
                boxes[position].tolist(),
                batch.random_keys[position].item(),
            ]
    return table


@pytest.fixture(scope="module")
def reference(reader: ShardReader, plan: Plan) -> Samples:
    return _by_sample(_collect(reader, plan, 0, 6))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("ranks", "accumulation", "workers", "prefetch"),
    [(1, 4, 0, 2), (2, 1, 0, 2), (2, 2, 1, 0), (1, 1, 4, 5)],
)
def test_any_split_over_ranks_and_workers_gives_the_same_samples(
    reader: ShardReader,
    plan: Plan,
    reference: Samples,
    ranks: int,
    accumulation: int,
    workers: int,
    prefetch: int,
) -> None:
    got: Samples = {}
    for rank in range(ranks):
        options = {"dp_rank": rank, "dp_size": ranks, "accumulation": accumulation}
        part = _collect(reader, plan, 0, 6, num_workers=workers, prefetch_steps=prefetch, **options)
        assert [step_plan.step for step_plan, _ in part[::accumulation]] == list(range(6))
        assert len(part) == 6 * accumulation
        got |= _by_sample(part)
    assert got == reference


def test_resuming_gives_the_rest(reader: ShardReader, plan: Plan, reference: Samples) -> None:
    rest = _by_sample(_collect(reader, plan, 4, 6))
    assert rest == {key: value for key, value in reference.items() if key[0] >= 4}


def test_roles_see_the_same_samples(reader: ShardReader, plan: Plan) -> None:
    """The first and the last stage of a pipeline read apart and must agree; those between read nothing."""
    both, images, labels = (
        [batch for _, batch in _collect(reader, plan, 0, 5, role=role, num_workers=number, accumulation=2)]
        for role, number in (("both", 0), ("images", 1), ("labels", 2))
    )
    for whole, pixels, truth in zip(both, images, labels, strict=True):
        assert torch.equal(whole.images, pixels.images) and not pixels.targets
        assert truth.images.shape[2:] == (0, 0)
        for name in ("boxes", "labels", "counts"):
            assert torch.equal(
                getattr(whole.targets["detection"], name), getattr(truth.targets["detection"], name)
            )
        for name in ("sizes", "original_sizes", "indices", "image_ids", "random_keys"):
            assert torch.equal(getattr(whole, name), getattr(pixels, name))
            assert torch.equal(getattr(whole, name), getattr(truth, name))
    idle = list(loader_of(reader, plan, role=None, accumulation=2).steps(3, 6))
    assert [(step_plan.step, batches) for step_plan, batches in idle] == [(3, []), (4, []), (5, [])]


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_surfaces_at_its_step_and_ends_the_workers(
    reader: ShardReader, plan: Plan, reference: Samples, tmp_path: Path, workers: int
) -> None:
    plain = _by_sample(_collect(reader, plan, 0, 6, pipelines=PIPELINES))
    assert plain != reference, "nothing was pasted"
    manifest = Manifest.load(Path(shutil.copytree(reader.manifest.root, tmp_path / "copy")), "toy")
    hurt = int(plan.step(3).indices[1])
    first = next(step for step in range(9) if hurt in plan.step(step).indices)
    row = manifest.index[hurt]
    with Path(manifest.root, manifest.shards[row["shard"]].name).open("r+b") as file:
        file.seek(int(row["image_offset"]) + 50)
        file.write(b"damage")
    torch.manual_seed(0)
    untouched, got = torch.get_rng_state(), []
    loop = loader_of(ShardReader(manifest), plan, num_workers=workers, prefetch_steps=1).steps(0, 9)
    for _ in range(first):
        step_plan, (batch,) = next(loop)
        got.append((step_plan, batch))
    with pytest.raises(RankError, match=f"{row['image_id']:012d}") as caught:
        next(loop)
    assert "Traceback" not in str(caught.value), "the message is the same without workers"
    assert torch.equal(torch.get_rng_state(), untouched), "dropout draws from the global generator"
    assert _by_sample(got) == {key: value for key, value in plain.items() if key[0] < first}
    _no_workers()


def test_leaving_the_loop_ends_the_workers(reader: ShardReader, plan: Plan) -> None:
    loop = loader_of(reader, plan, num_workers=2).steps(0)
    next(loop)
    assert multiprocessing.active_children()
    loop.close()
    _no_workers()


def _no_workers() -> None:
    deadline = time.monotonic() + 600
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.test_loader import Manifest, Plan, ShardReader, loader_of, one

os.setsid()
reader = ShardReader(Manifest.load(Path(sys.argv[1]), "toy"))
loop = loader_of(reader, Plan({"detection": one(18, 4)}, 0), num_workers=2).steps(0)
next(loop)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_workers(reader: ShardReader) -> None:
    (process,) = start_ranks(["-c", _KILLED, str(reader.manifest.root)], world=1)
    codes, printed = finish([process])
    assert codes == [-signal.SIGKILL], printed
    deadline = time.monotonic() + 600
    while left := [p.pid for p in psutil.process_iter() if _session(p.pid) == process.pid]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(("ranks", "batch_size", "step"), [(1, 4, 1), (3, 2, 1), (2, 5, 3)])
def test_evaluation_shows_each_image_once(
    reader: ShardReader, ranks: int, batch_size: int, step: int
) -> None:
    places, options = np.arange(18)[1::step], {"num_workers": int(ranks == 2)}
    per_rank = [
        list(evaluation_batches(reader, EVALUATE, batch_size, r, ranks, places, **options))
        for r in range(ranks)
    ]
    assert len({len(batches) for batches in per_rank}) == 1, "ranks stay in step"
    seen = [
        index for batches in per_rank for batch in batches for index in batch.indices[batch.real].tolist()
    ]
    assert sorted(seen) == places.tolist()
    assert all(batch.sizes.max() <= 49 and (batch.random_keys == 0).all() for batch in per_rank[0])


def test_a_picture_has_the_size_of_the_index(reader: ShardReader, monkeypatch: pytest.MonkeyPatch) -> None:
    index = np.array(reader.manifest.index)
    index["width"] += 1
    monkeypatch.setitem(vars(reader.manifest), "index", index)
    with pytest.raises(DamagedSample, match="pixels"):
        read_raw(reader, 0)
