"""tools/ablate.py from drawn images to tables, in the smallest form; and once more, which costs nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tiny import TINY
from visft_ds.experiments.ablations import cli, scales


@pytest.mark.slow
def test_a_question_from_images_to_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("open_clip")
    for name, value in {"TOY_TRAIN": 24, "TOY_VAL": 12, "TOY_SIDE": 56, "TOY_CLASS_TRAIN": 24}.items():
        monkeypatch.setattr(scales, name, value)
    monkeypatch.setattr(scales, "TOY_CLASS_TEST", 24)
    monkeypatch.setattr(scales, "TOY_BUILT_IN", ())
    tower = [part for name in ("width=32", "depth=2", "num_heads=2", "image_size=56") for part in ("--set", name)]
    monkeypatch.setattr(scales, "TOY_PRETRAINING", (*tower, "--steps", "2", "--batch-size", "8"))
    monkeypatch.setattr(scales, "TOY_TEXT", ("--steps", "2", "--batch-size", "8"))
    lengths = ("scheduler.params.warmup_num_steps=0", "scheduler.params.total_num_steps=2")
    monkeypatch.setattr(scales, "TOY_STAGE1", lengths)
    monkeypatch.setattr(scales, "TOY_STAGE2", lengths)
    shared = ["--seeds", "2", "--out", str(tmp_path / "out")]
    shared += [part for key, value in TINY.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    for words in (["tuning", "--arms", "DoRA,norms"], ["text"]):
        status = cli.main([*words, *shared])
        assert status == 0, capfd.readouterr().out
    table = json.loads((tmp_path / "out/tuning/table.json").read_text())
    assert table["seeds"] == [0, 1] and not any(arm["failures"] for arm in table["arms"])
    names = {metric["name"] for metric in table["metrics"]}
    wanted = {
        "caption/CIDEr",
        "zero_shot/style-b top1",
        "probe/style-b linear",
        "retrieval/style-b text to image R@1",
    }
    assert wanted <= names
    assert "<svg" in (tmp_path / "out/report.html").read_text()
    texts = json.loads((tmp_path / "out/text/table.json").read_text())["arms"]
    alone = texts[2]["numbers"]  # nothing of the images has changed where texts learnt alone
    assert all(pair["before"] == pair["after"] for pair in alone["probe/style-b knn"].values())
    capfd.readouterr()
    assert cli.main(["text", *shared]) == 0
    printed = capfd.readouterr().out
    assert "[1/" not in printed and "steps have finished before" in printed
