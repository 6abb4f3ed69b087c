"""A split opens only if it is whole, and says what is wrong and how to repair it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest

from tests.coco_tree import make_split
from visft_ds.data.manifest import INDEX_DTYPE, Category, Manifest, fingerprint, manifest_digest


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_split(tmp_path).root


def test_a_split_describes_itself(root: Path) -> None:
    manifest = Manifest.load(str(root), "toy")
    assert len(manifest) == 12 and [shard.count for shard in manifest.shards] == [4, 4, 4]
    assert manifest.categories == (Category(0, 3, "thing 3"), Category(1, 8, "thing 8"), Category(2, 13, "thing 13"))
    assert manifest.counts["images"] == 12 and manifest.counts["crowds"] == 1 and manifest.counts["captions"] == 24
    assert manifest.vocabulary == {"picture": 24, "it's": 24, "red": 24, "0": 12, "1": 12}
    assert isinstance(manifest.index, np.memmap) and manifest.index.dtype == INDEX_DTYPE
    assert int(manifest.index["num_annotations"].sum()) == manifest.counts["trainable"] == 15


def test_samples_are_selected_by_what_they_have(root: Path) -> None:
    manifest = Manifest.load(root, "toy")
    assert manifest.select().tolist() == list(range(12))
    annotated = manifest.select("annotations")
    # Every fourth picture and the last have no boxes; the crowd of the first does not count.
    assert sorted((manifest.index["image_id"][annotated] - 1000) // 7) == [1, 2, 3, 5, 6, 7, 9, 10]
    with pytest.raises(ValueError, match="allowed are any, annotations, captions"):
        manifest.select("masks")


def test_a_missing_split_names_those_that_exist(root: Path) -> None:
    with pytest.raises(ValueError, match=r"finished splits in .*: toy\. Make it by `visft shards build"):
        Manifest.load(root, "train")
    with pytest.raises(ValueError, match=r"finished splits in .*: none"):
        Manifest.load(root / "nowhere", "train")


def test_missing_and_cut_shards_are_named(root: Path) -> None:
    shard = root / "toy-000001.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(ValueError, match=r"toy-000001.tar has \d+ bytes, not \d+ .*visft shards build .*--split toy"):
        Manifest.load(root, "toy")
    shard.unlink()
    with pytest.raises(ValueError, match=r"toy-000001.tar is missing.*visft shards build .*--split toy"):
        Manifest.load(root, "toy")


def test_a_changed_index_is_refused(root: Path) -> None:
    index = root / "toy.index.npy"
    data = bytearray(index.read_bytes())
    data[-1] ^= 1
    index.write_bytes(data)
    with pytest.raises(ValueError, match=r"toy.index.npy does not belong to the manifest"):
        Manifest.load(root, "toy")
    index.unlink()
    with pytest.raises(ValueError, match=r"toy.index.npy is missing"):
        Manifest.load(root, "toy")


def test_a_changed_manifest_is_refused(root: Path) -> None:
    path = root / "toy.manifest.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "shards": fields["shards"][:2]}))
    with pytest.raises(ValueError, match="was changed after it was written"):
        Manifest.load(root, "toy")
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Manifest.load(root, "toy")


def test_another_version_is_refused(root: Path) -> None:
    path = root / "toy.manifest.json"
    fields = {**json.loads(path.read_text()), "version": 1}
    path.write_bytes(orjson.dumps({**fields, "sha256": manifest_digest(fields)}))
    with pytest.raises(ValueError, match=r"has version 1; this program reads version 2\. Build the split again"):
        Manifest.load(root, "toy")


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    manifest = make_split(tmp_path / "a")
    assert make_split(tmp_path / "b", max_count=5).fingerprint == manifest.fingerprint, "cut differently"
    assert make_split(tmp_path / "c", seed=1).fingerprint != manifest.fingerprint, "another order"
    assert make_split(tmp_path / "d", keep_crowd=False).fingerprint != manifest.fingerprint, "other labels"
    renamed = [replace(category, name="x") for category in manifest.categories]
    assert fingerprint(renamed, manifest.index) != manifest.fingerprint


def test_an_index_with_other_columns_is_refused(root: Path) -> None:
    index, manifest = root / "toy.index.npy", root / "toy.manifest.json"
    np.save(index, np.zeros(12, dtype=[("shard", "<i4")]))
    fields = json.loads(manifest.read_text())
    fields["index"] = {**fields["index"], "sha256": hashlib.sha256(index.read_bytes()).hexdigest()}
    manifest.write_bytes(orjson.dumps({**fields, "sha256": manifest_digest(fields)}))
    with pytest.raises(ValueError, match=r"toy.index.npy has columns of another version"):
        Manifest.load(root, "toy")
