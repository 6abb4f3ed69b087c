"""`tools/make_shards.py` from outside: the same bytes however it runs or is stopped; odd input is told, not hidden."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from faster_coco_eval import mask as coco_mask
from PIL import Image

from tests.coco_tree import NO_PHOTOS, PHOTOS, Tree, make_split, write_tree
from tools.make_shards import main
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.shards import Manifest, ShardReader, verify
from visft_ds.shards.build import Options, build

ROOT = Path(__file__).resolve().parents[2]
LAST_ID = 1000 + 7 * 15  # of a tree of 16
TOOL = [sys.executable, str(ROOT / "tools/make_shards.py")]


def _run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command in this process: another one takes most of its time to import."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = main([*map(str, arguments)])
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def _digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return write_tree(tmp_path_factory.mktemp("coco"), 240)


@pytest.fixture(scope="module")
def expected(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("reference")
    build(Options(tree.images, tree.instances, tree.captions, out, "toy", max_count=3), workers=1)
    return _digests(out)


def _start(tree: Tree, out: Path) -> subprocess.Popen[str]:
    """Start a build and wait until it is in the middle: some shards are finished, most are not."""
    arguments = [*TOOL, "build", *tree.arguments(out), "--max-count", "3", "--workers", "2"]
    # A suite that runs in the background of a shell has SIGINT ignored, and its children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 600
    while len(list(out.glob("toy-*.tar"))) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_build_goes_on_to_the_same_bytes(
    tree: Tree, expected: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    process = _start(tree, tmp_path)
    process.send_signal(end)
    _, message = process.communicate(timeout=600)
    if end == signal.SIGINT:
        assert process.returncode == 130 and "run the same command again" in message
    left = _digests(tmp_path)
    assert 4 <= len(left) < len(expected) - 2, "the test must interrupt in the middle"
    assert left.items() <= expected.items(), "a file with its final name is always complete"
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    again = _run("build", *tree.arguments(tmp_path), "--max-count", 3, "--json")
    assert again.returncode == 0, again.stderr
    assert _digests(tmp_path) == expected
    # A kill may come between a shard and its record; that one is made again.
    kept = sum(path.stat().st_mtime_ns == mtime for path, mtime in before.items())
    assert len(before) - 2 <= kept == json.loads(again.stdout)["shards_kept"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_any_number_of_workers_writes_the_same_bytes(tree: Tree, expected: dict[str, str], tmp_path: Path) -> None:
    for workers in (2, 5):
        out = tmp_path / str(workers)
        build(Options(tree.images, tree.instances, tree.captions, out, "toy", max_count=3), workers=workers)
        assert _digests(out) == expected


def test_the_tool_runs_in_its_own_folder(tmp_path: Path) -> None:
    """tools/profile.py must not stand in for the standard library's module, which torch imports."""
    tree = write_tree(tmp_path / "tree")
    command = [*TOOL, "build", *tree.arguments(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tools", timeout=600)
    assert result.returncode == 0, result.stderr
    assert "made 1 shards" in result.stdout and "1 x crowd" in result.stdout


def test_verify_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: Any, status: int = 0) -> str:
        assert main([*map(str, arguments)]) == status
        return capsys.readouterr().out

    root = make_split(tmp_path).root
    facts = json.loads(said("info", root, "--json"))
    assert [(split["split"], split["shards"]) for split in facts] == [("toy", 3)]
    run = ["--stage", 1, "--model", "debug", "--data", root, "--set", "visft.data.train=toy"]
    shown = ["info", "--step", 5, "--json", *run, "--set", "visft.shared.batch_size=4"]
    whole = json.loads(said(*shown))["image_ids"]["all"]
    parts = json.loads(said(*shown, "--dp-size", 2, "--accumulation", 2))["image_ids"]
    assert (
        sorted(ids for part in parts.values() for ids in part) == sorted(whole) and len(set(whole)) == len(parts) == 4
    )
    with (root / "toy-000002.tar").open("r+b") as file:
        file.write(b"x")
    assert "toy-000002.tar" in said("verify", root, "--split", "toy", status=1)


def _file(pixels: Any, kind: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def odd(tmp_path: Path) -> Tree:
    """A tree in which every picture but the last four has something odd."""
    tree = write_tree(tmp_path / "tree", 16)
    exif = Image.Exif()
    exif[0x0112] = 6
    names = [f"picture.{place}.jpg" for place in range(16)]
    pixels = {name: np.array(Image.open(tree.images / name)) for name in names}
    turned = np.zeros((pixels[names[11]].shape[1] + 1, pixels[names[11]].shape[0] + 1, 3), np.uint8)
    files = {
        0: b"",
        1: _file(pixels[names[1]], "JPEG")[:-40],
        2: b"<html>404</html>",
        3: _file(pixels[names[3]], "WEBP"),
        4: _file(pixels[names[4]], "PNG"),
        5: _file(pixels[names[5]], "JPEG", "L"),
        6: _file(pixels[names[6]], "JPEG", "CMYK"),
        7: _file(pixels[names[7]], "JPEG", exif=exif),
        8: _file(pixels[names[8]].swapaxes(0, 1), "JPEG", exif=exif),
        11: simplejpeg.encode_jpeg(turned),
    }
    for place, data in files.items():
        (tree.images / names[place]).write_bytes(data)
    (tree.images / names[9]).unlink()

    def change(content: dict[str, Any]) -> None:
        content["images"][10]["file_name"] = "../instances.json"
        sample = {**content["annotations"][0], "image_id": LAST_ID, "area": 3, "bbox": [1, 1, 5, 6]}
        changes = [
            {"bbox": [5, 5, 4, 0]},
            {"bbox": [2, 2, 300, 5]},
            {"category_id": 77},
            {"bbox": [1, 2, 3]},
            {"bbox": [1, 2, 3, "4"]},
            {"image_id": 5},
            {"image_id": [5]},
            {"segmentation": [[1, 1, 2, 2]]},
            {"segmentation": []},
        ]
        content["annotations"] += [{**sample, "id": 500 + place, **one} for place, one in enumerate(changes)]
        without = {name: value for name, value in sample.items() if name != "area"}
        content["annotations"] += [{**without, "id": 600}, {**sample, "id": 600}, {**sample, "id": "x"}]
        content["images"] += [dict(content["images"][-1]), {"id": "x"}]

    tree.edit(change)
    tree.edit(lambda content: content["annotations"].append({"id": 1, "image_id": LAST_ID, "caption": " "}), "captions")
    return tree


def test_everything_odd_is_reported_and_treated_as_said(odd: Tree, tmp_path: Path) -> None:
    result = _run("build", *odd.arguments(tmp_path / "out"), "--allow-drops", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert {finding["kind"]: finding["count"] for finding in report["findings"]} == {
        "image entry malformed": 1,
        "image id twice": 1,
        "annotation malformed": 1,
        "annotation without image": 2,
        "annotation id twice": 1,
        "unknown category": 1,
        "box malformed": 2,
        "box without area": 1,
        "box beyond the image": 1,
        "area missing": 1,
        "polygon under three points": 1,
        "instance without mask": 2,
        "crowd": 1,
        "caption empty": 1,
        "image without instances": 3,
        "EXIF rotation": 1,
        "grey image": 1,
        "CMYK image": 1,
        "PNG named otherwise": 1,
        "quarantined": 8,
    }
    reasons = {bad["file_name"]: bad["reason"] for bad in report["quarantine"]}
    assert reasons == {
        "picture.0.jpg": "unreadable",
        "picture.1.jpg": "unreadable",
        "picture.2.jpg": "unreadable",
        "picture.3.jpg": "unreadable",
        "picture.8.jpg": "size differs",
        "picture.9.jpg": "missing",
        "../instances.json": "unsafe name",
        "picture.11.jpg": "size differs",
    }
    detail = next(bad["detail"] for bad in report["quarantine"] if bad["file_name"] == "picture.8.jpg")
    assert "fits after EXIF rotation" in detail
    manifest = Manifest.load(tmp_path / "out", "toy")
    assert len(manifest) == report["counts"]["images"] == 8
    assert {name for name, _ in manifest.left_out} == reasons.keys()
    assert verify(Manifest.load(tmp_path / "out", "toy")) == []
    with ShardReader(manifest) as reader:
        stored = {a["id"]: a for a in coco_dataset(reader)["annotations"]}
    assert stored[500]["bbox"] == [5, 5, 4, 0], "a box without area is kept as given"
    assert stored[600]["area"] == stored[600]["bbox"][2] * stored[600]["bbox"][3]
    assert not {502, 503, 504, 505, 506} & stored.keys()


def test_bad_images_can_stop_the_build(odd: Tree, tmp_path: Path) -> None:
    result = _run("build", *odd.arguments(tmp_path / "out"), "--allow-drops", "--bad", "fail")
    assert result.returncode == 2 and "unusable images" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*")) or not (tmp_path / "out/toy.manifest.json").exists()


def test_a_changed_picture_changes_its_shard_only(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    options = Options(tree.images, tree.instances, tree.captions, tmp_path / "out", "toy", max_count=4)
    build(options)
    before = _digests(options.out)
    path = tree.images / "picture.3.jpg"
    pixels = simplejpeg.decode_jpeg(path.read_bytes())
    path.write_bytes(simplejpeg.encode_jpeg(255 - pixels, quality=60))
    assert build(options).shards_kept == 2
    after = _digests(options.out)
    assert sum(before[name] != after[name] for name in after if name.endswith(".tar")) == 1
    assert verify(Manifest.load(options.out, "toy")) == []
    (options.out / "toy-000001.tar").unlink()
    assert build(options).shards_kept == 2 and _digests(options.out) == after, "a lost shard is made again"


def test_a_failure_while_writing_leaves_only_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk in a rebuild: the old manifest must be gone before the first shard that it does not describe."""
    tree = write_tree(tmp_path / "tree")
    options = Options(tree.images, tree.instances, tree.captions, tmp_path / "out", "toy", max_count=4)
    build(options)
    before = _digests(options.out)
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
    assert not list(options.out.rglob("*.tmp"))
    with pytest.raises(ValueError, match=r"toy\.manifest\.json does not exist"):
        Manifest.load(options.out, "toy")
    assert build(options).shards_kept >= 1 and _digests(options.out) == before


def test_a_split_built_otherwise_is_not_overwritten(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    out = tmp_path / "out"
    assert _run("build", *tree.arguments(out), "--max-count", 4).returncode == 0
    before = _digests(out)
    refused = _run("build", *tree.arguments(out), "--max-count", 5)
    assert refused.returncode == 2 and "max_count: 4 there, 5 asked" in refused.stderr
    assert _digests(out) == before
    assert _run("build", *tree.arguments(out), "--max-count", 12, "--replace").returncode == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["toy-000000.tar"]
    assert verify(Manifest.load(out, "toy")) == []


def test_shards_that_fewer_images_leave_over_are_replaced(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    command = ["build", *tree.arguments(tmp_path / "out"), "--max-count", 1]
    assert _run(*command).returncode == 0
    (tree.images / "picture.3.jpg").unlink()
    refused = _run(*command)
    assert refused.returncode == 2 and "1 shards that this build would not make: toy-000011.tar" in refused.stderr
    assert _run(*command, "--replace").returncode == 0
    assert verify(Manifest.load(tmp_path / "out", "toy")) == []


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "tree")
    result = _run("build", *tree.arguments(tmp_path / "out"), "--max-count", 5, "--dry-run")
    assert result.returncode == 0 and "would make 3 shards" in result.stdout
    assert not (tmp_path / "out").exists()


def test_shards_stay_below_the_size_asked_for(tmp_path: Path) -> None:
    manifest = make_split(tmp_path, max_count=None, max_size=20_480)
    # Tars are multiples of 10,240 bytes: the limit is met exactly, not merely undercut.
    assert {shard.bytes for shard in manifest.shards[:-1]} == {20_480}
    assert len(manifest.shards) > 2 and manifest.shards[-1].bytes <= 20_480


def test_limit_and_order(tmp_path: Path) -> None:
    by_id = make_split(tmp_path / "a", seed=None, limit=5)
    assert by_id.index["image_id"].tolist() == [1000, 1007, 1014, 1021, 1028]
    shuffled = make_split(tmp_path / "b", seed=3)
    assert make_split(tmp_path / "c", seed=3, limit=5).index["image_id"].tolist() == (
        shuffled.index["image_id"][:5].tolist()
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--images", "/nowhere"], "images folder /nowhere does not exist"),
        (["--instances", "/nowhere.json"], "cannot read /nowhere.json"),
        (["--instances", __file__], "not valid JSON"),
        (["--split", "a/b"], "split name 'a/b' is not allowed"),
        (["--max-size", "12 apples"], "'12 apples' is no size"),
        (["--max-count", "0"], "max count 0 is not allowed"),
        (["--workers", "0"], "--workers 0 is not allowed"),
        (["--seed", "-1"], "neither an integer"),
        (["--out", "/proc/nothing"], "/proc/nothing"),
    ],
)
def test_wrong_usage_gets_one_clear_message(tree: Tree, tmp_path: Path, extra: list[str], message: str) -> None:
    result = _run("build", *tree.arguments(tmp_path), *extra)
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_captions_given_as_instances_are_refused(tree: Tree, tmp_path: Path) -> None:
    options = Options(tree.images, tree.captions, None, tmp_path, "toy")
    with pytest.raises(ValueError, match="no COCO file of this kind: it has no list 'categories'"):
        build(options)


def _compressed(code: dict[str, Any]) -> str:
    compressed = coco_mask.frPyObjects(code, *code["size"])["counts"]
    assert isinstance(compressed, bytes)
    return compressed.decode()


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_photographs_come_back_as_they_were(tmp_path: Path, split: str) -> None:
    labels = PHOTOS / "annotations"
    instances, captions = labels / f"instances_{split}.json", labels / f"captions_{split}.json"
    report = build(Options(PHOTOS / split, instances, captions, tmp_path, split, max_size=2_000_000), workers=2)
    assert report.quarantine == [] and verify(Manifest.load(tmp_path, split)) == []
    source = json.loads(instances.read_text())
    texts = json.loads(captions.read_text())["annotations"]
    with ShardReader(Manifest.load(tmp_path, split)) as reader:
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
