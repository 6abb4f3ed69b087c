"""RUN/checkpoints/step_N wherever a run's folder is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import finished
from tests.ranks import run_ranks
from tests.tiny import command
from tools.merge_lora import main as merge
from visft_ds import evaluate, load
from visft_ds.interop.heads import head_file, open_head

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
LAST, EARLIER = "checkpoints/step_00000004", "checkpoints/step_00000002"
IMAGE = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)


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


def test_the_last_checkpoint_predicts_measures_and_merges_as_the_run(tmp_path: Path) -> None:
    run = finished.runs() / "stage2"
    wanted, found, before = (load(place).predict(IMAGE, threshold=0) for place in (run, run / LAST, run / EARLIER))
    np.testing.assert_array_equal(found.boxes.scores, wanted.boxes.scores)
    assert not np.array_equal(before.boxes.scores, wanted.boxes.scores)
    numbers = [evaluate(place, tasks=["detection"], limit=2).metrics for place in (run, run / LAST)]
    assert numbers[0] == numbers[1]
    for name, place in (("run", run), ("step", run / LAST)):
        assert merge(["--adapter", str(place), "--out", str(tmp_path / f"{name}.safetensors")]) == 0
    merged, ours = (load_file(tmp_path / f"{name}.safetensors") for name in ("run", "step"))
    assert all(torch.equal(ours[name], value) for name, value in merged.items())


def test_stage_2_learns_under_the_heads_of_a_checkpoint(tmp_path: Path) -> None:
    run = finished.runs() / "stage1"
    extra = {**finished.SMALL, "visft.heads.path": str(run / EARLIER), "visft.lora.rank": 2}
    run_ranks(["launchers/train.py", *command(finished.shards(), tmp_path / "two", stage=2, extra=extra)], world=1)
    found = load(tmp_path / "two").predict(IMAGE, threshold=0)
    wanted = load(tmp_path / "two", heads=run / EARLIER).predict(IMAGE, threshold=0)
    np.testing.assert_array_equal(found.boxes.scores, wanted.boxes.scores)
