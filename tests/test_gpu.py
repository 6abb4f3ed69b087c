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
import torch

from tests.conftest import pytest_collection_modifyitems
from tests.ranks import REPOSITORY
from tools.gpu import COLUMNS, FAILED, PARTS, PASSED, SKIPPED, main, run_part
from visft_ds.ops import attention
from visft_ds.profiling import gpu_speed


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
    mistakes = {
        "codes.copy_(_codes(values))": ("gelu.py", "codes.copy_(_codes(1.02 * values))"),
        "return normed if": (
            "gelu.py",
            "if x.dtype == torch.half:\n        raise MemoryError('worn out')\n    return normed if",
        ),
        "q.shape[-1] ** -0.5": ("attention.py", "q.shape[-1] ** -0.51"),
    }
    for right, (file, wrong) in mistakes.items():
        path = copy / "visft_ds" / "ops" / file
        text = path.read_text()
        assert text.count(right) == 1
        path.write_text(text.replace(right, wrong))
    code, rows = run(copy, tmp_path / "rows.json", "--parts", "ops", "attention", "lora")
    failed = {(row["part"], row["case"]): row["reason"] for row in rows if row["verdict"] == FAILED}
    assert code == 1
    assert {part for part, _ in failed} == {"ops", "attention"}
    wanted = ["gelu in 8 bits, library, fp32", "gelu in 8 bits, library, fp16", "norm, added, library, fp16"]
    assert [case for part, case in failed if part == "ops"] == wanted
    assert failed["ops", wanted[-1]] == "exit code 1: MemoryError: worn out"
    cases = {f"reference, heads of {width}, {dtype}" for width in (112, 88, 64) for dtype in ("fp32", "bf16", "fp16")}
    plain = ("the table", "packed, the table", "packed, one by one")  # of plain products in bf16 on a CPU
    cases |= {f"{name}, heads of {width}, bf16" for name in plain for width in (112, 88, 64)}
    assert {case for part, case in failed if part == "attention"} == cases
    behind = [row["case"] for row in rows if row["part"] == "ops"]
    assert behind.index("gelu, triton, fp32") > behind.index(wanted[-1])
    assert {row["verdict"] for row in rows if row["part"] == "lora"} <= {PASSED, SKIPPED}


def test_what_takes_too_long_is_ended_and_said(tmp_path: Path) -> None:
    (row,) = run_part("steps", "cpu", tmp_path, 0.05)  # no run starts in so short a time
    assert row["verdict"] == FAILED and row["case"] == "detection, fp32" and "Timeout" in row["reason"]


def test_a_measurement_that_takes_too_long_is_said(tmp_path: Path) -> None:
    (row,) = gpu_speed.run_part("speed", "cpu", tmp_path, 1, 0.2)  # what it had measured would stand before it
    assert (row["verdict"], row["case"]) == (FAILED, "cut off after 0 s")


@pytest.mark.parametrize(("name", "memory"), [("Voodoo", 2**24), ("NVIDIA H100 PCIe", 80 * 2**30)])
def test_a_gpu_that_the_planner_does_not_know_keeps_its_rows(
    name: str, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    medians = {name: {"median": 1.0} for name in ("images_per_second", "step_seconds")}
    numbers = {**medians, "flops": {"hardware_utilisation": 0.5}, "memory_bytes": {"process_peak": 2**30}}
    found = {"tasks": {task: {"ranks": [numbers]} for task in gpu_speed.TASKS}}
    monkeypatch.setattr(gpu_speed, "command", lambda *_: found)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *_: name)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    *measured, last = gpu_speed.full_steps("cuda", tmp_path, 1)
    assert len(measured) == 3 * len(gpu_speed.TASKS) and all(row["value"] for row in measured)
    assert (last["verdict"], last["case"]) == (SKIPPED, f"no plan: the planner knows no {name}")


def test_cudnn_is_examined_and_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table takes it for numbers of tokens alone that were named."""
    monkeypatch.setattr(attention, "_fixed", frozenset())
    assert [*gpu_speed.kernels("cpu", tmp_path, 1)] and attention.fixed_lengths() == (64,)
    name, found, *_ = next(PARTS["attention"](torch.device("cpu"), tmp_path))
    assert name.startswith("the table") and found() and attention.fixed_lengths() == (33,)


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


@pytest.mark.slow
def test_speed_is_measured_and_two_processes_agree(tmp_path: Path) -> None:
    """On a CPU, where goals mean nothing: every measurement is made, and the traces are kept."""
    out = tmp_path / "rows.json"
    code, rows = run(REPOSITORY, out, "--gpus", "2", "--parts", "ranks", *gpu_speed.PARTS)
    speeds = json.loads(out.read_text())["speed"]
    assert code == 0, [row for row in (*rows, *speeds) if row["verdict"] == FAILED]
    assert [row["case"] for row in rows] == [f"{name} on 2" for name in ("zero1", "zero2", "zero3", "pipeline")]
    assert {row["part"] for row in speeds} == set(gpu_speed.PARTS)
    assert all(row["value"] > 0 for row in speeds)
    assert {path.name for path in tmp_path.glob("rows-trace-*.json")} == {
        f"rows-trace-{task}.json" for task in ("captioning", "detection", "segmentation")
    }
