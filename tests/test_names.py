"""Names that stand in files do not lead out of a folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.coco_tree import write_tree
from visft_ds.files import wrong_name
from visft_ds.shards.build import Options, build


def test_names_that_lead_nowhere_else_are_right() -> None:
    for name in ("../secret.jpg", "/etc/passwd", "a/../../secret.jpg", "..", "", "a\0.jpg", "a\x1b[2J.jpg"):
        assert wrong_name(name), name
    for name in ("a.jpg", "Bild 1.jpg", "...", "a..b", "-x", "ファイル.png"):
        assert wrong_name(name) is None and wrong_name(f"train/{name}") is None


def test_images_of_coco_files_are_below_their_folder(tmp_path: Path) -> None:
    tree = write_tree(tmp_path / "coco", 4)
    shutil.copy(tree.images / "picture.1.jpg", tmp_path / "coco/secret.jpg")
    for file in ("instances", "captions"):
        tree.edit(lambda content: content["images"][1].update(file_name="../secret.jpg"), file)
    with pytest.raises(ValueError, match="name not allowed"):
        build(Options(tree.images, tree.instances, tree.captions, tmp_path / "out", "toy"))
