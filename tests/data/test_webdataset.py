"""Our shards are ordinary tars that any WebDataset reader opens, and what a reader could be tricked into is
refused.
"""

from __future__ import annotations

import gc
import tarfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from visft_ds.data.open_webdataset import open_split, webdataset
from visft_ds.data.shards import Manifest, ShardReader


@pytest.fixture(scope="module", autouse=True)
def _all_collected() -> Iterator[None]:
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(autouse=True)
def _files_left_open() -> Iterator[None]:
    """webdataset leaves closing its files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect(1)  # what is young; all of it, with everything that torch has, takes a tenth of a second


def _check_samples(samples: list[dict[str, Any]], split: Manifest) -> None:
    """In the order of the index, keys as promised, both members with their bytes."""
    assert [sample["__key__"] for sample in samples] == [
        f"{one:012d}" for one in split.index["image_id"].tolist()
    ]
    with ShardReader(split) as reader:
        for index, sample in enumerate(samples):
            assert {name for name in sample if not name.startswith("__")} == {"jpg", "json"}
            assert (sample["jpg"], sample["json"]) == reader.read(index)


def test_a_split_opens_in_order_with_all_its_bytes(split: Manifest) -> None:
    _check_samples(list(open_split(split)), split)
    decoded = next(iter(open_split(split).decode("rgb8")))
    row = split.index[0]
    assert decoded["jpg"].shape == (row["height"], row["width"], 3)
    assert decoded["json"]["image_id"] == row["image_id"]


def test_webdataset_alone_opens_the_shards(split: Manifest) -> None:
    urls = [str(split.root / shard.name) for shard in split.shards]
    _check_samples(list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)), split)


def test_pythons_tarfile_sees_what_is_promised(split: Manifest) -> None:
    for shard in split.shards:
        with tarfile.open(split.root / shard.name, "r:") as tar:
            members = tar.getmembers()
        assert len(members) == 2 * shard.count
        for image, label in zip(members[::2], members[1::2], strict=True):
            assert (image.name.split("."), label.name.split(".")) == (
                [image.name[:12], "jpg"],
                [image.name[:12], "json"],
            )
        facts = {
            (m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type, bool(m.pax_headers)) for m in members
        }
        assert facts == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE, False)}
        assert shard.bytes % 10240 == 0, "other tar programs pad to this"
        first = (split.root / shard.name).read_bytes()[:512]
        assert first[257:265] == b"ustar\x0000", "POSIX USTAR, not the header of GNU tar"


def test_webdataset_without_its_security_is_refused(split: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset.utils, "enforce_security", False)
    with pytest.raises(RuntimeError, match="security"):
        open_split(split)
