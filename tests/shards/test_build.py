"""What a build takes, leaves out and re-encodes; where it reads from."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from tests.coco_tree import Tree, write_tree
from visft_ds.data.dataset import coco_dataset
from visft_ds.data.decode import decode_image
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.monitor.console import Gauge
from visft_ds.shards.build import Options, build
from visft_ds.shards.build_command import show_progress
from visft_ds.shards.finish import BuildReport
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.workers import BuildProgress


def _options(tree: Tree, out: Path | str, **changes: Any) -> Options:
    given = {"images": tree.images, "instances": tree.instances, "captions": tree.captions, "out": out, "split": "toy"}
    return Options(**{**given, "max_count": 4, **changes})


def _digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in root.iterdir() if path.is_file()}


def _found(report: BuildReport) -> dict[str, int]:
    return {finding["kind"]: finding["count"] for finding in report.findings}


def _labels(root: Path) -> list[dict[str, Any]]:
    with ShardReader(Manifest.load(root, "toy")) as reader:
        return [json.loads(reader.read(index, "labels")[1] or b"") for index in range(len(reader))]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return write_tree(tmp_path / "tree")


# ---------------------------------------------------------------------------------------------------- what is taken


def test_images_are_chosen_by_id_name_licence_and_content(tree: Tree, tmp_path: Path) -> None:
    chosen = tmp_path / "ids.txt"
    chosen.write_text("1007\n\npicture.3.jpg\n1077\n")  # the last has neither boxes nor, below, captions

    def change(content: dict[str, Any]) -> None:
        content["images"][1]["license"] = 5
        content["images"][1]["flickr_url"] = "http://x/y.jpg"

    tree.edit(change)
    tree.edit(lambda content: content.update(annotations=content["annotations"][:-2]), "captions")
    assert build(_options(tree, tmp_path / "a", ids=chosen)).counts["images"] == 3
    report = build(_options(tree, tmp_path / "b", ids=chosen, keep_empty=False, seed=None))
    assert [label["image_id"] for label in _labels(tmp_path / "b")] == [1007, 1021]
    assert _found(report)["empty image dropped"] == 1
    assert Manifest.load(tmp_path / "b", "toy").sources["ids"]["name"] == "ids.txt"
    licensed = build(_options(tree, tmp_path / "c", licenses=(5, 6)))
    (label,) = _labels(tmp_path / "c")
    assert "crowd" not in _found(licensed), "findings are those of the images that were asked for"
    assert licensed.counts["images"] == 1 and label["license"] == 5 and label["flickr_url"] == "http://x/y.jpg"
    with pytest.raises(ValueError, match="has 12 images; none is left by --license"):
        build(_options(tree, tmp_path / "d", licenses=(9,)))
    chosen.write_text("1007\n9999\n")
    with pytest.raises(ValueError, match="1 of 2 lines name no image of the data set, for instance '9999'"):
        build(_options(tree, tmp_path / "d", ids=chosen))


def test_captions_alone_make_a_data_set(tree: Tree, tmp_path: Path) -> None:
    report = build(_options(tree, tmp_path / "out", instances=None))
    manifest = Manifest.load(tmp_path / "out", "toy")
    assert manifest.categories == () and manifest.counts["captions"] == 24 and manifest.counts["images"] == 12
    assert _found(report) == {}, "images without instances are no finding where there are none"
    assert manifest.having("captions").size == 12 and manifest.having("annotations").size == 0
    with pytest.raises(ValueError, match="give --instances, --captions or both"):
        _options(tree, tmp_path / "out", instances=None, captions=None)


def test_categories_follow_a_file(tree: Tree, tmp_path: Path) -> None:
    rules = tmp_path / "map.json"
    rules.write_text(json.dumps({"thing 3": {"id": 5, "name": "joined"}, "8": {"id": 5, "name": "joined"}, "*": None}))
    report = build(_options(tree, tmp_path / "out", categories=str(rules)))
    manifest = Manifest.load(tmp_path / "out", "toy")
    assert [(one.id, one.coco_id, one.name) for one in manifest.categories] == [(0, 5, "joined")]
    ids = {one["category_id"] for label in _labels(tmp_path / "out") for one in label["annotations"]}
    assert ids == {5} and _found(report)["category dropped"] == 2
    assert manifest.sources["categories"]["sha256"] == hashlib.sha256(rules.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"does not have COCO's 80 categories: id 1 is None, not 'person'"):
        build(_options(tree, tmp_path / "out", categories="coco80"))


def test_masks_are_stored_so_that_every_reader_can_use_them(tree: Tree, tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        image = content["images"][1]
        size = [image["height"], image["width"]]
        for number, code in ((9100, {"size": size, "counts": [7, size[0] * size[1] - 7]}), (9101, {"size": [1, 1]})):
            added = {**content["annotations"][0], "id": number, "image_id": image["id"], "segmentation": code}
            content["annotations"].append({**added, "ignore": 1})

    tree.edit(change)
    found = _found(build(_options(tree, tmp_path / "out")))
    assert (found["uncompressed run-length code"], found["mask malformed"], found["ignore flag"]) == (1, 1, 2)
    with ShardReader(Manifest.load(tmp_path / "out", "toy")) as reader:
        stored = {one["id"]: one for one in coco_dataset(reader)["annotations"]}
    assert isinstance(stored[9100]["segmentation"]["counts"], str) and "segmentation" not in stored[9101]


# ------------------------------------------------------------------------------------------------------ re-encoding


def test_re_encoded_pictures_keep_the_frame_of_their_annotations(tree: Tree, tmp_path: Path) -> None:
    for place, kind in ((3, "WEBP"), (4, "PNG")):
        with Image.open(tree.images / f"picture.{place}.jpg") as image:
            image.save(tree.images / f"picture.{place}.jpg", kind)
    plain = build(_options(tree, tmp_path / "plain"))
    assert plain.quarantine[0]["reason"] == "unreadable", "WebP is never decoded for training"
    for workers in (1, 2):
        report = build(_options(tree, tmp_path / str(workers), reencode=Reencoding(80, 20)), workers=workers)
    assert _digests(tmp_path / "1") == _digests(tmp_path / "2")
    assert _found(report)["WebP converted"] == 1 and report.quarantine == []
    assert _found(plain)["PNG named otherwise"] == 1 and "PNG named otherwise" not in _found(report)
    given = json.loads(tree.instances.read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in given["images"]}
    boxes = {one["id"]: one["bbox"] for one in given["annotations"]}
    manifest = Manifest.load(tmp_path / "1", "toy")
    assert manifest.options["reencode"]["short_side"] == 20
    with ShardReader(manifest) as reader:
        for index, label in enumerate(_labels(tmp_path / "1")):
            shape = decode_image(reader.read(index, "images")[0] or b"").shape[:2]
            assert min(shape) == 20 and shape == (label["stored_height"], label["stored_width"])
            row = reader.row(index)
            assert sizes[label["image_id"]] == (label["height"], label["width"]) == (row["height"], row["width"])
            assert all(boxes[one["id"]] == one["bbox"] for one in label["annotations"])
    with pytest.raises(ValueError, match="leave out --check header"):
        _options(tree, tmp_path, reencode=Reencoding(80), check="header")


# ----------------------------------------------------------------------------------------------------- remote places


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves files; a path answers "busy" as often as `busy` says."""

    busy: dict[str, int]

    def __init__(self, *args: Any, busy: dict[str, int], **kwargs: Any) -> None:
        self.busy = busy
        super().__init__(*args, **kwargs)

    def send_head(self) -> Any:
        if self.busy.get(self.path, 0) > 0:
            self.busy[self.path] -= 1
            self.send_error(503)
            return None
        return super().send_head()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def busy() -> dict[str, int]:
    return {}


@pytest.fixture
def web(tmp_path: Path, busy: dict[str, int]) -> Iterator[str]:
    """The address of a server of `tmp_path`."""
    handler = functools.partial(_Server, directory=str(tmp_path), busy=busy)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_data_set_behind_http_gives_the_same_shards(tree: Tree, tmp_path: Path, web: str) -> None:
    (tree.images / "picture.4.jpg").unlink()
    local = build(_options(tree, tmp_path / "local"))
    places = {"images": f"{web}/tree/images/", "instances": f"{web}/tree/instances.json", "captions": None}
    places["captions"] = f"{web}/tree/captions.json"
    remote = build(_options(tree, tmp_path / "remote", **places), workers=2)
    assert _digests(tmp_path / "remote") == _digests(tmp_path / "local")
    assert [bad["reason"] for bad in remote.quarantine] == ["missing"] and remote.fingerprint == local.fingerprint
    with pytest.raises(ValueError, match=r"cannot read http.*nothing.json.*does not exist"):
        build(_options(tree, tmp_path / "x", instances=f"{web}/nothing.json"))


def test_a_server_that_is_busy_is_asked_again_and_never_taken_for_missing_files(
    tree: Tree, tmp_path: Path, web: str, busy: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images left out because a server was down for a moment would be a silent loss."""
    monkeypatch.setattr("visft_ds.shards.inputs._FIRST_PAUSE", 0.001)
    options = _options(tree, tmp_path / "out", images=f"{web}/tree/images")
    busy["/tree/images/picture.5.jpg"] = 3  # HEAD and GET make one question
    assert build(options).quarantine == [] and busy["/tree/images/picture.5.jpg"] == 0
    busy["/tree/images/picture.5.jpg"] = 1000
    with pytest.raises(RuntimeError, match=r"picture\.5\.jpg cannot be reached: 503"):
        build(options)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system of an S3 server with an empty bucket `data`."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    for name, value in zip(names, ("key", "secret", "us-east-1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    filesystem = fsspec.filesystem("s3", skip_instance_cache=False)
    filesystem.mkdir("data")
    yield filesystem
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def test_a_data_set_in_an_object_store_gives_the_same_shards(tree: Tree, tmp_path: Path, bucket: Any) -> None:
    """Its images are found by a listing, and a rerun knows by their tags that they are the same."""
    (tree.images / "picture.4.jpg").unlink()
    build(_options(tree, tmp_path / "local"))
    bucket.put(str(tree.images) + "/", "data/in/images/", recursive=True)
    bucket.put(str(tree.instances), "data/in/instances.json")
    places = {"images": "s3://data/in/images", "instances": "s3://data/in/instances.json"}
    report = build(_options(tree, tmp_path / "out", **places), workers=2)
    assert _digests(tmp_path / "out") == _digests(tmp_path / "local")
    assert [bad["reason"] for bad in report.quarantine] == ["missing"]
    assert build(_options(tree, tmp_path / "out", **places)).shards_kept == 3


@pytest.mark.parametrize("place", ["s3://data/out", "http://127.0.0.1:1/out"])
def test_nothing_is_written_to_a_url(tree: Tree, place: str) -> None:
    with pytest.raises(ValueError, match=rf"--out {place}: .* removed in 0.2: .*`aws s3 sync`"):
        build(_options(tree, place))


def test_a_missing_package_is_named_with_its_extra(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs://b/in needs a package.*pip install 'visft_ds\[remote\]'"):
        build(_options(tree, tmp_path / "out", images="gs://b/in"))


# --------------------------------------------------------------------------------------------------------- messages


def test_what_a_phase_found_done_does_not_count_for_its_speed(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([0.0, 0.0, 1.0, 9.9, 9.9, 10.1, 11.0, 20.5])
    gauge = Gauge("reading annotations", seconds=lambda: next(seconds))
    progress = BuildProgress()
    for images in (0, 0, 100, 200, 300, 400):
        if images:
            progress.phase, progress.total_images, progress.total_shards = "writing shards", 1000, 4
        progress.images = images
        show_progress(gauge, progress)
    shown = capsys.readouterr().err.splitlines()
    # the phase began at 9.9 s with 100 images
    assert shown == ["writing shards: 400/1000 images, 0/4 shards, 28.3/s, left 0:00:21"]


def test_a_full_disk_is_one_clear_line(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: cannot write to .*run the same command again"):
            build(_options(tree, tmp_path / "out"))
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [tmp_path / "out/.toy.build/lock"]
