"""Shared settings of the test suite: one thread, fixed seeds, GPU tests skipped with a printed reason."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from visft_ds.data.manifest import Manifest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Where it is forbidden to keep byte code, each of the many processes that tests start would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

#: The longest files, longest first. One of them that began last would keep one worker busy while the others rest.
FIRST = (
    *("train/test_train.py", "parallel/test_engines.py", "models/test_timm_backbone.py", "run/test_validation.py"),
    *("experiments/test_ablations.py", "train/test_fit.py", "test_house.py"),
    *("profiling/test_profile.py", "tasks/test_fourth_task.py", "train/test_start.py", "parallel/test_pipeline.py"),
    *("evals/test_evaluate.py", "planner/test_planner.py", "profiling/test_operations.py", "models/test_eva_vit.py"),
    *("ops/test_triton.py", "models/test_until.py", "train/test_golden.py", "shards/test_make_shards.py"),
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    import torch  # here and below: the process that hands out the tests needs none

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Twelve small pictures in three shards ("toy"), their COCO tree beside them. Nobody may change them."""
    from tests.coco_tree import make_split

    return make_split(tmp_path_factory.mktemp("split"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same pictures in one shard ("train"), for runs. Nobody may change it."""
    from tests.coco_tree import make_split

    return Path(make_split(tmp_path_factory.mktemp("coco"), split="train", max_count=5000).root)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; skip tests marked `gpu` where there is no CUDA device, and say so."""
    import torch

    torch.set_num_threads(1)
    places = {Path(__file__).parent / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))
    for item in items:
        if not torch.cuda.is_available() and item.get_closest_marker("gpu"):  # keywords hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_collection_finish() -> None:
    """Spare every collection of garbage, and every count of living tensors, what was imported: that stays."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report as leaked what is left
