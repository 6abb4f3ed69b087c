"""Whatever is done to finished shards, `verify` reports it, says where, and never falls over."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from tests.coco_tree import write_tree
from tools.make_shards import main
from visft_ds.data.manifest import Manifest, manifest_digest
from visft_ds.data.shards import ShardReader
from visft_ds.shards.shard_content import Problem, read_shard
from visft_ds.shards.shard_writer import TarWriter
from visft_ds.shards.tar_scan import BLOCK, Damage, Member, TarScan
from visft_ds.shards.verify import VerifyProgress, verify

KEY = "000000001035"  # of the first sample


@pytest.fixture
def copy(split: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(split.root, tmp_path / "copy"))


def _scan(data: bytes, **options: Any) -> list[Member | Damage]:
    return list(TarScan(io.BytesIO(data), len(data), **options))


def _messages(problems: Sequence[Problem]) -> str:
    return "\n".join(f"{problem.file}: {problem.message}" for problem in problems)


def _with_checksum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def test_every_byte_of_a_header_counts(split: Manifest) -> None:
    """Also where the header's own checksum is made to fit: what is left then is compared with what is written."""
    whole = (split.root / "toy-000000.tar").read_bytes()
    members = [found for found in _scan(whole) if isinstance(found, Member)]
    assert [member.name for member in members[:2]] == [f"{KEY}.jpg", f"{KEY}.json"] and len(members) == 8
    small = whole[: members[1].header] + bytes(2 * BLOCK)  # the first image and a proper end
    assert [type(found) for found in _scan(small)] == [Member]
    first = members[0].name, members[0].payload
    for place in range(BLOCK):
        for fixed in (False, True):
            header = bytearray(small[:BLOCK])
            header[place] ^= 1
            if fixed:
                _with_checksum(header)
            if header == small[:BLOCK]:
                continue  # a byte of the checksum, put right again
            found = _scan(bytes(header) + small[BLOCK:])
            # Another name or size with a checksum that fits is valid: that it is not the right one the index tells.
            other = any(isinstance(one, Member) and (one.name, one.payload) != first for one in found)
            assert other or any(isinstance(one, Damage) for one in found), (place, fixed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a symbolic link; only regular files"),
        ({"type": tarfile.LNKTYPE, "linkname": "a"}, "is a hard link; only regular files"),
        ({"type": tarfile.DIRTYPE}, "is a folder; only"),
        ({"type": tarfile.CHRTYPE}, "is a character device; only"),
        ({"linkname": "x"}, "valid, but not the one that was written"),
        ({"mtime": 5}, "valid, but not the one that was written"),
        ({"uid": 1000, "uname": "me"}, "valid, but not the one that was written"),
        ({"mode": 0o777}, "valid, but not the one that was written"),
        ({"name": "/etc/1.jpg"}, "'/etc/1.jpg' is not allowed"),
        ({"name": "../1.jpg"}, "'../1.jpg' is not allowed"),
        ({"name": "a.b.jpg"}, "'a.b.jpg' is not allowed"),
        ({"name": "1.pyd"}, "'1.pyd' is not allowed"),
        ({"name": "1.pickle"}, "'1.pickle' is not allowed"),
        ({"name": "__init__.py"}, "'__init__.py' is not allowed"),
        ({"name": "1"}, "'1' is not allowed"),
        ({"name": "\x1b[2J.jpg"}, r"'\x1b[2J.jpg' is not allowed"),
    ],
)
def test_only_plain_images_and_labels_are_allowed(
    tmp_path: Path, split: Manifest, change: dict[str, Any], message: str
) -> None:
    info = tarfile.TarInfo(f"{KEY}.jpg")
    for name, value in change.items():
        setattr(info, name, value)
    whole = (split.root / "toy-000000.tar").read_bytes()
    path = tmp_path / "toy-000000.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + whole)
    content = read_shard(path)
    assert message in _messages(content.problems)
    assert len(content.rows) == 4, "the samples behind it are still found"


def _shard(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    with open(path, "wb") as file:
        tar = TarWriter(file)
        for name, data in members:
            tar.add(name, data)
        tar.close()
    return path


def _samples(split: Manifest, count: int = 3) -> list[list[tuple[str, bytes]]]:
    with ShardReader(split) as reader:
        samples = []
        for index in range(count):
            image, label = reader.read(index)
            key = f"{reader.row(index)['image_id']:012d}"
            samples.append([(f"{key}.jpg", image or b""), (f"{key}.json", label or b"")])
    return samples


def _edit(label: bytes, **changes: Any) -> bytes:
    return orjson.dumps({**orjson.loads(label), **changes})


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda a, b, c: [*a, *b, *a, *c], "this key is there twice"),
        (lambda a, b, c: [a[0], b[0], a[1], b[1], *c], "no label directly behind it"),
        (lambda a, b, c: [*a, b[1], b[0], *c], "its image does not come directly before it"),
        (lambda a, b, c: [*a, b[0], *c], "no label directly behind it"),
        (lambda a, b, c: [*a, *b, c[0]], "no label directly behind it"),
        (lambda a, b, c: [a[0], (a[1][0], _edit(a[1][1], image_id=5)), *b], "it says image_id 5, which does not fit"),
        (lambda a, b, c: [a[0], (a[1][0], a[1][1][:-1]), *b], "it is not valid JSON"),
        (lambda a, b, c: [a[0], (a[1][0], b"[]"), *b], "it is no JSON object"),
        (lambda a, b, c: [a[0], (a[1][0], b"{}"), *b], "it has no 'image_id', 'file_name', 'width'"),
        (lambda a, b, c: [a[0], (a[1][0], _edit(a[1][1], captions=[3])), *b], "its captions are not all strings"),
        (lambda a, b, c: [a[0], (a[1][0], _edit(a[1][1], width=5)), *b], "pixels, the label says 5 x"),
        (lambda a, b, c: [(a[0][0], b"GIF89a"), a[1], *b], "neither JPEG nor PNG"),
        (lambda a, b, c: [(a[0][0].replace("jpg", "png"), a[0][1]), a[1], *b], "named .png, but its content is jpg"),
    ],
)
def test_samples_are_images_with_their_labels(
    split: Manifest, tmp_path: Path, arrange: Callable[..., list[tuple[str, bytes]]], message: str
) -> None:
    content = read_shard(_shard(tmp_path / "toy-000000.tar", arrange(*_samples(split))))
    assert message in _messages(content.problems)
    assert content.rows, "the others are read"


def test_a_shard_made_again_is_told_from_a_damaged_one(copy: Path, split: Manifest) -> None:
    """Whole, but with other content than the index describes: no byte of it is damaged, the index is older."""
    first, second, third = _samples(split)
    _shard(copy / "toy-000000.tar", [*third, *first, *second])
    problems = verify(copy, "toy")
    assert "a whole shard, but not the one that index and manifest describe (0 of their 4 samples" in _messages(
        problems
    )
    assert all("damaged" not in problem.message for problem in problems)
    assert {problem.file for problem in problems} == {"toy-000000.tar"}


def test_times_of_files_do_not_matter(copy: Path) -> None:
    os.utime(copy / "toy.index.npy", (1, 1))
    os.utime(copy / "toy.manifest.json", (2, 2))
    assert verify(copy, "toy") == []


def _write_manifest(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / "toy.manifest.json"
    fields = orjson.loads(path.read_bytes())
    change(fields)
    path.write_bytes(orjson.dumps({**fields, "sha256": manifest_digest(fields)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["counts"].update(crowds=7), "it counts 7 crowds, the shards hold 1"),
        (lambda m: m["vocabulary"].update(red=1), "1 words are counted otherwise in the captions: red"),
        (lambda m: m["shards"].pop(), "not part of this split"),
        (lambda m: m["shards"].reverse(), "its shard 0 is named 'toy-000002.tar'"),
        (lambda m: m["shards"][0].update(name="../toy-000000.tar"), "is named '../toy-000000.tar'"),
        (lambda m: m["shards"][0].update(count=3), "its rows are not those of the shards"),
        (lambda m: m.update(split="other"), "it is the manifest of 'other'"),
        (lambda m: m.pop("options"), "options is missing"),
        (lambda m: m["categories"].pop(), "its content does not give the fingerprint"),
        (lambda m: m.update(fingerprint="0"), "its content does not give the fingerprint"),
    ],
)
def test_a_forged_manifest_is_found_though_its_digest_fits(
    copy: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    _write_manifest(copy, change)
    assert message in _messages(verify(copy, "toy"))


def test_a_picture_that_only_decoding_proves_bad(copy: Path, split: Manifest) -> None:
    """Cut, but with checksums that fit; training would stop at it."""
    (image, label), *rest = _samples(split, 4)
    half = _shard(copy / "toy-000000.tar", [(image[0], image[1][:-60]), label, *(one for pair in rest for one in pair)])
    assert read_shard(half).problems == []
    problems = read_shard(half, decode=True).problems
    assert len(problems) == 1 and problems[0].keys == (KEY,) and problems[0].offset == BLOCK


def test_left_overs_and_splits_without_a_manifest_are_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / ".toy.build/toy-000002.tar.tmp").write_bytes(b"half")
    shutil.copy(copy / "toy-000000.tar", copy / "lost-000000.tar")
    assert main(["verify", str(copy)]) == 1
    output = capsys.readouterr().out
    assert ".toy.build/toy-000002.tar.tmp: left over from an interrupted build (4 bytes)" in output
    assert "lost.manifest.json: " in output and "build ... --split lost` again" in output
    assert main(["verify", str(copy), "--split", "toy", "--json", "--quiet"]) == 1
    problems = json.loads(capsys.readouterr().out)["toy"]
    assert [problem["file"] for problem in problems] == [".toy.build/toy-000002.tar.tmp"] and problems[0]["fix"]


def test_the_exit_status_tells_clean_damaged_and_unusable(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), "--decode", "--workers", "2"]) == 0
    assert capsys.readouterr().out == "toy: every byte is as it was made\n"
    for arguments in (["nowhere"], [str(copy), "--split", "other"], [str(copy), "--workers", "0"]):
        assert main(["verify", *arguments]) == 2
        assert capsys.readouterr().err.startswith("shards: ")
    os.truncate(copy / "toy-000001.tar", 3000)
    assert main(["verify", str(copy), "--limit", "2"]) == 1
    output = capsys.readouterr().out
    assert "more: --limit or --json shows them" in output and "build ... --split toy" in output


def test_problems_name_key_and_offset_whatever_the_number_of_workers(copy: Path, split: Manifest) -> None:
    row = split.index[6]
    for shard, offset in (("toy-000001.tar", int(row["image_offset"]) + 50), ("toy-000002.tar", 0)):
        data = bytearray((copy / shard).read_bytes())
        data[offset] ^= 4
        (copy / shard).write_bytes(data)
    seen: list[int] = []

    def watch(progress: VerifyProgress) -> None:
        seen.append(progress.bytes)
        assert progress.bytes <= progress.total_bytes == sum(shard.bytes for shard in split.shards)

    problems = verify(copy, "toy", on_progress=watch)
    assert problems == verify(copy, "toy", workers=3)
    places = [(problem.file, problem.keys, problem.offset) for problem in problems if problem.keys]
    assert places == [
        ("toy-000001.tar", (f"{row['image_id']:012d}",), row["image_offset"]),
        ("toy-000002.tar", (f"{split.index[8]['image_id']:012d}",), 0),
    ]
    assert seen == sorted(seen) and seen[-1] == sum(shard.bytes for shard in split.shards)


def test_shards_are_read_even_where_the_manifest_is_lost(copy: Path) -> None:
    (copy / "toy.manifest.json").unlink()
    assert [problem.file for problem in verify(copy, "toy")] == ["toy.manifest.json"]
    os.truncate(copy / "toy-000001.tar", 3000)
    assert {problem.file for problem in verify(copy, "toy", workers=2)} == {"toy.manifest.json", "toy-000001.tar"}


@pytest.mark.parametrize("file", ["toy-000001.tar", "toy.index.npy", "toy.manifest.json"])
def test_random_damage_is_always_reported_and_never_a_crash(copy: Path, file: str) -> None:
    path = copy / file
    whole = path.read_bytes()
    draw = random.Random(file)
    for _ in range(60):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        length = draw.choice([1, 1, 8, 512, 1500])
        kind = draw.choice(["flip", "zero", "random", "cut", "insert", "twice"])
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif kind == "random":
            data[place : place + length] = draw.randbytes(len(data[place : place + length]))
        elif kind == "cut":
            del data[place:]
        elif kind == "insert":
            data[place:place] = draw.randbytes(length)
        else:
            data[place:place] = data[place : place + length]
        same = data == whole or (file.endswith(".json") and _same_json(bytes(data), whole))
        path.write_bytes(data)
        assert bool(verify(copy, "toy", decode=True)) != same, (kind, place, length)


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_of_other_programs_stay_verifiable(copy: Path, split: Manifest, kind: int) -> None:
    """Version 0.1 gave them an index and a manifest with a mark, which readers still open."""
    name = "a" * (120 if kind == tarfile.GNU_FORMAT else 20)  # beyond 100 characters GNU tar adds a header
    path = copy / "toy-000000.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        for key, sample in zip((KEY, name, "b", "c"), _samples(split, 4), strict=True):
            for member, data in sample:
                info = tarfile.TarInfo(f"{key}.{member.rpartition('.')[2]}")
                # What webdataset's own writer does: a time with a fraction, which needs an extended header.
                info.size, info.uid, info.mtime = len(data), 1000, 1_700_000_000.25 if kind == tarfile.PAX_FORMAT else 9  # type: ignore[assignment]
                tar.addfile(info, io.BytesIO(data))
    content = read_shard(path, plain=True)
    assert content.problems == [] and len(content.rows) == 4
    index = np.array(split.index)
    for place, row in enumerate(content.rows):
        for column, value in row.items():
            index[column][place] = value
    np.save(copy / "toy.index.npy", index)

    def change(fields: dict[str, Any]) -> None:
        fields["shards"][0].update(bytes=content.bytes, sha256=content.sha256)
        data = (copy / "toy.index.npy").read_bytes()
        fields["index"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    _write_manifest(copy, change)
    assert "not the one that was written" in _messages(verify(copy, "toy"))
    _write_manifest(copy, lambda fields: fields["options"].update(unknown=["writer"]))
    assert verify(copy, "toy", decode=True) == []


def test_the_same_build_mends_what_verify_finds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flipped byte, a lost shard, a lost index and a cut manifest of a finished split; whole shards are kept."""
    tree = write_tree(tmp_path / "tree")
    out = tmp_path / "out"
    command = ["build", *tree.arguments(out), "--max-count", "2", "--quiet"]
    assert main(command) == 0
    whole = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    data = bytearray(whole["toy-000001.tar"])
    data[2000] ^= 1
    (out / "toy-000001.tar").write_bytes(data)
    (out / "toy-000003.tar").unlink()
    assert main(["verify", str(out)]) == 1
    said = capsys.readouterr().out
    assert "toy-000001.tar: sha256 is" in said and "toy-000003.tar: missing" in said
    assert "build ... --split toy` again" in said
    assert main(command) == 0 and "made 6 shards (4 were there already)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole
    (out / "toy.index.npy").unlink()
    os.truncate(out / "toy.manifest.json", 500)
    assert main(["verify", str(out)]) == 1 and "build ... --split toy` again" in capsys.readouterr().out
    assert main(command) == 0 and "(6 were there already)" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == whole
    assert main(["verify", str(out)]) == 0


def _same_json(first: bytes, second: bytes) -> bool:
    """Blanks between the parts of a manifest mean nothing."""
    try:
        return bool(orjson.loads(first) == orjson.loads(second))
    except orjson.JSONDecodeError:
        return False
