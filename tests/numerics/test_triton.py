"""The Triton kernels without a GPU: interpreted against float64, and compiled ahead of time for the GPUs they are for.

Each in a process of its own: Triton decides when a kernel is defined whether it is interpreted.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has packages for Linux only")

HERE = Path(__file__).parent


def _interpret(selection: str) -> None:
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "--show-capture=no", "-m", selection]
    result = subprocess.run(
        [*command, str(HERE / "interpreted_kernels.py")],
        capture_output=True,
        text=True,
        timeout=600,
        # One thread: torch's and numpy's would wait for each other.
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout) and "skipped" not in result.stdout


def test_interpreted_kernels_equal_float64() -> None:
    _interpret("not slow")


@pytest.mark.slow
def test_interpreted_kernels_equal_float64_for_any_shape() -> None:
    _interpret("slow")
