"""`tools/profile.py data`: fair baselines, honest sums, and wrong usage."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch

from tests.coco_tree import NO_PHOTOS, PHOTOS, make_split, write_tree
from tools.profile import main
from visft_ds.config import ResolvedConfig
from visft_ds.data.shards import ShardReader
from visft_ds.profiling import data as parts
from visft_ds.profiling import data_compare as comparison
from visft_ds.profiling.data import MeasuredSet, joint_pipeline, open_set, our_loader


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> MeasuredSet:
    """Twelve small pictures in three shards."""
    return MeasuredSet.of("toy", make_split(tmp_path_factory.mktemp("data")), 12)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with comparison.quiet():
        yield


def _ours(data: MeasuredSet) -> dict[int, Any]:
    """Batches of one sample by image id."""
    with ShardReader(data.manifest) as reader:
        loader = our_loader(data, reader, joint_pipeline(data.vocabulary), 1, num_workers=0)
        return {int(batch.image_ids): batch for _, (batch,) in loader.steps(0, len(data))}


# --------------------------------------------------------------------------------------------------- baselines


def _assert_tuned_is_ours(data: MeasuredSet, workers: int) -> None:
    ours = _ours(data)
    keys = {image: int(batch.random_keys) for image, batch in ours.items()}
    pipeline = joint_pipeline(data.vocabulary)
    seen = []
    for batch in comparison.tuned(data.urls, pipeline, 1, workers=workers, buffer=len(data), key_of=keys.__getitem__):
        expected = ours[int(batch.image_ids)]
        seen.append(int(batch.image_ids))
        for name in ("images", "sizes", "original_sizes", "image_ids", "random_keys", "real"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        assert batch.tasks == expected.tasks == ("detection", "segmentation", "captioning")
        for task in batch.tasks:
            for field in fields(batch.targets[task]):
                one, other = (getattr(b.targets[task], field.name) for b in (batch, expected))
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, (task, field.name)
    assert sorted(seen) == sorted(ours) and len(seen) == len(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_tuned_baseline_makes_the_same_samples_bit_for_bit(data: MeasuredSet, workers: int) -> None:
    """Else the comparison would measure other work."""
    _assert_tuned_is_ours(data, workers)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
def test_the_same_on_photographs() -> None:
    with open_set(PHOTOS, "train", 26) as photos:
        assert len(photos) == 26
        _assert_tuned_is_ours(photos, 0)


def test_the_naive_baseline_has_the_same_objects(data: MeasuredSet) -> None:
    """Every sample once; as many objects; masks of full size cover as much as the soft masks of the head."""
    ours = list(_ours(data).values())
    ((images, targets),) = comparison.naive(data.urls, data.vocabulary, 12, workers=0)
    assert images.shape == (12, 3, 224, 224) and images.dtype == torch.float32
    assert -3 < float(images.min()) < -1 and 1 < float(images.max()) < 3  # normalised
    sizes = sorted(len(target["labels"]) for target in targets)
    assert sizes == sorted(int(batch.targets["detection"].counts) for batch in ours) and max(sizes) == 3
    for target in targets:
        assert target["masks"].shape == (len(target["labels"]), 224, 224)
        assert set(target["masks"].unique().tolist()) <= {0, 1}
        assert target["boxes"].shape == (len(target["labels"]), 4) and len(target["tokens"]) >= 6
    full = sum(float(target["masks"].float().sum()) for target in targets) / 224**2
    soft = sum(float(batch.targets["segmentation"].masks.float().mean((1, 2)).sum()) / 255 for batch in ours)
    # Triangles with sides of 9 pixels: of their 40.5 pixels COCO's rasteriser fills 36, and 40 when drawn finer.
    assert full == pytest.approx(soft, rel=0.15)


# --------------------------------------------------------------------------------------------------- measuring


def test_cpu_time_of_workers_counts() -> None:
    def with_worker() -> int:
        loader = torch.utils.data.DataLoader(_Busy(), batch_size=None, num_workers=1)
        return sum(1 for _ in loader)

    cost = comparison.measure_pass(with_worker)
    assert cost.samples == 1 and cost.cpu >= 0.2


class _Busy(torch.utils.data.Dataset[int]):
    """One sample that takes 0.2 s of CPU."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if index:
            raise IndexError(index)
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass
        return index


def _jpeg() -> bytes:
    data: bytes = simplejpeg.encode_jpeg(np.random.default_rng(0).integers(0, 256, (1200, 1200, 3), dtype=np.uint8))
    return data


@pytest.mark.parametrize("name", [name for _, name in parts.RELEASING])
def test_the_calls_that_count_as_releasing_the_lock_do(name: str, tmp_path: Path) -> None:
    """With no forced switches, this thread gets on inside a call of another one only if that call lets go."""
    file = tmp_path / "zeros"
    with file.open("wb") as opened:
        opened.truncate(50_000_000)
        opened.flush()
    arguments: dict[str, tuple[Any, ...]] = {
        "crc32": (bytes(50_000_000),),
        "decode_jpeg": (_jpeg(),),
        "interpolate": (torch.zeros(1, 3, 1500, 1500, dtype=torch.uint8), [700, 700]),
    }
    keywords: dict[str, Any] = {"mode": "bilinear", "antialias": True} if name == "interpolate" else {}
    owner = next(owner for owner, other in parts.RELEASING if other == name)
    inside = threading.Event()
    ended: list[float] = []

    def call() -> None:
        with file.open("rb") as opened:
            given = arguments.get(name, (opened.fileno(), 50_000_000, 0))
            inside.set()
            getattr(owner, name)(*given, **keywords)
            ended.append(time.perf_counter())

    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        thread = threading.Thread(target=call)
        thread.start()
        inside.wait()
        awake = time.perf_counter()
        thread.join()
    finally:
        sys.setswitchinterval(before)
    assert ended and awake < ended[0]


# ------------------------------------------------------------------------------------------------------- tools


@pytest.fixture(scope="module")
def measured(data: MeasuredSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("record") / "data.json"
    workers = ["--threads", "0", "1", "--processes"]
    flags = ["--batch", "4", "--images", "8", "--repeats", "2", "--json", str(file)]
    assert main(["data", "--data", str(data.manifest.root), "--split", "toy", *workers, *flags]) == 0
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def test_parts_add_up(measured: dict[str, Any], data: MeasuredSet) -> None:
    numbers = measured["streams"]["joint"]
    names = ["read", "crc", "decode", "labels", "resize", "boxes", "masks", "tokens", "collate", "rest"]
    assert list(numbers["parts"]) == names and numbers["steps"] == 2 and numbers["parts_by"] == "0 threads"
    # the median of two passes is their mean, so parts add up
    whole = numbers["by_workers"]["0 threads"]["cpu_seconds_per_sample"]["median"]
    total = sum(part["cpu_seconds"]["median"] for part in numbers["parts"].values())
    assert total == pytest.approx(whole)
    assert sum(part["share"]["median"] for part in numbers["parts"].values()) == pytest.approx(1)
    # CPU clocks of a thread and of the process may differ by their resolution
    assert all(part["cpu_seconds"]["median"] > 0 for name, part in numbers["parts"].items() if name != "rest")
    assert 0.02 < numbers["released_share"]["median"] < 0.98
    sizes = (data.rows["image_size"] + data.rows["label_size"]).astype(float)
    assert sizes.min() <= numbers["by_workers"]["1 threads"]["bytes_per_sample"] <= sizes.max()


def test_the_tables_show_the_numbers(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert parts.tables(measured)[0] == "data path: joint on shards/toy"
    titles = [section.title for section in parts.tables(measured)[1]]
    head = "joint, 2 steps of 4"
    assert titles == [
        "on",
        f"{head}: where the time goes, 0 threads",
        f"{head}: workers",
        f"{head}: the interpreter lock",
    ]
    rows = {row[0]: row for row in parts.tables(measured)[1][1].rows}
    assert f"{1e6 * measured['streams']['joint']['parts']['decode']['cpu_seconds']['median']:.1f}" in rows["decode"][1]
    assert rows["whole"][3].strip() == "100.00 %"


def test_labels_alone_decode_nothing(data: MeasuredSet, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    workers = ["--threads", "0", "--processes"]
    flags = ["--images", "8", "--batch", "8", "--repeats", "1", "--role", "labels", "--step-ms", "30"]
    command = ["data", "--data", str(data.manifest.root), "--split", "toy", *workers, *flags, "--json", str(file)]
    assert main(command) == 0
    numbers = json.loads(file.read_text())["streams"]["joint"]
    assert not {"decode", "resize"} & numbers["parts"].keys()
    rates = numbers["by_workers"]["0 threads"]
    assert rates["samples_per_second"]["median"] < 8 / 0.03  # the consumer was busy
    assert rates["wait_share"]["median"] < 0.9


def test_everything_is_compared(
    data: MeasuredSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def threads(*arguments: Any, workers: str = "threads", **named: Any) -> Any:
        return our_loader(*arguments, **named)  # a server of processes takes seconds to start

    monkeypatch.setattr(comparison, "our_loader", threads)
    file = tmp_path / "compare.json"
    flags = ["--compare", "--batch", "4", "--images", "12", "--repeats", "1", "--json", str(file)]
    assert main(["data", "--data", str(data.manifest.root), "--split", "toy", *flags]) == 0
    record = json.loads(file.read_text())
    assert len(record["passes"]) == 10
    for name, numbers in record["passes"].items():
        assert numbers["samples"] == 12 and numbers["cpu_seconds_per_sample"]["median"] > 0, name
    assert len(record["ratios"]) == 6 and all(pair["ratio"]["median"] > 0 for pair in record["ratios"])
    printed = capsys.readouterr().out
    assert "== the loader against plain webdataset 1." in printed
    assert sum(" / ours" in line for line in printed.splitlines()) == 6 and "goal" not in printed


def test_a_tree_is_repeated(tmp_path: Path) -> None:
    written = write_tree(tmp_path / "written", 5)
    tree = tmp_path / "coco"
    (tree / "annotations").mkdir(parents=True)
    shutil.move(written.images, tree / "train2017")
    for kind in ("instances", "captions"):
        shutil.move(tmp_path / "written" / f"{kind}.json", tree / "annotations" / f"{kind}_train2017.json")
    with open_set(tree, "train", 11) as found:
        assert len(found) == 15 and found.facts()["samples"] == 15
        ids = found.rows["image_id"] % parts._REPETITION
        assert sorted(ids.tolist()) == sorted(3 * [1000, 1007, 1014, 1021, 1028])
        crcs = {int(i): set(found.rows["image_crc32"][ids == i].tolist()) for i in ids}
        assert all(len(values) == 1 for values in crcs.values()) and len(set.union(*crcs.values())) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": [], "annotations": []}, "has no images"),
        ([], "'images' must be a list of objects with id, file_name"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}]}, "'annotations' must be a list of objects with image_id"),
    ],
)
def test_a_tree_of_other_json_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    for folder in ("annotations", "train2017"):
        (tmp_path / folder).mkdir()
    for kind in ("instances", "captions"):
        (tmp_path / "annotations" / f"{kind}_train2017.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=said), open_set(tmp_path, "train", 2):
        pass


def test_only_the_first_shards_are_read_where_they_suffice(data: MeasuredSet) -> None:
    some = MeasuredSet.of("toy", data.manifest, 5)
    assert (some.shards, len(some), len(some.urls)) == (2, 8, 2)
    assert MeasuredSet.of("toy", data.manifest, 8).shards == 2 and MeasuredSet.of("toy", data.manifest, 999).shards == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data FOLDER or --synthetic: neither is given"),
        (["--synthetic", "--data", "x"], "both are given"),
        (["--data", "nowhere"], "--data nowhere: neither shards (train.manifest.json) nor a COCO tree"),
        (["--synthetic", "--threads", "1", "1"], "--threads 1 1: give numbers from 0 up, each once"),
        (["--synthetic", "--threads", "-1"], "--threads"),
        (["--synthetic", "--role", "all"], "--role all: give one of both, images, labels"),
        (["--synthetic", "--repeats", "0"], "--repeats 0 must be at least 1"),
        (["--synthetic", "--images", "0"], "--images 0 must be at least 1"),
        (["--synthetic", "--batch", "0"], "--batch 0 must be at least 1"),
        (["--synthetic", "--step-ms", "-1"], "--step-ms -1 must be from 0"),
        (["--synthetic", "--compare", "--batch", "9", "--images", "8"], "--batch 9 is more than the --images 8"),
        (["--comparee"], "--comparee: unknown argument; did you mean --compare?"),
        (["--synthetic", "--json", "nowhere/at/all.json"], "there is no folder"),
        (["--stage", "3", "--synthetic"], "--stage 3: must be 1"),
        (["--stage", "2", "--synthetic", "--data", "x"], "both are given"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""


def test_a_url_reaches_the_configuration_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def configured(config: ResolvedConfig, *_: Any, **__: Any) -> Any:
        raise ValueError(f"{config.visft.data.root} is far away")

    monkeypatch.setattr(parts, "configured", configured)
    assert main(["data", "--stage", "2", "--model", "debug", "--data", "s3://bucket/coco"]) == 2
    assert "s3://bucket/coco is far away" in capsys.readouterr().err


def test_worker_processes_need_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_split(tmp_path, 3)
    flags = ["--compare", "--batch", "2", "--images", "3", "--repeats", "1"]
    assert main(["data", "--data", str(manifest.root), "--split", "toy", *flags]) == 2
    assert "has 1 shard: webdataset needs one for each of 2 worker processes" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_are_measured(data: MeasuredSet, tmp_path: Path) -> None:
    """Their spans and their CPU time arrive here, though a fork server stands between."""
    file = tmp_path / "data.json"
    flags = ["--batch", "4", "--images", "8", "--repeats", "2", "--threads", "0", "--processes", "1"]
    command = ["data", "--data", str(data.manifest.root), "--split", "toy", *flags, "--json", str(file)]
    assert main(command) == 0
    rates = json.loads(file.read_text())["streams"]["joint"]["by_workers"]
    assert list(rates) == ["0 threads", "1 processes"]
    # unpickling and handing over come on top
    alone, other = (rates[name]["cpu_seconds_per_sample"]["least"] for name in rates)
    assert other > alone


@pytest.mark.slow
def test_streams_of_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    flags = ["--images", "8", "--repeats", "1", "--threads", "0", "--processes", "--json", str(file)]
    assert main(["data", "--synthetic", "--stage", "2", "--model", "debug", *flags]) == 0
    streams = json.loads(file.read_text())["streams"]
    assert list(streams) == ["detection", "segmentation", "captioning"]
    assert "masks" in streams["segmentation"]["parts"] and "tokens" in streams["captioning"]["parts"]
