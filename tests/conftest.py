"""Shared settings of the test suite: one thread, fixed seeds, GPU tests skipped with a printed reason."""

from __future__ import annotations

import gc
import math
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.ranks import SHARED

if TYPE_CHECKING:
    from visft_ds.data.shards import Manifest

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("VISFT_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
if "VISFT_DEVICE" in os.environ:  # `make gpu DEVICE=cpu`: before Triton is imported
    os.environ.setdefault("TRITON_INTERPRET", str(int(os.environ["VISFT_DEVICE"] == "cpu")))
# Where it is forbidden to keep byte code, each of the many processes that tests start would compile the
# package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# No test survives a power failure; to wait for the disk takes a tenth of the suite's time.
os.fsync = lambda fd: None  # ranks begin with the same, see tests/zygote.py

#: When no further test begins (`--minutes`), and the tests that were left out for it.
DEADLINE = pytest.StashKey[float]()
LEFT_OUT: list[str] = []

#: Folders whose tests take longest: a long file that comes last keeps one worker alone at it.
FIRST = (
    "train",
    "parallel",
    "evals",
    "run",
    "checkpoint",
    "tasks",
    "tests",
    "planner",
    "interop",
    "models",
    "data",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes", type=float, help="begin no further test after so many minutes, and list them"
    )


def pytest_configure(config: pytest.Config) -> None:
    minutes = config.getoption("--minutes")
    config.stash[DEADLINE] = time.monotonic() + 60 * minutes if minutes else math.inf
    if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the folder of who starts them
        folder = tempfile.mkdtemp(prefix="visft-tests-")
        os.environ[SHARED] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("left out: the minutes are over")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "left out: the minutes are over" in str(report.longrepr):
        LEFT_OUT.append(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LEFT_OUT:
        terminalreporter.section(f"left out for --minutes: {len(LEFT_OUT)} tests")
        terminalreporter.write_line("\n".join(sorted(LEFT_OUT)))


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

    return Path(make_split(tmp_path_factory.mktemp("coco"), split="train", max_size=256_000_000).root)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders that take longest. Skip tests marked `gpu` where there is no CUDA device, and say so;
    `make gpu DEVICE=cpu` tries them out.
    """
    import torch

    places = {folder: index for index, folder in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(places)))

    torch.set_num_threads(1)
    absent = not torch.cuda.is_available() and os.environ.get("VISFT_DEVICE") != "cpu"
    for item in items:
        if absent and item.get_closest_marker("gpu"):  # keywords hold the names of folders, too
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_collection_finish() -> None:
    """Spare every collection of garbage, and every count of living tensors, what was imported: that stays."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report as leaked what is left
