"""Index and manifest come back from the shards alone, to the last byte where that can be known."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import simplejpeg
from coco_tree import write_tree

from tools.make_shards import main
from visft_ds.data.manifest import Manifest, manifest_digest
from visft_ds.data.shards import ShardReader
from visft_ds.shards.build import Options, build
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.repair import repair
from visft_ds.shards.verify import verify

FILES = ("toy.index.npy", "toy.manifest.json")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """With something on the quarantine list and among the findings."""
    folder = tmp_path_factory.mktemp("split")
    tree = write_tree(folder / "tree")
    (tree.images / "picture.3.jpg").unlink()
    (tree.images / "picture.5.jpg").write_bytes(b"<html>")
    assert main(["build", *tree.arguments(folder / "shards"), "--max-count", "4"]) == 0
    return Manifest.load(folder / "shards", "toy")


@pytest.fixture
def copy(split: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split.root, tmp_path / "copy"))


def _original(copy: Path, split: Manifest) -> bool:
    return all((copy / name).read_bytes() == (split.root / name).read_bytes() for name in FILES)


@pytest.mark.parametrize("damage", ["missing", "flipped", "cut", "another version's"])
def test_a_lost_index_comes_back_byte_for_byte(copy: Path, split: Manifest, damage: str) -> None:
    path = copy / "toy.index.npy"
    data = path.read_bytes()
    changed = {"flipped": data[:-1] + b"\xff", "cut": data[:150], "another version's": data.replace(b"width", b"wight")}
    path.unlink() if damage == "missing" else path.write_bytes(changed[damage])
    dry = repair(copy, "toy", dry_run=True)
    assert dry.written == ("toy.index.npy",) and path.exists() == (damage != "missing")
    assert damage == "missing" or path.read_bytes() == changed[damage], "a dry run writes nothing"
    done = repair(copy, "toy", workers=2)
    assert (done.problems, done.original, done.written, done.notes) == ((), True, ("toy.index.npy",), ())
    assert _original(copy, split) and verify(copy, "toy") == []
    assert repair(copy, "toy").written == (), "then there is nothing left to do"


@pytest.mark.parametrize("damaged", ['"count": 4', '"bytes": 20480', '"red": 20', '"images": 10'])
def test_a_damaged_manifest_is_proved_to_be_the_original(copy: Path, split: Manifest, damaged: str) -> None:
    """What the tars say is put right; then its own digest fits, which it would not if anything else were changed."""
    path = copy / "toy.manifest.json"
    text = path.read_text()
    assert damaged in text
    path.write_text(text.replace(damaged, damaged[:-1] + "7", 1))
    assert repair(copy, "toy").original and _original(copy, split)


def test_what_nothing_proves_is_said(copy: Path, split: Manifest) -> None:
    path = copy / "toy.manifest.json"
    path.write_text(path.read_text().replace("thing 8", "thing 9"))
    done = repair(copy, "toy")
    assert not done.original and done.written == ("toy.manifest.json",)
    assert "options and sources are those in the records of the build" in done.notes
    assert any("names of categories are those of the old manifest, whose digest does not fit" in n for n in done.notes)
    assert verify(copy, "toy") == []
    repaired = Manifest.load(copy, "toy")
    assert (repaired.options, repaired.sources) == (split.options, split.sources)


def test_without_a_manifest_the_rest_is_marked_as_unknown(copy: Path, split: Manifest, tmp_path: Path) -> None:
    for name in FILES:
        (copy / name).unlink()
    shutil.rmtree(copy / ".toy.build")
    done = repair(copy, "toy")
    assert not done.original and sorted(done.written) == sorted(FILES)
    repaired = Manifest.load(copy, "toy")
    unknown = ["categories", "findings", "options", "quarantine", "sources"]
    assert repaired.options == {"tokenizer": split.options["tokenizer"], "unknown": unknown}
    assert [category.name for category in repaired.categories] == ["category 3", "category 8", "category 13"]
    assert (copy / FILES[0]).read_bytes() == (split.root / FILES[0]).read_bytes(), "the index is known in full"
    assert dict(repaired.counts) == {**split.counts, "quarantined": 0}
    assert repaired.vocabulary == split.vocabulary and repaired.shards == split.shards
    assert verify(copy, "toy") == []
    instances = split.root.parent / "tree/instances.json"
    assert main(["repair", str(copy), "--split", "toy", "--instances", str(instances)]) == 0
    assert Manifest.load(copy, "toy").categories == split.categories
    assert Manifest.load(copy, "toy").options["unknown"] == unknown[1:]
    assert Manifest.load(copy, "toy").fingerprint == split.fingerprint, "checkpoints still know it"


def test_a_damaged_shard_is_never_blessed(copy: Path, split: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    """Not even where nothing but the record or the old index speaks against it."""
    row = split.index[5]
    key = f"{row['image_id']:012d}"
    path = copy / split.shards[row["shard"]].name
    data = bytearray(path.read_bytes())
    data[row["image_offset"] + 99] ^= 1
    path.write_bytes(data)
    before = {name: (copy / name).read_bytes() for name in FILES}
    for lost, message in (("", "describes other shards"), (FILES[1], "the build recorded"), (".toy.build", key)):
        if lost == ".toy.build":
            shutil.rmtree(copy / lost)
        elif lost:
            (copy / lost).unlink()
        assert main(["repair", str(copy), "--split", "toy"]) == 1
        output = capsys.readouterr().out
        assert message in output and path.name in output and "nothing was written" in output
        assert "build ... --split toy" in output and "--replace" in output
    assert (copy / FILES[0]).read_bytes() == before[FILES[0]] and not (copy / FILES[1]).exists()
    assert main(["repair", str(copy), "--split", "toy", "--replace", "--quiet"]) == 0


def test_a_build_that_was_interrupted_is_not_taken_for_a_split(copy: Path) -> None:
    (copy / FILES[1]).unlink()
    (copy / "toy-000002.tar").rename(copy / ".toy.build/toy-000002.tar.tmp")
    problems = repair(copy, "toy").problems
    assert [problem.file for problem in problems] == [".toy.build/toy-000002.tar.tmp"]
    (copy / ".toy.build/toy-000002.tar.tmp").unlink()
    assert any("nothing tells how many shards there were" in note for note in repair(copy, "toy").notes)


def test_a_split_of_an_older_version_is_brought_up_to_date(copy: Path, split: Manifest) -> None:
    fields = orjson.loads((copy / FILES[1]).read_bytes()) | {"version": 1}
    (copy / FILES[1]).write_bytes(orjson.dumps({**fields, "sha256": manifest_digest(fields)}))
    (copy / FILES[0]).unlink()
    assert repair(copy, "toy").problems == () and _original(copy, split)


def test_pictures_that_were_encoded_anew_keep_their_hashes(tmp_path: Path) -> None:
    """They were hashed before; where the records of the build are gone too, a repair says that it could not know."""
    tree = write_tree(tmp_path / "tree", 4)
    out = tmp_path / "out"
    build(Options(tree.images, tree.instances, tree.captions, out, "toy", reencode=Reencoding(40, 20)))
    assert verify(out, "toy", decode=True) == []
    before = {name: (out / name).read_bytes() for name in FILES}
    (out / FILES[0]).unlink()
    assert repair(out, "toy").original and (out / FILES[0]).read_bytes() == before[FILES[0]]
    (out / FILES[0]).unlink()
    shutil.rmtree(out / ".toy.build")
    done = repair(out, "toy")
    assert done.problems == () and any("before it re-encoded them" in note for note in done.notes)
    assert verify(out, "toy") == []
    again = Manifest.load(out, "toy")
    assert again.fingerprint == orjson.loads(before[FILES[1]])["fingerprint"] and not again.options.get("unknown")


def test_the_keys_that_are_lost_are_named(copy: Path, split: Manifest) -> None:
    first, second = split.index[0], split.index[1]
    data = bytearray((copy / "toy-000000.tar").read_bytes())
    data[first["image_offset"] - 512 + 3] ^= 1
    data[second["label_offset"] - 512 + 130] ^= 1
    third = split.index[2]
    data[third["image_offset"] + 9] ^= 1  # nothing but the old index knows
    (copy / "toy-000000.tar").write_bytes(data)
    (copy / "toy-000001.tar").unlink()
    problems = repair(copy, "toy").problems
    assert [problem.file for problem in problems[:1]] == ["toy-000001.tar"] and problems[0].message == "missing"
    keys = [(f"{row['image_id']:012d}",) for row in (first, second, third)]
    assert [problem.keys for problem in problems[1:]] == keys


def _foreign(path: Path, samples: list[tuple[str, bytes, dict[str, Any]]], kind: int, extension: str = "jpg") -> None:
    with tarfile.open(path, "w", format=kind) as tar:
        for key, image, label in samples:
            for name, data in ((f"{key}.{extension}", image), (f"{key}.json", orjson.dumps(label))):
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.uid, info.uname = len(data), 1_700_000_000, 1000, "somebody"
                # What webdataset's own writer does: a time with a fraction, which needs an extended header.
                info.mtime = 1_700_000_000.25 if kind == tarfile.PAX_FORMAT else info.mtime  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(data))


def _sample(number: int) -> tuple[str, bytes, dict[str, Any]]:
    pixels = simplejpeg.encode_jpeg(np.full((16, 20, 3), number, dtype=np.uint8))
    box = {"id": number, "bbox": [1, 1, 5, 6], "category_id": 2, "iscrowd": 0, "area": 30}
    label = {"image_id": number, "file_name": f"{number}.jpg", "width": 20, "height": 16, "tags": ["x"]}
    return f"photo{number}", pixels, {**label, "annotations": [box], "captions": ["A caption."]}


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_get_index_and_manifest(tmp_path: Path, kind: int) -> None:
    name = "a" * (120 if kind == tarfile.GNU_FORMAT else 20)  # beyond 100 characters GNU tar adds a header
    samples = [_sample(number) for number in range(1, 4)]
    samples[1] = (name, *samples[1][1:])
    _foreign(tmp_path / "val-000000.tar", samples, kind, "jpeg")
    done = repair(tmp_path, "val")
    assert done.problems == () and done.images == 3
    assert verify(tmp_path, "val", decode=True) == []
    manifest = Manifest.load(tmp_path, "val")
    assert "writer" in manifest.options["unknown"]
    with ShardReader(manifest) as reader:
        for index, (_, image, label) in enumerate(samples):
            stored_image, stored_label = reader.read(index)
            assert stored_image == image and orjson.loads(stored_label or b"") == label
    assert repair(tmp_path, "val").written == ()


def test_labels_of_another_form_are_refused_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [_sample(1), ("photo2", _sample(2)[1], {"objects": []}), _sample(3)]
    samples[2][2]["annotations"][0].pop("area")
    _foreign(tmp_path / "val-000000.tar", samples, tarfile.USTAR_FORMAT)
    assert main(["repair", str(tmp_path), "--split", "val", "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert [problem["keys"] for problem in problems] == [["photo2"], ["photo3"]]
    assert "it has no 'image_id', 'file_name', 'width', 'height', 'annotations', 'captions'" in problems[0]["message"]
    assert "entry 0 of its annotations has no number 'area'" in problems[1]["message"]
    assert not (tmp_path / "val.manifest.json").exists()


def test_what_cannot_be_repaired_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _foreign(tmp_path / "00000.tar", [_sample(1)], tarfile.USTAR_FORMAT)
    assert main(["repair", str(tmp_path), "--split", "val"]) == 2
    assert "no shards val-000000.tar, ...; tars there: 00000.tar" in capsys.readouterr().err
    _foreign(tmp_path / "val-000000.tar", [_sample(1)], tarfile.USTAR_FORMAT)
    shutil.copy(tmp_path / "val-000000.tar", tmp_path / "val-000001.tar")
    problems = repair(tmp_path, "val").problems
    expected = "1 of its samples are twice in the split: 000000000001"
    assert [(problem.file, problem.message) for problem in problems] == [
        ("val-000000.tar", expected),
        ("val-000001.tar", expected),
    ]
