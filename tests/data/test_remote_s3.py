"""Shards in an S3-compatible store that a package provides, set up as a user would: by fsspec's environment."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader

SCRIPT = """
import hashlib, json, sys, time, warnings
from pathlib import Path
warnings.simplefilter("error")
from visft_ds.data import remote
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader
from visft_ds.data.store import CacheOptions
remote.FIRST_WAIT = 0.01
root, folder = sys.argv[1:]
out = {}
for cache in (None, CacheOptions(Path(folder), 1 << 20)):
    manifest = Manifest.load(root, "toy", cache=cache)
    with ShardReader(manifest) as reader:
        reader.prefetch(range(6))
        for number in range(12):
            reader.read(number)
        while cache and len(list(Path(folder).glob("*/*.whole"))) < 4:
            time.sleep(0.01)
        digest = hashlib.sha256(b"".join(reader.read(i)[0] + reader.read(i)[1] for i in range(12))).hexdigest()
        out[str(cache is not None)] = digest
out["listed"] = sorted(manifest.store.sizes())
manifest.store.close()
for name, url in (("split", root), ("bucket", "s3://no-such-bucket/x")):
    try:
        Manifest.load(url, "train")
    except ValueError as error:
        out[name] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = pytest.importorskip("moto.server", reason="no moto: pip install 'visft_ds[dev]'")
    running = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


def test_an_s3_store_gives_the_bytes_of_the_local_files(endpoint: str, split: Manifest, tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs", reason="no s3fs: pip install 'visft_ds[remote]'")
    options = {"key": "k", "secret": "s", "endpoint_url": endpoint}
    filesystem = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    filesystem.mkdir("shards")
    for path in Path(split.root).glob("toy*"):
        filesystem.put_file(str(path), f"shards/coco/{path.name}")
    environment = {
        **os.environ,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_KEY": "k",
        "FSSPEC_S3_SECRET": "s",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-c", SCRIPT, "s3://shards/coco", str(tmp_path / "cache")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    with ShardReader(Manifest.load(split.root, "toy")) as reader:
        parts = [part or b"" for index in range(12) for part in reader.read(index)]
        digest = hashlib.sha256(b"".join(parts)).hexdigest()
    assert out["False"] == out["True"] == digest
    assert out["listed"] == sorted(path.name for path in Path(split.root).glob("toy*"))
    assert "finished splits in s3://shards/coco: toy" in out["split"]
    assert "no-such-bucket" in out["bucket"]
