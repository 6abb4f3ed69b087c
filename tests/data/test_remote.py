"""Shards behind a real web server: the bytes of the local files, few requests, and every failure heals or says so."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec.config
import numpy as np
import pytest

from tests.options import alone
from tests.shard_server import Served, serve
from visft_ds.data import remote, store
from visft_ds.data.dataset import DataSet, SamplePipeline
from visft_ds.data.loader import StepLoader
from visft_ds.data.manifest import Manifest
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.shards import ROLES, Role, ShardReader
from visft_ds.data.store import CacheOptions, open_store
from visft_ds.tasks.transform import collate_joint

Sample = tuple[bytes | None, bytes | None]


@pytest.fixture(scope="module")
def truth(split: Manifest) -> dict[Role, list[Sample]]:
    with ShardReader(split) as reader:
        return {role: [reader.read(index, role) for index in range(12)] for role in ROLES}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 10.0)


@pytest.fixture
def served(split: Manifest) -> Iterator[Served]:
    assert isinstance(split.root, Path)
    with serve(split.root) as server:
        yield server


def _open(served: Served, folder: Path | None = None) -> ShardReader:
    cache = None if folder is None else CacheOptions(folder, 1 << 20)
    reader = ShardReader(Manifest.load(served.url, "toy", cache=cache))
    served.requests.clear()
    return reader


@pytest.mark.parametrize("hint", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_bytes_are_those_of_the_local_files(
    served: Served, truth: dict[Role, list[Sample]], tmp_path: Path, cache: bool, hint: bool
) -> None:
    order = [7, 0, 11, 3, 3, 5, 1, 2, 10, 4, 9, 8, 6]
    for role in ROLES:
        with _open(served, tmp_path / role if cache else None) as reader:
            if hint:
                reader.prefetch(order, role)
            assert [reader.read(index, role) for index in order] == [truth[role][index] for index in order]


def test_a_sample_is_one_request_and_hinted_neighbours_share_one(served: Served, split: Manifest) -> None:
    with _open(served) as reader:
        reader.read(0)
        row = reader.row(0)
        end = row["label_offset"] + row["label_size"]
        assert served.gets() == [("toy-000000.tar", row["image_offset"], end - row["image_offset"])]
        served.requests.clear()
        reader.prefetch(range(12))
        for index in range(12):
            reader.read(index)
        assert sorted(name for name, _, _ in served.gets()) == [shard.name for shard in split.shards]


def test_labels_alone_do_not_pay_for_pixels(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_GAP", 600)  # the toy pictures are smaller than the gap that is bridged
    with _open(served) as reader:
        reader.prefetch(range(12), "labels")
        labels = [reader.read(index, "labels")[1] or b"" for index in range(12)]
    assert sum(size for _, _, size in served.gets()) == sum(map(len, labels))


def test_a_cache_on_disk_copies_each_shard_once(served: Served, split: Manifest, tmp_path: Path) -> None:
    whole = [(shard.name, 0, shard.bytes) for shard in split.shards]
    with _open(served, tmp_path) as reader:
        for index in range(12):
            reader.read(index)
        _wait_until(lambda: len(list(tmp_path.glob("*/*.whole"))) == 4)
        for index in range(12):
            reader.read(index)
    assert sorted(request for request in served.gets() if request in whole) == whole
    assert len(served.gets()) <= len(whole) + 12, "by sample until the copy is there, at most once"
    with _open(served, tmp_path) as reader:
        assert isinstance(reader.manifest.index, np.memmap), "the index is in the cache too"
        reader.prefetch(range(12))
        for index in range(12):
            reader.read(index)
    assert served.gets() == [] and served.gets(".npy") == []


def test_the_first_sample_does_not_wait_for_its_shard(
    served: Served, truth: dict[Role, list[Sample]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun = threading.Event()
    copy = remote.Requests.copy

    def slow(requests: remote.Requests, name: str, path: str) -> None:
        assert not name.endswith(".tar") or begun.wait(600)
        copy(requests, name, path)

    monkeypatch.setattr(remote.Requests, "copy", slow)
    with _open(served, tmp_path) as reader:
        assert reader.read(0) == truth["both"][0]
        begun.set()


@pytest.mark.parametrize("fault", ["500", "503", "429", "reset", "cut", "short", "shifted", "slow"])
@pytest.mark.parametrize("hint", [False, True])
def test_a_failure_that_passes_is_tried_again_and_logged(
    served: Served,
    truth: dict[Role, list[Sample]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: str,
    hint: bool,
) -> None:
    with _open(served) as reader:
        if fault == "slow":
            monkeypatch.setattr(remote, "TIMEOUT", 0.1)
            served.slow_seconds = 0.3
        served.faults.extend([fault, fault])
        with caplog.at_level(logging.WARNING, "visft_ds"):
            if hint:
                reader.prefetch([0])
            assert reader.read(0) == truth["both"][0]
    told = [record.getMessage().split("; ")[-1][:14] for record in caplog.records]
    # Newer versions of aiohttp repeat a request once if a connection that was kept open turns out to be gone.
    few = 1 if fault == "reset" and len(told) == 1 else 2
    assert told == ["attempt 2 of 5", "attempt 3 of 5"][:few]
    assert all(f"{served.url}/toy-000000.tar [512:" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("hint", [False, True])
def test_a_failure_that_stays_ends_with_the_url_and_the_attempts(served: Served, hint: bool) -> None:
    with _open(served) as reader:
        served.faults.extend(["500"] * remote.ATTEMPTS)
        if hint:
            reader.prefetch([0])
        with pytest.raises(RuntimeError, match=rf"{served.url}/toy-000000.tar .*: attempt 5 of 5 failed too; .*500"):
            reader.read(0)
        assert len(served.gets()) == remote.ATTEMPTS


@pytest.mark.parametrize(("fault", "message"), [("404", "no such file"), ("403", "access was denied"), ("400", "400")])
def test_what_cannot_pass_is_not_tried_again(served: Served, fault: str, message: str) -> None:
    with _open(served) as reader:
        served.faults.append(fault)
        with pytest.raises(ValueError, match=rf"{served.url}/toy-000000.tar .*{message}"):
            reader.read(0)
        assert len(served.gets()) == 1


def test_a_byte_that_is_damaged_on_its_way_is_read_again_once(served: Served, truth: dict[Role, list[Sample]]) -> None:
    with _open(served) as reader:
        served.faults.append("flipped")
        assert reader.read(0) == truth["both"][0]
        served.faults.extend(["flipped", "flipped"])
        with pytest.raises(ValueError, match=r"toy-000000.tar, key \d+\): the image at offset 512 is damaged"):
            reader.read(0)


def test_a_server_without_ranges_gives_whole_shards_or_an_error(
    split: Manifest, truth: dict[Role, list[Sample]], tmp_path: Path
) -> None:
    assert isinstance(split.root, Path)
    with serve(split.root, ranges=False) as served:
        with _open(served) as reader:
            with pytest.raises(ValueError, match=r"does not answer range requests.*copy the shards into a folder"):
                reader.read(1)
        with _open(served, tmp_path) as reader:
            reader.prefetch(range(4))
            assert [reader.read(index) for index in range(12)] == truth["both"]


@pytest.mark.parametrize("url", ["pipe:cat x", "ftp://a/b", "simplecache::http://a/b", "github://a:b@/c", "file:///a"])
def test_other_protocols_are_refused(url: str) -> None:
    allowed = "is not allowed; give the plain path of a folder, or a URL that begins with http://, https://"
    with pytest.raises(ValueError, match=allowed):
        open_store(url)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(store.REMOTE_PROTOCOLS, "gs", "no_such_package")
    with pytest.raises(ValueError, match=r"gs:// needs the package no_such_package: pip install 'visft_ds\[remote\]'"):
        open_store("gs://bucket/folder")


def test_urls_that_would_spread_a_password_or_are_no_folder_are_refused() -> None:
    with pytest.raises(ValueError, match="FSSPEC_HTTP"):
        open_store("https://me:secret@host/shards")
    with pytest.raises(ValueError, match="URL of a folder"):
        open_store("https://host/shards?token=1")


def test_headers_come_from_the_configuration_of_fsspec(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.authorization = "Bearer abc"
    with pytest.raises(ValueError, match=r"toy.manifest.json: access was denied \(ClientResponseError: 401"):
        Manifest.load(served.url, "toy")
    variables = {"FSSPEC_HTTP": '{"headers": {"Authorization": "Bearer abc"}}'}
    configured: dict[str, dict[str, object]] = {}
    fsspec.config.set_conf_env(configured, variables)  # as fsspec does when it is imported
    monkeypatch.setitem(fsspec.config.conf, "http", configured["http"])
    with ShardReader(Manifest.load(served.url, "toy")) as reader:
        assert reader.read(0)[0] is not None


def test_a_missing_split_behind_a_server(served: Served) -> None:
    with pytest.raises(
        ValueError, match=rf"{served.url}/train.manifest.json does not exist; .*does not list its files"
    ):
        Manifest.load(served.url, "train")


def test_a_changed_shard_behind_a_server_is_found_at_opening(served: Served, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(served.folder, tmp_path / "copy"))
    with serve(folder) as copy:
        os.truncate(folder / "toy-000001.tar", 10240)
        with pytest.raises(ValueError, match=rf"shard {copy.url}/toy-000001.tar has 10240 bytes, not 20480"):
            Manifest.load(copy.url, "toy")
        (folder / "toy-000001.tar").unlink()
        with pytest.raises(ValueError, match=rf"shard {copy.url}/toy-000001.tar is missing"):
            Manifest.load(copy.url, "toy")


@pytest.mark.parametrize("cache", [False, True])
def test_a_fork_reads_by_connections_of_its_own(
    served: Served, truth: dict[Role, list[Sample]], tmp_path: Path, cache: bool
) -> None:
    """The child neither waits for the parent's event loop, which has no thread there, nor closes its sockets."""
    with _open(served, tmp_path if cache else None) as reader:
        reader.prefetch(range(4))
        assert reader.read(0) == truth["both"][0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there are threads
            child = os.fork()
        if child == 0:
            good = [reader.read(index) for index in range(12)] == truth["both"]
            reader.close()
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert [reader.read(index) for index in range(12)] == truth["both"]


def test_a_pickled_reader_opens_the_split_again(
    served: Served, split: Manifest, truth: dict[Role, list[Sample]]
) -> None:
    with _open(served) as reader:
        packed = pickle.dumps(reader)
    assert len(packed) < 1000, "neither the index nor the vocabulary travels"
    with pickle.loads(packed) as again:  # noqa: S301 - our own
        assert again.read(5) == truth["both"][5]
    with ShardReader(split) as reader, pickle.loads(pickle.dumps(reader)) as again:  # noqa: S301 - our own
        assert again.read(5) == truth["both"][5] and isinstance(again.manifest.index, np.memmap)


def test_reading_ahead_stays_within_its_bound_and_survives_abandoned_hints(
    served: Served, truth: dict[Role, list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "MEMORY_BYTES", 12_000)  # about three samples
    monkeypatch.setattr(remote, "REQUEST_BYTES", 1)  # every sample by itself
    with _open(served) as reader:
        reader.prefetch(range(6))
        _wait_until(lambda: len(served.gets()) >= 3)
        time.sleep(0.1)
        assert sum(size for _, _, size in served.gets()) <= 12_000
        # These are never asked for, which must not keep later hints out for ever.
        for turn in range(20):
            reader.prefetch([6 + turn % 6])
            assert reader.read(6 + turn % 6) == truth["both"][6 + turn % 6]
        before = len(served.gets())
        reader.prefetch([1, 3, 5])
        _wait_until(lambda: len(served.gets()) == before + 3)
        assert [reader.read(index) for index in (1, 3, 5)] == [truth["both"][index] for index in (1, 3, 5)]
        assert len(served.gets()) == before + 3, "all of them had been read ahead at once"


@pytest.mark.parametrize(("ranks", "requests"), [(1, 5), (2, 8)])
def test_the_loader_fetches_neighbours_of_many_steps_together(served: Served, ranks: int, requests: int) -> None:
    """A hint of one small batch after another would ask for nearly every sample by itself."""
    with _open(served) as reader:
        for rank in range(ranks):
            assert len(list(_loader(reader, dp_rank=rank, dp_size=ranks, prefetch_steps=0).steps(0, 6))) == 6
    # 12 samples in 3 shards, those of the first step by themselves; two ranks share every batch, so that neighbours may
    # belong to the other one
    assert len(served.gets()) <= requests


def test_the_first_steps_are_hinted_before_their_window(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[int] = []
    monkeypatch.setattr(ShardReader, "prefetch", lambda self, indices, role="both": hints.append(len(indices)))
    with _open(served) as reader:
        first = _loader(reader, num_workers=0).steps(0, 6)
        next(first)
        assert hints == [2], "the rest is hinted when the second step is asked for"
        next(first)
        assert hints == [2, 10]
        hints.clear()
        assert len(list(_loader(reader, num_workers=2, prefetch_steps=2).steps(0, 6))) == 6
        assert hints == [6, 6], "three steps are made before the first is used"


def _loader(reader: ShardReader, **options: Any) -> StepLoader:
    pipeline = SamplePipeline(alone("detection", True, fixed_size=32), collate_joint)
    plan = Plan({"detection": TaskPlan({"toy": SetPlan(reader.manifest.selection())}, 2)}, 0, "windowed")
    return StepLoader({"toy": DataSet(reader)}, plan, {"detection": {"toy": pipeline}}, **options)


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_at_the_same_time_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_REQUESTS", 3)
    monkeypatch.setattr(remote, "REQUEST_BYTES", 1)  # every sample by itself
    served.delay = 0.02
    with _open(served) as reader:
        reader.prefetch(range(12))
        for index in range(12):
            reader.read(index)
    assert len(served.gets()) == 12 and 2 <= served.most_at_once <= 3


@pytest.mark.parametrize("cache", [False, True])
def test_closing_ends_what_is_under_way(served: Served, tmp_path: Path, cache: bool) -> None:
    reader = _open(served, tmp_path if cache else None)
    served.slow_seconds = 900.0
    served.faults.extend(["slow"] * 12)
    reader.prefetch(range(12))
    time.sleep(0.1)
    began = time.monotonic()
    reader.close()
    assert time.monotonic() - began < 600, "one request would take 900 s"
    assert "copies" not in {thread.name for thread in threading.enumerate()}
    served.faults.clear()
    assert reader.read(0)[0] is not None, "a later read opens it again"
    reader.close()


def test_closing_keeps_the_connections_of_another_store() -> None:
    first, second = (remote.Requests("http://host/shards", "http") for _ in range(2))
    kept = first._open()
    assert second._open() == kept, "fsspec takes them for equal"
    second.close()
    assert any(one is kept for one in remote._in_use.values())
    first.close()


@pytest.mark.parametrize(
    ("code", "status", "heals"), [("SlowDown", 503, True), ("InternalError", 500, True), ("NoSuchKey", 404, False)]
)
def test_failures_of_an_object_store_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, code: str, status: int, heals: bool
) -> None:
    errors = pytest.importorskip("s3fs.errors", reason="no s3fs: pip install 'visft_ds[remote]'")
    exceptions = pytest.importorskip("botocore.exceptions")
    requests = remote.Requests("s3://bucket/folder", "s3")
    response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    answers = [errors.translate_boto_error(exceptions.ClientError(response, "GetObject")), b"bytes"]

    async def answer(*_: object, **__: object) -> bytes:
        found = answers.pop(0)
        if isinstance(found, bytes):
            return found
        raise found

    monkeypatch.setattr("s3fs.S3FileSystem._cat_file", answer)
    if heals:
        assert requests.fetch("a.tar", 0, 5) == b"bytes"
    else:
        with pytest.raises(ValueError, match=r"s3://bucket/folder/a.tar \[0:5\]: there is no such file"):
            requests.fetch("a.tar", 0, 5)
    answers[:] = [exceptions.NoCredentialsError(), b"bytes"]
    with pytest.raises(ValueError, match="NoCredentialsError: Unable to locate credentials"):
        requests.fetch("a.tar", 0, 5)
    requests.close()


def test_file_systems_that_are_not_asynchronous(
    split: Manifest, truth: dict[Role, list[Sample]], tmp_path: Path
) -> None:
    fsspec = pytest.importorskip("fsspec")
    for path in Path(split.root).glob("toy*"):
        fsspec.filesystem("memory").pipe_file(f"/coco/{path.name}", path.read_bytes())
    for cache in (None, CacheOptions(tmp_path, 1 << 20)):
        manifest = Manifest.load("memory://coco", "toy", cache=cache)
        with ShardReader(manifest) as reader:
            reader.prefetch(range(6))
            assert [reader.read(index) for index in range(12)] == truth["both"]
    with pytest.raises(ValueError, match="finished splits in memory://coco: toy"):
        Manifest.load("memory://coco", "train")


def test_neighbours_are_joined_up_to_a_gap_and_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def joined(max_gap: int, max_bytes: int) -> list[tuple[str, int, int]]:
        monkeypatch.setattr(remote, "MAX_GAP", max_gap)
        monkeypatch.setattr(remote, "REQUEST_BYTES", max_bytes)
        groups = remote.grouped(parts)
        assert {part for group in groups for part in group.parts} == set(parts)
        return [(group.name, group.start, group.end) for group in groups]

    parts = [("b", 0, 10), ("a", 100, 10), ("a", 0, 10), ("a", 12, 10), ("a", 0, 10), ("a", 55, 12)]
    apart = [("b", 0, 10), ("a", 100, 110), ("a", 0, 22), ("a", 55, 67)]
    assert joined(2, 1000) == apart, "a gap as large as a part is bridged, and the order is that of first use"
    assert joined(33, 1000) == [("b", 0, 10), ("a", 0, 110)]
    assert joined(33, 70) == [("b", 0, 10), ("a", 100, 110), ("a", 0, 67)]
    assert remote.grouped([]) == []
