"""A finished tiny run that has all tasks, and the pictures of its validation split as files."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import finished


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: runs/stage2; stage1, where its record says that its heads are; photos, in order;
    dog.jpg.
    """
    folder = tmp_path_factory.mktemp("predict")
    for name, to in (("stage2", "runs/stage2"), ("stage1", "stage1")):
        shutil.copytree(finished.runs() / name, folder / to, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "photos").mkdir()
    with tarfile.open(finished.shards() / "val-000000.tar") as shard:
        for member in shard.getmembers():
            file = shard.extractfile(member)
            if member.name.endswith(".jpg") and file is not None:
                (folder / "photos" / Path(member.name).name).write_bytes(file.read())
    shutil.copy(min((folder / "photos").iterdir()), folder / "dog.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
