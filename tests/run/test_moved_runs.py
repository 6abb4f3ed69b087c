"""A run whose stage-1 folder is deleted, whose own folder is moved, and that is used from another current
folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import write_shards
from tests.random_tower import build_backbone, save_backbone
from tests.ranks import REPOSITORY, python
from tests.tiny import TINY, words_of
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
from visft_ds.merge.cli import main as merge
from visft_ds.predict.model import load
from visft_ds.tasks.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    **TINY,
    "scheduler.params.total_num_steps": 4,
    "scheduler.params.warmup_num_steps": 1,
    "visft.run.save_every": 2,
}


def _train(folder: Path, *more: str) -> str:
    """The training command, from a folder; returns what it printed."""
    return python(
        REPOSITORY / "launchers/train.py", "--model=debug", *words_of(SETTINGS), *more, folder=folder
    )


def test_a_run_is_used_without_the_folder_it_began_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home, away = tmp_path / "home", tmp_path / "away"
    write_shards(home, train=12, val=12)
    known = json.loads((home / "shards/train.manifest.json").read_text())["vocabulary"]
    (home / "words.json").write_text(json.dumps(Vocabulary(tuple(known)).to_dict()))
    base = home / "weights/base.safetensors"
    save_backbone(build_backbone("debug", **SETTINGS["visft.model.overrides"]), base)
    words = ("--data=shards", "--set=visft.model.weights=weights/base.safetensors")
    words += ("--set=visft.tasks.captioning.vocabulary.file=words.json",)
    _train(home, "--stage=1", "--out=stage1", *words)
    second = ("--stage=2", "--set=visft.lora.rank=2")
    _train(home, *second, "--heads=stage1/export", "--out=runs/stage2", *words)
    run, moved = home / "runs/stage2", away / "moved"
    last = run / "checkpoints/step_00000004/parameters.safetensors"
    expected = load_file(last)
    shutil.rmtree(last.parent)  # as if it was stopped before
    (run / "export/export.json").unlink()
    shutil.rmtree(run / "export/adapter")
    shutil.rmtree(home / "stage1")
    away.mkdir()
    run.rename(moved)

    words = (f"--data={home}/shards", f"--set=visft.model.weights={base}", "--heads=moved/export")
    words += (f"--set=visft.tasks.captioning.vocabulary.file={home}/words.json",)
    printed = _train(away, *second, "--out=moved", "--resume=must", *words)
    assert "heads loaded strictly from moved/export: " in printed
    resumed = load_file(moved / last.relative_to(run))
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    monkeypatch.chdir(tmp_path)
    assert evaluate(["--run", str(moved), "--out", "numbers", "--visualizations", "0"]) == 0
    assert merge(["--adapter", str(moved / "export/adapter"), "--verify", "--out", "merged.safetensors"]) == 0
    assert str(base) in capsys.readouterr().out
    spec = parse_model(f"before={moved}")
    assert (
        spec.name == str(base)
        and str(spec.adapter).startswith(str(moved))
        and load_encoder(spec, "fp32").kinds
    )
    photo = home / "val/images/picture.0.jpg"
    wanted = load(moved).predict(photo, threshold=0)
    assert wanted.boxes is not None and len(wanted.boxes.names) and wanted.caption is not None

    base.rename(tmp_path / "base.safetensors")
    assert merge([str(moved / "export"), "--out", "again.safetensors"]) == 2
    assert f"{base}, the base weights of" in capsys.readouterr().err
    there = load(moved / "export", backbone="base.safetensors").predict(photo, threshold=0)
    assert there.caption == wanted.caption
