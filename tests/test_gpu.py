"""`make gpu` on a CPU: a wrong kernel fails, and nothing beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY


def cases(repository: Path, *words: str) -> tuple[int, str]:
    """Exit code and words of `make gpu DEVICE=cpu`, some of its cases."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests/gpu", *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=repository,
        env={**os.environ, "VISFT_DEVICE": "cpu", "PYTHONPATH": str(repository)},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_a_broken_kernel_fails_and_nothing_else_does(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("visft_ds", "tests", "ds_configs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", copy)
    path = copy / "visft_ds" / "ops" / "attention.py"
    right = "[None] for part in image))"
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, right.replace("))", "), scale=q.shape[-1] ** -0.51)")))
    code, words = cases(copy, "-k", "attention or lora")
    assert (
        code == 1
        and "attention[112-packed-fp32]" in words
        and "FAILED tests/gpu/test_gpu.py::test_lora" not in words
    )


@pytest.mark.slow
def test_a_cpu_agrees_with_itself() -> None:
    code, words = cases(REPOSITORY)
    assert code == 0 and "is it right?" in words, words


def test_every_path_of_a_gpu_names_a_file_and_a_case() -> None:
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = page.partition("## What only a GPU runs")[2].partition("\n## ")[0]
    code = "".join(path.read_text() for path in (REPOSITORY / "tests/gpu").glob("test_*.py"))
    rows = re.findall(r"^\| (?!path).+ \| (`.+`) \| (`.+`) \|$", section, re.MULTILINE)
    assert len(rows) > 10
    for where, cases in rows:
        for name in re.findall(r"`(.+?)`", where):
            package = REPOSITORY if name.startswith("ds_configs") else REPOSITORY / "visft_ds"
            assert (package / name).exists(), name
        for name in re.findall(r"`(.+?)`", cases):
            assert f"def {name}(" in code, name
