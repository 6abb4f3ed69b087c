"""A run whose stage-1 folder is deleted, whose own folder is moved, and that is used from another current folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.coco_tree import write_tree
from tests.integration.ranks import REPOSITORY
from tests.integration.tiny import TINY
from visft_ds.evals.benchmarks.models import LoadOptions, load_encoder, parse_model
from visft_ds.interop.backbones import save_backbone
from visft_ds.models.eva_vit import build_backbone
from visft_ds.shards.build import Options, build
from visft_ds.tasks.captioning.vocabulary import Vocabulary

pytestmark = pytest.mark.slow
SETTINGS: dict[str, Any] = {
    **TINY,
    "scheduler.params.total_num_steps": 4,
    "scheduler.params.warmup_num_steps": 1,
    "visft.run.save_every": 2,
    "visft.model.weights": "weights/base.safetensors",
    "visft.tasks.captioning.vocabulary.file": "words.json",
}


def _run(folder: Path, tool: str, *words: str | Path, code: int = 0) -> str:
    """A command of the repository, from a folder; returns everything it printed."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / tool), *map(str, words)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def _train(stage: int, *more: str) -> Sequence[str]:
    settings = (f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.items())
    return ("--stage", str(stage), "--model", "debug", "--data", "shards", *settings, *more)


def test_a_run_is_whole_without_the_folder_it_began_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, away, lost = tmp_path / "home", tmp_path / "away", tmp_path / "lost"
    for split in ("train", "val"):
        tree = write_tree(tmp_path / split)
        build(Options(tree.images, tree.instances, tree.captions, home / "shards", split))
    known = json.loads((home / "shards/train.manifest.json").read_text())["vocabulary"]
    (home / "words.json").write_text(json.dumps(Vocabulary(tuple(known)).to_dict()))
    base = home / "weights/base.safetensors"
    save_backbone(build_backbone("debug", **SETTINGS["visft.model.overrides"]), base, layout="timm")
    _run(home, "launchers/train.py", *_train(1, "--out", "stage1"))
    second = _train(2, "--set=visft.heads.path=stage1/export", "--set=visft.lora.rank=2")
    _run(home, "launchers/train.py", *second, "--out", "runs/stage2")
    run, moved = home / "runs/stage2", away / "moved"
    last = run / "checkpoints/step_00000004/parameters.safetensors"
    expected, copies = load_file(last), {path.name for path in (run / "inputs").rglob("*") if path.is_file()}
    heads = {f"{task}.safetensors" for task in ("detection", "segmentation", "captioning")}
    assert copies == {*heads, "vocabulary.json", "categories.json"}
    shutil.rmtree(last.parent)  # as if it was stopped before
    shutil.rmtree(run / "export")
    shutil.rmtree(home / "stage1")
    (home / "words.json").unlink()
    away.mkdir()
    run.rename(moved)

    printed = _run(away, "launchers/train.py", *second, "--out", "moved", "--resume", "must")
    assert "heads loaded strictly from moved/inputs/heads: " in printed
    resumed = load_file(moved / last.relative_to(run))
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert json.loads((moved / "run.json").read_text())["config"]["visft"]["heads"]["path"] == "stage1/export"

    (tmp_path / "elsewhere").mkdir()
    _run(tmp_path / "elsewhere", "tools/evaluate.py", "--run", moved, "--out", "numbers", "--images", "0")
    assert (tmp_path / "elsewhere/numbers/metrics.json").is_file()
    merge = ("tools/merge_lora.py", "--adapter", moved / "export/adapter", "--verify", "--out")
    assert str(base) in _run(tmp_path / "elsewhere", *merge, "merged.safetensors")
    assert "everything is finite" in _run(tmp_path / "elsewhere", "tools/replay.py", moved, "--step", "3")
    step = _run(tmp_path / "elsewhere", "tools/make_shards.py", "info", "--run", moved, "--step", "3")
    assert str(home / "shards") in step
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = parse_model(f"before={moved}")
    assert spec.name == str(base) and load_encoder(spec, LoadOptions("fp32")).facts["adapter"].startswith(str(moved))

    home.rename(lost)
    told = _run(away, *merge, "again.safetensors", code=2)
    sha256 = json.loads((moved / "run.json").read_text())["inputs"]["visft.model.weights"]["sha256"]
    for part in (str(base), "weights/base.safetensors: no such file", sha256, "--base FILE", "--backbone FILE"):
        assert part in told
    told = _run(away, "tools/evaluate.py", "--run", moved, "--backbone", lost / "weights/base.safetensors", code=2)
    assert f"{home / 'shards'}: no shards of train" in told and "--data FOLDER" in told
