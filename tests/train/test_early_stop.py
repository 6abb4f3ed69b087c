"""`visft.run.stop_after`: a run ends when its metric has not risen for a while, at the same step on every start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tests.freeze.stored import FOLDER
from tests.ranks import finish, start_ranks
from tests.tiny import TINY, steps_recorded
from visft_ds.config import resolve
from visft_ds.parallel.engine import Engine
from visft_ds.run.log import RunLog
from visft_ds.run.state import RunState

#: A learning rate that changes nothing: the first evaluation stays the best one.
SETTINGS = {
    **TINY,
    "visft.mode": "sampled",
    "visft.tasks": "detection",
    "optimizer.params.lr": 1e-30,
    "optimizer.params.weight_decay": 0,
    "scheduler.params.warmup_num_steps": 0,
    "scheduler.params.total_num_steps": 8,
    "visft.run.save_every": 1,
    "visft.run.eval_every": 1,
    "visft.run.eval_limit": 2,
    "visft.run.pictures": 0,
    "visft.run.keep_best": "box/AP50",
    "visft.run.stop_after": 2,
}


def _train(out: Path) -> str:
    settings = [f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    words = ["--stage", "1", "--model", "debug", "--data", str(FOLDER / "shards"), "--out", str(out), *settings]
    (code,), (printed,) = finish(start_ranks(["launchers/train.py", *words], world=1))
    assert code == 0, printed
    return printed


def test_it_ends_and_exports_at_the_same_step_after_an_interruption(tmp_path: Path) -> None:
    told = "ends after step 3: 2 evaluations without a better box/AP50 than that of step 1 (visft.run.stop_after)"
    assert told in _train(tmp_path)
    assert {*steps_recorded(tmp_path)} == {1, 2, 3} and (tmp_path / "export/detection.safetensors").is_file()
    shutil.rmtree(tmp_path / "checkpoints/step_00000003")  # it was killed before it saved the last one
    (tmp_path / "export/detection.safetensors").unlink()
    assert told in _train(tmp_path)
    assert {*steps_recorded(tmp_path)} == {1, 2, 3} and (tmp_path / "export/detection.safetensors").is_file()
    assert told in _train(tmp_path), "the same command finds nothing left to do"
    assert {*steps_recorded(tmp_path)} == {1, 2, 3} and (tmp_path / "checkpoints/step_00000001").is_dir()


def test_a_best_checkpoint_that_is_not_there_is_not_named(tmp_path: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    config = resolve(stage=1, model="debug", settings=[*settings, f"visft.run.out={tmp_path}"])
    state = RunState(config, cast(Engine, None), {})  # an engine is asked for nothing here
    for step, score in enumerate((0.5, 0.1, 0.1), 1):
        state.judged(step, {"box/AP50": score})
    told: list[str] = []
    assert state.ends_early(3, lambda: None, cast(RunLog, SimpleNamespace(message=told.append)))
    assert told[0].endswith("(visft.run.stop_after); its checkpoint was not kept")


def test_it_needs_a_metric() -> None:
    with pytest.raises(
        ValueError, match=r"stop_after = 2 \(--set\): needs a metric: set visft\.run\.keep_best, such as box/AP50"
    ):
        resolve(stage=1, model="debug", settings=["visft.run.stop_after=2"])
