"""The tables of remote shards in docs/LOG.md: requests, and CPU time of the reading process a sample.

python -m pytest -m slow -n 0 -rP tests/data/test_remote_costs.py
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.coco_tree import NO_PHOTOS, PHOTOS
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import Role, ShardReader
from visft_ds.data.store import CacheOptions
from visft_ds.shards.build import Options, build

ROUNDS = 9
#: (name, cache, hint, whether the folder of the cache is that of the line before)
CASES = (
    ("no cache, no hint", False, False, False),
    ("no cache, hint", False, True, False),
    ("cache, first epoch, hint", True, True, False),
    ("cache, later", True, False, True),
)
#: A server in a process of its own, whose work is not counted: prints its URL, then requests and bytes when asked.
HTTP_SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.shard_server import serve
with serve(Path(sys.argv[1])) as served:
    print(served.url, flush=True)
    while sys.stdin.readline():
        print(len(served.gets()), sum(size for _, _, size in served.gets()), flush=True)
        served.requests.clear()
"""
S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
server.start()
print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    if not PHOTOS.is_dir():
        pytest.skip(NO_PHOTOS)
    folder = tmp_path_factory.mktemp("photographs")
    annotations = [PHOTOS / f"annotations/{kind}_train2017.json" for kind in ("instances", "captions")]
    build(Options(PHOTOS / "train2017", *annotations, folder, "train", max_count=13))
    return Manifest.load(folder, "train")


def _server(script: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.fixture
def http(local: Manifest) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    with _server(HTTP_SERVER, str(local.root), str(Path(__file__).parents[2])) as process:
        assert process.stdin is not None and process.stdout is not None
        url = process.stdout.readline().strip()

        def counted() -> tuple[int, int]:
            assert process.stdin is not None and process.stdout is not None
            print(file=process.stdin, flush=True)
            requests, size = process.stdout.readline().split()
            return int(requests), int(size)

        yield url, counted
        process.stdin.close()


@pytest.fixture
def s3(local: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], tuple[int, int]]]]:
    s3fs = pytest.importorskip("s3fs", reason="no s3fs: pip install 'visft_ds[remote]'")
    pytest.importorskip("moto.server", reason="no moto: pip install 'visft_ds[dev]'")
    import fsspec.config

    with _server(S3_SERVER) as process:
        assert process.stdin is not None and process.stdout is not None
        options = {"endpoint_url": process.stdout.readline().strip(), "key": "k", "secret": "s"}
        monkeypatch.setitem(fsspec.config.conf, "s3", options)
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("photographs")
        for path in Path(local.root).glob("train*"):
            filesystem.put_file(str(path), f"photographs/coco/{path.name}")
        sizes: list[int] = []
        read, copy = s3fs.S3FileSystem._cat_file, s3fs.S3FileSystem._get_file

        async def counting(self: object, path: str, **options: int) -> bytes:
            data: bytes = await read(self, path, **options)
            sizes.append(len(data))
            return data

        async def counting_copies(self: object, source: str, target: str) -> None:
            await copy(self, source, target)
            sizes.append(Path(target).stat().st_size)

        monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", counting)
        monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", counting_copies)

        def counted() -> tuple[int, int]:
            found = len(sizes), sum(sizes)
            sizes.clear()
            return found

        yield "s3://photographs/coco", counted
        process.stdin.close()


def _spent(reader: ShardReader, role: Role, hint: bool) -> float:
    """Microseconds of CPU time a sample, of all threads."""
    began = time.process_time()
    if hint:
        reader.prefetch(range(len(reader)), role)
    for index in range(len(reader)):
        reader.read(index, role)
    return (time.process_time() - began) / len(reader) * 1e6


@pytest.mark.slow
@pytest.mark.parametrize("role", ["both", "labels"])
@pytest.mark.parametrize("server", ["http", "s3"])
def test_costs(local: Manifest, server: str, role: Role, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url, counted = request.getfixturevalue(server)
    times: dict[str, list[float]] = {}
    asked: dict[str, tuple[int, int]] = {"local disk": (0, 0)}
    for _ in range(ROUNDS):  # interleaved: what else runs on the machine hits all lines alike
        with ShardReader(local) as reader:
            times.setdefault("local disk", []).append(_spent(reader, role, False))
        folder = tmp_path / "cache"
        for name, cached, hint, again in CASES:
            if not again:
                shutil.rmtree(folder, ignore_errors=True)
            manifest = Manifest.load(url, "train", cache=CacheOptions(folder, 1 << 30) if cached else None)
            with ShardReader(manifest) as reader:
                reader._store.sizes(["train.manifest.json"])  # opens the connection
                counted()
                times.setdefault(name, []).append(_spent(reader, role, hint))
                while cached and len(list(folder.glob("*/*.whole"))) <= len(local.shards):
                    time.sleep(0.01)  # not counted: another process of the machine might do it
                asked[name] = counted()
    print(f"{server}, {role}, {len(local)} samples, n = {ROUNDS}: requests, KiB, us of CPU time a sample")
    for name, spent in times.items():
        requests, size = asked[name]
        middle, least, most = statistics.median(spent), min(spent), max(spent)
        print(f"  {name:26s} {requests:3d} {size / 1024:7,.0f}   {middle:7,.1f} [{least:,.1f} .. {most:,.1f}]")
    shards = len(local.shards)
    single = len(local) if role == "labels" else shards
    assert [asked[name][0] for name, *_ in CASES] == [len(local), single, single + shards, 0]
