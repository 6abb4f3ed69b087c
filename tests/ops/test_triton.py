"""The Triton kernels without a GPU: interpreted against float64, and compiled ahead of time for the GPUs they
are for.

Each in a process of its own: Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import python

pytest.importorskip("triton", reason="Triton has packages for Linux only")

HERE = Path(__file__).parent
TABLE: dict[str, Any] = json.loads((HERE / "compiled_kernels.json").read_text())
#: Bytes of shared memory that a block may have (CUDA C++ Programming Guide, table of compute capabilities).
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


def _interpret(selection: str) -> None:
    command = ["-m", "pytest", "-n", "0", "-q", "-x", "--show-capture=no", "-m", selection]
    # The interpreter of Triton 3.6 does what NumPy deprecates.
    command += ["-W", "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"]
    # One thread: torch's and numpy's would wait for each other.
    printed = python(
        *command, HERE / "interpreted_kernels.py", TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1"
    )
    assert re.search(r"\d+ passed", printed) and "skipped" not in printed


def test_interpreted_kernels_equal_float64() -> None:
    _interpret("not slow")


@pytest.mark.slow
def test_interpreted_kernels_equal_float64_for_any_shape() -> None:
    _interpret("slow")


def _compiled(folder: Path) -> dict[str, Any]:
    # A fresh cache, or what an older version of a kernel was compiled to would be found again.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.ops.compile_kernels"],
        cwd=HERE.parents[1],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def _check(found: dict[str, Any], wanted: set[str]) -> None:
    """Nothing spills, everything fits, products run on matrix units; and it is what the table says."""
    assert set(found["kernels"]) == wanted and wanted
    for name, row in found["kernels"].items():
        assert row["spilled"] == 0 and row["registers"] <= 255, (name, row)
        assert row["shared"] <= SHARED[name.split()[-1]], (name, row)
        assert row["matrix_instructions"] > 0, (name, row)
    # Another release of Triton allots registers otherwise.
    if found["triton"] == TABLE["triton"]:
        assert found["kernels"] == {name: TABLE["kernels"][name] for name in wanted}


def test_the_committed_table_is_clean() -> None:
    _check(TABLE, set(TABLE["kernels"]))
    assert {name.split()[-1] for name in TABLE["kernels"]} == set(SHARED)


@pytest.mark.slow
def test_every_kernel_compiles_to_what_the_table_says(tmp_path: Path) -> None:
    _check(_compiled(tmp_path), set(TABLE["kernels"]))
