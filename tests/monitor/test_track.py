"""Trackers: what they are sent, a run that goes on, errors that end no run; and the two libraries themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from visft_ds.monitor import track
from visft_ds.monitor.track import Tracker


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a stand-in of wandb was given; it fails at step 3."""
    calls: list[Any] = []
    wandb, errors = ModuleType("wandb"), ModuleType("wandb.errors")
    errors.Error = type("Error", (Exception,), {})  # type: ignore[attr-defined]

    def log(values: dict[str, float]) -> None:
        if values[track.STEP] == 3:
            raise errors.Error("no answer from https://user:secret@example.com")
        calls.append(values)

    def init(**given: Any) -> Any:
        calls.append(given)
        finish, ignore = (lambda: calls.append("finished")), (lambda *_, **__: None)
        return SimpleNamespace(id=given["id"] or "a1", log=log, finish=finish, define_metric=ignore)

    wandb.init, wandb.Settings = init, lambda **settings: settings  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "wandb.errors", errors)
    return calls


def test_a_run_that_goes_on_goes_on_there(sent: list[Any], tmp_path: Path) -> None:
    for start in (0, 1):
        tracker = Tracker("wandb", tmp_path, {"visft.seed": 1})
        tracker.on_step(start + 1, {"loss/loss": 2.0})
        tracker.on_evaluation(start + 1, {"box/AP": 0.5})
        tracker.close()
    opened, *values = sent[:4]
    assert (opened["id"], sent[4]["id"], opened["config"], opened["name"]) == (
        None,
        "a1",
        {"visft.seed": 1},
        tmp_path.name,
    )
    assert values == [{track.STEP: 1, "loss/loss": 2.0}, {track.STEP: 1, "val/box/AP": 0.5}, "finished"]
    assert sent[5][track.STEP] == 2 and not opened["settings"]["save_code"]


def test_an_error_of_a_tracker_ends_no_run(sent: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker("wandb", tmp_path, {})
    for step in range(1, 6):
        tracker.on_step(step, {"loss": 1.0})
    tracker.close()
    assert [values[track.STEP] for values in sent[1:]] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("warning: wandb gets nothing any more") == 1 and "secret" not in said


@pytest.mark.parametrize("failing", ["start_run", "log_params"])
def test_no_error_of_mlflow_ends_a_run(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It raises a bare Exception for a record that is open already, which one that failed must not stay."""
    mlflow, ended = ModuleType("mlflow"), list[str]()

    def fail(*_: Any, **__: Any) -> None:
        raise Exception("Run with UUID 1 is already active")

    vars(mlflow).update(
        set_experiment=lambda _: SimpleNamespace(experiment_id="1"), start_run=lambda **_: None, end_run=ended.append
    )
    vars(mlflow)[failing] = fail
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    Tracker("mlflow", tmp_path, {}).on_step(1, {"loss": 1.0})
    assert "warning: mlflow gets nothing any more: Run with UUID 1 is already active" in capsys.readouterr().err
    assert len(ended) == (failing == "log_params") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install visft_ds[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker("wandb", tmp_path, {"visft.seed": 1})
    tracker.on_step(2, {"loss/loss": 2.0})
    tracker.on_evaluation(1, {"box/AP": 0.5})
    tracker.close()
    assert "nothing any more" not in capsys.readouterr().err
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb")) and (tmp_path / "tracker-wandb").read_text().strip()


@pytest.mark.slow
def test_mlflow_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install visft_ds[mlflow]")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'store'}")
    for step in (1, 2):
        tracker = Tracker("mlflow", tmp_path, {"visft.seed": 1})
        tracker.on_step(step, {"loss/detection": 2.0 / step, "loss/detection/ce": 1.0})
        tracker.close()
    run = mlflow.get_run((tmp_path / "tracker-mlflow").read_text().strip())
    assert run.data.params == {"visft.seed": "1"}
    assert run.data.metrics == {"loss.detection": 1.0, "loss.detection.ce": 1.0}
