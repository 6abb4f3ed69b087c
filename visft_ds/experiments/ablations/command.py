"""Work of visft ablate: the plan of its questions, the folder it works in, and what it prints."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from visft_ds.config.fields import StrictModel
from visft_ds.config.preflight import render_missing
from visft_ds.config.records import read_record
from visft_ds.demo import PRETRAINED
from visft_ds.experiments.ablations.collect import FEWEST, collect
from visft_ds.experiments.ablations.gain import GainPlan, GainPlanner, collect_gain, predicted
from visft_ds.experiments.ablations.plan import AblationPlan
from visft_ds.experiments.ablations.questions import GAIN, QUESTIONS, choose_arms, find_question
from visft_ds.experiments.ablations.run import Runner
from visft_ds.experiments.ablations.scales import TOY_MODEL, Scale, check_scale
from visft_ds.experiments.ablations.steps import Step
from visft_ds.experiments.ablations.write import shown, write_question, write_report
from visft_ds.flags import EVAL, check_extra, check_least
from visft_ds.interop.writing import write_text
from visft_ds.monitor.console import clock, print_plan
from visft_ds.redaction import redacted_words
from visft_ds.resilience.processes import same_code
from visft_ds.run.folder import LOCK_FILE
from visft_ds.run.lock import locked

MARKER, FORMAT = "ablations.json", "visft_ds ablations"


def ask(given: argparse.Namespace) -> int:
    """Plan, run and report the questions that the flags name; returns the exit status.

    Raises:
        ValueError: flags or inputs that do not fit.
    """
    planner, plans = _plan(given)
    missing = render_missing(list(planner.missing.values())) if planner.missing else ""
    if given.dry_run:
        _print_plan(plans, planner.steps.steps)
        print("".join(f"\n# {line}" for line in missing.splitlines()).lstrip("\n"))
        return 2 if missing else 0
    if missing:
        raise ValueError(missing)
    with locked(given.out, patience=1.0):
        _claim(given.out, planner.scale)
        return _run(given, planner, plans)


def _plan(given: argparse.Namespace) -> tuple[GainPlanner, list[AblationPlan | GainPlan]]:
    """Check everything that can be wrong with the command line, and plan.

    Raises:
        ValueError: what is wrong, and what is allowed.
    """
    if given.seeds < FEWEST:
        raise ValueError(f"--seeds {given.seeds}: an interval over seeds needs at least {FEWEST}, better 3 or more")
    check_least(given, jobs=1)
    check_extra("what is trained here is judged by benchmarks, which", "eval", EVAL)
    names = list(QUESTIONS) if given.questions == ["all"] else list(dict.fromkeys(given.questions))
    questions = {name: find_question(name) for name in names}
    if given.arms is not None:
        if len(names) != 1:
            raise ValueError(f"--arms chooses among the arms of one question, and {len(names)} are given")
        questions = {names[0]: choose_arms(questions[names[0]], [arm.strip() for arm in given.arms.split(",")])}
    # A base that knows something is asked for more than colours.
    even = bool(given.base) or given.model == PRETRAINED or names == [GAIN]
    scale = Scale(
        model=given.model or (PRETRAINED if even else TOY_MODEL),
        processes=given.processes,
        data=given.data,
        second=given.second_data,
        heads=given.heads,
        benchmarks=tuple(given.benchmark),
        text=given.text,
        settings=tuple(given.set),
        vary_base=given.vary_base,
        base=given.base,
        even=even,
    )
    check_scale(scale)
    if given.jobs > 1 and not scale.alone:
        raise ValueError(f"--jobs {given.jobs}: trainings started by deepspeed would share its GPUs; leave it at 1")
    _check_folder(given.out, scale)
    planner, seeds = GainPlanner(given.out, scale), range(given.seeds)
    return planner, [
        planner.plan_gain(question, seeds) if name == GAIN else planner.plan(name, question, seeds)
        for name, question in questions.items()
    ]


class AblationsFile(StrictModel):
    """Mark of a folder of comparisons."""

    format: Literal["visft_ds ablations"]
    scale: dict[str, Any]


def _check_folder(out: Path, scale: Scale) -> None:
    """Refuse a folder of other things, or of comparisons at another scale: tables of the two would stand side by side.

    Raises:
        ValueError: it is one.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not out.exists() or not {path.name for path in out.iterdir()} - {LOCK_FILE}:
        return
    try:
        record = read_record(out / MARKER, AblationsFile)
    except ValueError as error:
        raise ValueError(f"{out} is not empty and holds no ablations (no {MARKER}); choose another --out") from error
    here = _record(scale)["scale"]
    other = [
        f"{key}: {record.scale.get(key)} there, {value} here"
        for key, value in here.items()
        if record.scale.get(key) != value
    ]
    if other:
        raise ValueError(f"{out} holds ablations of another plan ({'; '.join(other)}); choose another --out")


def _record(scale: Scale) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, "scale": asdict(scale)}))
    return record


def _claim(out: Path, scale: Scale) -> None:
    write_text(out / MARKER, json.dumps(_record(scale), indent=1) + "\n", overwrite=True)


def _run(given: argparse.Namespace, planner: GainPlanner, plans: Sequence[AblationPlan | GainPlan]) -> int:
    began, steps = time.monotonic(), planner.steps.steps
    forks = prepare_environment(given.jobs)
    failed = False
    for plan in plans:
        print(f"\n== {plan.name}: {plan.question.asks}", flush=True)
        weigh = predicted if isinstance(plan, GainPlan) else lambda _: 1.0
        runner = Runner(given.jobs, forks, lambda line: print(line, flush=True), weigh)
        failures = runner.run(needed(plan, steps))
        failed = failed or bool(failures)
        outcome = collect_gain(plan, failures) if isinstance(plan, GainPlan) else collect(plan, steps, failures)
        written = [*write_question(given.out, outcome), *write_report(given.out, [*QUESTIONS, GAIN])]
        print_plan(outcome.asks, shown(outcome))
        print(f"written: {', '.join(str(path) for path in written)}", flush=True)
    print(f"\n{clock(time.monotonic() - began)}", flush=True)
    return 1 if failed else 0


def needed(plan: AblationPlan | GainPlan, steps: Mapping[str, Step]) -> dict[str, Step]:
    """The steps of a plan and all before them, in the order of the list."""
    wanted = {step.stem for step in plan.ends}
    for stem in reversed(list(steps)):  # a step comes after all that it needs
        if stem in wanted:
            wanted |= set(steps[stem].needs)
    return {stem: step for stem, step in steps.items() if stem in wanted}


def prepare_environment(jobs: int) -> bool:
    """Divide the cores among the steps; returns whether steps can be forks: on a GPU they cannot."""
    import torch  # the only one who knows whether its GPUs can be used

    here = str(Path(sys.executable).parent)  # of an environment that need not be activated: there is deepspeed
    os.environ.update(same_code())
    os.environ["PATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PATH")])])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    if torch.cuda.device_count():
        return False
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without a GPU DeepSpeed guesses and warns at every start
    return True


def _print_plan(plans: Sequence[AblationPlan | GainPlan], steps: Mapping[str, Step]) -> None:
    done = sum(step.marker.is_file() for step in steps.values())
    trials = sum(len(plan.seeds) * len(plan.question.arms) for plan in plans)
    print(f"# {len(plans)} question(s), {trials} trials, {len(steps)} commands, of which {done} have finished")
    if any(isinstance(plan, GainPlan) for plan in plans):
        seconds = sum(predicted(step) for step in steps.values() if not step.marker.is_file())
        print(f"# {clock(seconds / 2)} by --jobs 2 on two idle cores, as EfficientNet-Lite0 and drawings took")
    for step in steps.values():
        mark = " (finished)" if step.marker.is_file() else ""
        print(f"# {step.title}{mark}\n{shlex.join(redacted_words(step.command))}")
