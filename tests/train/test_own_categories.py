"""Own categories from the command line: stage 1, stage 2 on its heads, mask AP during and after training, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.coco_tree import write_tree
from tests.ranks import run_ranks
from tests.tiny import command
from visft_ds.evals.cli import main as evaluate
from visft_ds.evals.records import read_evaluation
from visft_ds.shards.build import Options, build

OWN = {0: "paint", 1: "scratch", 12: "rust", 500: "hole"}  # no object is of the first
INTO = {3: 1, 8: 12, 13: 500}
SETTINGS: dict[str, object] = {
    "visft.run.rehearsal": True,
    "visft.tasks.segmentation.head.num_queries": 12,
    "scheduler.params.warmup_num_steps": 1,
    "scheduler.params.total_num_steps": 4,
    "visft.run.eval_every": 4,
    "visft.run.save_every": 4,
    "visft.run.pictures": 1,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")

    def rename(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": number, "name": name} for number, name in OWN.items()]
        for annotation in content["annotations"]:
            annotation["category_id"] = INTO[annotation["category_id"]]

    for split in ("train", "val"):
        tree = write_tree(folder / split, 8)
        tree.edit(rename)
        build(Options(tree.images, tree.instances, tree.captions, folder / "shards", split))
    return folder / "shards"


def _train(stage: int, shards: Path, out: Path, *more: str) -> str:
    words = ["launchers/train.py", *command(shards, out, stage=stage, extra=SETTINGS)]
    return run_ranks([*words, *(f"--set={one}" for one in more)], world=1)[0]


@pytest.mark.slow
def test_both_stages_and_evaluation(shards: Path, tmp_path: Path) -> None:
    printed = _train(1, shards, tmp_path / "one")
    assert "classes, segmentation  4, the categories of the data" in printed
    _train(2, shards, tmp_path / "two", f"visft.heads.path={tmp_path / 'one/export'}")
    records = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert any("val/mask/AP" in record for record in records)
    assert evaluate(["--run", str(tmp_path / "two"), "--images", "2"]) == 0
    found = read_evaluation("two", tmp_path / "two/evaluation-val")
    assert {f"{kind}/AP/{name}" for kind in ("box", "mask") for name in OWN.values()} <= found.metrics.keys()
    assert found.metrics["mask/AP/paint"] == -1 < found.metrics["mask/AP/rust"]
    for task in ("detection", "segmentation"):
        results = json.loads((found.folder / f"{task}_results.json").read_text())
        assert results and {result["category_id"] for result in results} <= OWN.keys()
        assert (found.folder / f"{task}.png").is_file()
