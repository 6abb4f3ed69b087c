"""Opening a split of COCO's size: its time and memory, and what a worker process costs."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from visft_ds.data.manifest import (
    INDEX_DTYPE,
    Category,
    Manifest,
    ShardFile,
    index_path,
    manifest_bytes,
    manifest_path,
    shard_name,
)

SAMPLES, SHARDS = 120_000, 80

#: Prints milliseconds of CPU time and MiB of memory that opening a split takes, the import not counted.
OPEN = """
import sys, time
from visft_ds.data.manifest import Manifest
import visft_ds.data.shards
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
memory, began = resident(), time.process_time()
manifest = Manifest.load(sys.argv[1], "big")
spent = time.process_time() - began
reader = visft_ds.data.shards.ShardReader(manifest)
for index in range(0, len(manifest), 997):
    reader.row(index)
print(spent * 1000, resident() - memory, len(manifest.selection("captions")))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of empty shards: only their names and sizes count when it is opened."""
    folder = tmp_path_factory.mktemp("big")
    index = np.zeros(SAMPLES, INDEX_DTYPE)
    index["shard"] = np.arange(SAMPLES) * SHARDS // SAMPLES
    index["image_id"] = np.random.default_rng(0).permutation(SAMPLES)
    index["num_captions"] = 5
    index["width"], index["height"] = 640, 480
    buffer = io.BytesIO()
    np.save(buffer, index)
    index_path(folder, "big").write_bytes(buffer.getvalue())
    shards = [ShardFile(shard_name("big", number), SAMPLES // SHARDS, 250 << 20, "0" * 64) for number in range(SHARDS)]
    for shard in shards:
        with open(folder / shard.name, "wb") as file:
            file.truncate(shard.bytes)  # sparse: takes no room on the disk
    manifest = manifest_bytes(
        split="big",
        categories=[Category(place, place + 1, f"thing {place}") for place in range(80)],
        counts={"images": SAMPLES},
        shards=shards,
        index=index,
        index_file=buffer.getvalue(),
        vocabulary={f"word{place}": place for place in range(25_000)},
        quarantine=[],
        findings=[],
        options={},
        sources={},
    )
    manifest_path(folder, "big").write_bytes(manifest)
    return folder


def test_a_split_of_the_size_of_coco_opens_in_little_time_and_memory(root: Path) -> None:
    command = [sys.executable, "-c", OPEN, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    milliseconds, mebibytes, captioned = (float(value) for value in done.stdout.split())
    print(f"{SAMPLES} samples: {milliseconds:.0f} ms CPU time and {mebibytes:.1f} MiB to open")
    assert captioned == SAMPLES
    assert milliseconds < 200 and mebibytes < 50, done.stdout


def test_a_manifest_travels_to_a_worker_without_its_index(root: Path) -> None:
    manifest = Manifest.load(root, "big")
    packed = pickle.dumps(manifest)
    assert len(packed) < 1000
    again = pickle.loads(packed)  # noqa: S301 - our own
    assert isinstance(again.index, np.memmap) and np.array_equal(again.index, manifest.index)
    path = manifest_path(root, "big")
    whole = path.read_bytes()
    os.replace(path, path.with_suffix(".kept"))
    try:
        other = manifest_bytes(
            split="big",
            categories=[],
            counts={},
            shards=manifest.shards,
            index=manifest.index,
            index_file=index_path(root, "big").read_bytes(),
            vocabulary={},
            quarantine=[],
            findings=[],
            options={},
            sources={},
        )
        path.write_bytes(other)
        with pytest.raises(ValueError, match="was made anew while it was in use"):
            pickle.loads(packed)  # noqa: S301 - our own
    finally:
        path.write_bytes(whole)
