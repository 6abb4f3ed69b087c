"""Reading by place gives exactly the bytes that were packed; every kind of damage is found."""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.coco_tree import make_split
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import DamagedSample, ShardReader
from visft_ds.shards.shard_content import Problem
from visft_ds.shards.verify import verify


@pytest.fixture
def copy(split: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split.root, tmp_path / "copy"))


def test_samples_are_the_original_files_in_every_role(split: Manifest) -> None:
    tree = split.root.parent / "tree"
    with ShardReader(split) as reader:
        for index in range(len(reader)):
            image, label = reader.read(index)
            assert image is not None and label is not None
            fields = json.loads(label)
            assert image == (tree / "images" / fields["file_name"]).read_bytes()
            assert fields["image_id"] == split.index[index]["image_id"]
            assert reader.read(index, "images") == (image, None)
            assert reader.read(index, "labels") == (None, label)


def test_labels_hold_everything_as_given(split: Manifest) -> None:
    source = json.loads((split.root.parent / "tree/instances.json").read_text())
    with ShardReader(split) as reader:
        labels = [json.loads(reader.read(index, "labels")[1] or b"") for index in range(len(reader))]
    stored = {a["id"]: {**a, "image_id": label["image_id"]} for label in labels for a in label["annotations"]}
    assert stored == {annotation["id"]: annotation for annotation in source["annotations"]}
    assert all(label["captions"] == ["Picture 0, it's red.", "Picture 1, it's red."] for label in labels)
    assert all(label["license"] == 4 for label in labels)


def test_the_order_of_samples_is_a_permutation(split: Manifest) -> None:
    ids = split.index["image_id"].tolist()
    assert ids != sorted(ids) and sorted(ids) == [1000 + 7 * place for place in range(12)]


def test_threads_and_forks_may_share_a_reader(split: Manifest) -> None:
    with ShardReader(split) as reader:
        expected = [reader.read(index) for index in range(12)]
        reader.close()
        start = threading.Barrier(4)

        def read_all(_: int) -> list[tuple[bytes | None, bytes | None]]:
            start.wait()
            return [reader.read(index) for index in [*range(12)] * 20]

        with ThreadPoolExecutor(4) as pool:
            assert all(result == expected * 20 for result in pool.map(read_all, range(4)))
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # Python 3.12: libraries have threads; the child uses none
            child = os.fork()
        if child == 0:
            os._exit(0 if [reader.read(index) for index in range(12)] == expected else 1)
        for _ in range(20):
            assert [reader.read(index) for index in range(12)] == expected
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_flipped_byte_is_an_error_that_says_where(copy: Path) -> None:
    manifest = Manifest.load(copy, "toy")
    row = manifest.index[5]
    _flip(int(row["image_offset"]) + 100)(copy / "toy-000001.tar")
    with ShardReader(manifest) as reader:
        key, offset = f"{row['image_id']:012d}", row["image_offset"]
        for role in ("both", "images"):
            with pytest.raises(ValueError, match=rf"toy-000001.tar, key {key}\): the image at offset {offset} is"):
                reader.read(5, role)
        assert reader.read(5, "labels")[1] is not None, "the labels are whole"
        with pytest.raises(ValueError, match="sample 12 does not exist: 'toy' has 0 to 11"):
            reader.read(12)


def test_many_labels_at_once_are_those_read_one_by_one(copy: Path) -> None:
    with ShardReader(Manifest.load(copy, "toy")) as reader:
        order = [7, 0, 11, 0]
        assert reader.read_labels(order) == [reader.read(index, "labels")[1] for index in order]
        assert reader.read_labels([]) == []
        for wrong in ([3, 12], [-1, 3]):
            with pytest.raises(ValueError, match="does not exist: 'toy' has 0 to 11"):
                reader.read_labels(wrong)
        row = reader.row(5)
        _flip(row["label_offset"] + 9)(copy / "toy-000001.tar")
        with pytest.raises(DamagedSample, match=rf"key {row['image_id']:012d}\): the label at offset"):
            reader.read_labels([4, 5])


def test_a_shard_cut_after_opening_is_an_error(copy: Path) -> None:
    manifest = Manifest.load(copy, "toy")
    with ShardReader(manifest) as reader:
        reader.read(0)
        os.truncate(copy / "toy-000000.tar", int(manifest.index[2]["image_offset"]) + 10)
        with pytest.raises(ValueError, match=r"10 of \d+ bytes read"):
            reader.read(2, "images")


def test_a_whole_split_has_no_problems(copy: Path) -> None:
    assert verify(copy, "toy") == []


def _flip(offset: int) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset] ^= 1
        path.write_bytes(data)

    return change


def _zero_blocks(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[1024:2048] = bytes(1024)
    path.write_bytes(data)


def _swap(path: Path) -> None:
    other = path.with_name("toy-000002.tar")
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def _edit_manifest(path: Path) -> None:
    manifest = path.with_name("toy.manifest.json")
    manifest.write_text(manifest.read_text().replace('"count": 4', '"count": 3', 1))


def _extra(path: Path) -> None:
    shutil.copy(path, path.with_name("toy-000003.tar"))


def _neighbour(path: Path) -> None:
    shutil.copy(path, path.with_name("toy-000001-000000.tar"))


@pytest.mark.parametrize(
    ("damage", "file", "message"),
    [
        (_flip(700), "toy-000001.tar", "crc32 differs"),
        (_flip(3), "toy-000001.tar", "header of the image of .* is damaged"),
        (lambda path: os.truncate(path, 2000), "toy-000001.tar", "only .* bytes"),
        (lambda path: os.truncate(path, path.stat().st_size - 1024), "toy-000001.tar", "bytes, not"),
        (_flip(-1), "toy-000001.tar", "sha256 is"),  # in the padding: no member is hurt
        (_zero_blocks, "toy-000001.tar", "crc32 differs"),
        (_swap, "toy-000002.tar", "content is that of toy-000001.tar: swapped"),
        (Path.unlink, "toy-000001.tar", "missing"),
        (_extra, "toy-000003.tar", "not part of this split"),
        (_edit_manifest, "toy.manifest.json", "changed after it was written"),
        (lambda path: _flip(-2)(path.with_name("toy.index.npy")), "toy.index.npy", "does not belong"),
    ],
)
def test_verify_finds_every_damage(copy: Path, damage: Callable[[Path], None], file: str, message: str) -> None:
    damage(copy / "toy-000001.tar")
    problems = verify(copy, "toy")
    with pytest.raises(ValueError, match=message):
        raise ValueError("\n".join(problem.message for problem in problems if problem.file == file))
    assert all(isinstance(problem, Problem) for problem in problems)


def test_a_split_with_a_similar_name_is_no_extra_shard(copy: Path) -> None:
    _neighbour(copy / "toy-000001.tar")
    assert verify(copy, "toy") == []


def test_many_shards_do_not_use_up_all_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visft_ds.data.store._MAX_OPEN", 1)
    manifest = make_split(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with ShardReader(manifest) as reader:
        for index in range(12):
            assert io.BytesIO(reader.read(index)[0] or b"").read(2) == b"\xff\xd8"
        assert len(os.listdir("/proc/self/fd")) == before + 1
