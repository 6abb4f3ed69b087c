"""A cache that several processes share: one fetches, nobody reads half a file, the bound holds, damage heals."""

from __future__ import annotations

import fcntl
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
from coco_tree import make_split
from shard_server import Served, serve

from visft_ds.data import remote, remote_store
from visft_ds.data.cache import DiskCache
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import CacheMode, CacheOptions, Expected

SHARD = 20480  # bytes of each of the three shards

#: Reads every sample of a served split through a cache; prints a digest of the bytes.
READ_ALL = """
import hashlib, sys
from pathlib import Path
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import CacheOptions
url, folder, mode, room = sys.argv[1:]
with ShardReader(Manifest.load(url, "toy", cache=CacheOptions(Path(folder), int(room), mode))) as reader:
    print("open", flush=True)
    digest = hashlib.sha256()
    for index in range(12):
        digest.update(b"".join(part or b"" for part in reader.read(index)))
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    manifest = make_split(tmp_path_factory.mktemp("split"))
    assert [shard.bytes for shard in manifest.shards] == [SHARD] * 3
    return manifest


@pytest.fixture
def truth(local: Manifest) -> list[tuple[bytes | None, bytes | None]]:
    with ShardReader(local) as reader:
        return [reader.read(index) for index in range(12)]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "TIMEOUT", 10.0)


@pytest.fixture
def served(local: Manifest) -> Iterator[Served]:
    assert isinstance(local.root, Path)
    with serve(local.root) as server:
        yield server


def _reader(served: Served, folder: Path, mode: CacheMode, room: int = 1 << 20) -> ShardReader:
    return ShardReader(Manifest.load(served.url, "toy", cache=CacheOptions(folder, room, mode)))


def _copies(folder: Path) -> dict[str, int]:
    """Name and size of everything that counts towards the bound."""
    found = {}
    for path in (folder / "visft-cache-1").rglob("*"):
        if path.suffix in (".whole", ".part") or "-" in path.name:
            try:
                found[path.name] = path.stat().st_size
            except FileNotFoundError:  # removed while we looked
                continue
    return found


def _process(served: Served, folder: Path, mode: CacheMode, room: int = 1 << 20) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ_ALL, served.url, str(folder), mode, str(room)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_of_several_processes_one_fetches_a_shard(served: Served, tmp_path: Path) -> None:
    served.delay = 0.05
    processes = [_process(served, tmp_path, "shards") for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and outputs[0] == outputs[1]
    assert sorted(name for name, _, _ in served.gets()) == [f"toy-00000{number}.tar" for number in range(3)]
    assert len(served.gets(".npy")) == 1, "the index too"


def test_a_killed_process_leaves_neither_half_a_file_nor_a_lock(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path
) -> None:
    served.slow_seconds = 30.0
    served.faults.append("slow")
    process = _process(served, tmp_path, "shards")
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
    with _reader(served, tmp_path, "shards") as reader:
        assert [reader.read(index) for index in range(12)] == truth
    assert not [name for name in _copies(tmp_path) if name.endswith(".part")]


def test_a_forked_child_does_not_keep_a_lock_of_its_parent(tmp_path: Path) -> None:
    cache = DiskCache(CacheOptions(tmp_path, 1000))
    ready, go = os.pipe(), os.pipe()
    with cache._lock("some.lock"):
        with cache._lock("some.lock", wait=False) as again:
            assert not again, "held, also against this very thread"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there are threads
            child = os.fork()
        if child == 0:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
    with cache._lock("some.lock", wait=False) as free:
        os.write(go[1], b"x")
        assert free, "the child lives, and closed what it inherited"
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for descriptor in (*ready, *go):
        os.close(descriptor)


@pytest.mark.parametrize("mode", ["ranges", "shards"])
def test_the_bound_holds_and_readers_keep_what_they_read(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path, mode: CacheMode
) -> None:
    """Four threads here and another process want three shards; there is room for two, or for a few samples."""
    room = 2 * SHARD + 100 if mode == "shards" else SHARD
    largest = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.is_set():
            if (tmp_path / "visft-cache-1/lock").exists():
                with open(tmp_path / "visft-cache-1/lock") as lock:  # else files come and go while they are counted
                    fcntl.flock(lock, fcntl.LOCK_EX)
                    largest = max(largest, sum(_copies(tmp_path).values()))
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    other = _process(served, tmp_path, mode, room)
    watcher.start()
    with _reader(served, tmp_path, mode, room) as reader:

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
    gets = len(served.gets())
    assert gets > (3 if mode == "shards" else 12), "something had to be fetched again"


@pytest.mark.parametrize("mode", ["ranges", "shards"])
def test_a_damaged_copy_is_fetched_again(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path, mode: CacheMode
) -> None:
    with _reader(served, tmp_path, mode) as reader:
        for index in range(12):
            reader.read(index)
    for path in (tmp_path / "visft-cache-1").rglob("*"):
        if path.suffix == ".whole" or "-" in path.name:
            data = bytearray(path.read_bytes())
            data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
            path.write_bytes(data)
    served.requests.clear()
    with _reader(served, tmp_path, mode) as reader:
        assert [reader.read(index) for index in range(12)] == truth
        again = len(served.gets())
        assert again == (12 if mode == "ranges" else 3) and len(served.gets(".npy")) == 1
        assert [reader.read(index) for index in range(12)] == truth and len(served.gets()) == again


@pytest.mark.parametrize("mode", ["ranges", "shards"])
def test_a_copy_of_the_wrong_length_is_none(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path, mode: CacheMode
) -> None:
    with _reader(served, tmp_path, mode) as reader:
        reader.read(0)
        for path in (tmp_path / "visft-cache-1").rglob("*"):
            if "-" in path.name or (path.suffix == ".whole" and path.stat().st_size == SHARD):
                os.truncate(path, 100)
        assert reader.read(0) == truth[0]


def test_a_shard_that_is_damaged_at_its_source_is_an_error(local: Manifest, tmp_path: Path) -> None:
    root = Path(shutil.copytree(local.root, tmp_path / "copy"))
    data = bytearray((root / "toy-000001.tar").read_bytes())
    data[int(local.index["image_offset"][5]) + 9] ^= 1
    (root / "toy-000001.tar").write_bytes(data)
    with serve(root) as served:
        with _reader(served, tmp_path / "shards", "shards") as reader:
            reader.prefetch([5])
            for _ in range(2):
                with pytest.raises(
                    ValueError, match=rf"{served.url}/toy-000001.tar has 20480 bytes with sha256 .* not"
                ):
                    reader.read(5)
            assert reader.read(0)[0] is not None
        assert len(_copies(tmp_path / "shards")) == 2, "the index and the good shard"
        with _reader(served, tmp_path / "ranges", "ranges") as reader:
            with pytest.raises(ValueError, match="is damaged"):
                reader.read(5)
            assert reader.read(4)[0] is not None


@pytest.mark.parametrize("mode", ["ranges", "shards"])
def test_a_cache_smaller_than_a_shard_is_refused(served: Served, tmp_path: Path, mode: CacheMode) -> None:
    with pytest.raises(ValueError, match=r"toy-000000.tar has 20480 bytes, a cache of 20000 bytes cannot hold it"):
        _reader(served, tmp_path, mode, 20_000)


def test_options_that_make_no_sense_are_refused(tmp_path: Path, served: Served) -> None:
    with pytest.raises(ValueError, match="give one of ranges, shards"):
        CacheOptions(tmp_path, 10, "files")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 bytes is not allowed"):
        CacheOptions(tmp_path, 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot use .*file as a cache folder"):
        _reader(served, tmp_path / "file", "ranges")


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    cache = DiskCache(CacheOptions(tmp_path, 1000))
    file = Expected(10_000, "a" * 64)
    for offset in range(0, 1000, 50):
        cache.put(file, [(offset, bytes(50))])
    assert cache.read(file, 0, 50) == bytes(50), "used again"
    cache.put(file, [(5000, bytes(50))])
    held = [offset for offset in [*range(0, 1000, 50), 5000] if cache.has_part(file, offset, 50)]
    # A tenth goes at once, so that not every new copy looks through the folder.
    assert held == [0, *range(150, 1000, 50), 5000]


def test_a_wrong_count_is_mended_when_it_matters(tmp_path: Path) -> None:
    cache = DiskCache(CacheOptions(tmp_path, 1000))
    file = Expected(10_000, "a" * 64)
    count = tmp_path / "visft-cache-1/total"
    cache.put(file, [(0, bytes(100))])
    for number, content in enumerate(("", "no number", "990"), 2):
        count.write_text(content)
        cache.put(file, [(number * 100, bytes(100))])
        assert count.read_text() == str(number * 100)
    assert all(cache.has_part(file, offset, 100) for offset in (0, 200, 300, 400)), "nothing had to go"
    (tmp_path / "visft-cache-1/notes.txt").write_text("x" * 5000)
    cache.put(file, [(600, bytes(700))])
    assert (tmp_path / "visft-cache-1/notes.txt").exists(), "other files are left alone"


def test_reading_whole_shards_ahead_stays_within_half_of_the_room(
    served: Served, truth: list[tuple[bytes | None, bytes | None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "REQUEST_BYTES", 8192)  # three pieces a shard
    with _reader(served, tmp_path, "shards", 2 * SHARD + SHARD // 2) as reader:
        reader.prefetch(range(12))
        time.sleep(0.2)
        assert [name for name, _, _ in served.gets()] == ["toy-000000.tar"] * 3
        assert [reader.read(index) for index in range(12)] == truth
