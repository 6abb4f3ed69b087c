"""Predicted peaks of real engines against measured ones, for every engine, stage, task and policy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.ranks import finish, start_ranks
from tools.profile import main
from visft_ds.config.layers import CONFIG_ROOT
from visft_ds.profiling.plan_validation import CASES, TOLERANCE, _storages, error_of, tables, time_ratios


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_every_peak_is_predicted(processes: int, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    codes, outputs = finish(
        start_ranks(["tools/profile.py", "plan", "--validate", "--json", str(file)], processes, fresh=True),
        timeout=1200,
    )
    assert codes[0] == 0, outputs[0]
    records = json.loads(file.read_text())["records"]
    assert len(records) == 3 * sum(case.processes == processes for case in CASES)
    wrong = {(one["case"], one["task"]): error_of(one) for one in records if abs(error_of(one)) > TOLERANCE}
    assert wrong == {}


def test_storages_are_those_of_one_kind_of_device() -> None:
    kept = torch.ones(3)
    assert kept.untyped_storage()._cdata in _storages("cpu") and not _storages("cuda")


def test_a_gpu_is_compared_by_memory_alone() -> None:
    """The times are those of a processor."""
    record = {"case": "one", "task": "detection", "processes": 1, "cpu_seconds": None, "predicted_seconds": None}
    record |= {"measured": {"other": 2**20}, "predicted": {"total": 2**20}}
    ratios = time_ratios([record])
    _, (steps, _) = tables({"records": [record], "time_ratios": ratios, "largest_error": 0.0})
    assert steps.rows == [("one", "detection", "1.00", "1.00", "+0.0 %", "", "")] and ratios == []


def test_a_plan_takes_the_file_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(CONFIG_ROOT / "models" / "debug.json", tmp_path / "copy.json")
    monkeypatch.chdir(tmp_path)
    arguments = ["--cluster", "1xH100", "--stage", "2", "--model", "copy.json", "--set", "visft.tasks=detection"]
    assert main(["plan", *arguments]) == 0
    assert "copy.json, stage 2, ZeRO-1: time" in capsys.readouterr().out


def test_a_plan_is_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    arguments = ["--model", "debug", "--stage", "2", "--engine", "zero1", "--set", "visft.tasks=detection"]
    assert main(["plan", "--cluster", "1xH100", *arguments, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "== plan: 1xH100-80GB, predicted" in text and "debug, stage 2, ZeRO-1: time" in text
    (plan,) = json.loads(file.read_text())["plans"]
    assert plan["arms"][0]["fits"] and plan["arms"][0]["streams"]["detection"]["memory"]["total"] > 0


def test_what_more_gpus_are_worth_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "debug", "--stage", "2", "--set", "visft.tasks=captioning"]
    assert main(["plan", "--cluster", "2x4xH100", "--network", "25", "--scaling", *flags]) == 0
    text = capsys.readouterr().out
    assert "== plan: 8xH100-80GB in machines of 4 with a network of 25 GB/s, predicted" in text
    rows = [line.split() for line in text.splitlines() if "ZeRO-1" in line or "pipeline" in line]
    engines = {"1": ["ZeRO-1"], **{gpus: ["ZeRO-1", "pipeline"] for gpus in ("2", "4", "8")}}
    assert [row[:2] for row in rows] == [[gpus, engine] for gpus, found in engines.items() for engine in found]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster", "16xH100", "--network", "fast"], "--network fast: give the GB/s of a machine"),
        (["--validate", "--network", "25", "--scaling"], "leave out --network, --scaling: --validate has"),
        (["--validate", "--model", "eva_e", "--set", "visft.seed=1"], "leave out --model, --set: --validate has"),
        (["--cluster", "2xH100", "--scaling", "--engine", "zero1"], "leave out --engine"),
        ([], "give --cluster SPEC, or --validate"),
        (["--cluster", "8xA10O-80GB"], "did you mean A100-80GB"),
        (["--cluster", "8xH100", "--stages", "2"], "did you mean --stage"),
    ],
)
def test_wrong_usage_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err
