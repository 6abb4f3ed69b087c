"""`visft profile`: steps of the real run by part, with and without a pipeline; the loader by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from visft_ds.profiling.command import main

SETTINGS = (
    "visft.mode=sampled",
    "visft.tasks.detection.batch_size=2",
    "visft.tasks.detection.micro_batch=1",
    "visft.tasks.detection.image.fixed_size=56",
    'visft.model.overrides={"width": 32, "depth": 2, "num_heads": 2, "image_size": 56}',
    "visft.run.memory_check=false",
)
FLAGS = ["--model", "debug", "--tasks", "detection", "--synthetic", "--steps", "2", "--warmup", "1"]
FLAGS += [f"--set={setting}" for setting in SETTINGS]


def check(found: dict[str, Any], *parts: str) -> None:
    """One rank's steps of detection."""
    assert found["images"] == 2 and len(found["seconds"]) == 2 and min(found["seconds"]) > 0
    assert set(parts) <= found["parts"].keys() and all(found["parts"][part] > 0 for part in parts)
    assert 0.8 < found["peak"] / sum(found["planned"].values()) < 1.3  # both without libraries
    assert found["operations"] > 0 and found["mfu"] is None  # nobody states the peak of a CPU


def test_steps_by_part_and_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "found.json"), "--trace", str(tmp_path / "traces")]
    run_ranks(["-m", "visft_ds", "profile", "--stage", "2", *FLAGS, *files], world=1)
    (rank,) = json.loads((tmp_path / "found.json").read_text())["ranks"]
    check(rank["detection"], "backbone", "heads", "criteria", "backward", "optimizer", "rest")
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["detection-rank0.json.gz"]


def test_a_pipeline_on_two_ranks(tmp_path: Path) -> None:
    files = ["--engine", "pipeline", "--json", str(tmp_path / "found.json")]
    run_ranks(["tools/profile.py", "--stage", "2", *FLAGS, *files], world=2)
    ranks = json.loads((tmp_path / "found.json").read_text())["ranks"]
    assert len(ranks) == 2
    for rank in ranks:
        check(rank["detection"], "forward", "backward", "optimizer", "between stages")


def test_the_loader_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stage", "1", "--loader", "--json", str(tmp_path / "found.json"), *FLAGS]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["loader"]["detection"]
    assert found["samples"] == 4 and found["seconds"] > 0
    assert "samples/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--stage", "1", "--steps", "0"], "--steps"),
        (["--stage", "1", "--synthetik"], "--synthetik"),
        (["--stage", "1", *FLAGS, "--json", "tests"], "--json tests"),
        (["--stage", "1", *FLAGS, "--trace", "setup.py"], "--trace setup.py"),
        ([], "--stage"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert word in capsys.readouterr().err
