"""RUN/checkpoints/step_N wherever a run's folder is taken, and the export of a run that names a metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import finished
from tests.ranks import run_ranks
from tests.tiny import TINY, command
from tools.merge_lora import main as merge
from visft_ds import evaluate, fit, load
from visft_ds.checkpoint.saver import best_step, recorded_scores
from visft_ds.interop.heads import head_file, open_head
from visft_ds.run.folder import BACKBONE_FILE

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
LAST, EARLIER = "checkpoints/step_00000004", "checkpoints/step_00000002"


def _image() -> Any:
    return np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def test_heads_of_a_checkpoint_are_those_of_the_export_at_that_step() -> None:
    run = finished.runs() / "stage1"
    for task in ("detection", "segmentation", "captioning"):
        there, exported = (
            open_head(run / LAST, task).build(),
            open_head(head_file(run / "export", task), task).build(),
        )
        wanted = exported.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in there.state_dict().items())
        assert open_head(run / EARLIER, task).info.extra["step"] == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_predictions_of_the_last_checkpoint_are_those_of_the_run(stage: int) -> None:
    run = finished.runs() / f"stage{stage}"
    wanted, found, before = (load(place).predict(_image(), threshold=0) for place in (run, run / LAST, run / EARLIER))
    np.testing.assert_array_equal(found.boxes.scores, wanted.boxes.scores)
    assert not np.array_equal(before.boxes.scores, wanted.boxes.scores)


def test_a_checkpoint_is_evaluated() -> None:
    run = finished.runs() / "stage2"
    wanted, found = (evaluate(place, tasks=["detection"], limit=2) for place in (run, run / LAST))
    assert found.metrics == wanted.metrics


def test_a_checkpoint_is_merged(tmp_path: Path) -> None:
    run = finished.runs() / "stage2"
    for name, place in (("run", run), ("step", run / LAST)):
        assert merge(["--adapter", str(place), "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    wanted, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("run", "step"))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert (run / "export" / BACKBONE_FILE).is_file()


def test_stage_2_learns_under_the_heads_of_a_checkpoint(tmp_path: Path) -> None:
    run = finished.runs() / "stage1"
    extra = {**finished.SMALL, "visft.heads.path": str(run / EARLIER), "visft.lora.rank": 2}
    run_ranks(["launchers/train.py", *command(finished.shards(), tmp_path / "two", stage=2, extra=extra)], world=1)
    found = load(tmp_path / "two").predict(_image(), threshold=0)
    wanted = load(tmp_path / "two", heads=run / EARLIER).predict(_image(), threshold=0)
    np.testing.assert_array_equal(found.boxes.scores, wanted.boxes.scores)


def test_the_export_is_that_of_the_best_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is found by a head of few steps: of equal numbers the first is the best."""
    settings: dict[str, Any] = {
        **TINY,
        "visft.mode": "sampled",
        "visft.tasks": "detection",
        "scheduler.params.total_num_steps": 4,
        "scheduler.params.warmup_num_steps": 0,
        "visft.run.save_every": 1,
        "visft.run.eval_every": 1,
        "visft.run.eval_limit": 2,
        "visft.run.pictures": 0,
        "visft.run.keep_last": 4,
        "visft.run.keep_best": "box/AP50",
    }
    ended = fit(stage=1, model="debug", data=finished.shards(), out=tmp_path, settings=settings)
    best = best_step(recorded_scores(tmp_path / "metrics.jsonl", "box/AP50"))
    assert ended.finished and best is not None and best < 4
    assert f"exports step {best}, the best by box/AP50" in capfd.readouterr().out
    exported = load_file(head_file(tmp_path / "export", "detection"))
    values = [load_file(tmp_path / f"checkpoints/step_0000000{step}/parameters.safetensors") for step in (best, 4)]
    assert all(torch.equal(values[0][f"heads.detection.{name}"], value) for name, value in exported.items())
    assert any(not torch.equal(values[1][f"heads.detection.{name}"], value) for name, value in exported.items())
    assert open_head(head_file(tmp_path / "export", "detection"), "detection").info.extra["step"] == best
    assert json.loads((tmp_path / "checkpoints/step_00000004/state.json").read_text())["step"] == 4
