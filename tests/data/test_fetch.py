"""Shards behind a URL are read as those in a folder: whole copies, one a machine, checked and bounded."""

from __future__ import annotations

import errno
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from tests.coco_tree import make_split
from tests.data.test_loader import PIPELINES
from tests.ranks import run_ranks
from tests.shard_server import Served, serve
from visft_ds.config import resolve
from visft_ds.data import fetch
from visft_ds.data.fetch import Cache
from visft_ds.data.loader import StepLoader
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.errors import exit_code
from visft_ds.prepare.datasets import TrainingSet, samples_of

SIZE = 1 << 30


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PAUSES", (0.0,) * 10)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """40 pictures in ten shards."""
    return make_split(tmp_path_factory.mktemp("split"), 40)


@pytest.fixture
def served(local: Manifest) -> Iterator[Served]:
    with serve(Path(local.root)) as found:
        yield found


def copies(folder: Path) -> int:
    return len(list(folder.glob("*.tar")))


def test_remote_samples_are_the_local_ones(local: Manifest, served: Served, tmp_path: Path) -> None:
    remote = Manifest.load(f"{served.url}/", "toy", Cache(tmp_path))
    assert (remote.fingerprint, len(remote), copies(tmp_path)) == (local.fingerprint, 40, 0), (
        "no shard before it is read"
    )
    here, there = ShardReader(local), ShardReader(remote)
    assert all(here.read(index) == there.read(index) for index in range(40))
    assert served.shards == {shard.name: 1 for shard in local.shards} and not served.ranges
    again = ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path)))
    assert again.read(7) == here.read(7) and served.shards.total() == 10, "copies are kept"


def test_missing_credentials_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    botocore = pytest.importorskip("botocore.exceptions", reason="no s3fs: pip install '.[dev]'")
    tried = []

    def url_to_fs(*address: str) -> None:
        tried.append(address)
        raise botocore.NoCredentialsError

    monkeypatch.setattr(fsspec, "url_to_fs", url_to_fs)
    with pytest.raises(ValueError, match=r"AWS_ACCESS_KEY_ID.*FSSPEC_S3_ANON=true reads a public bucket"):
        fetch.download("s3://bucket/a.tar", tmp_path / "a.tar")
    assert len(tried) == 1, "waiting brings no credentials"


def test_an_s3_store(local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto.server", reason="no moto: pip install '.[dev]'")
    server = moto.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setitem(
            fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}", "key": "a", "secret": "b"}
        )
        filesystem = fsspec.filesystem("s3")
        filesystem.mkdir("bucket")
        for path in Path(local.root).iterdir():
            if path.is_file():
                filesystem.pipe_file(f"bucket/set/{path.name}", path.read_bytes())
        remote = ShardReader(Manifest.load("s3://bucket/set", "toy", Cache(tmp_path)))
        assert remote.read(3) == ShardReader(local).read(3)
    finally:
        server.stop()


@pytest.mark.parametrize("fault", ["500", "cut", "flipped"])
def test_a_failure_is_tried_again_and_then_an_error(served: Served, tmp_path: Path, fault: str) -> None:
    reader = ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path)))
    served.faults.extend([fault, fault, "fine"])
    assert reader.read(0)[0]
    served.faults.extend([fault] * 20)
    with pytest.raises(ValueError if fault == "flipped" else TimeoutError, match="toy-000009"):
        reader.read(39)
    assert not list(tmp_path.glob(".*.part"))


def test_a_server_that_is_away_for_minutes_is_waited_for_and_said(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    pauses: list[float] = []
    monkeypatch.setattr(fetch.time, "sleep", pauses.append)
    reader = ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path)))
    served.faults.extend([*["500"] * 8, "fine"])
    assert reader.read(0)[0]
    assert sum(pauses) > 120
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 8 and all("waiting for http" in line and "500" in line for line in lines)
    pauses.clear()
    served.faults.extend(["500"] * 20)
    with pytest.raises(TimeoutError, match="11 times") as error:
        reader.read(39)
    assert 200 < sum(pauses) < 600 and exit_code(error.value) == 5


def test_a_damaged_copy_after_a_long_wait_is_fetched_again(served: Served, tmp_path: Path) -> None:
    """Failed requests are no damaged copies, of which there may be three."""
    reader = ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path)))
    served.faults.extend([*["500"] * 5, "flipped", "fine"])
    assert reader.read(0)[0]


def test_a_full_disk_of_this_machine_is_not_waited_for(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def get_file(self, source: str, target: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", target)

    reader = ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path)))
    monkeypatch.setattr(fsspec, "url_to_fs", lambda url, **options: (Full(), url))
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(OSError, match="No space left") as error:
        reader.read(0)
    assert exit_code(error.value) == 2


@pytest.mark.parametrize(
    ("url", "word"),
    [("ftp://host/x", "https://"), ("pipe://ls", "https://"), ("http://127.0.0.1:1/x", "127.0.0.1")],
)
def test_what_cannot_be_read_is_named(url: str, word: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match=word):
        Manifest.load(url, "toy", Cache(tmp_path))


def test_a_split_that_is_not_there_is_named(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.manifest\.json"):
        Manifest.load(served.url, "train", Cache(tmp_path))


def test_the_shards_read_least_recently_make_room(local: Manifest, served: Served, tmp_path: Path) -> None:
    largest = max(shard.bytes for shard in local.shards)
    bound = 3 * largest
    reader = ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path, bound)))
    for index in (0, 4, 8):  # shards 0, 1, 2
        reader.read(index)
        time.sleep(0.02)
    reader.close()
    reader.read(0)  # shard 0 is the last one read now
    time.sleep(0.02)
    for index in (12, 16):
        reader.read(index)
        time.sleep(0.02)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= bound
    reader.close()
    reader.read(0)
    assert served.shards["toy-000000.tar"] == 1
    reader.read(5)
    assert served.shards["toy-000001.tar"] == 2
    with pytest.raises(ValueError, match="cache_bytes"):
        ShardReader(Manifest.load(served.url, "toy", Cache(tmp_path / "small", 100))).read(0)


_READS_ALL = """
import sys
from pathlib import Path
from visft_ds.data.fetch import Cache
from visft_ds.data.shards import Manifest, ShardReader
reader = ShardReader(Manifest.load(sys.argv[1], "toy", Cache(Path(sys.argv[2]))))
assert all(reader.read(index) for index in range(len(reader)))
"""


def test_processes_of_a_machine_share_one_copy(served: Served, tmp_path: Path) -> None:
    run_ranks(["-c", _READS_ALL, served.url, str(tmp_path)])
    assert set(served.shards.values()) == {1}


def test_a_run_fetches_each_shard_once_an_epoch_and_ahead(
    local: Manifest, served: Served, tmp_path: Path
) -> None:
    """With a cache that holds a part of the set: two epochs, batches as from the folder."""
    shards = local.index["shard"]
    plan = Plan({"detection": TaskPlan({"toy": SetPlan(np.arange(40), 1, shards)}, 4)}, seed=1)
    bound = 8 * max(shard.bytes for shard in local.shards)
    remote = Manifest.load(served.url, "toy", Cache(tmp_path, bound))
    both = [StepLoader({"toy": ShardReader(one)}, plan, PIPELINES) for one in (remote, local)]
    for (step, (there,)), (_, (here,)) in zip(both[0].steps(0, 20), both[1].steps(0, 20), strict=True):
        assert torch.equal(there.images, here.images) and torch.equal(there.indices, here.indices)
        if step.step == 0:
            deadline = time.monotonic() + 600
            while served.shards.total() < 10 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert served.shards.total() >= 10, "shards of later steps come while this one computes"
    assert max(served.shards.values()) <= 3, Counter(served.shards)


def test_a_copy_that_is_gone_is_fetched_again(served: Served, tmp_path: Path) -> None:
    manifest = Manifest.load(served.url, "toy", Cache(tmp_path))
    ShardReader(manifest).read(0)
    shutil.rmtree(tmp_path)  # somebody cleans up while a run goes on
    reader = ShardReader(manifest)
    assert reader.read(0)[0] and served.shards["toy-000000.tar"] == 2


def test_remote_shards_are_read_in_windows(served: Served, tmp_path: Path) -> None:
    remote = Manifest.load(served.url, "toy", Cache(tmp_path))

    def windowed(manifest: Manifest, *settings: str) -> bool:
        config = resolve(stage=1, model="debug", settings=["visft.tasks=detection", *settings]).visft
        (stream,) = config.streams().values()
        return (
            samples_of(config, stream, {"train": TrainingSet(manifest, ("detection",))})["train"].shards
            is not None
        )

    assert windowed(remote) and not windowed(replace(remote, root=tmp_path))
    assert not windowed(remote, "visft.data.shuffle=full")
