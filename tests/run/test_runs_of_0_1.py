"""Runs written by release 0.1 stay readable: each gives what it gave when it was written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm

from tests.freeze.stored import FEW, FOLDER, RESUMED, RUNS
from tests.freeze.worker import ENVIRONMENT

REPOSITORY = Path(__file__).parents[2]
#: Other processors sum in another order, which two steps magnify.
TOLERANCE = 1e-3
TIMM = "1.0.31"  #: with which the runs on a ConvNeXt were made; another version draws other weights


@cache
def results(runs: str, folder: Path) -> dict[str, Any]:
    """What this version makes of runs, by commands alone: {"entries": ..., "failed": ...}."""
    places = [REPOSITORY, folder / "work", folder / "result.json"]
    command = [sys.executable, "-m", "tests.freeze.worker", *map(str, places), runs, "2"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=600)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {runs: tmp_path_factory.mktemp(runs) for runs in ("few", "stored")}


@pytest.mark.parametrize(
    ("run", "runs"),
    [
        *((run, "few") for run in FEW),
        *(pytest.param(run, "stored", marks=pytest.mark.slow) for run in RUNS if run not in FEW),
    ],
)
def test_the_run_is_read(folders: dict[str, Path], run: str, runs: str) -> None:
    if run.startswith("convnext") and timm.__version__ != TIMM:
        pytest.skip(f"began with random weights of timm {TIMM}, and this is {timm.__version__}")
    found = results(runs, folders[runs])
    assert run not in found["failed"], found["failed"][run]
    expected = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))[run]
    found = {name.partition("/")[2]: value for name, value in found["entries"].items() if name.startswith(f"{run}/")}
    if run not in RESUMED:
        expected = {
            name: value for name, value in expected.items() if not name.startswith("step4/") and "/loss/" not in name
        }
    # Empty masks were predictions.
    found, expected = (
        {name: value for name, value in of.items() if "segmentation_results" not in name} for of in (found, expected)
    )
    assert (60 if run in RESUMED else 10) < len(expected)
    assert found == pytest.approx(expected, rel=TOLERANCE, abs=1e-6)
