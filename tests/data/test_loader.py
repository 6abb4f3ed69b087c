"""Batches depend on the plan alone: not on ranks, micro-batches, threads, roles or where a run resumed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.coco_tree import NO_PHOTOS, PHOTOS, make_split
from tests.options import alone
from visft_ds.data import loader as loader_module
from visft_ds.data.dataset import DataSet, SamplePipeline, coco_dataset, read_raw
from visft_ds.data.loader import StepLoader, evaluation_batches
from visft_ds.data.plan import Plan, SetPlan, StepPlan, TaskPlan
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import DamagedSample, Manifest, ShardReader
from visft_ds.data.workers import _Parts, choose_workers
from visft_ds.resilience.errors import StoreFailed
from visft_ds.shards.build import Options, build
from visft_ds.tasks.transform import collate_joint

SIZES: dict[str, Any] = {"short_sides": (30, 36), "max_long": 60, "crop_short_sides": (28,), "crop_range": (20, 30)}
TRAIN = SamplePipeline(alone("detection", True, **SIZES), collate_joint)
EVALUATE = SamplePipeline(alone("detection", False, eval_short=30, eval_max_long=48), collate_joint)
#: Of the two tasks, "other" stands for any second one.
PIPELINES = {"detection": {"toy": TRAIN}, "other": {"toy": TRAIN}}


def one(samples: int, batch_size: int, ratio: float = 1) -> TaskPlan:
    return TaskPlan({"toy": SetPlan(np.arange(samples))}, batch_size, ratio)


def loader_of(reader: ShardReader, plan: Plan, pipelines: Any = PIPELINES, **options: Any) -> StepLoader:
    return StepLoader({"toy": DataSet(reader)}, plan, pipelines, **options)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShardReader]:
    with ShardReader(make_split(tmp_path_factory.mktemp("split"), 18)) as reader:
        yield reader


@pytest.fixture(scope="module")
def plan(reader: ShardReader) -> Plan:
    return Plan({"detection": one(len(reader), 4, 2), "other": one(len(reader), 8, 1)}, seed=3)


def _collect(reader: ShardReader, plan: Plan, start: int, stop: int, **options: Any) -> list[tuple[StepPlan, Batch]]:
    return [
        (step_plan, batch)
        for step_plan, batches in loader_of(reader, plan, **options).steps(start, stop)
        for batch in batches
    ]


def _by_sample(batches: list[tuple[StepPlan, Batch]]) -> dict[tuple[int, int], list[Any]]:
    """(step, index) -> everything about that sample, without what depends on its neighbours (padding)."""
    table = {}
    for step_plan, batch in batches:
        boxes = batch.targets["detection"].boxes.split(batch.targets["detection"].counts.tolist())
        for place, index in enumerate(batch.indices.tolist()):
            height, width = batch.sizes[place].tolist()
            image = batch.images[place, :, :height, :width]
            table[step_plan.step, index] = [image.tolist(), boxes[place].tolist(), batch.random_keys[place].item()]
    return table


@pytest.fixture(scope="module")
def reference(reader: ShardReader, plan: Plan) -> dict[tuple[int, int], list[Any]]:
    return _by_sample(_collect(reader, plan, 0, 6, num_workers=0))


@pytest.mark.parametrize(
    ("ranks", "accumulation", "threads", "prefetch"), [(1, 1, 1, 0), (1, 4, 3, 2), (2, 1, 2, 5), (4, 1, 0, 0)]
)
def test_any_split_gives_the_same_samples(
    reader: ShardReader,
    plan: Plan,
    reference: dict[tuple[int, int], list[Any]],
    ranks: int,
    accumulation: int,
    threads: int,
    prefetch: int,
) -> None:
    got: dict[tuple[int, int], list[Any]] = {}
    for rank in range(ranks):
        options = {"dp_rank": rank, "dp_size": ranks, "accumulation": accumulation}
        part = _collect(reader, plan, 0, 6, num_workers=threads, prefetch_steps=prefetch, **options)
        assert len(part) == 6 * accumulation
        assert [step_plan.step for step_plan, _ in part[::accumulation]] == list(range(6))
        got |= _by_sample(part)
    assert got == reference


class _Upload:
    """Stand-in of `Upload`: notes which samples are sent, and by which thread."""

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cuda"
        self.sent: list[tuple[list[int], str]] = []
        _Upload.last = self

    last: _Upload

    def __call__(self, batch: Batch) -> Batch:
        self.sent.append((batch.random_keys.tolist(), threading.current_thread().name))
        return batch


@pytest.mark.parametrize(("threads", "prefetch"), [(2, 2), (2, 0), (0, 2)])
def test_batches_for_a_gpu_are_the_same_and_are_sent_one_step_ahead(
    reader: ShardReader,
    plan: Plan,
    reference: dict[tuple[int, int], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    threads: int,
    prefetch: int,
) -> None:
    monkeypatch.setattr(loader_module, "Upload", _Upload)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    loader = loader_of(reader, plan, num_workers=threads, prefetch_steps=prefetch, device=torch.device("cuda", 0))
    got, ahead = [], bool(threads and prefetch)
    for step_plan, (batch,) in loader.steps(0, 6):
        got.append((step_plan, batch))
        wanted = len(got) + (ahead and len(got) < 6)
        deadline = time.monotonic() + 20
        while len(_Upload.last.sent) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(_Upload.last.sent) == wanted
    assert _by_sample(got) == reference and not _threads()
    assert [keys for keys, _ in _Upload.last.sent] == [batch.random_keys.tolist() for _, batch in got]
    here = threading.current_thread().name
    assert all((name != here) == (ahead and place > 0) for place, (_, name) in enumerate(_Upload.last.sent))


@pytest.mark.gpu
def test_what_a_gpu_computes_with_is_what_was_read(
    reader: ShardReader, plan: Plan, reference: dict[tuple[int, int], list[Any]]
) -> None:
    gpu, got = torch.device("cuda", 0), []
    for step_plan, (batch,) in loader_of(reader, plan, device=gpu).steps(0, 6):
        torch.cuda._sleep(10_000_000)  # the stream that computes is behind
        there = batch.to(gpu)
        assert there.images.device == gpu and there.indices.device.type == "cpu"
        got.append((step_plan, replace(batch, images=there.images.cpu(), sizes=there.sizes.cpu(), sent=None)))
    assert _by_sample(got) == reference


def test_on_a_cpu_nothing_is_sent(reader: ShardReader, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "Upload", None)
    for _, batch in _collect(reader, plan, 0, 3, device=torch.device("cpu")):
        assert batch.sent is None and batch.to(torch.device("cpu")).images is batch.images


def test_resuming_gives_the_rest(reader: ShardReader, plan: Plan, reference: dict[tuple[int, int], list[Any]]) -> None:
    rest = _by_sample(_collect(reader, plan, 4, 6))
    assert rest == {key: value for key, value in reference.items() if key[0] >= 4}


def test_roles_see_the_same_samples(reader: ShardReader, plan: Plan) -> None:
    """The first and the last stage of a pipeline read apart and must agree.

    Unequal numbers of workers are what breaks other loaders here: their order depends on them.
    """
    workers = {"both": 2, "images": 1, "labels": 3}
    roles = {
        role: _collect(reader, plan, 0, 5, role=role, num_workers=number, accumulation=2)
        for role, number in workers.items()
    }
    for (_, both), (_, images), (_, labels) in zip(*roles.values(), strict=True):
        assert torch.equal(both.images, images.images) and images.tasks == ()
        assert labels.images.shape[2:] == (0, 0)
        for name in ("boxes", "labels", "counts"):
            assert torch.equal(getattr(both.targets["detection"], name), getattr(labels.targets["detection"], name))
        for name in ("sizes", "original_sizes", "indices", "image_ids", "random_keys"):
            assert torch.equal(getattr(both, name), getattr(images, name))
            assert torch.equal(getattr(both, name), getattr(labels, name))


def test_the_same_picture_looks_different_in_another_epoch(reader: ShardReader, plan: Plan) -> None:
    seen: dict[int, set[int]] = {}
    for _, batch in _collect(reader, plan, 0, 12):
        for index, key in zip(batch.indices.tolist(), batch.random_keys.tolist(), strict=True):
            seen.setdefault(index, set()).add(key)
    assert max(map(len, seen.values())) > 1


def _damage(reader: ShardReader, folder: Path, indices: Sequence[int]) -> Manifest:
    """A copy of the split in which these samples have a byte of their picture flipped."""
    root = Path(shutil.copytree(reader.manifest.root, folder / "copy"))
    manifest = Manifest.load(root, "toy")
    for index in indices:
        row = manifest.index[index]
        path = root / manifest.shards[row["shard"]].name
        data = bytearray(path.read_bytes())
        data[row["image_offset"] + 50] ^= 255
        path.write_bytes(data)
    return manifest


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_damage_surfaces_at_its_step_and_ends_the_threads(
    reader: ShardReader, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(loader_module, "Upload", _Upload)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    hurt = int(plan.step(3).indices[1])
    good = next(step for step in range(9) if hurt in plan.step(step).indices)
    manifest = _damage(reader, tmp_path, [hurt])
    row = manifest.index[hurt]
    path = Path(manifest.root) / manifest.shards[row["shard"]].name
    with ShardReader(manifest) as damaged:
        loop = loader_of(damaged, plan, device=torch.device(device)).steps(0, 9)
        assert [next(loop)[0].step for _ in range(good)] == list(range(good)), "earlier steps are unharmed"
        with pytest.raises(ValueError, match=rf"{row['image_id']:012d} of .*{path.name}.*damaged"):
            next(loop)
    assert not _threads()


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 2)])
def test_a_damaged_sample_has_the_same_substitute_everywhere(
    reader: ShardReader, plan: Plan, tmp_path: Path, ranks: int, accumulation: int
) -> None:
    hurt = [int(plan.step(3).indices[1]), int(plan.step(5).indices[0])]
    got: dict[int, list[int]] = {}
    skipped = []
    with ShardReader(_damage(reader, tmp_path, hurt)) as damaged:
        for rank in range(ranks):
            options = {"dp_rank": rank, "dp_size": ranks, "accumulation": accumulation, "skip_damaged": 2}
            loader = loader_of(damaged, plan, **options)
            for step_plan, batches in loader.steps(0, 12):
                parts = plan.split(step_plan, rank, ranks, accumulation)
                for part, batch in zip(parts, batches, strict=True):
                    got.update(zip(part.keys.tolist(), batch.indices.tolist(), strict=True))
                    assert batch.random_keys.tolist() == part.keys.tolist(), "the numbers of the sample stay the same"
            skipped += loader.skipped
    expected = {}
    for step in range(12):
        step_plan = plan.step(step)
        for index, key in zip(step_plan.indices.tolist(), step_plan.keys.tolist(), strict=True):
            attempt, place = 0, index
            while place in hurt:
                attempt += 1
                place = plan.substitute(step_plan, key, attempt)
            expected[key] = place
    assert got == expected and {one.index for one in skipped} == set(hurt)
    assert all("damaged" in one.reason and one.instead not in hurt for one in skipped if one.step in (3, 5))


def test_skipping_has_a_budget_and_is_off_where_images_and_labels_are_read_apart(
    reader: ShardReader, plan: Plan, tmp_path: Path
) -> None:
    hurt = sorted({int(plan.step(step).indices[0]) for step in range(4)})[:3]
    with ShardReader(_damage(reader, tmp_path, hurt)) as damaged:
        loop = loader_of(damaged, plan, skip_damaged=2).steps(0)
        with pytest.raises(
            ValueError, match=r"3 damaged samples are more than the 2 that may be skipped(.|\n)*key"
        ) as e:
            list(zip(loop, range(40), strict=False))
        assert str(e.value).count("damaged (") == 3, "every one is named"
        for role, raises in (("images", True), ("labels", False)):  # a picture's damage does not hurt its labels
            loop = loader_of(damaged, plan, role=role).steps(0, 4)
            if raises:
                with pytest.raises(DamagedSample):
                    list(loop)
            else:
                assert len(list(loop)) == 4


def test_worker_processes_make_the_same_batches_and_the_same_errors(
    reader: ShardReader, plan: Plan, reference: dict[tuple[int, int], list[Any]], tmp_path: Path
) -> None:
    hurt = int(plan.step(5).indices[0])
    first = next(step for step in range(9) if hurt in plan.step(step).indices)
    got = []
    with ShardReader(_damage(reader, tmp_path, [hurt])) as damaged:
        loader = loader_of(damaged, plan, workers="processes", num_workers=2, accumulation=2, prefetch_steps=1)
        torch.manual_seed(0)
        untouched = torch.get_rng_state()
        loop = loader.steps(0, 6)
        for _ in range(first):
            step_plan, batches = next(loop)
            got += [(step_plan, batch) for batch in batches]
        with pytest.raises(DamagedSample, match=r"key \d{12}\): the image at offset") as caught:
            next(loop)
    assert torch.equal(torch.get_rng_state(), untouched), "dropout would differ from a run with threads"
    assert "Traceback" not in str(caught.value), "the message is the one a user would see without processes"
    assert _by_sample(got) == {key: value for key, value in reference.items() if key[0] < first}
    spent = loader.spent()["decode"]
    assert spent.count >= sum(len(batch.indices) for _, batch in got) and spent.wall > 0
    deadline = time.monotonic() + 600
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not multiprocessing.active_children()


def test_a_worker_process_hands_over_what_reading_ahead_raises(plan: Plan) -> None:
    def full(indices: Sequence[int], role: str) -> None:
        raise StoreFailed("the disk of the cache is full")

    maker: Any = SimpleNamespace(
        sets={"toy": SimpleNamespace(reader=SimpleNamespace(prefetch=full))}, features=None, role="both"
    )
    assert isinstance(_Parts(maker, with_cpu=False)[plan.step(0)], StoreFailed)


_KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.test_loader import DataSet, Manifest, Plan, ShardReader, loader_of, one

if __name__ == "__main__":
    reader = ShardReader(Manifest.load(Path(sys.argv[1]), "toy"))
    loader = loader_of(reader, Plan({"detection": one(18, 4)}, 0), workers="processes", num_workers=2)
    loop = loader.steps(0)
    next(loop)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_workers(reader: ShardReader, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(_KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [Path(__file__).parents[2], *sys.path]))}
    command = [sys.executable, str(script), str(reader.manifest.root)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        assert process.wait(timeout=600) == -signal.SIGKILL
        deadline = time.monotonic() + 600
        while left := [p.pid for p in psutil.process_iter() if _session(p.pid) == process.pid]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(
    ("kind", "number", "cores", "processes", "expected"),
    [
        ("auto", None, 2, 1, ("threads", 2)),
        ("auto", None, 2, 8, ("threads", 2)),
        ("auto", None, 4, 1, ("threads", 3)),
        ("auto", None, 16, 1, ("processes", 8)),
        ("auto", None, 96, 8, ("processes", 8)),
        ("auto", 2, 96, 8, ("threads", 2)),
        ("auto", 12, 96, 8, ("processes", 12)),
        ("threads", None, 96, 8, ("threads", 3)),
        ("processes", None, 2, 1, ("processes", 2)),
    ],
)
def test_workers_suit_the_host(
    kind: str, number: int | None, cores: int, processes: int, expected: tuple[str, int]
) -> None:
    found = choose_workers(kind, number, cores=cores, processes=processes)
    assert found[:2] == expected
    assert f"{cores} cores for {processes} process" in found[2] and ("auto" in found[2]) == (kind == "auto")


def test_leaving_the_loop_ends_the_threads(reader: ShardReader, plan: Plan) -> None:
    loop = loader_of(reader, plan, num_workers=3).steps(0)
    next(loop)
    assert _threads()
    loop.close()
    assert not _threads()


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data")]


def test_read_ahead_hides_the_work_and_is_bounded(reader: ShardReader) -> None:
    made = []

    def slow(raw: RawSample, rng: np.random.Generator) -> Sample:
        time.sleep(0.02)
        made.append(raw.index)
        return TRAIN.transform(raw, rng)

    plan = Plan({"detection": one(len(reader), 2)}, seed=0)
    pipelines = {"detection": {"toy": SamplePipeline(slow, collate_joint)}}
    loader = loader_of(reader, plan, pipelines, num_workers=2, prefetch_steps=2)
    loop = loader.steps(0)
    next(loop)
    assert loader.wait_seconds > 0.015, "nothing was ready for the first step"
    time.sleep(0.3)
    assert len(made) == 3 * 2, "one step in use, two ready"
    next(loop)
    assert loader.wait_seconds < 0.015, "this one was ready"
    loop.close()


def test_an_uneven_split_is_refused(reader: ShardReader, plan: Plan) -> None:
    with pytest.raises(ValueError, match="cannot be split over 3"):
        loader_of(reader, plan, dp_size=3)


@pytest.mark.parametrize(
    ("ranks", "batch_size", "limit"), [(1, 4, None), (2, 4, None), (4, 2, 10), (4, 3, 3), (5, 7, None)]
)
def test_evaluation_shows_each_image_once(reader: ShardReader, ranks: int, batch_size: int, limit: int | None) -> None:
    """Repeating images to fill up ranks and counting them twice is a well-known way to a wrong AP."""
    per_rank = [list(evaluation_batches(reader, EVALUATE, batch_size, rank, ranks, limit)) for rank in range(ranks)]
    assert len({tuple(len(batch.real) for batch in batches) for batches in per_rank}) == 1
    real = [index for batches in per_rank for b in batches for index in b.indices[b.real].tolist()]
    assert sorted(real) == list(range(min(18, limit or 18)))
    assert all(batch.sizes.max() <= 49 and (batch.random_keys == 0).all() for batch in per_rank[0])
    assert not _threads()


def test_the_size_in_the_index_must_be_that_of_the_picture(reader: ShardReader, tmp_path: Path) -> None:
    index = np.array(reader.manifest.index)
    index["width"] += 1
    manifest = Manifest(**{**vars(reader.manifest), "index": index})
    with ShardReader(manifest) as wrong:
        with pytest.raises(ValueError, match=r"the image at offset \d+ has \d+ x \d+ pixels, not"):
            read_raw(wrong, 0)


def test_the_stored_annotations_are_a_coco_data_set(reader: ShardReader) -> None:
    content = coco_dataset(reader)
    assert len(content["images"]) == 18 and sum(a["iscrowd"] for a in content["annotations"]) == 1
    assert {a["image_id"] for a in content["annotations"]} <= {image["id"] for image in content["images"]}
    assert [category["id"] for category in content["categories"]] == [3, 8, 13]
    assert [image["id"] for image in coco_dataset(reader, [4])["images"]] == [int(reader.row(4)["image_id"])]


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
def test_real_photographs_at_full_size(tmp_path: Path) -> None:
    labels = PHOTOS / "annotations"
    build(Options(PHOTOS / "val2017", labels / "instances_val2017.json", None, tmp_path, "val"))
    pipelines = {"detection": {"toy": SamplePipeline(alone("detection", True), collate_joint)}}
    with ShardReader(Manifest.load(tmp_path, "val")) as photos:
        plan = Plan({"detection": one(len(photos), 8)}, seed=0)
        for _, (batch,) in loader_of(photos, plan, pipelines).steps(0, 3):
            assert max(batch.images.shape[2:]) <= 672 and batch.sizes.min() >= 100
            boxes = batch.targets["detection"].boxes
            corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)
            # Boxes are cut at the border; float32 rounds the sum of centre and half extent.
            assert corners.min() > -1e-6 and corners.max() < 1 + 1e-6
            assert batch.targets["detection"].labels.max() <= 90
