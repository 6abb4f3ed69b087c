"""The experiment: what its variants train on and are compared with, its verdict, and the whole of it in very
small.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import TINY
from visft_ds.evals.judge.benchmark import Score
from visft_ds.evals.judge.table import Trial, rows_of
from visft_ds.evals.records import JUDGE
from visft_ds.experiments import ablate
from visft_ds.experiments.ablate import Experiment, _parser, main
from visft_ds.experiments.results import BASE, EQUAL, over_styles, report, verdict
from visft_ds.experiments.variants import FIRST, PERMUTED
from visft_ds.steps import Step

WORDS = ["--model", "debug", "--seeds", "2", "--out", "out"]


@pytest.fixture(scope="module")
def steps() -> dict[str, Step]:
    names = f"{PERMUTED},soup,one stage,four times the images,last block"
    variants = ["--variants", names, "--variant", "rank 8: visft.lora.rank=8"]
    return Experiment(_parser().parse_args([*WORDS, *variants])).steps.steps


def _value(step: Step, flag: str) -> str:
    return step.command[step.command.index(flag) + 1]


def test_both_stages_of_the_control_have_the_labels_of_other_images(steps: dict[str, Step]) -> None:
    """Heads of true labels under permuted ones diverge: that would be another control."""
    for seed in "01":
        one, two = steps[f"stage1-permuted-seed{seed}"], steps[f"permuted-labels-seed{seed}"]
        assert _value(one, "--data") == _value(two, "--data") == str(steps[f"permuted{seed}-shards"].out)
        assert _value(steps[f"permuted{seed}"], "--seed") == seed
        assert f"visft.heads.path={one.out}/export" in two.command and one.name in two.needs
        assert all(f"visft.seed={seed}" in step.command for step in (one, two))


def test_arms_are_judged_beside_the_base_and_as_controls_of_the_first(steps: dict[str, Step]) -> None:
    for name in (FIRST, PERMUTED, "rank 8"):
        slug = name.replace(" ", "-")
        table, runs = (
            steps[f"{slug}-table"].command,
            ",".join(str(steps[f"{slug}-seed{seed}"].out) for seed in "01"),
        )
        assert table[1].startswith("base=") and table[2] == f"{name}={runs}"
        assert _value(steps[f"{slug}-table"], "--on").startswith("segmentation=")  # which decides
        if name != FIRST:
            beside = steps[f"{slug}-beside"]
            assert beside.command[2].startswith(f"{FIRST}=")
            assert _value(beside, "--control") == f"{name} {EQUAL}={runs}"
    assert _value(steps["soup-beside"], "--control").endswith("soup")
    assert "visft.lora.rank=8" in steps["rank-8-seed0"].command
    assert all("--without" in steps[name].command for name in ("drawings", "style-b"))
    joint = steps["one-stage-seed0"]
    assert "visft.mode=shared" in joint.command and not any(
        "visft.heads.path" in word for word in joint.command
    )


def test_more_images_teach_both_stages(steps: dict[str, Step]) -> None:
    """The first variant's drawings are the first of them: both come of one seed and style."""
    few, many = (steps[name].command for name in ("drawings", "drawings-x4"))
    assert 4 * int(few[few.index("--train") + 1]) == int(many[many.index("--train") + 1])
    one, two = steps["stage1-x4-seed1"], steps["four-times-the-images-seed1"]
    assert _value(one, "--data") == _value(two, "--data") == "out/shards-x4"
    assert f"visft.heads.path={one.out}/export" in two.command
    assert _value(steps["two-stages-seed1"], "--data") == "out/shards"
    assert "visft.param_groups=backbone.blocks.1.*" in steps["last-block-seed0"].command  # of two


@pytest.mark.parametrize(
    ("model", "globs"),
    [("debug", "backbone.*norm*"), ("efficientnet_lite0", "backbone.*bn*")],
    ids=["ViT", "convolutions"],
)
def test_norms_are_named_as_the_model_names_them(model: str, globs: str) -> None:
    """A group that matches no parameter is refused, after the trainings before it."""
    words = ["--model", model, "--out", "out", "--variants", "norms"]
    steps = Experiment(_parser().parse_args(words)).steps.steps
    assert f"visft.param_groups={globs}" in steps["norms-seed0"].command


def test_variants_may_be_judged_at_equal_shift_alone() -> None:
    words = [*WORDS, "--variants", PERMUTED, "--equal-shift", "--numbers", "in-context mIoU"]
    steps = Experiment(_parser().parse_args(words)).steps.steps
    judged = {name: _value(step, "--numbers") for name, step in steps.items() if step.command[0] == "judge"}
    assert judged == dict.fromkeys(("two-stages-table", "permuted-labels-beside"), "in-context mIoU")


def test_drawn_styles_are_judged_together_and_are_the_sample(tmp_path: Path) -> None:
    """Expected: scipy.stats.ttest_1samp([1, 2, 4, 1], 0).confidence_interval() by hand, 2.0 +- 3.182 *
    sqrt(2) / 2.
    """
    words = [*WORDS[:-1], str(tmp_path), "--variants", PERMUTED, "--styles", "4"]
    experiment = Experiment(_parser().parse_args(words))
    judged, runs = (
        experiment.steps.steps["styles"],
        ",".join(str(tmp_path / f"{{}}-seed{seed}") for seed in "01"),
    )
    assert judged.command[2] == f"{FIRST}={runs.format('two-stages', 'two-stages')}"
    assert (
        _value(judged, "--control")
        == f"{PERMUTED} {EQUAL}={runs.format('permuted-labels', 'permuted-labels')}"
    )
    assert [word for word in judged.command if "style-" in word] == [
        f"segmentation={tmp_path}/style-{number},name=style-{number}" for number in (1, 2, 3, 4)
    ]
    drawn = [
        _value(step, "--style") for name, step in experiment.steps.steps.items() if name.startswith("style-")
    ]
    assert drawn == ["b", "1", "2", "3", "4"]
    rows = [
        {"differences": {FIRST: {"value": gain}}, "controls": {FIRST: {"noise": {"value": 1.0}}}}
        for gain in (1.0, 2.0, 4.0, 1.0)
    ]
    found = over_styles(rows)
    assert found["minus base"] == pytest.approx({"value": 2.0, "low": -0.2503, "high": 4.2503}, abs=1e-3)
    assert found["minus noise"] == {"value": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("own", "control", "said"),
    [
        ((4.5, 2.7, 6.3), (4.4, 0.5, 8.0), "The claim holds: +4.5 [+2.7, +6.3] *"),
        ((4.5, 2.7, 6.3), (4.4, -0.7, 9.5), "Zero is not excluded over labels of other images."),
        ((4.5, -0.1, 9.1), (4.4, 0.5, 8.0), "Zero is not excluded over the base."),
        (
            (-4.5, -6, -3),
            (-1.0, -2.0, -0.5),
            "Zero is not excluded over the base and labels of other images.",
        ),
    ],
)
def test_the_claim_needs_both_intervals(
    own: tuple[float, ...], control: tuple[float, ...], said: str
) -> None:
    gain, against = (
        {k: v / 100 for k, v in zip(("value", "low", "high"), numbers, strict=True)}
        for numbers in (own, control)
    )
    rows: dict[str, dict[str, Any]] = {FIRST: {"minus base": gain}}
    assert "was not judged" in verdict(rows, 5)
    rows[f"{PERMUTED} {EQUAL}"] = {f"{FIRST} minus it": against}
    sentence = verdict(rows, 5)
    assert said in sentence and sentence.startswith("The claim holds") == ("Zero" not in sentence)
    assert "2 seeds of the 5" in verdict(rows, 2) and "seeds of" not in sentence


def test_the_table_holds_gain_and_price_at_equal_feature_shift(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of each variant once, whatever other numbers a data set gives."""
    equal, drawn = f"boxes {EQUAL}", np.random.default_rng(0).random(400)
    numbers = ("segmentation/x in-context mIoU", "agreement/x predictions", "segmentation/x linear mIoU")
    # Shares of items that are right.
    right = {
        BASE: (0.2, 1.0, 0.1),
        FIRST: (0.5, 0.6, 0.9),
        "boxes": (0.4, 0.9, 0.1),
        equal: (0.5, 0.8, 0.1),
    }
    folders = []
    for variants in ([BASE, FIRST], [BASE, "boxes"], [BASE, FIRST, equal]):
        results = {
            variant: {
                name: Score(name, (drawn < share).astype(np.float64))
                for name, share in zip(numbers, right[variant], strict=True)
            }
            for variant in variants
        }
        rows = rows_of(
            results,
            {variant: [variant] for variant in variants},
            [Trial(variants[1], tuple(variants[2:]))],
            numbers[0],
        )
        record = {
            "format": JUDGE,
            "primary": numbers[0],
            "variants": {variant: [variant] for variant in variants},
            "shifts": dict.fromkeys(variants, 0.2),
            "rows": [asdict(row) for row in rows],
        }
        folders.append(tmp_path / variants[-1])
        folders[-1].mkdir()
        (folders[-1] / "judge.json").write_text(json.dumps(record))
    report(tmp_path, folders, None, {}, 5)
    assert "was not judged" in " ".join(capsys.readouterr().out.split())
    rows_by_arm = {row["variant"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(rows_by_arm) == [FIRST, "boxes", equal]
    assert rows_by_arm[FIRST].keys() == {"variant", "feature shift", "minus base", "agreement/x predictions"}
    row = rows_by_arm[equal]
    assert row["two stages minus it"]["value"] == 0
    assert row["two stages minus it, agreement/x predictions"]["value"] == pytest.approx(0.6 - 0.8, abs=0.05)
    assert set(row) - set(rows_by_arm[FIRST]) == {
        "two stages minus it",
        "two stages minus it, agreement/x predictions",
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--variants", "noisy"], "--variants"),
        (["--variant", "rank 8"], "--variant"),
        (["--variant", "rank 8: visft.lora.rannk=8"], "did you mean visft.lora.rank?"),
        (["--data", "x", "--on", "digits"], "segmentation="),
        (["--data", "x", "--on", "segmentation=y"], "x holds no shards (train.manifest.json)"),
        (["--on", "segmentation=y"], "y has no pixel labels"),
        (["--base", "z.pt"], "--base z.pt"),
        (["--variants", ""], "no such variant"),
        (["--seeds", "1"], "--seeds"),
        (["--styles", "1"], "at least 2"),
        (["--data", "x", "--variants", "half of the images"], "needs drawings"),
        (["--data", "x", "--styles", "4"], "without --data"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "debug", "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_drawings_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("open_clip")
    small = {"VAL": 12, "PROBED": (1.0, 0.5), "DRAWN": ("--size", "56"), "STYLE_IMAGES": 12}
    for name, value in small.items():
        monkeypatch.setattr(ablate, name, value)
    lengths = {"scheduler.params.warmup_num_steps": 0, "scheduler.params.total_num_steps": 2}
    words = [
        *WORDS[:-1],
        str(tmp_path / "out"),
        "--jobs",
        "2",
        "--train",
        "24",
        "--variants",
        f"{PERMUTED},soup",
    ]
    words += ["--styles", "2"]
    words += [
        part for key, value in {**TINY, **lengths}.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]
    assert main(words) == 0, capfd.readouterr().out
    assert "The claim" in capfd.readouterr().out
    table = json.loads((tmp_path / "out/table.json").read_text())
    assert set(table["styles"]) == {"minus base", "minus noise", f"minus {PERMUTED} {EQUAL}"}
    rows = {row["variant"]: row for row in table["rows"]}
    assert list(rows)[:5] == [FIRST, "noise", "half", PERMUTED, f"{PERMUTED} {EQUAL}"] and not table["failed"]
    assert rows[f"{PERMUTED} {EQUAL}"]["feature shift"] == pytest.approx(
        rows[FIRST]["feature shift"], rel=0.2
    )
