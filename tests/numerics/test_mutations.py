"""Would the tests of the operations see a mistake? One is made at a time, in a copy of the package; a test must fail.

Slow, since each runs tests in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LIBRARY, INTERPRETED = "test_ops_lora.py", "interpreted_kernels.py"


@dataclass(frozen=True)
class Mistake:
    """A text of a file of visft_ds/ops, found once, what takes its place, and the tests that should notice."""

    file: str
    right: str
    wrong: str
    tests: str
    only: str


MISTAKES = {
    "sign of the scale": Mistake(
        "lora.py", "_cast(lora_a, x).t(), scale)", "_cast(lora_a, x).t(), -scale)", LIBRARY, "dense_update"
    ),
    "q and v change places": Mistake(
        "lora.py",
        "slice(index * rank, (index + 1) * rank)",
        "slice((len(slices) - 1 - index) * rank, (len(slices) - index) * rank)",
        LIBRARY,
        "dense_update",
    ),
    "no gradient through the adapter": Mistake(
        "lora.py", "(du @ a).addmm_(dy, weight)", "dy @ weight", LIBRARY, "dense_update"
    ),
    "gradient without the scale": Mistake("lora.py", "b[part], ctx.scale)", "b[part], 1)", LIBRARY, "dense_update"),
    "no gradient of A": Mistake("lora.py", "da.copy_((", "da.copy_(0 * (", LIBRARY, "dense_update"),
    "gradient of B by the wrong slice": Mistake(
        "lora.py", "u[:, cols].t() @ dy[:, lo:hi]", "u[:, cols].t() @ dy[:, : hi - lo]", LIBRARY, "dense_update"
    ),
    "without the bias": Mistake(
        "lora.py", "bias.expand(len(x), -1)", "0 * bias.expand(len(x), -1)", LIBRARY, "dense_update"
    ),
    "a copy of the weight is kept": Mistake(
        "lora.py",
        "output[1] if need_b else None, weight,",
        "output[1] if need_b else None, weight * 1,",
        LIBRARY,
        "keeps_only",
    ),
    "triton: products without their mask": Mistake(
        "triton/lora.py", "inner_in = k + inner < K", "inner_in = k + inner < K + 7", INTERPRETED, "lora_equals"
    ),
    "triton: u of the first slice for all": Mistake(
        "triton/lora.py", "(g * RANK + low)[None, :]", "low[None, :]", INTERPRETED, "lora_equals"
    ),
    "triton: B of the first slice for all": Mistake(
        "triton/lora.py", " + SLICES[3 * g + 2])[:, None]", ")[:, None]", INTERPRETED, "lora_equals"
    ),
    "triton: dx without its update": Mistake(
        "triton/lora.py", "range(0, DOWN, BR)", "range(DOWN, DOWN, BR)", INTERPRETED, "lora_equals"
    ),
    "triton: sign within the slope": Mistake(
        "triton/pointwise.py", "slope = share + value", "slope = share - value", INTERPRETED, "gelu"
    ),
    "triton: the norm's gradient loses a term": Mistake(
        "triton/pointwise.py", " - normed * along", "", INTERPRETED, "added_norm"
    ),
    "code of the slope is off by one": Mistake(
        "gelu.py", "add_(ZERO).round_()", "add_(ZERO + 1).round_()", INTERPRETED, "gelu"
    ),
    "packed images see each other": Mistake(
        "attention.py", "tensor.split(packing.lengths)", "(tensor,)", "test_ops_attention.py", "packed_lengths_equal"
    ),
}


def _run(folder: Path, tests: str, only: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    environment["TRITON_INTERPRET"] = "1" if tests == INTERPRETED else "0"
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-x", "--show-capture=no", "-k", only]
    where = f"tests/numerics/{tests}"
    return subprocess.run([*command, where], cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "visft_ds", tmp_path / "visft_ds", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "numerics", tmp_path / "tests" / "numerics", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    return tmp_path


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(name: str, copy: Path) -> None:
    mistake = MISTAKES[name]
    if mistake.tests == INTERPRETED:
        pytest.importorskip("triton", reason="Triton has packages for Linux only")
    file = copy / "visft_ds" / "ops" / mistake.file
    text = file.read_text()
    assert text.count(mistake.right) == 1
    file.write_text(text.replace(mistake.right, mistake.wrong))
    result = _run(copy, mistake.tests, mistake.only)
    # 1: tests failed. Anything else, such as 2 or 4, is a file that cannot be read or found; 5, no test at all.
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-2000:]


@pytest.mark.parametrize(("tests", "only"), sorted({(one.tests, one.only) for one in MISTAKES.values()}))
def test_without_a_mistake_they_pass(tests: str, only: str, copy: Path) -> None:
    if tests == INTERPRETED:
        pytest.importorskip("triton", reason="Triton has packages for Linux only")
    result = _run(copy, tests, only)
    assert result.returncode == 0, result.stdout[-3000:]
