"""A task of another package, tests/fourth_task.py, found by its entry point, does all that ours do."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests import finished, fourth_task
from tests.ranks import run_ranks
from tests.tiny import TINY
from visft_ds import tasks
from visft_ds.config import resolve
from visft_ds.config.schema import complete
from visft_ds.monitor.metrics import read_metrics
from visft_ds.tasks import BUILT_IN, TASKS, entries, register

SETTINGS: dict[str, Any] = {
    **TINY,
    **finished.SMALL,
    "visft.run.save_every": 4,
    "visft.run.eval_every": 4,
    "visft.run.visualizations": 1,
    "visft.run.log_every": 1,
    **{f"visft.tasks.{task}.steps": 1 for task in BUILT_IN[:3]},
    "visft.tasks.classification": {"steps": 1, "batch_size": 4, "micro_batch": 2, "image": {"size": 28}},
}
SCRIPT = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
import visft_ds, visft_ds.tasks
from tests.tiny import Here
from visft_ds.config import resolve
from visft_ds.config.schema import complete
from visft_ds.prepare.settle import settle
from visft_ds.planner.memory import plan_largest, planned_run
from visft_ds.evals.report import report_runs
from visft_ds.run import evaluation
evaluation.ProcessPoolExecutor = Here
out, mode = Path(sys.argv[1]), sys.argv[2]
settings = json.loads({json.dumps(json.dumps(SETTINGS))}) | {{"visft.mode": mode}}
if mode == "shared":
    settings |= {{"visft.shared.batch_size": 4, "visft.shared.micro_batch": 2, "visft.shared.image.fixed_size": 28}}
given = dict(model="debug", engine="zero1", data={str(finished.shards())!r}, settings=settings)
own = settings | {{"visft.param_groups": [{{"name": "heads", "params": "heads.*"}}], "visft.run.eval_every": 0}}
first = visft_ds.fit(stage=1, out=out / "stage1", **{{**given, "settings": own}})
follows = settle(["--stage", "2", "--data", given["data"], "--heads", str(first.export)]).config.visft
assert follows.tasks.enabled()["classification"].batch_size == 4
settings |= {{"visft.heads.path": first.export, "visft.lora.rank": 2}}
second = visft_ds.fit(stage=2, out=out / "stage2", **given)
found = visft_ds.evaluate(out / "stage2", out=out / "evaluation", visualizations=1)
same = json.loads((out / "evaluation/classification_results.json").read_text()) == found.results["classification"]
if mode == "sampled":
    report_runs([out / "stage2"], None, None)
model = visft_ds.load(out / "stage2")
predicted = model.predict(sys.argv[3])
predicted.draw().save(out / "drawn.png")
texts = [f"{{key}}={{json.dumps(value)}}" for key, value in settings.items() if key != "visft.heads.path"]
plan = plan_largest(planned_run(resolve(stage=2, model="debug", settings=texts), 1, "fp32", None, None))
print(json.dumps([dict(found.metrics), predicted.to_coco(1)["classification"], repr(predicted), plan.total, same]))
"""


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("own") / "photograph.png"
    Image.new("RGB", (40, 30), (200, 20, 20)).save(path)
    return path


@pytest.mark.parametrize("mode", [pytest.param("sampled", marks=pytest.mark.slow), "shared"])
def test_it_trains_evaluates_exports_predicts_draws_and_is_planned(
    mode: str, tmp_path: Path, picture: Path
) -> None:
    installed = tmp_path / "site/own-1.0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Name: own\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[visft_ds.tasks]\nclassification = tests.fourth_task:SPEC\n")
    (printed,) = run_ranks(["-c", SCRIPT, str(tmp_path), mode, str(picture), str(installed.parent)], world=1)
    metrics, (result,), told, planned, same = json.loads(printed.splitlines()[-1])
    assert 0 <= metrics["class/accuracy"] <= 1 and {"box/AP", "mask/AP", "caption/CIDEr"} <= set(metrics)
    assert result["image_id"] == 1 and f"{result['score']:.2f}" in told and planned > 0 and same
    for stage in (1, 2):
        records = list(read_metrics(tmp_path / f"stage{stage}" / "metrics.jsonl"))
        losses = [record["loss/classification"] for record in records if "loss/classification" in record]
        assert losses and (stage == 1 or any("class/accuracy" in json.dumps(record) for record in records))
    assert (tmp_path / "stage1/export/classification.safetensors").is_file()
    assert (tmp_path / "drawn.png").is_file() and list(
        (tmp_path / "evaluation/visualizations").glob("*classification*")
    )
    if mode == "sampled":
        assert "class/accuracy" in (tmp_path / "stage2/report.html").read_text(encoding="utf-8")


def test_names_are_taken_once_and_places_must_have_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {name: entries()[name] for name in BUILT_IN}
    monkeypatch.setattr(tasks, "entries", lambda: table)
    with pytest.raises(ValueError, match="taken"):
        register("detection", "mine:SPEC")
    for place in ("tests.nothing:SPEC", "tests.fourth_task:NOTHING", "classification", ":"):
        table["own"] = place
        with pytest.raises(ValueError, match="module:NAME"):
            TASKS["own"]
    del table["own"]
    register("classification", "tests.fourth_task:SPEC")
    monkeypatch.setattr(import_module("visft_ds.config.resolve"), "entries", lambda: table)
    with pytest.raises(ValueError, match="add --set 'visft"):
        resolve(stage=1, model="debug", settings=["visft.tasks=classification"])
    assert list(TASKS) == [*BUILT_IN, "classification"] and TASKS["classification"] is fourth_task.SPEC


def test_settings_that_were_read_before_a_task_was_registered_stay_valid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = resolve(stage=1, model="debug")
    monkeypatch.setitem(entries(), "classification", "tests.fourth_task:SPEC")
    complete()
    assert [*before.visft.tasks.enabled()] == [*BUILT_IN[:3]]
