"""The export of a run is a whole model wherever it lies: predictions, numbers and merged weights are the run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests import finished
from visft_ds.evals.evaluate import evaluate
from visft_ds.interop.cli import main as merge
from visft_ds.predict.model import load

IMAGE = np.random.default_rng(0).integers(0, 255, (70, 60, 3), dtype=np.uint8)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_export_is_whole_by_itself(stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, moved = finished.runs() / f"stage{stage}", tmp_path / "moved"
    shutil.copytree(run / "export", moved)
    monkeypatch.chdir(tmp_path)
    found, expected = (load(source).predict(IMAGE, threshold=0).to_coco(1) for source in ("moved", run))
    assert found == expected and found["detection"] and found["captioning"]
    ours, theirs = (evaluate(source, data=finished.shards(), split="val") for source in ("moved", run))
    assert ours.metrics == theirs.metrics
    if stage == 2:
        for source, name in (("moved", "ours"), (str(run), "theirs")):
            assert merge(["--adapter", source, "--out", f"{name}.safetensors"]) == 0
        merged = load_file("ours.safetensors")
        assert all(torch.equal(merged[name], value) for name, value in load_file("theirs.safetensors").items())


def test_an_export_without_its_record_is_none(tmp_path: Path) -> None:
    """It is written last: a run that was interrupted has exported a part of its model."""
    shutil.copytree(finished.runs() / "stage2", tmp_path / "run")
    (tmp_path / "run/export/export.json").unlink()
    with pytest.raises(ValueError, match="has not exported"):
        load(tmp_path / "run")
    assert load(tmp_path / "run/checkpoints/step_00000004").tasks == ("detection", "segmentation", "captioning")


def test_a_record_names_its_files_from_any_folder() -> None:
    recorded = json.loads((finished.runs() / "stage2/export/export.json").read_text())["config"]["visft"]
    assert Path(recorded["data"]["root"]).is_absolute() and Path(recorded["heads"]["path"]).is_absolute()
