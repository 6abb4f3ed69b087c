"""Tars that others wrote are read where they lie: the samples that webdataset sees, as our own shards are."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask
from PIL import Image

from tests.coco_tree import make_split
from tests.ranks import finish, run_ranks, start_ranks, wait_for
from tests.shard_server import serve
from tests.tiny import STEPS, command, equal, steps_recorded
from visft_ds.config import resolve
from visft_ds.data.dataset import caption_dataset, coco_dataset, read_raw
from visft_ds.data.fetch import Cache
from visft_ds.data.open_webdataset import webdataset
from visft_ds.data.shards import Manifest, ShardReader, verify
from visft_ds.prepare.data import vocabulary_of
from visft_ds.prepare.datasets import TrainingSet
from visft_ds.shards import tars
from visft_ds.shards.build import alone
from visft_ds.shards.cli import main
from visft_ds.shards.tars import index_tars


def _picture(kind: str = "JPEG", size: tuple[int, int] = (40, 30), turn: int = 1) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.getexif()[274] = turn
    file = io.BytesIO()
    picture.save(file, kind, **({"exif": picture.getexif()} if turn > 1 else {}))
    return file.getvalue()


PICTURE = _picture()


def _write(path: Path, files: Mapping[str, bytes]) -> Path:
    """A tar of files; a name that ends with "'" is the same name once more."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name.rstrip("'"))
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def _captioned(first: int, count: int) -> dict[str, bytes]:
    """So many samples as img2dataset writes them."""
    files = {}
    for number in range(first, first + count):
        text = f"A small picture of dog {number % 3}."
        files[f"{number:08d}.jpg"] = PICTURE
        files[f"{number:08d}.txt"] = text.encode()
        files[f"{number:08d}.json"] = json.dumps({"caption": "not read", "width": 640}).encode()
    return files


#: Names that webdataset groups in its own way, and samples that cannot be used.
ODD = {
    "__meta__/x.json": b"{}",
    "a.b/c.d/0001.JPG": PICTURE,
    "a.b/c.d/0001.txt": "Zürich, twice".encode(),
    "0002.png": _picture("PNG", (20, 50)),
    "0002.json": b'{"caption": "in JSON"}',
    "0003.webp": _picture("WEBP"),
    "0003.json": b'{"captions": ["one", "two"]}',
    "0004.jpg": PICTURE,
    "0004.jpg'": PICTURE,
    "0004.txt": b"12",
    "0005.jpg": PICTURE,
    "0006.jpg": PICTURE,
    "0005.txt": b"apart from its picture",
    "0007.v2.jpg": PICTURE,
    "0007.txt": b"the suffix is v2.jpg",
    "0008.jpg": PICTURE[:-400],
    "0008.txt": b"cut",
    "0009.jpg": PICTURE,
    "0009.txt": b"\xff\xfe",
    "0010.jpg": _picture(turn=6),
    "0010.txt": b"",
    "long/" + "x" * 150 + "/0011.jpg": PICTURE,
    "long/" + "x" * 150 + "/0011.txt": b"a long name",
    "0012.mp4": b"is not read",
    "noext": b"x",
    "caf\udce9.jpg": PICTURE,  # a name in Latin-1
}
LEFT_OUT = [
    ("0005", "no txt or json"),
    ("0006", "no txt or json"),
    ("0005", "no picture"),
    ("0007", "no picture"),
    ("0008", "unreadable"),
    ("0009", "unusable label: .*utf-8"),
    ("0012", "no picture"),
    (r"caf\udce9'", "no txt or json"),
]


def test_samples_are_those_of_webdataset(tmp_path: Path) -> None:
    """Bytes and order; what is left out is named with its reason, what is odd is counted; nothing but index and
    manifest is written.
    """
    paths = [
        str(_write(tmp_path / "odd.tar", ODD)),
        str(_write(tmp_path / "many.tar", _captioned(100, 70))),
    ]
    manifest = index_tars(paths, tmp_path / "index", "train")
    written = sorted(path.name for path in (tmp_path / "index").iterdir())
    assert written == ["train.index.npy", "train.manifest.json"]
    assert len(Manifest.load(tmp_path / "index", "train")) == 76 and verify(manifest) == []
    for (name, reason), (number, words) in zip(manifest.left_out, LEFT_OUT, strict=True):
        assert name.endswith(f"odd.tar/{number}") and re.match(words, reason), reason
    assert {kind.partition(" (")[0]: count for kind, (count, _) in manifest.findings.items()} == {
        "second file of a name in a sample": 1,
        "picture that EXIF data turns": 1,
    }
    out = {number for number, _ in LEFT_OUT} | {"caf\udce9"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves closing to the collector
        theirs = webdataset.WebDataset(
            paths, shardshuffle=False, empty_check=False, handler=webdataset.ignore_and_continue
        )
        samples = [sample for sample in theirs if sample["__key__"] not in out]
        gc.collect(1)
    with ShardReader(manifest) as reader:
        for index, sample in enumerate(samples):
            label = sample["txt"] if "txt" in sample else sample["json"]
            pictures = [sample[suffix] for suffix in tars.PICTURES if suffix in sample]
            assert reader.read(index) == (pictures[0], label)
        assert len(samples) == len(reader) == 76
        captions = [read_raw(reader, index).captions for index in range(6)]
        shown = read_raw(reader, 4).size
    assert captions == [["Zürich, twice"], ["in JSON"], ["one", "two"], ["12"], [], ["a long name"]]
    assert shown == (30, 40), "not turned"
    assert manifest.counts == {"images": 76, "captions": 76, "empty": 1, "left_out": 8}
    assert manifest.index["image_id"].tolist() == [1, 2, 3, 4, 10, 11, *range(100, 170)]


def test_our_own_shards_indexed_are_what_was_built(tmp_path: Path) -> None:
    """COCO annotations with polygons, run-length codes and crowds; only the kind of the labels differs."""
    built = make_split(tmp_path, 12)
    pattern = f"{built.root}/toy-00000{{0..2}}.tar"
    categories = tmp_path / "tree/instances.json"
    indexed = index_tars([pattern], tmp_path / "index", "toy", categories=categories)
    for name in ("categories", "having_category", "object_sides", "vocabulary", "fingerprint"):
        assert getattr(indexed, name) == getattr(built, name), name
    assert indexed.counts == built.counts
    assert [shard.sha256 for shard in indexed.shards] == [shard.sha256 for shard in built.shards]
    columns = [name for name in built.index.dtype.names if name != "label_kind"]
    assert all(np.array_equal(indexed.index[name], built.index[name]) for name in columns)
    both = [ShardReader(built), ShardReader(indexed)]
    captions = [caption_dataset(reader) for reader in both]
    objects = [coco_dataset(reader) for reader in both]
    assert captions[0] == captions[1] and objects[0]["annotations"] == objects[1]["annotations"]


def test_annotations_of_others(tmp_path: Path) -> None:
    """Keys that COCO has and others leave out, and run-length codes as COCO's own file has them."""
    code = {"size": [30, 40], "counts": [3, 4, 1193]}
    boxes = [{"bbox": [1, 2, 9, 9], "category_id": 4, "segmentation": code}]
    labels = json.dumps({"annotations": boxes, "width": 640, "image_id": 5}).encode()
    tar = _write(tmp_path / "a.tar", {"x.jpg": PICTURE, "x.json": labels})
    names = tmp_path / "names.json"
    names.write_text('[{"id": 4, "name": "thing"}]')
    reader = ShardReader(index_tars([str(tar)], tmp_path / "index", "train", categories=names))
    (annotation,) = coco_dataset(reader)["annotations"]
    assert (annotation["id"], annotation["iscrowd"], annotation["area"]) == (1, 0, 81)
    assert coco_mask.area(annotation["segmentation"]) == 4 and reader.manifest.labels == {"annotations"}
    with pytest.raises(ValueError, match="--categories"):
        index_tars([str(tar)], tmp_path / "other", "train")


def test_damaged_tars(tmp_path: Path) -> None:
    """A tar that is cut anywhere is named, and its whole samples are used; too many of them are refused."""
    whole = [_write(tmp_path / f"{number}.tar", _captioned(0, 3)) for number in range(10)]
    data = whole[0].read_bytes()
    for length in (len(data) // 2, 6 * 512, 6 * 512 + 100):
        (tmp_path / "cut[1].tar").write_bytes(data[:length])
        paths = [str(path) for path in (*whole, tmp_path / "cut[1].tar")]
        manifest = index_tars(paths, tmp_path / "index", "train", replace=True)
        assert 30 <= len(manifest) < 33 and manifest.left_out[-1][0].endswith("cut[1].tar")
    assert manifest.index["image_id"].tolist() == list(range(len(manifest))), "the digits are not unique"
    with pytest.raises(ValueError, match=r"(?s)1 of its 2 tars.*cut\[1\]\.tar"):
        index_tars(paths[-2:], tmp_path / "index", "train", replace=True)
    (tmp_path / "some.tar.gz").write_bytes(gzip.compress(data))
    for pattern, words in (
        ("some.tar.gz", "gunzip"),
        ("none-{0..3}.tar", "no such tar: .*none-0"),
        ("{0,0}.tar", "twice"),
    ):
        with pytest.raises(ValueError, match=words):
            index_tars([str(tmp_path / pattern)], tmp_path / "new", "train")
    with pytest.raises(ValueError, match="--replace"):
        index_tars(paths[:1], tmp_path / "index", "train")


def test_remote_tars(tmp_path: Path) -> None:
    """Read once to be indexed; a training has them in its cache, and reads them a window at a time."""
    for number in range(3):
        _write(tmp_path / f"served/{number:05d}.tar", _captioned(10 * number, 10))
    with serve(tmp_path / "served") as served:
        index_tars([served.url + "/{00000..00002}.tar"], tmp_path / "index", "train")
        assert served.shards == {f"{number:05d}.tar": 1 for number in range(3)}
        assert {path.name for path in (tmp_path / "index").iterdir()} == {
            "train.index.npy",
            "train.manifest.json",
        }
        manifest = Manifest.load(tmp_path / "index", "train", Cache(tmp_path / "cache"))
        with ShardReader(manifest) as reader:
            pairs = [reader.read(index) for index in (0, 5, 29)]
        assert pairs[0][0] == PICTURE and manifest.is_remote
        assert served.shards == {"00000.tar": 2, "00001.tar": 1, "00002.tar": 2}
        assert verify(manifest) == []


def test_of_two_at_once_the_second_is_refused(tmp_path: Path) -> None:
    """It names the first one; nothing of either stays but index and manifest."""
    tar = str(_write(tmp_path / "a.tar", _captioned(0, 3)))
    out = tmp_path / "index"
    with (
        alone(out, "train"),
        pytest.raises(ValueError, match=rf"another build \(process {os.getpid()} on .*\) is making 'train'"),
    ):
        index_tars([tar], out, "train", replace=True)
    index_tars([tar], out, "train")
    assert {path.name for path in out.iterdir()} == {"train.index.npy", "train.manifest.json"}


def test_words_are_cut_by_their_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tars, "_MOST_WORDS", 6)  # a small picture of dog 0 1 2
    _write(tmp_path / "tars/0.tar", _captioned(0, 10))
    arguments = ["index", str(tmp_path / "tars/*.tar"), "--out", str(tmp_path), "--workers", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "the 6 words that occur at least 4 times" in printed
    assert printed.endswith(f"train on it: visft train --data {tmp_path}\n")
    manifest = Manifest.load(tmp_path, "train")
    assert manifest.vocabulary == {"a": 10, "small": 10, "picture": 10, "of": 10, "dog": 10, "0": 4}
    config = resolve(
        stage=1,
        model="debug",
        settings=["visft.tasks=captioning", "visft.tasks.captioning.vocabulary.min_count=3"],
    ).visft
    with pytest.raises(ValueError, match=r"vocabulary\.min_count=4"):
        vocabulary_of(config, {"train": TrainingSet(manifest, ("captioning",))})
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["captioning", "detection"])
def test_a_training_on_tars_of_others(task: str, tmp_path: Path) -> None:
    """Two ranks, killed and resumed: bit for bit the run on shards that were built of the same samples."""
    built = make_split(tmp_path, 12)
    index_tars(
        [f"{built.root}/*.tar"],
        tmp_path / "index",
        "toy",
        categories=tmp_path / "tree/instances.json" if task == "detection" else None,
        workers=2,
    )
    extra: dict[str, object] = {"visft.tasks": task, "visft.data.train": "toy", "visft.run.eval_every": 0}
    if task == "captioning":
        extra["visft.tasks.captioning.vocabulary.min_count"] = 1
    undisturbed = tmp_path / "undisturbed"
    run_ranks(["launchers/train.py", *command(Path(built.root), undisturbed, extra=extra)])
    words = ["launchers/train.py", *command(tmp_path / "index", tmp_path / "resumed", extra=extra)]
    processes = start_ranks(words)
    wait_for(processes[0], "step 5/")
    processes[0].kill()
    finish(processes)
    run_ranks(words)
    assert steps_recorded(tmp_path / "resumed") == list(range(1, STEPS + 1))
    assert equal(tmp_path / "resumed", undisturbed)


def test_a_folder_without_splits_is_refused_with_the_way_to_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(tmp_path)]) == 2
    assert "holds no finished split: visft shards FOLDER makes them" in capsys.readouterr().err
