"""Questions as experiments: every plan is a configuration that can be, steps run once, intervals are Student's."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.experiments.ablation_steps import TELL, run_steps, steps_of
from visft_ds.experiments.ablations import cli, command
from visft_ds.experiments.ablations.collect import ArmResult, Metric, Outcome, Pair, collect, estimate
from visft_ds.experiments.ablations.plan import AblationPlan, Planner, Trial
from visft_ds.experiments.ablations.questions import QUESTIONS, TASKS, TOWERS, Arm, Question, choose_arms, find_question
from visft_ds.experiments.ablations.run import Failure
from visft_ds.experiments.ablations.scales import Scale
from visft_ds.experiments.ablations.steps import Step, StepList
from visft_ds.experiments.ablations.write import (
    chart,
    markdown,
    read_outcome,
    remarks,
    sections,
    write_question,
    write_report,
)
from visft_ds.run.folder import BACKBONE_FILE

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------------------------------------- planning


@pytest.fixture(scope="module")
def toy() -> tuple[Planner, Mapping[str, AblationPlan]]:
    planner = Planner(Path("out"), Scale())
    return planner, {name: planner.plan(name, question, [0]) for name, question in QUESTIONS.items()}


def test_every_arm_of_every_question_resolves(toy: tuple[Planner, Mapping[str, AblationPlan]]) -> None:
    planner, plans = toy
    for plan in plans.values():
        assert [trial.arm for trial in plan.trials] == [arm.name for arm in plan.question.arms]
        assert len({trial.after.stem for trial in plan.trials}) >= len(plan.trials) - 1  # texts leave heads alone
        assert len({trial.benchmarks.stem for trial in plan.trials}) == len(plan.trials), plan.name
        names = [arm.name for arm in plan.question.arms]
        assert len(set(names)) == len(names) and "," not in "".join(names)  # --arms A,B
    known = planner.steps.steps
    assert all(set(step.needs) <= known.keys() for step in known.values())
    order = list(known)
    assert all(order.index(need) < order.index(stem) for stem in order for need in known[stem].needs)


def test_text_learns_with_merged_weights(toy: tuple[Planner, Mapping[str, AblationPlan]]) -> None:
    """tools/contrast.py leaves an adapter out of what it writes: the comparison would be about the base."""
    planner, plans = toy
    after = plans["text"].trials[1].benchmarks
    [text] = [planner.steps.steps[stem] for stem in after.needs if stem.startswith("text-")]
    model = Path(text.command[text.command.index("--model") + 1])
    [merged] = [planner.steps.steps[stem] for stem in text.needs if stem.startswith("merged-")]
    assert model.parent == merged.out and f"after={text.out}" in " ".join(after.command)


def test_what_arms_share_is_one_step(toy: tuple[Planner, Mapping[str, AblationPlan]]) -> None:
    """The reference arms of most questions are the recipe: one training for all, and one stage 1 for every arm."""
    planner, plans = toy
    kinds = [stem.partition("-")[0] for stem in planner.steps.steps]
    assert kinds.count("base") == 1 and kinds.count("stage1") == 1 + len(TOWERS)
    recipes = {plans[name].trials[0].benchmarks.stem for name in plans}
    assert len(recipes) == 1
    steps = planner.steps.steps.values()
    assert len({step.out for step in steps if step.stem.startswith(("stage", "evaluation"))}) == sum(
        step.stem.startswith(("stage", "evaluation")) for step in steps
    )


def test_a_folder_elsewhere_has_the_same_steps_and_another_seed_others() -> None:
    question = choose_arms(QUESTIONS["heads"], ["trained"])
    first, second = (Planner(Path(name), Scale()) for name in ("here", "some/where/else"))
    for planner in (first, second):
        planner.plan("heads", question, [0])
    assert list(first.steps.steps) == list(second.steps.steps)
    other = Planner(Path("here"), Scale(settings=("optimizer.params.lr=3e-3",)))
    other.plan("heads", question, [0])
    trained = {stem for stem in first.steps.steps if stem.startswith(("stage", "evaluation", "benchmarks"))}
    assert not trained & set(other.steps.steps)
    more = Planner(Path("here"), Scale())
    more.plan("heads", question, [0, 1])
    assert set(first.steps.steps) < set(more.steps.steps)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("visft.lora.rnak=8", "did you mean visft.lora.rank"),
        ("visft.param_groups.0.params=backbone.*.lora_Q", "lora_Q"),
        ("optimizer.params.lr=$rat", r"there are: \$rate"),
    ],
)
def test_a_typing_mistake_in_a_question_cannot_pass(setting: str, told: str) -> None:
    question = Question("?", (Arm("recipe"), Arm("mistaken", (setting,))))
    with pytest.raises(ValueError, match=told) as caught:
        Planner(Path("out"), Scale()).plan("mine", question, [0])
    assert "arm 'mistaken'" in str(caught.value)


def test_full_scale_is_the_launchers_own_command() -> None:
    scale = Scale(model="eva_g", processes=8, data="data/coco", benchmarks=("zero_shot=imagenet-a",))
    planner = Planner(Path("out"), scale)
    planner.plan("tasks", choose_arms(QUESTIONS["tasks"], ["captions"]), [3])
    lines = [" ".join(step.command) for step in planner.steps.steps.values()]
    start = "deepspeed --num_gpus 8 --module visft_ds.launch --stage"
    trained = [line for line in lines if "visft_ds.launch" in line]
    assert all(line.startswith(start) and "--data data/coco" in line and "visft.seed=3" in line for line in trained)
    assert len(trained) == 3 and sum("--set visft.tasks=captioning" in line for line in trained) == 1
    assert not any("toy" in line or "total_num_steps" in line or "contrast" in line for line in lines)
    assert any("--model before=weights/eva_vit_g.pth" in line for line in lines)
    assert set(planner.missing) == {
        "data/coco/train.manifest.json",
        "data/coco/val.manifest.json",
        "weights/eva_vit_g.pth",
    }


def test_given_heads_take_the_place_of_stage_1(tmp_path: Path) -> None:
    scale = Scale(model="eva_g", data="data/coco", benchmarks=("digits",), heads=str(tmp_path))
    planner = Planner(Path("out"), scale)
    trial = planner.plan("heads", choose_arms(QUESTIONS["heads"], ["trained"]), [0]).trials[1]
    assert not any(stem.startswith("stage1") for stem in planner.steps.steps)
    assert "--adapter none" in " ".join(trial.before.command) and "--heads" in trial.after.command
    assert f"visft.heads.path={tmp_path}" in " ".join(planner.steps.steps[trial.before.needs[0]].command)


@pytest.mark.parametrize("heads", [False, True], ids=["stage 1", "given heads"])
def test_a_model_without_weights_is_compared_with_the_base_that_a_training_wrote(tmp_path: Path, heads: bool) -> None:
    """Random base weights are no file of the user's: the first training of a seed leaves them."""
    given = str(tmp_path) if heads else None
    planner = Planner(Path("out"), Scale(data="data/own", benchmarks=("digits",), heads=given))
    for trial in planner.plan("tuning", choose_arms(QUESTIONS["tuning"], ["all"]), [0, 1]).trials:
        words = trial.benchmarks.command
        base = Path(next(word for word in words if word.startswith("before=")).removeprefix("before="))
        makes = [step for step in planner.steps.steps.values() if base == step.out / "export" / BACKBONE_FILE]
        assert [step.stem for step in makes] == [need for need in trial.benchmarks.needs if need == makes[0].stem]
        assert "visft_ds.launch" in makes[0].command and f"visft.seed={trial.seed}" in makes[0].command


def test_a_model_without_weights_has_no_text_to_learn_or_to_compare_with() -> None:
    for question, benchmark in (("text", "digits"), ("heads", "zero_shot=imagenet-a")):
        planner = Planner(Path("out"), Scale(data="data/own", benchmarks=(benchmark, "digits")))
        with pytest.raises(ValueError, match=r"no text side.*visft\.model\.weights=FILE"):
            planner.plan(question, QUESTIONS[question], [0])


@pytest.mark.parametrize("heads", [False, True], ids=["stage 1", "given heads"])
def test_a_model_of_timm_is_named_by_a_run_that_knows_it(tmp_path: Path, heads: bool) -> None:
    """Its file alone does not tell that it is one of timm."""
    given = str(tmp_path) if heads else None
    planner = Planner(Path("out"), Scale(model="clip_vit_b", data="data/own", benchmarks=("digits",), heads=given))
    [trial, _] = planner.plan("tuning", choose_arms(QUESTIONS["tuning"], ["last blocks at a tenth"]), [0]).trials
    [base] = [word for word in trial.benchmarks.command if word.startswith("before=")]
    [run] = [step for step in planner.steps.steps.values() if str(step.out) in base]
    assert run.stem in trial.benchmarks.needs and base == f"before={run.out}{'@0' if heads else ''}"
    assert any("backbone.blocks.11.*" in " ".join(step.command) for step in planner.steps.steps.values())


def test_whole_weights_of_a_model_of_timm_are_written_as_timm_reads_them() -> None:
    planner = Planner(Path("out"), Scale(model="debug_convnext", data="data/own", benchmarks=("digits",)))
    planner.plan("tuning", choose_arms(QUESTIONS["tuning"], ["norms"]), [0])
    [merge] = [step.command for step in planner.steps.steps.values() if step.stem.startswith("merged")]
    assert merge[merge.index("--format") + 1] == "timm"


# ----------------------------------------------------------------------------------------------------- running


def test_a_failing_step_takes_only_those_that_need_it(tmp_path: Path) -> None:
    texts = {
        "first": TELL,
        "broken": "import sys; print('error: no such thing', file=sys.stderr); sys.exit(2)",
        "after": TELL + " # after",
        "beside": TELL + " # beside",
    }
    steps = steps_of(tmp_path, texts, {"broken": "first", "after": "broken", "beside": "first"})
    reasons, said = run_steps(steps, jobs=2)
    assert reasons == {"broken": "exit status 2: error: no such thing", "after": "needs broken, which failed"}
    assert any("FAILED: broken" in line for line in said)
    finished = {stem for stem, step in steps.items() if step.marker.is_file()}
    assert {stem.partition("-")[0] for stem in finished} == {"first", "beside"}
    # What failed is tried again, what has finished is not: its script would not survive a second start.
    again, said = run_steps(steps)
    assert set(again) == {"broken", "after"} and said[0] == "2 of 4 steps have finished before"


def test_a_long_step_at_the_end_is_part_of_the_time_left(tmp_path: Path) -> None:
    texts = {"short": TELL, "next": TELL + " # next", "long": TELL + " # long"}
    steps = steps_of(tmp_path, texts, {"next": "short", "long": "next"})
    failures, said = run_steps(steps, weights={"long": 1e9})
    assert not failures and len(said) == 3 and "left" not in said[0]
    assert "d " in said[1] and "d " in said[2], said  # counted alike, each would be a second


def test_an_end_without_a_result_is_no_result(tmp_path: Path) -> None:
    """A training that is asked to stop saves and ends with 0."""
    steps = StepList(tmp_path)
    (tmp_path / "stop.py").write_text("print('stopped after step 3')")
    steps.add("train", "train", lambda out: [sys.executable, str(tmp_path / "stop.py")], proof=Path("export"))
    reasons, _ = run_steps(steps.steps)
    assert list(reasons) == ["train"] and "ended before it had made" in reasons["train"]


def test_a_kill_leaves_what_had_finished_and_the_rest_goes_on(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    wait = (
        "import sys, time, pathlib; out = pathlib.Path(sys.argv[1]); (out / 'a').mkdir(parents=True)\n"
        f"while not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.05)"
    )
    (tmp_path / "run.py").write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
if __name__ == "__main__":
    from pathlib import Path
    from tests.experiments.ablation_steps import TELL, run_steps, steps_of
    print(run_steps(steps_of(Path({str(root)!r}), {{"quick": TELL, "slow": {wait!r}}}, {{"slow": "quick"}})))
"""
    )
    command_line = [sys.executable, str(tmp_path / "run.py")]
    with subprocess.Popen(command_line) as process:
        deadline = time.monotonic() + 600
        while not list(root.glob("steps/slow-*/a")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    [marker] = root.glob("steps/*.json")
    assert marker.name.startswith("quick-")
    told, before = next(root.glob("steps/quick-*/told")), marker.stat().st_mtime_ns
    (tmp_path / "go").touch()
    done = subprocess.run(command_line, capture_output=True, text=True, check=True)
    assert "1 of 2 steps have finished before" in done.stdout and done.stdout.startswith("({}, ")
    assert len(list(root.glob("steps/*.json"))) == 2 and marker.stat().st_mtime_ns == before and told.is_file()


def test_what_a_later_question_mended_is_not_missing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "prepare_environment", lambda jobs: False)
    once = (
        "import sys, pathlib; out = pathlib.Path(sys.argv[1]); tried = out.with_name('tried')\n"
        "if not tried.exists(): tried.touch(), sys.exit(3)\n"
        "out.mkdir(); (out / 'metrics.json').write_text('{\"metrics\": {\"box/AP50\": 0.5}}')\n"
        "(out / 'benchmarks.json').write_text('{\"rows\": []}')"
    )
    steps = steps_of(tmp_path, {"once": once}, {})
    [step] = steps.values()
    question, trial = Question("?", (Arm("recipe"),)), Trial("recipe", 0, step, step, step)
    planner: Any = SimpleNamespace(steps=SimpleNamespace(steps=steps))
    plans = [AblationPlan(name, question, [trial]) for name in ("first", "second")]
    assert command._run(Namespace(jobs=1, out=tmp_path), planner, plans) == 1
    (lost,), (whole,) = (read_outcome(tmp_path / name).arms for name in ("first", "second"))
    assert lost.failures and not lost.numbers and not whole.failures and whole.numbers


# ---------------------------------------------------------------------------------------------------- statistics


def test_intervals_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 5, 12) * 5:
        values = rng.normal(1.0, 10.0 ** rng.uniform(-3, 1), count).tolist()
        found, expected = estimate(values), stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
        assert found.sure == (stats.ttest_1samp(values, 0.0).pvalue < 0.05)
    assert not estimate([0.1 + 0.2, 0.3, 0.3]).sure  # no width: the seeds agree by accident
    one = estimate([0.5])
    assert one.low is None and one.high is None and not one.sure


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    found = [estimate(rng.normal(0.3, 1.0, 3).tolist()) for _ in range(2000)]
    share = np.mean([one.low <= 0.3 <= one.high for one in found if one.low is not None and one.high is not None])
    assert abs(share - 0.95) < 4 * math.sqrt(0.95 * 0.05 / 2000)


# ------------------------------------------------------------------------------------------ collecting and showing


def _outcome() -> Outcome:
    first = ArmResult(
        "recipe", {"box/AP50": {0: Pair(10, 11), 1: Pair(12, 13.5)}, "probe/b knn": {0: Pair(50, 49)}}, ()
    )
    other = ArmResult("<all> & more", {"box/AP50": {0: Pair(10, 9), 1: Pair(12, 12), 2: Pair(1, 9)}}, ("seed 2: lost",))
    metrics = [Metric("box/AP50", True), Metric("probe/b knn", False)]
    return Outcome("mine", "Which?", "A note.", (0, 1, 2), metrics, [first, other])


def test_differences_are_of_the_same_seed() -> None:
    first, other = _outcome().arms
    change, against = other.change("box/AP50"), other.against(first, "box/AP50")
    assert change is not None and change.values == (-1, 0, 8)
    assert against is not None and against.values == (-2, -1.5)  # seed 2 has no partner
    assert other.change("probe/b knn") is None and other.against(first, "probe/b knn") is None


def test_tables_and_charts_tell_what_is_missing(tmp_path: Path) -> None:
    outcome = _outcome()
    rows = {section.title: section.rows for section in sections(outcome)}
    inside = rows["in domain: after stage 2 minus before"]
    assert inside[0] == ["before stage 2", "7.7 to 11.0"] and inside[1][1] == "+1.2 ± 3.2"
    assert rows["out of domain: after stage 2 minus before"][1:] == [
        ["recipe", "-1.0 (one seed)"],
        ["<all> & more", "–"],
    ]
    assert any("incomplete: seed 2: lost" in line for line in remarks(outcome))
    drawn = chart(outcome)
    assert "no result" in drawn and "&lt;all&gt; &amp; more" in drawn and "nan" not in drawn
    unasked = replace(outcome, arms=[outcome.arms[0], replace(outcome.arms[1], failures=())])
    assert drawn.count("&lt;all&gt;") == 2 and chart(unasked).count("&lt;all&gt;") == 1  # in domain alone
    write_question(tmp_path, outcome)
    assert read_outcome(tmp_path / "mine") == outcome
    page, text = write_report(tmp_path, ["mine", "absent"])
    assert "<svg" in page.read_text() and markdown(outcome) in text.read_text()
    arms = [replace(arm, name="<script>", failures=("<script>",)) for arm in outcome.arms]
    write_question(tmp_path, replace(outcome, asks="<script>", note="<script>", arms=arms))
    assert "<script" not in (shown := write_report(tmp_path, ["mine"])[0].read_text()) and "&lt;script&gt;" in shown


def test_numbers_come_from_what_the_tools_write(tmp_path: Path) -> None:
    def step(name: str) -> Step:
        folder = tmp_path / name
        folder.mkdir()
        return Step(name, name, (), folder, tmp_path / f"{name}.json", tmp_path / f"{name}.log", (), False, None)

    before, after, benchmarks, lost = (step(name) for name in ("before", "after", "benchmarks", "lost"))
    for one, value in ((before, 0.25), (after, 0.5)):
        metrics = {"box/AP50": value, "mask/AP50": -1.0, "caption/CIDEr": 2 * value, "box/AP": 0.9}
        (one.out / "metrics.json").write_text(json.dumps({"metrics": metrics}))
    values = {"before": {"value": 0.5}, "after": {"value": 0.625}}
    rows = [
        {"name": name, "values": values} for name in ("probe/digits knn", "probe/digits 4-shot", "zero_shot/b top1")
    ]
    (benchmarks.out / "benchmarks.json").write_text(json.dumps({"rows": rows}))
    for one in (before, after, benchmarks):
        one.marker.touch()
    question = Question("?", (Arm("recipe"), Arm("broken")))
    trials = [Trial("recipe", 0, before, after, benchmarks), Trial("broken", 0, before, lost, lost)]
    steps = {one.stem: one for one in (before, after, benchmarks, lost)}
    failure = Failure("exit status 2: error: why")
    outcome = collect(AblationPlan("mine", question, trials), steps, {"lost": failure})
    assert [metric.name for metric in outcome.metrics] == [
        *("box/AP50", "caption/CIDEr"),
        *("probe/digits knn", "zero_shot/b top1"),
    ]
    numbers = {name: of[0] for name, of in outcome.arms[0].numbers.items()}
    assert numbers["caption/CIDEr"] == Pair(50, 100) and numbers["probe/digits knn"].change == 12.5
    assert outcome.arms[1].failures == ("seed 0: lost: exit status 2: error: why",)


# ------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["task"], "'task' is no question; did you mean 'tasks'"),
        (["xyz"], "'xyz' is no question. There are: "),
        (["heads", "--arms", "trainde"], "did you mean 'trained'"),
        (["heads", "lora", "--arms", "trained"], "one question"),
        (["heads", "--seeds", "1"], "needs at least 2"),
        (["heads", "--model", "eva_e"], "--data SHARDS"),
        (["heads", "--model", "eva_e", "--data", "x"], "--benchmark"),
        (["heads", "--text", "clip.pt"], "toy scale makes its own"),
        (["heads", "--set", "visft.lora.rnak=1"], "visft.lora.rank"),
        (["heads", "--jobs", "0"], "--jobs 0"),
        (["heads", "--jobs", "2", "--processes", "2"], "would share its GPUs"),
        (["heads", "--processes", "0"], "--processes 0"),
    ],
)
def test_what_cannot_be_meant_is_told(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    assert told in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_folders_of_other_things_and_other_plans_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["heads", "--arms", "frozen", "--seeds", "2", "--dry-run", "--out", str(tmp_path)]
    assert cli.main(words) == 0
    assert "visft train --stage 2" in capsys.readouterr().out
    (tmp_path / "precious").touch()
    assert cli.main(words) == 2
    assert "holds no ablations" in capsys.readouterr().err
    command._claim(tmp_path, replace(Scale(), settings=("optimizer.params.lr=1e-3",)))
    assert cli.main(words) == 2
    assert "another plan (settings: ['optimizer.params.lr=1e-3'] there, [] here)" in capsys.readouterr().err
    assert set(TASKS) == {"detection", "segmentation", "captioning"} and find_question("tasks").arms[0].stage2
