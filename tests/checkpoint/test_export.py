"""An export wherever it lies, and a checkpoint, are whole models: predictions, numbers, merged weights,
heads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import finished
from tests.ranks import run_ranks
from tests.tiny import command
from visft_ds.evals.evaluate import evaluate
from visft_ds.interop.heads import head_file, open_head
from visft_ds.merge.cli import main as merge
from visft_ds.predict.model import load

LAST, EARLIER = "checkpoints/step_00000004", "checkpoints/step_00000002"
IMAGE = np.random.default_rng(0).integers(0, 255, (70, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize(("stage", "part"), [(1, "export"), (2, "export"), (2, LAST)])
def test_a_part_of_a_run_is_its_whole_model(
    stage: int, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished.runs() / f"stage{stage}"
    place = Path("moved") if part == "export" else run / part
    monkeypatch.chdir(tmp_path)
    if part == "export":
        shutil.copytree(run / "export", place)
    found, expected = (load(source).predict(IMAGE, threshold=0).to_coco(1) for source in (place, run))
    assert found == expected and found["detection"] and found["captioning"]
    ours, theirs = (evaluate(source, data=finished.shards(), split="val") for source in (place, run))
    assert ours.metrics == theirs.metrics
    if stage == 2:
        for source, name in ((place, "ours"), (run, "theirs")):
            assert merge([str(source), "--out", f"{name}.safetensors"]) == 0
        merged = load_file("ours.safetensors")
        assert all(
            torch.equal(merged[name], value) for name, value in load_file("theirs.safetensors").items()
        )


def test_heads_of_a_checkpoint_are_those_of_the_export_at_that_step() -> None:
    run = finished.runs() / "stage1"
    for task in ("detection", "segmentation", "captioning"):
        there, expected, before = (
            open_head(file, task).build().state_dict()
            for file in (run / LAST, head_file(run / "export", task), run / EARLIER)
        )
        assert all(torch.equal(value, expected[name]) for name, value in there.items())
        assert not all(torch.equal(value, expected[name]) for name, value in before.items())
        assert open_head(run / EARLIER, task).info.extra["step"] == 2


def test_stage_2_learns_under_the_heads_of_a_checkpoint(tmp_path: Path) -> None:
    run = finished.runs() / "stage1"
    extra = {**finished.SMALL, "visft.heads.path": str(run / EARLIER), "visft.lora.rank": 2}
    run_ranks(
        ["launchers/train.py", *command(finished.shards(), tmp_path / "two", stage=2, extra=extra)], world=1
    )
    actual, expected = (
        load(tmp_path / "two", **heads).predict(IMAGE, threshold=0)
        for heads in ({}, {"heads": run / EARLIER})
    )
    np.testing.assert_array_equal(actual.boxes.scores, expected.boxes.scores)


def test_an_export_without_its_record_is_none(tmp_path: Path) -> None:
    """It is written last: a run that was interrupted has exported a part of its model."""
    shutil.copytree(finished.runs() / "stage2", tmp_path / "run")
    (tmp_path / "run/export/export.json").unlink()
    with pytest.raises(ValueError, match="has no export yet"):
        load(tmp_path / "run")
    assert load(tmp_path / "run" / LAST).tasks == ("detection", "segmentation", "captioning")


def test_a_record_names_its_files_from_any_folder() -> None:
    recorded = json.loads((finished.runs() / "stage2/export/export.json").read_text())["config"]["visft"]
    assert Path(recorded["data"]["root"]).is_absolute() and Path(recorded["heads"]["path"]).is_absolute()
