"""Weights & Biases: what it is sent, a run that goes on, errors that end no run; and the library itself."""

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
        tracker = Tracker(tmp_path, {"visft.seed": 1})
        tracker(start + 1, {"loss/loss": 2.0})
        tracker(start + 1, {"val/box/AP": 0.5})
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


def test_an_error_of_a_tracker_ends_no_run(
    sent: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(tmp_path, {})
    for step in range(1, 6):
        tracker(step, {"loss": 1.0})
    tracker.close()
    assert [values[track.STEP] for values in sent[1:]] == [1, 2]
    said = capsys.readouterr().err
    assert said.count("warning: wandb receives nothing more") == 1 and "secret" not in said
