"""The whole way of a task whose labels are a map of each image, and its losses under two engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.tiny import SETTINGS, STEPS, losses

_WAY = """
import json, sys
from pathlib import Path
import visft_ds
from tests.tiny import Here
from visft_ds.cli import main
from visft_ds.run import evaluation

evaluation.ProcessPoolExecutor = Here
root, task, images, settings, whole = sys.argv[1:]
root, settings = Path(root), json.loads(settings)
images = root / "data" / images
shards = root / "data-shards"


def run(*words):
    assert main([*map(str, words)]) == 0, words


run("shards", root / "data")
given = dict(model="debug", engine="zero1", data=shards)
visft_ds.fit(stage=1, out=root / "stage1", settings=settings, **given)
last = root / "stage1"
if whole:
    last = root / "stage2"
    adapted = {**settings, "visft.heads.path": str(root / "stage1/export"), "visft.lora.rank": 2}
    visft_ds.fit(stage=2, out=last, settings=adapted, **given)
    run("report", root / "stage1", last, "--out", root / "report.html")
    sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    run("plan", "--cluster=1xH100-80GB", "--stage=1", *sets, "--model=debug", "--engine=zero1")
run("evaluate", "--run", last, "--visualizations", 1)
run("predict", images, "--run", last, "--out", root / "found", "--threshold", 0)
found = visft_ds.load(last).predict(min(images.iterdir()))
found.draw().save(root / "drawn.png")
if whole:
    for form in ("onnx", "torch"):
        run("export", last, "--out", root / form, "--format", form, "--verify", "all")
    run("predict", root / "onnx", images, "--out", root / "found-onnx", "--threshold", 0)
values = getattr(found, task)
print(json.dumps([repr(found), values.shape, float(values.min()), float(values.max())]))
"""


def of_one_task(task: str, steps: int, **options: Any) -> dict[str, Any]:
    """Settings of a run of this task alone, with options of its own."""
    return {
        **{key: value for key, value in SETTINGS.items() if ".tasks." not in key},
        "visft.mode": "sampled",
        "visft.tasks": task,
        "scheduler.params.total_num_steps": steps,
        "visft.run.save_every": steps,
        "visft.run.eval_every": steps,
        f"visft.tasks.{task}": {"batch_size": 4, **options},
    }


def whole_way(
    root: Path, task: str, images: str, settings: dict[str, Any], *, whole: bool
) -> tuple[str, list[int], float, float]:
    """Pack `root/data`, train (`stage1`), evaluate, and predict its folder `images` (`found`); `whole`: with a
    stage 2 (`stage2`), a report, a plan and exports (`found-onnx`) besides.

    Returns the prediction of the first image in words, and shape, least and largest value of its map.
    """
    words = [str(root), task, images, json.dumps(settings), "whole" if whole else ""]
    (printed,) = run_ranks(["-c", _WAY, *words], world=1)
    in_words, shape, least, most = json.loads(printed.splitlines()[-1])
    return in_words, shape, least, most


def check_engines(root: Path, words: list[str], loss: str) -> None:
    """Train in one process and under ZeRO-3 on two, by these words of a command; the losses are the same."""
    for engine, world in {"zero1": 1, "zero3": 2}.items():
        run_ranks(["launchers/train.py", f"--engine={engine}", f"--out={root / engine}", *words], world)
    alone = losses(root / "zero1")
    assert len(alone) == STEPS and any(loss in record for record in alone)
    for one, other in zip(losses(root / "zero3"), alone, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6)
