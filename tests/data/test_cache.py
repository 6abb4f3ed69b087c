"""A cache that several processes share: one fetches, nobody reads half a file, the bound holds, damage heals."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from tests.shard_server import Served, serve
from visft_ds.data import cache, remote
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import CacheOptions
from visft_ds.resilience.errors import StoreFailed

SHARD = 20480  # bytes of each of the three shards

#: Reads every sample of a served split through a cache; prints a digest of the bytes.
READ_ALL = """
import hashlib, sys, time
from pathlib import Path
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import CacheOptions
url, folder, room = sys.argv[1:]
with ShardReader(Manifest.load(url, "toy", cache=CacheOptions(Path(folder), int(room)))) as reader:
    print("open", flush=True)
    digest = hashlib.sha256()
    for index in range(12):
        digest.update(b"".join(part or b"" for part in reader.read(index)))
    while int(room) >= 1 << 20 and len(list(Path(folder).glob("*/*.whole"))) < 4:
        time.sleep(0.01)
print(digest.hexdigest())
"""


@pytest.fixture
def truth(split: Manifest) -> list[tuple[bytes | None, bytes | None]]:
    with ShardReader(split) as reader:
        return [reader.read(index) for index in range(12)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 10.0)


@pytest.fixture
def served(split: Manifest) -> Iterator[Served]:
    assert isinstance(split.root, Path)
    with serve(split.root) as server:
        yield server


def _reader(served: Served, folder: Path, room: int = 1 << 20) -> ShardReader:
    return ShardReader(Manifest.load(served.url, "toy", cache=CacheOptions(folder, room)))


def test_copies_begin_when_the_first_hint_is_read(served: Served, tmp_path: Path) -> None:
    """A first batch must not share the line with whole shards."""
    with _reader(served, tmp_path) as reader:
        reader.prefetch([0, 1, 5])
        reader.read(0)
        reader.read(1)
        time.sleep(0.1)
        assert len(list(tmp_path.glob("*/*.whole"))) == 1, "the index"
        assert "copies" not in {thread.name for thread in threading.enumerate()}
        reader.read(5)
        deadline = time.monotonic() + 600
        while len(list(tmp_path.glob("*/*.whole"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def _copies(folder: Path) -> dict[str, int]:
    """Name and size of everything that counts towards the bound."""
    found = {}
    for path in (folder / "visft-cache-2").glob("*.*"):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:  # removed while we looked
            continue
    return found


def _wait_for_copies(folder: Path, number: int) -> None:
    deadline = time.monotonic() + 600
    while sum(name.endswith(".whole") for name in _copies(folder)) < number:
        assert time.monotonic() < deadline, _copies(folder)
        time.sleep(0.01)


def _whole(served: Served) -> list[str]:
    """Names of the shards that were fetched whole, in order."""
    return [name for name, offset, size in served.gets() if (offset, size) == (0, SHARD)]


def _process(served: Served, folder: Path, room: int = 1 << 20) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ_ALL, served.url, str(folder), str(room)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_fetches_a_shard(served: Served, tmp_path: Path) -> None:
    served.delay = 0.05
    processes = [_process(served, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and outputs[0] == outputs[1]
    assert sorted(_whole(served)) == [f"toy-00000{number}.tar" for number in range(3)]
    assert len(served.gets(".npy")) == 1, "the index too"


def test_a_killed_process_leaves_neither_half_a_file_nor_a_lock(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path
) -> None:
    served.slow_seconds = 30.0
    served.faults.extend(["slow"] * 2)  # the first sample, and the copy of its shard
    process = _process(served, tmp_path)
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    deadline = time.monotonic() + 600
    while not any(name.endswith(".part") for name in _copies(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = _copies(tmp_path)
    assert [name for name in left if name.endswith(".part")] and not [
        name for name, size in left.items() if name.endswith(".whole") and size == SHARD
    ]
    with _reader(served, tmp_path) as reader:
        assert [reader.read(index) for index in range(12)] == truth
        _wait_for_copies(tmp_path, 4)
    assert not [name for name in _copies(tmp_path) if name.endswith(".part")]


def test_a_forked_child_does_not_keep_a_lock_of_its_parent(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path
) -> None:
    ready, go = os.pipe(), os.pipe()
    with FileLock(tmp_path / "some.lock"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there are threads
            child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    with FileLock(tmp_path / "some.lock", timeout=0):
        os.write(go[1], b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for descriptor in (*ready, *go):
        os.close(descriptor)


def test_the_bound_holds_and_readers_keep_what_they_read(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path
) -> None:
    """Four threads here and another process want three shards; there is room for two and the index."""
    room = 2 * SHARD + 2000
    largest = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            largest = max(largest, sum(_copies(tmp_path).values()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    other = _process(served, tmp_path, room)
    watcher.start()
    with _reader(served, tmp_path, room) as reader:

        def read(seed: int) -> bool:
            order = [(seed + 5 * place) % 12 for place in range(36)]
            reader.prefetch(order[:12])
            return all(reader.read(index) == truth[index] for index in order)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(4)))
        output, _ = other.communicate(timeout=600)
    done.set()
    watcher.join()
    assert other.returncode == 0 and len(output.split()) == 2
    assert SHARD // 2 < largest <= room


def test_copies_in_use_make_no_room_for_others_of_the_run(
    served: Served,
    truth: list[tuple[bytes | None, bytes | None]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = 2 * SHARD + 2000
    with _reader(served, tmp_path, room) as reader:
        reader.read(0)
        reader.read(4)
        _wait_for_copies(tmp_path, 3)
        for _ in range(3):
            assert [reader.read(index) for index in range(12)] == truth
            time.sleep(0.05)
    assert sorted(_whole(served)) == ["toy-000000.tar", "toy-000001.tar"]
    assert [record.getMessage()[:40] for record in caplog.records] == ["cache full of what this run reads: the r"]
    # a later run gives up what was not used for longest
    monkeypatch.setattr(cache.time, "time", lambda clock=time.time: clock() + 1)
    os.utime(next(path for path in tmp_path.glob("*/*.whole") if path.name.startswith(_sha(reader, 1))), (9, 9))
    with _reader(served, tmp_path, room) as reader:
        assert [reader.read(index) for index in range(8, 12)] == truth[8:]
        deadline = time.monotonic() + 600
        while not any(name.startswith(_sha(reader, 2)) and name.endswith("whole") for name in _copies(tmp_path)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert {name[:64] for name in _copies(tmp_path)} >= {_sha(reader, 0), _sha(reader, 2)}


def _sha(reader: ShardReader, number: int) -> str:
    return reader.manifest.shards[number].sha256


def test_a_damaged_copy_is_fetched_again(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path
) -> None:
    with _reader(served, tmp_path) as reader:
        for index in range(12):
            reader.read(index)
        _wait_for_copies(tmp_path, 4)
    for path in tmp_path.glob("*/*.whole"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
        path.write_bytes(data)
    served.requests.clear()
    with _reader(served, tmp_path) as reader:
        assert [reader.read(index) for index in range(12)] == truth
        _wait_for_copies(tmp_path, 4)
        again = len(served.gets())
        assert sorted(_whole(served)) == [shard.name for shard in reader.manifest.shards]
        assert len(served.gets(".npy")) == 1
        assert [reader.read(index) for index in range(12)] == truth and len(served.gets()) == again


def test_a_copy_of_the_wrong_length_is_none(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path
) -> None:
    with _reader(served, tmp_path) as reader:
        reader.read(0)
        _wait_for_copies(tmp_path, 2)
        for path in tmp_path.glob("*/*.whole"):
            if path.stat().st_size == SHARD:
                os.truncate(path, 100)
        assert reader.read(0) == truth[0]


def test_a_shard_that_is_damaged_at_its_source_is_not_kept(
    split: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = Path(shutil.copytree(split.root, tmp_path / "copy"))
    data = bytearray((root / "toy-000001.tar").read_bytes())
    data[int(split.index["image_offset"][5]) + 9] ^= 1
    (root / "toy-000001.tar").write_bytes(data)
    with serve(root) as served:
        with _reader(served, tmp_path / "cache") as reader:
            reader.prefetch(range(12))
            for _ in range(2):
                with pytest.raises(ValueError, match="is damaged"):
                    reader.read(5)
            assert all(reader.read(index)[0] is not None for index in range(12) if index != 5)
            _wait_for_copies(tmp_path / "cache", 3)
            deadline = time.monotonic() + 600
            while not caplog.records:
                assert time.monotonic() < deadline
                time.sleep(0.01)
    assert len(_copies(tmp_path / "cache")) == 3, "the index and the good shards"
    assert f"{served.url}/toy-000001.tar has 20480 bytes with sha256" in caplog.records[0].getMessage()
    assert len(caplog.records) == 1 and _whole(served).count("toy-000001.tar") == 2
    with serve(root, ranges=False) as served, _reader(served, tmp_path / "other") as reader:
        with pytest.raises(ValueError, match=rf"{served.url}/toy-000001.tar has 20480 bytes with sha256 .* not"):
            reader.read(5)


def test_a_cache_smaller_than_a_shard_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"toy-000000.tar has 20480 bytes, a cache of 20000 bytes cannot hold it"):
        _reader(served, tmp_path, 20_000)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, served: Served) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot use .*file as a cache folder"):
        _reader(served, tmp_path / "file")


def test_a_disk_that_refuses_says_which_cache_it_is(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with _reader(served, tmp_path) as reader:
        monkeypatch.setattr(cache, "file_digest", full)
        reader.prefetch([0])
        with pytest.raises(StoreFailed, match=rf"cannot write to the cache in {tmp_path}.*No space left.*free some"):  # noqa: PT012
            for _ in range(1000):
                time.sleep(0.01)
                reader.read(0)


def test_other_files_in_the_folder_are_left_alone(served: Served, tmp_path: Path) -> None:
    notes = tmp_path / "visft-cache-2/notes.txt"
    notes.parent.mkdir()
    notes.write_text("x" * 50_000)
    with _reader(served, tmp_path, 2 * SHARD + 2000) as reader:
        reader.read(0)
        _wait_for_copies(tmp_path, 2)
    assert notes.exists()
