"""Stage 2 against its controls: the plan, labels of other images, equal doses, the verdict, data that is too small."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from PIL import Image

from tests.coco_tree import write_tree
from tests.experiments.ablation_steps import steps_of
from tests.tiny import TINY
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.benchmarks.command import RECORD
from visft_ds.evals.benchmarks.dose_command import WITHIN, as_noise, scale_for
from visft_ds.experiments.ablations import cli, command, gain, scales
from visft_ds.experiments.ablations.gain import GainPlan, GainPlanner, collect_gain, verdict
from visft_ds.experiments.ablations.questions import EXPERIMENT, PERMUTED, choose_arms
from visft_ds.experiments.ablations.run import Failure
from visft_ds.experiments.ablations.scales import Scale
from visft_ds.experiments.ablations.steps import Step
from visft_ds.experiments.ablations.write import read_outcome, remarks, shown, write_question
from visft_ds.interop.adapter import Adapter
from visft_ds.shards.build import Options, build
from visft_ds.shards.cli import main as shards_main
from visft_ds.shards.permute import others

ARMS = [PERMUTED, "noise", "scales", "soup"]


# ---------------------------------------------------------------------------------------------------- planning


@pytest.fixture(scope="module")
def planned() -> tuple[GainPlanner, GainPlan]:
    planner = GainPlanner(Path("out"), Scale(even=True))
    return planner, planner.plan_gain(choose_arms(EXPERIMENT, ARMS), [0, 1])


def _value(step: Step, flag: str) -> str:
    return step.command[step.command.index(flag) + 1]


def test_both_stages_of_the_control_have_the_labels_of_other_images(planned: tuple[GainPlanner, GainPlan]) -> None:
    """Heads of true labels under permuted ones diverge: that would be another control."""
    planner, _ = planned
    steps = planner.steps.steps
    permuted = {stem: step for stem, step in steps.items() if "permute" in step.command}
    assert sorted(_value(step, "--seed") for step in permuted.values()) == ["0", "1"]
    shards = {stem: step.out for stem, step in steps.items() if set(step.needs) & permuted.keys()}
    trained = [step for stem, step in steps.items() if stem.startswith("stage") and set(step.needs) & shards.keys()]
    assert sorted(_value(step, "--stage") for step in trained) == ["1", "1", "2", "2"]
    for step in trained:
        [root] = [word for word in step.command if word.startswith("visft.data.root=")]
        assert Path(root.partition("=")[2]) in [shards[stem] for stem in step.needs if stem in shards]
    [stage1, stage2] = [step for step in trained if "visft.seed=1" in step.command]
    assert stage1.stem in stage2.needs and f"visft.heads.path={stage1.out / 'export'}" in stage2.command


def test_every_control_has_the_dose_of_its_own_seed(planned: tuple[GainPlanner, GainPlan]) -> None:
    planner, plan = planned
    doses = [step for stem, step in planner.steps.steps.items() if stem.startswith("dose")]
    assert len(doses) == 2 + 2 + 1  # of labels, of noise, of the soup
    models = dict.fromkeys(("two stages", "permuted labels at equal dose"), "")
    for label in models:
        step = plan.against_first[PERMUTED]
        [models[label]] = [word.partition("=")[2] for word in step.command if word.startswith(f"{label}=")]
    for like, model in zip(*(text.split(",") for text in models.values()), strict=True):
        [step] = [step for step in doses if model.endswith(f"+{step.out}")]
        assert _value(step, "--like") == like and step.stem in plan.against_first[PERMUTED].needs
    assert [_value(step, "--noise") for step in doses if "--noise" in step.command] == ["0", "1"]


def test_arms_are_judged_beside_the_base_and_beside_the_first(planned: tuple[GainPlanner, GainPlan]) -> None:
    _, plan = planned
    assert list(plan.against_base) == ["two stages", *ARMS] and list(plan.against_first) == ARMS
    for arm, step in plan.against_base.items():
        assert _value(step, "--model").startswith("base=") and _value(step, "--primary") == plan.primary, arm
    for arm, step in plan.against_first.items():
        assert _value(step, "--model").startswith("two stages=")
        assert {plan.against_base[name].stem for name in ("two stages", arm)} <= set(step.needs)
    assert any("@0.25:1.5:0.25" in word for word in plan.against_base["scales"].command)
    late = plan.late
    assert late is not None and sum("style-c" in word for word in late.command) == 2
    others = [*plan.against_base.values(), *plan.against_first.values()]
    assert not any("style-c" in word or "held-out" in word for step in others for word in step.command)


def test_what_is_kept_until_the_end_is_never_trained_on(planned: tuple[GainPlanner, GainPlan]) -> None:
    planner, _ = planned
    drawn = {_value(s, "--style"): s.command for s in planner.steps.steps.values() if s.command[:2] == ("visft", "toy")}
    assert all("--without" in drawn[style] for style in "ab") and "--without" not in drawn["c"]
    assert all("even" in command for command in drawn.values())


# ------------------------------------------------------------------------------------------------- permuted labels


def test_permuting_is_one_round_through_all() -> None:
    for count in (2, 3, 50):
        places = others(count, 1)
        walked, here = [], 0
        for _ in range(count):
            walked.append(here)
            here = int(places[here])
        assert sorted(walked) == list(range(count)) and here == 0
    assert not np.array_equal(others(50, 1), others(50, 2))
    with pytest.raises(ValueError, match="at least 2"):
        others(1, 0)


def test_labels_lie_beside_another_image_which_takes_their_size(split: Manifest, tmp_path: Path) -> None:
    assert shards_main(["permute", str(split.root), "--out", str(tmp_path / "tree"), "--seed", "3"]) == 0
    reader = ShardReader(split)
    content = orjson.loads((tmp_path / "tree/annotations/instances_toy2017.json").read_bytes())
    captions = orjson.loads((tmp_path / "tree/annotations/captions_toy2017.json").read_bytes())
    labels = [orjson.loads(reader.read(place, "labels")[1] or b"") for place in range(len(reader))]
    places = others(len(reader), 3)
    for label, image, place in zip(labels, content["images"], places, strict=True):
        assert (image["id"], image["width"], image["height"]) == (label["image_id"], label["width"], label["height"])
        own = [one for one in content["annotations"] if one["image_id"] == image["id"]]
        assert [one["bbox"] for one in own] == [one["bbox"] for one in label["annotations"]]
        texts = [one["caption"] for one in captions["annotations"] if one["image_id"] == image["id"]]
        assert texts == label["captions"]
        found, (data, _) = tmp_path / "tree/toy2017" / image["file_name"], reader.read(int(place), "images")
        other = labels[place]
        with Image.open(found) as picture:
            assert picture.size == (label["width"], label["height"])
        assert (found.read_bytes() == data) == (picture.size == (other["width"], other["height"]))
    words = ["--images", str(tmp_path / "tree/toy2017"), "--split", "toy", "--out", str(tmp_path / "again"), "--quiet"]
    words += [f"--{kind}={tmp_path}/tree/annotations/{kind}_toy2017.json" for kind in ("instances", "captions")]
    assert shards_main(["build", *words]) == 0
    assert len(Manifest.load(tmp_path / "again", "toy")) == len(reader)


# ------------------------------------------------------------------------------------------------------ equal dose


@pytest.mark.parametrize(
    "dose",
    [lambda scale: 0.4 * scale, lambda scale: 3 * scale**2, lambda scale: 0.9 * math.tanh(scale / 7), math.expm1],
    ids=["linear", "square", "saturating", "steep"],
)
@pytest.mark.parametrize("wanted", [0.02, 0.35, 0.8])
def test_a_scale_is_found_for_any_dose(dose: Callable[[float], float], wanted: float) -> None:
    calls = []
    scale = scale_for(lambda scale: calls.append(scale) or dose(scale), wanted)  # type: ignore[func-returns-value]
    assert abs(dose(scale) - wanted) <= WITHIN * wanted and len(calls) <= 20


def test_a_dose_that_no_scale_reaches_is_told() -> None:
    with pytest.raises(ValueError, match="no scale up to 1024 was found"):
        scale_for(lambda scale: min(scale, 0.1), 0.3)


def test_noise_is_as_large_as_what_was_learnt() -> None:
    tensors = {"a.lora_A": torch.full((8, 400), 3.0), "a.lora_B": torch.linspace(-1, 1, 3200).reshape(400, 8)}
    found = as_noise(Adapter(8, 8.0, ("a",), tensors, model="x"), 1).tensors
    for name, value in tensors.items():
        assert float(found[name].square().mean()) == pytest.approx(float(value.square().mean()), rel=0.1)
    assert abs(float((found["a.lora_B"] * tensors["a.lora_B"]).mean())) < 0.05


# -------------------------------------------------------------------------------------------------------- the verdict


def _table(folder: Path, name: str, arms: dict[str, tuple[float, float, float]], seeds: int, first: str) -> Step:
    """A finished table: arm -> difference with its interval, in points."""
    step = Step(name, name, (), folder / name, folder / f"{name}.json", folder / f"{name}.log", (), False, None)
    step.out.mkdir(parents=True)
    step.marker.touch()
    differences = {
        arm: dict(zip(("value", "low", "high"), np.divide(of, 100), strict=True)) for arm, of in arms.items()
    }
    values = {arm: {"value": 0.8, "low": 0.7, "high": 0.9} for arm in (first, *arms)}
    of_seeds = {
        arm: {"each": [of[0] / 100] * seeds, "items": differences[arm], "seeds": differences[arm]}
        for arm, of in arms.items()
        if seeds > 1
    }
    row: dict[str, Any] = {"name": "dense/b objects knn", "items": 9, "values": values, "differences": differences}
    row |= {"p": dict.fromkeys(arms, 0.5), "seeds": of_seeds, "shown": {}}
    models = {arm: [f"{arm} {number}" for number in range(1, seeds + 1)] for arm in (first, *arms)}
    moved = {"dense/b": {"kind": "patches", "change": 0.25, "cosine": 0.9}}
    doses = {model: moved for arm in arms for model in models[arm]}
    (step.out / RECORD).write_text(json.dumps({"arms": models, "rows": [row], "doses": doses}))
    return step


def _plan(folder: Path, own: tuple[float, float, float], control: tuple[float, float, float], seeds: int) -> GainPlan:
    """`control`: labels of other images at equal dose, minus two stages."""
    equal = f"{PERMUTED} {gain.EQUAL}"
    return GainPlan(
        "gain",
        choose_arms(EXPERIMENT, [PERMUTED]),
        range(seeds),
        "dense/b objects knn",
        {
            "two stages": _table(folder, "own", {"two stages": own}, seeds, "base"),
            PERMUTED: _table(folder, "labels", {PERMUTED: (0, -1, 1), equal: (0.1, -2, 2)}, seeds, "base"),
        },
        {PERMUTED: _table(folder, "beside", {PERMUTED: control, equal: control}, seeds, "two stages")},
        None,
    )


@pytest.mark.parametrize(
    ("own", "control", "told"),
    [
        ((4.5, 2.7, 6.3), (-4.4, -8.0, -0.5), "The claim stands: two stages, dense/b objects knn, +4.5 [+2.7, +6.3] *"),
        ((4.5, 2.7, 6.3), (-4.4, -9.5, 0.7), "zero is not excluded over labels of other images"),
        ((4.5, -0.1, 9.1), (-4.4, -8.0, -0.5), "zero is not excluded over the base."),
        ((-4.5, -6, -3), (1.0, 0.5, 2.0), "zero is not excluded over the base and over labels of other images"),
    ],
)
def test_the_claim_needs_both_intervals(tmp_path: Path, own: Any, control: Any, told: str) -> None:
    said = verdict(_plan(tmp_path, own, control, 5))
    assert told in said and said.startswith("The claim stands") == ("zero is" not in said)
    assert "seeds of the 5" not in said


def test_fewer_seeds_and_missing_controls_are_told_on_the_page(tmp_path: Path) -> None:
    plan = _plan(tmp_path, (4.5, 2.7, 6.3), (-4.4, -8.0, -0.5), 3)
    outcome = collect_gain(plan, {})
    assert outcome.said[0].endswith("3 seeds of the 5 that it asks for.")
    assert outcome.arms[0].numbers["dense/b objects knn"][2].change == pytest.approx(4.5)
    rows = {row[0]: row[1:] for row in outcome.tables[0].rows}
    assert rows["permuted labels at equal dose"] == ["0.250", "+0.1 [-2.0, +2.0]", "-4.4 [-8.0, -0.5] *"]
    write_question(tmp_path, outcome)
    assert read_outcome(tmp_path / "gain") == outcome and shown(outcome)[0].rows == [(outcome.said[0],)]
    plan.against_base[PERMUTED].marker.unlink()
    plan.against_first[PERMUTED].marker.unlink()
    outcome = collect_gain(plan, {"labels": Failure("exit status 2: error: why")})
    assert outcome.said[0].startswith("The claim was not judged")
    assert any("permuted labels is incomplete: exit status 2: error: why" in line for line in remarks(outcome))


def test_a_table_that_failed_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one without which every arm has its numbers."""
    monkeypatch.setattr(command, "prepare_environment", lambda jobs: False)
    [late] = steps_of(tmp_path, {"late": "import sys; sys.exit(3)"}, {}).values()
    plan = replace(_plan(tmp_path, (4.5, 2.7, 6.3), (-4.4, -8.0, -0.5), 2), late=late)
    planner: Any = SimpleNamespace(steps=SimpleNamespace(steps={step.stem: step for step in plan.ends}))
    assert command._run(Namespace(jobs=1, out=tmp_path), planner, [plan]) == 1


# ----------------------------------------------------------------------------------------------------------- refusals


def test_too_little_data_is_told_before_anything_runs(tmp_path: Path, capsys: Any) -> None:
    """51 photographs: an interval over their objects has zero in it, and nothing could be learnt from them."""
    assert 1.96 * math.sqrt(gain.CHANGING / gain.FEWEST_OBJECTS) * 100 == pytest.approx(gain.EXPECTED, rel=0.01)
    tree, shards = write_tree(tmp_path / "tree"), tmp_path / "shards"
    for part in ("train", "val"):
        build(Options(tree.images, tree.instances, tree.captions, shards, part))
    words = ["gain", "--model", "debug", "--data", str(shards), "--benchmark", f"dense={shards}", "--seeds", "2"]
    assert cli.main([*words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "12 images to learn from and" in told and "noise would be all there is to see" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gain", "--base", "lite0.pth"], "give timm:NAME=FILE"),
        (["gain", "--base", "timm:resnet50=nowhere.pth"], "nowhere.pth is no file"),
        (["gain", "--data", "x", "--benchmark", "digits"], "give a --benchmark dense=SOURCE"),
        (["gain", "--arms", "noisy"], "did you mean 'noise'"),
    ],
)
def test_what_gain_cannot_do_is_told(words: list[str], told: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ the whole way


@pytest.mark.slow
def test_gain_from_drawings_to_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    pytest.importorskip("open_clip")
    for name, value in {"TOY_TRAIN": 24, "TOY_VAL": 12, "TOY_SIDE": 56, "PROBED": (0.024, 0.012)}.items():
        monkeypatch.setattr(scales, name, value)
    tower = [part for name in ("width=32", "depth=2", "num_heads=2", "image_size=56") for part in ("--set", name)]
    monkeypatch.setattr(scales, "TOY_PRETRAINING", (*tower, "--steps", "2", "--batch-size", "8"))
    lengths = ("scheduler.params.warmup_num_steps=0", "scheduler.params.total_num_steps=2")
    monkeypatch.setattr(scales, "TOY_STAGE1", lengths)
    monkeypatch.setattr(scales, "TOY_STAGE2", lengths)
    words = ["gain", "--model", "debug", "--seeds", "2", "--out", str(tmp_path / "out"), "--jobs", "2"]
    words += [part for key, value in TINY.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    assert cli.main(words) == 0, capfd.readouterr().out
    printed = capfd.readouterr().out
    assert "The claim" in printed and "2 seeds of the 5" in printed
    outcome = read_outcome(tmp_path / "out/gain")
    assert [arm.name for arm in outcome.arms][:3] == ["two stages", PERMUTED, f"{PERMUTED} {gain.EQUAL}"]
    assert {"dense/style-c objects knn", "dense/held-out objects knn"} <= {metric.name for metric in outcome.metrics}
    for path in (tmp_path / "out/steps").glob("dose-*/dose.json"):
        record = json.loads(path.read_text())
        assert record["dose"] == pytest.approx(record["wanted"], rel=1.1 * WITHIN)
    assert outcome.said[0] in (tmp_path / "out/report.html").read_text()
