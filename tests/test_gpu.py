"""`make gpu` on a CPU: a wrong kernel fails, a case that ends its process does not hide those behind it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.conftest import pytest_collection_modifyitems
from tests.ranks import REPOSITORY
from tools.gpu import COLUMNS, FAILED, PARTS, PASSED, SKIPPED, main, run_part


def run(repository: Path, out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code, and the rows of the JSON."""
    command = [sys.executable, str(repository / "tools" / "gpu.py"), "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert out.exists(), done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert all(row.keys() == set(COLUMNS) and row["verdict"] in (PASSED, FAILED, SKIPPED) for row in rows)
    assert all(row["reason"] for row in rows)
    return done.returncode, rows


@pytest.mark.slow
def test_broken_kernels_fail_and_nothing_else_does(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("visft_ds", "tools", "ds_configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "visft_ds" / "ops" / "attention.py"
    right = "F.scaled_dot_product_attention(q, k, v)"
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, right.replace("v)", "v, scale=q.shape[-1] ** -0.51)")))
    code, rows = run(copy, tmp_path / "rows.json", "--parts", "attention", "lora")
    assert code == 1
    failed = {(row["part"], row["case"].rpartition(",")[0]) for row in rows if row["verdict"] == FAILED}
    assert {part for part, _ in failed} == {"attention"}
    assert failed >= {
        ("attention", f"{name}, heads of {dim}") for name in ("chosen", "packed") for dim in (112, 88, 64)
    }
    assert {row["verdict"] for row in rows if row["part"] == "lora"} <= {PASSED, SKIPPED}


def test_what_takes_too_long_is_ended_and_said(tmp_path: Path) -> None:
    (row,) = run_part("steps", "cpu", tmp_path, 0.05)  # no run starts in so short a time
    assert row["verdict"] == FAILED and row["case"] == "detection, fp32" and "Timeout" in row["reason"]


def test_without_a_gpu_its_absence_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_a_folder_named_gpu_skips_no_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is among the keywords of what lies in it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    skipped: list[bool] = []
    for marked in (False, True):
        item = SimpleNamespace(
            path=Path("gpu/test_one.py"),
            keywords={"gpu"},
            get_closest_marker=lambda name, marked=marked: marked and name == "gpu",
            add_marker=lambda _, marked=marked: skipped.append(marked),
        )
        pytest_collection_modifyitems([cast(pytest.Item, item)])
    assert skipped == [True]


@pytest.mark.slow
def test_a_cpu_agrees_with_itself(tmp_path: Path) -> None:
    code, rows = run(REPOSITORY, tmp_path / "rows.json", "--parts", *PARTS)
    assert code == 0, [row for row in rows if row["verdict"] == FAILED]
    assert {row["part"] for row in rows if row["verdict"] == PASSED} == set(PARTS) - {"ranks"}
