"""`tools/make_shards.py` from outside: the same bytes however it runs or is stopped, and nothing is mixed or
lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simplejpeg
from faster_coco_eval import mask as coco_mask

from tests.coco_tree import NO_PHOTOS, PHOTOS, Tree, make_split, write_tree
from tests.ranks import python
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.shards import Manifest, ShardReader, verify
from visft_ds.shards.build import alone, build
from visft_ds.shards.cli import main
from visft_ds.shards.options import Options

ROOT = Path(__file__).resolve().parents[2]
SMALL = 20_480  # bytes of a shard: a few samples


def options_of(tree: Tree, out: Path, **changes: Any) -> Options:
    given = {
        "images": tree.images,
        "instances": tree.instances,
        "captions": tree.captions,
        "out": out,
        "name": "toy",
    }
    return Options(**{**given, "max_size": SMALL, **changes})


def digests(root: Path) -> dict[str, str]:
    finished = [path for path in root.iterdir() if path.is_file() and ".tmp-" not in path.name]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in finished}


def times(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in root.glob("*.tar")}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return write_tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return write_tree(tmp_path_factory.mktemp("coco"), 240)


@pytest.fixture(scope="module")
def expected(large: Tree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference")
    build(options_of(large, out))
    return digests(out)


def _start(tree: Tree, out: Path) -> subprocess.Popen[str]:
    """Start a build and wait until it is in the middle: some shards are finished, most are not."""
    tool = [sys.executable, str(ROOT / "tools/make_shards.py")]
    arguments = [*tool, "build", *tree.arguments(out), f"--max-size={SMALL}", "--workers=2"]
    # A suite that runs in the background of a shell has SIGINT ignored, and its children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 600
    while len(list(out.glob("toy-*.tar"))) < 4:
        assert time.monotonic() < deadline and process.poll() in (None, 0)
        time.sleep(0.001)
    return process


def _interrupted(tree: Tree, folder: Path, end: signal.Signals, shards: int) -> tuple[Path, int, str]:
    """Folder, exit status and message of a build that ended before it had so many shards.

    On a busy machine a build may be done before anybody looks: then another one is interrupted.
    """
    for attempt in range(20):
        out = folder / str(attempt)
        process = _start(tree, out)
        process.send_signal(end)
        _, message = process.communicate(timeout=600)
        if len(digests(out)) < shards:
            return out, process.returncode, message
    raise AssertionError("no build was interrupted in the middle")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    large: Tree, expected: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    out, status, message = _interrupted(large, tmp_path, end, len(expected) - 2)
    if end == signal.SIGINT:
        assert status == 130 and "the same command continues" in message
    left, before = digests(out), times(out)
    assert len(left) >= 4 and left.items() <= expected.items(), (
        "a file with its final name is always complete"
    )
    build(options_of(large, out))
    assert digests(out) == expected
    # A kill may come between a shard and its record; that one is made again.
    after = times(out)
    assert len(before) - 2 <= sum(after[name] == stamp for name, stamp in before.items())
    assert not list(out.rglob(".*.tmp-*"))


def test_any_number_of_workers_writes_the_same_bytes(
    large: Tree, expected: dict[str, str], tmp_path: Path
) -> None:
    for workers in (2, 5):
        build(options_of(large, tmp_path / str(workers)), workers=workers)
        assert digests(tmp_path / str(workers)) == expected


def test_the_tool_runs_in_its_own_folder(tree: Tree, tmp_path: Path) -> None:
    """tools/profile.py must not stand in for the standard library's module, which torch imports."""
    assert (
        main(["build", *tree.arguments(tmp_path / "out"), "--dry-run"]) == 0
        and not (tmp_path / "out").exists()
    )
    printed = python("make_shards.py", "build", *tree.arguments(tmp_path / "out"), folder=ROOT / "tools")
    assert "toy: built 1 shard(s), 0.1 MB, " in printed and "1 x crowd" in printed


def test_a_changed_picture_changes_its_shard_only(tree: Tree, tmp_path: Path) -> None:
    options = options_of(tree, tmp_path / "out")
    build(options)
    path, before, stamps = tree.images / "picture.3.jpg", digests(options.out), times(options.out)
    path.write_bytes(simplejpeg.encode_jpeg(255 - simplejpeg.decode_jpeg(path.read_bytes()), quality=60))
    build(options)
    after = digests(options.out)
    assert sum(before[name] != after[name] for name in after if name.endswith(".tar")) == 1
    assert sum(stamps[name] == stamp for name, stamp in times(options.out).items()) == len(stamps) - 1
    for spoil in (Path.unlink, lambda shard: shard.write_bytes(bytes(shard.stat().st_size))):
        spoil(options.out / "toy-000001.tar")
        build(options)
        assert digests(options.out) == after, "a lost or damaged shard is made again"


def test_a_failure_while_writing_leaves_only_whole_files(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk in a rebuild: the old manifest must be gone before the first shard that it does not
    describe.
    """
    options = options_of(tree, tmp_path / "out")
    build(options)
    before = digests(options.out)
    for picture in tree.images.iterdir():
        os.utime(picture, (1, 1))  # taken for a new file
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name == "toy-000001.tar":
            raise OSError(28, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            build(options)
    assert not list(options.out.rglob(".*.tmp-*"))
    with pytest.raises(ValueError, match=r"holds no shards .toy\.manifest\.json."):
        Manifest.load(options.out, "toy")
    build(options)
    assert digests(options.out) == before


def test_a_split_built_otherwise_is_not_overwritten(tree: Tree, tmp_path: Path) -> None:
    command = ["build", *tree.arguments(tmp_path / "out")]
    assert main([*command, f"--max-size={SMALL}"]) == 0
    before = digests(tmp_path / "out")
    assert main(command) == 2 and digests(tmp_path / "out") == before
    tree.edit(lambda content: content["annotations"].pop())
    assert main([*command, f"--max-size={SMALL}"]) == 2 and digests(tmp_path / "out") == before
    assert main([*command, "--replace"]) == 0
    assert times(tmp_path / "out").keys() == {"toy-000000.tar"}
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/toy-000000.tar").write_bytes(b"of another program")
    assert (
        main(["build", *tree.arguments(tmp_path / "theirs")]) == 2 and len(digests(tmp_path / "theirs")) == 1
    )
    assert verify(Manifest.load(tmp_path / "out", "toy")) == []


def test_of_two_builds_at_once_the_second_is_refused(tree: Tree, tmp_path: Path) -> None:
    """Else both write the same temporary files, and one of them ends with "No such file"."""
    options = options_of(tree, tmp_path / "out")
    build(options)
    before = digests(options.out)
    with (
        alone(options.out, "toy"),
        pytest.raises(ValueError, match=r"another build \(process .*\) is making 'toy'"),
    ):
        build(options)
    assert digests(options.out) == before
    build(replace(options, name="other"))
    build(options)
    assert before.items() <= digests(options.out).items()


def test_shards_stay_below_the_size_asked_for(tmp_path: Path) -> None:
    manifest = make_split(tmp_path, max_size=20_480)
    # Tars are multiples of 10,240 bytes: the limit is met exactly, not merely undercut.
    assert {shard.bytes for shard in manifest.shards[:-1]} == {20_480}
    assert len(manifest.shards) > 2 and manifest.shards[-1].bytes <= 20_480


def test_limit_order_and_chosen_images(tree: Tree, tmp_path: Path) -> None:
    whole = make_split(tmp_path / "b", seed=3).index["image_id"].tolist()
    assert make_split(tmp_path / "c", seed=3, limit=5).index["image_id"].tolist() == whole[:5]
    assert sorted(whole) != whole != make_split(tmp_path / "d").index["image_id"].tolist()
    chosen = tmp_path / "ids.txt"
    chosen.write_text("1007\n\npicture.3.jpg\n1077\n")
    made = build(options_of(tree, tmp_path / "out", ids=chosen))
    assert sorted(made.index["image_id"].tolist()) == [1007, 1021, 1077]
    chosen.write_text("1007\n9999\n")
    with pytest.raises(ValueError, match=r"1 of 2 entries match no image: \['9999'\]"):
        build(options_of(tree, tmp_path / "none", ids=chosen))
    assert len(build(options_of(tree, tmp_path / "out", ids=None), replace=True)) == 12


def test_verify_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_split(tmp_path).root
    assert main(["info", str(root)]) == 0
    printed = capsys.readouterr().out
    assert (
        "3 shard(s)" in printed
        and "12 images" in printed
        and "3 categories: 3 thing 3, 8 thing 8, 13" in printed
    )
    assert main(["verify", str(root)]) == 0
    shard = Path(root, "toy-000001.tar")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert main(["verify", str(root), "--split", "toy"]) == 1
    assert "damaged: toy-000001.tar" in capsys.readouterr().out
    os.truncate(shard, 3000)
    assert main(["verify", str(root)]) == 2


@pytest.mark.parametrize(
    ("extra", "word"),
    [
        (["--images", "/nowhere"], "/nowhere"),
        (["--instances", __file__], "test_build.py"),
        (["--split", "a/b"], "a/b"),
        (["--workers", "0"], "--workers"),
        (["--out", "s3://bucket/shards"], "s3://bucket/shards: shards are built in a local folder"),
        (["--out", __file__], "is a file"),
    ],
)
def test_wrong_usage_is_one_line(
    tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], word: str
) -> None:
    assert main(["build", *tree.arguments(tmp_path), *extra]) == 2
    error = capsys.readouterr().err
    assert word in error and error.count("\n") == 1


def _compressed(code: dict[str, Any]) -> str:
    compressed = coco_mask.frPyObjects(code, *code["size"])["counts"]
    assert isinstance(compressed, bytes)
    return compressed.decode()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_photographs_come_back_as_they_were(tmp_path: Path, split: str) -> None:
    labels = PHOTOS / "annotations"
    instances, captions = labels / f"instances_{split}.json", labels / f"captions_{split}.json"
    manifest = build(
        Options(split, PHOTOS / split, instances, captions, out=tmp_path, max_size=2_000_000), workers=2
    )
    assert not manifest.left_out and verify(manifest) == []
    source = json.loads(instances.read_text())
    texts = json.loads(captions.read_text())["annotations"]
    reader = ShardReader(manifest)
    content = coco_dataset(reader)
    stored = [json.loads(reader.read(index, "labels")[1] or b"") for index in range(len(reader))]
    for annotation in source["annotations"]:
        code = annotation["segmentation"]
        if isinstance(code, dict):  # crowds, given as lists of runs, are stored as text
            annotation["segmentation"] = {"size": code["size"], "counts": _compressed(code)}
    assert {a["id"]: a for a in content["annotations"]} == {a["id"]: a for a in source["annotations"]}
    assert len(content["annotations"]) == len(source["annotations"])
    assert content["categories"] == [{"id": c["id"], "name": c["name"]} for c in source["categories"]]
    assert {label["image_id"]: label["captions"] for label in stored} == {
        image["id"]: [text["caption"] for text in texts if text["image_id"] == image["id"]]
        for image in source["images"]
    }
    for position in range(len(reader)):
        image = (PHOTOS / split / stored[position]["file_name"]).read_bytes()
        assert reader.read(position, "images")[0] == image


def test_sides_of_objects_are_those_of_what_is_seen_in_parts_of_the_picture(
    tree: Tree, tmp_path: Path
) -> None:
    """Crowds do not count, and of a box beyond the border only the part inside does."""

    def change(content: dict[str, Any]) -> None:
        sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for number, entry in enumerate(content["annotations"]):
            width, height = sizes[entry["image_id"]]
            entry["bbox"] = [width / 2, 0, width / 2 + 1, height / 4 if number % 2 else height / 2]

    tree.edit(change)
    made = build(options_of(tree, tmp_path / "out"))
    assert made.counts["crowds"] == 1
    # Half of the width, and a half or a quarter of the height: roots of 1/4 and 1/8.
    assert made.object_sides["5"] == made.object_sides["25"] == pytest.approx(0.125**0.5, abs=1e-5)
    assert made.object_sides["75"] == made.object_sides["95"] == pytest.approx(0.5, abs=1e-5)
    assert Manifest.load(tmp_path / "out", "toy").object_sides == made.object_sides
