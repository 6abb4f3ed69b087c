"""Names that stand in files do not lead out of a folder; links that a user has put into one are followed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.coco_tree import make_split, write_tree
from visft_ds.data.shards import Manifest, ShardReader, verify
from visft_ds.evals.benchmarks.objects import read_objects
from visft_ds.evals.benchmarks.retrieval import read_captions
from visft_ds.interop.files import TensorInfo, open_weights
from visft_ds.interop.writing import save_tensors, write_shards
from visft_ds.names import wrong_name
from visft_ds.shards.build import Options, build

#: Name -> part of the reason.
WRONG = {
    "../secret.jpg": "",
    "/etc/passwd": "",
    "/dev/zero": "",
    "a/../../secret.jpg": "",
    "..": "leads out",
    "": "empty",
    "a\0.jpg": "control",
    "a\n.jpg": "control",
    "a\x1b[2J.jpg": "control",
    "CON": "device",
    "nul.jpg": "device",
    "com1.tar.gz": "device",
    "a" * 300: "too long",
    "ä" * 128: "too long",
}
GOOD = ("a.jpg", "console.jpg", "Bild 1.jpg", "ä" * 127, "...", "a..b", "-x", "ファイル.png")


def _case(name: str) -> str:
    return ascii(name)[:24]


@pytest.mark.parametrize("name", WRONG, ids=_case)
def test_wrong_names_have_a_reason(name: str) -> None:
    assert WRONG[name] in (wrong_name(name) or "nothing")
    assert WRONG[name] in (wrong_name(name, folders=True) or "nothing")


def test_good_names_are_as_they_are() -> None:
    for name in GOOD:
        assert wrong_name(name) is None and wrong_name(f"train/{name}", folders=True) is None
    assert wrong_name("a/b") and wrong_name("a\\b") and wrong_name(".")
    assert wrong_name("./a//b", folders=True) is None, "as some COCO files have it"
    assert wrong_name("/".join(["a" * 200] * 30), folders=True)


@pytest.mark.parametrize("name", WRONG, ids=_case)
def test_an_index_of_weights_names_files_beside_it(tmp_path: Path, name: str) -> None:
    tensors = {"one": torch.ones(4), "two": torch.ones(4)}
    save_tensors(tmp_path / "secret.jpg", tensors, {})
    infos = {key: TensorInfo.of(value) for key, value in tensors.items()}
    index = write_shards(tmp_path / "model/a.safetensors", infos, tensors.__getitem__, {}, 16)[-1]
    content = json.loads(index.read_text())
    content["weight_map"]["one"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not allowed: it") as refused:
        open_weights(index)
    assert str(index) in str(refused.value) and repr(name[:80]) in str(refused.value)


@pytest.mark.parametrize("name", WRONG, ids=_case)
def test_images_of_coco_files_are_below_their_folder(tmp_path: Path, name: str) -> None:
    tree = write_tree(tmp_path / "coco", 4)
    shutil.copy(tree.images / "picture.1.jpg", tmp_path / "coco/secret.jpg")
    for file in ("instances", "captions"):
        tree.edit(lambda content: content["images"][1].update(file_name=name), file)
    options = Options(tree.images, tree.instances, tree.captions, tmp_path / "out", "toy")
    with pytest.raises(ValueError, match="1 x name not allowed"):
        build(options)

    with pytest.raises(ValueError, match=r"instances.json: the file name .* is not allowed"):
        read_objects(tree.instances, tree.images)
    root = tmp_path / "benchmark"
    (root / "annotations").mkdir(parents=True)
    shutil.copytree(tree.images, root / "val2017")
    shutil.copy(tree.captions, root / "annotations/captions_val2017.json")
    with pytest.raises(ValueError, match=r"captions_val2017.json: the file name .* is not allowed"):
        read_captions(str(root), "val")


def test_links_of_a_user_are_followed(tmp_path: Path) -> None:
    """As in a hub's cache, whose snapshots are links to blobs, and on machines with a scratch disk."""
    scratch, here = tmp_path / "scratch", tmp_path / "here"
    split, tree = make_split(scratch / "split"), write_tree(scratch / "coco", 4)
    assert isinstance(split.root, Path)
    (here / "shards").mkdir(parents=True)
    for path in split.root.iterdir():
        if path.is_file():
            os.symlink(path, here / "shards" / path.name)
    os.symlink(scratch, here / "disk")
    for root in (here / "shards", here / "disk" / split.root.relative_to(scratch)):
        manifest = Manifest.load(root, "toy")
        with ShardReader(manifest) as reader, ShardReader(split) as straight:
            assert reader.read(3) == straight.read(3)
        assert verify(Manifest.load(root, "toy")) == []

    (here / "images").mkdir()
    for image in tree.images.iterdir():
        os.symlink(image, here / "images" / image.name)
    built = build(Options(here / "images", tree.instances, tree.captions, here / "disk/out", "toy"))
    assert built.left_out == [] and (scratch / "out/toy.manifest.json").is_file()

    tensors = {"one": torch.ones(4), "two": torch.ones(4)}
    infos = {key: TensorInfo.of(value) for key, value in tensors.items()}
    files = write_shards(scratch / "model/a.safetensors", infos, tensors.__getitem__, {}, 16)
    (here / "snapshot").mkdir()
    for number, file in enumerate(files):  # blobs have other names
        blob = file.rename(file.with_name(f"blob{number}"))
        os.symlink(blob, here / "snapshot" / file.name)
    assert open_weights(here / "snapshot" / files[-1].name).get("two").tolist() == [1.0] * 4
