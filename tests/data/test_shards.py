"""A split opens only if it is whole; samples are exactly the bytes that were packed; damage is an error."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from tests.coco_tree import make_split
from visft_ds.data import shards
from visft_ds.data.shards import (
    INDEX_DTYPE,
    Category,
    DamagedSample,
    Manifest,
    ShardReader,
    fingerprint,
    verify,
)


@pytest.fixture
def root(split: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split.root, tmp_path / "copy"))


def test_a_split_describes_itself(split: Manifest) -> None:
    assert len(split) == 12 and [shard.count for shard in split.shards] == [5, 4, 3]
    assert split.categories == (
        Category(0, 3, "thing 3"),
        Category(1, 8, "thing 8"),
        Category(2, 13, "thing 13"),
    )
    assert split.counts["crowds"] == 1 and split.counts["captions"] == 24
    assert split.vocabulary == {"picture": 24, "it's": 24, "red": 24, "0": 12, "1": 12}
    assert split.labels == {"annotations", "captions"} and split.index.dtype == INDEX_DTYPE
    ids = split.index["image_id"].tolist()
    assert ids != sorted(ids) and sorted(ids) == [1000 + 7 * index for index in range(12)]
    assert int(split.index["num_annotations"].sum()) == split.counts["trainable"] == 15


def test_samples_are_selected_by_what_they_have(split: Manifest) -> None:
    assert split.having("any").tolist() == split.having("captions").tolist() == list(range(12))
    # Every fourth picture and the last have no boxes; the crowd of the first does not count.
    found = split.index["image_id"][split.having("annotations")]
    assert sorted((found - 1000) // 7) == [1, 2, 3, 5, 6, 7, 9, 10]


def test_samples_are_the_original_files_in_every_role(split: Manifest) -> None:
    tree, reader = Path(split.root).parent / "tree", ShardReader(split)
    for index in range(len(reader)):
        image, label = reader.read(index)
        assert image is not None and label is not None
        fields = json.loads(label)
        assert image == (tree / "images" / fields["file_name"]).read_bytes()
        assert fields["image_id"] == split.index[index]["image_id"]
        assert reader.read(index, "images") == (image, None)
        assert reader.read(index, "labels") == (None, label)


def test_labels_hold_everything_as_given(split: Manifest) -> None:
    source = json.loads((Path(split.root).parent / "tree/instances.json").read_text())
    reader = ShardReader(split)
    labels = [json.loads(reader.read(index, "labels")[1] or b"") for index in range(len(reader))]
    stored = {a["id"]: {**a, "image_id": label["image_id"]} for label in labels for a in label["annotations"]}
    assert stored == {annotation["id"]: annotation for annotation in source["annotations"]}
    assert all(label["captions"] == ["Picture 0, it's red.", "Picture 1, it's red."] for label in labels)


def test_threads_share_a_reader_that_keeps_few_files_open(
    split: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN", 1)
    reader = ShardReader(split)
    expected = [reader.read(index) for index in range(12)]
    start, opened = threading.Barrier(4), len(os.listdir("/proc/self/fd"))

    def read_all(_: int) -> list[tuple[bytes | None, bytes | None]]:
        start.wait()
        return [reader.read(index) for index in [*range(12)] * 20]

    with ThreadPoolExecutor(4) as pool:
        assert all(result == expected * 20 for result in pool.map(read_all, range(4)))
    assert len(os.listdir("/proc/self/fd")) == opened
    assert pickle.loads(pickle.dumps(reader)).read(3) == expected[3]  # noqa: S301
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == opened - 1 and reader.read(0) == expected[0]


def test_a_missing_split_names_those_that_exist(root: Path) -> None:
    with pytest.raises(ValueError, match="finished splits there: toy"):
        Manifest.load(root, "train")
    with pytest.raises(ValueError, match=r"holds no shards .*, which `visft shards FOLDER` makes"):
        Manifest.load(root / "elsewhere", "train")


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    manifest = make_split(tmp_path / "a")
    assert make_split(tmp_path / "b", max_size=40_000).fingerprint == manifest.fingerprint, "cut differently"
    assert make_split(tmp_path / "c", seed=1).fingerprint != manifest.fingerprint, "another order"
    renamed = [replace(category, name="x") for category in manifest.categories]
    assert fingerprint(renamed, manifest.index, None) != manifest.fingerprint


def _flip(offset: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return change


def _other(old: str, new: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("file", "damage", "word"),
    [
        ("toy-000001.tar", Path.unlink, "missing"),
        ("toy-000001.tar", lambda path: os.truncate(path, 2000), "truncated"),
        ("toy.index.npy", Path.unlink, "missing"),
        ("toy.index.npy", _flip(-1), "belong"),
        ("toy.index.npy", lambda path: path.write_bytes(b"rubbish"), "magic"),
        ("toy.manifest.json", lambda path: path.write_text("{"), "manifest"),
        ("toy.manifest.json", _other("toy-", "../"), "shards"),
        ("toy.manifest.json", _other('"version": 5', '"version": 4'), "version 5"),
        ("toy.manifest.json", _other('"split": "toy"', '"split": 3'), "of the split 3"),
        ("toy.manifest.json", _other('"images": ', '"image": '), "manifest"),
        ("toy.manifest.json", _other('"images": ', '"images": [], "x": '), "manifest"),
        ("toy.manifest.json", _other('"vocabulary": ', '"vocabulary": 5, "x": '), "vocabulary"),
        ("toy.manifest.json", _other('"findings": ', '"findings": [], "x": '), "findings"),
    ],
)
def test_what_is_not_whole_does_not_open(
    root: Path, file: str, damage: Callable[[Path], object], word: str
) -> None:
    damage(root / file)
    with pytest.raises(ValueError, match=word):
        Manifest.load(root, "toy")


def test_a_flipped_byte_is_an_error_that_says_where(root: Path) -> None:
    manifest = Manifest.load(root, "toy")
    assert verify(manifest) == []
    row = manifest.index[5]
    _flip(int(row["image_offset"]) + 100)(root / "toy-000001.tar")
    reader = ShardReader(manifest)
    with pytest.raises(
        DamagedSample, match=rf"{row['image_id']:012d} of .*toy-000001.tar: .*{row['image_offset']}"
    ):
        reader.read(5)
    assert reader.read(5, "labels")[1] is not None, "the labels are whole"
    assert verify(manifest) == ["toy-000001.tar"]
    os.truncate(root / "toy-000000.tar", int(manifest.index[2]["image_offset"]) + 10)
    with pytest.raises(DamagedSample):
        reader.read(2, "images")
