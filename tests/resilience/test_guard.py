"""Losses that are no numbers, or leap, against the last ones of the same task."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from visft_ds.config.schema import RunConfig
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.parallel.engine import StepReport
from visft_ds.resilience.guard import LossGuard, resumed_guard, robust_score

PLAN = Plan(
    {
        "detection": TaskPlan({"train": SetPlan(np.arange(8))}, 4, 0.75),
        "captioning": TaskPlan({"train": SetPlan(np.arange(8))}, 4, 0.25),
    },
    seed=3,
)
LEVELS = {"detection": 20.0, "captioning": 3.0}


def settings(**values: Any) -> RunConfig:
    return RunConfig(**{"spike_threshold": 10.0, "spike_window": 30, **values})


def normal_losses(count: int) -> list[float]:
    """Losses around the level of each step's task; a function of the step alone."""
    return [LEVELS[PLAN.task_of(step)] + random.Random(step).gauss(0, 0.5) for step in range(count)]


def play(guard: LossGuard, losses: Sequence[float], start: int = 0) -> list[tuple[bool, str]]:
    """What the guard says of each step: (updated, text)."""
    said = []
    for step, loss in enumerate(losses, start):
        step_plan = PLAN.step(step)
        accepted = math.isfinite(loss)
        refused: Literal["", "loss"] = "" if accepted else "loss"
        report = StepReport({"loss": loss}, 1.0, {}, False, refused, {1: ["detection/ce is nan"]} if refused else {})
        said.append((accepted, guard.observe(step_plan, report)))
    return said


def test_the_score_is_in_standard_deviations_and_not_moved_by_leaps() -> None:
    draw = random.Random(0)
    past = [draw.gauss(5.0, 0.2) for _ in range(400)]
    assert robust_score(past, 6.0) == pytest.approx(5.0, abs=0.6)  # 400 draws know a deviation to about 5 percent
    assert robust_score([*past, *[1e6] * 20], 6.0) == pytest.approx(5.0, abs=1.0)
    assert robust_score([5.0] * 30, 5.0) == 0.0
    assert robust_score([5.0] * 30, 5.1) > 10


def test_a_leap_is_reported_against_its_own_task_and_the_update_is_made() -> None:
    losses = normal_losses(160)
    leap = next(step for step in range(150, 160) if PLAN.task_of(step) == "captioning")
    losses[leap] = 20.0  # an ordinary loss of detection
    said = play(LossGuard(settings()), losses)
    assert all(updated for updated, _ in said)
    assert [step for step, (_, text) in enumerate(said) if text] == [leap]
    assert said[leap][1].startswith(f"step {leap + 1} (captioning): loss 20 leaps: ")
    assert "the update was made all the same" in said[leap][1]
    assert not any(text for _, text in play(LossGuard(settings(spike_threshold=None)), losses))


def test_a_leap_whose_gradient_overflows_is_reported_without_an_update() -> None:
    guard = LossGuard(settings())
    play(guard, normal_losses(120))
    said = guard.observe(PLAN.step(120), StepReport({"loss": 1e4}, math.inf, {}, True, loss_scale=8.0))
    assert "leaps" in said and said.endswith("no update was made: the gradient overflows in fp16")


def test_the_first_losses_of_a_task_are_never_leaps() -> None:
    said = play(LossGuard(settings()), [1000.0 * (step % 7) for step in range(19)])
    assert not any(text for _, text in said)


def test_bad_steps_stop_a_run_only_in_a_row() -> None:
    guard = LossGuard(settings(skip_bad_steps=2))
    for losses in ([math.nan, math.inf], [5.0, -math.inf, math.nan]):
        said = play(guard, losses)
        guard.check(said[-1][1], saved=500)
    assert [updated for updated, _ in said] == [True, False, False]
    assert "no update was made on any rank" in said[-1][1] and "rank 1: detection/ce is nan" in said[-1][1]
    said = play(guard, [math.nan])
    with pytest.raises(FloatingPointError, match=r"(?s)after 2 others in a row.*checkpoint is that of step 500"):
        guard.check(said[-1][1], saved=500)
    strict = LossGuard(settings())
    said = play(strict, [math.nan])
    with pytest.raises(FloatingPointError, match="nothing was saved yet"):
        strict.check(said[-1][1], saved=0)


def test_a_gradient_that_is_no_number_is_bad_even_where_the_loss_leaps() -> None:
    guard = LossGuard(settings(skip_bad_steps=3))
    play(guard, normal_losses(120))
    step_plan = PLAN.step(120)
    said = guard.observe(step_plan, StepReport({"loss": 1e4}, math.inf, {}, False, "gradient"))
    assert guard.bad == 1 and "the gradient is not finite, no update was made on any rank" in said


def test_a_resumed_run_judges_as_the_undisturbed_one(tmp_path: Path) -> None:
    """The same messages from the records of a run, cut anywhere, also within a row of refusals."""
    losses = normal_losses(220)
    for step in (110, 111, 112, 113, 150, 180, 181):
        losses[step] = 400.0
    for step in (130, 131):
        losses[step] = math.nan
    options = settings(skip_bad_steps=5)
    straight = play(LossGuard(options), losses)
    assert [step for step, (_, text) in enumerate(straight) if text] == [110, 111, 112, 113, 130, 131, 150, 180, 181]
    records = tmp_path / "metrics.jsonl"
    with records.open("w") as file:
        for step, loss in enumerate(losses):
            value: float | str = loss if math.isfinite(loss) else str(loss)
            line = {"kind": "step", "step": step + 1, "loss/loss": value, "refused": float(not straight[step][0])}
            line["not_finite"] = float(not math.isfinite(loss))
            file.write(json.dumps(line) + "\n")
    for cut in (1, 111, 112, 131, 132, 151, 170, 181):
        resumed = play(resumed_guard(options, tmp_path, PLAN, cut), losses[cut:], cut)
        assert resumed == straight[cut:], cut


def overflows(guard: LossGuard, steps: int, scale: float, start: int = 0) -> list[str]:
    """What the guard says of steps whose gradient overflows, each at half the loss scale of the one before."""
    said = []
    for step in range(start, start + steps):
        step_plan = PLAN.step(step)
        said.append(
            guard.observe(
                step_plan, StepReport({"loss": 5.0}, math.inf, {}, True, loss_scale=scale / 2 ** (step - start))
            )
        )
        guard.check(said[-1], saved=12)
    return said


def test_a_loss_scale_may_fall_as_far_as_allowed() -> None:
    guard = LossGuard(settings())
    assert overflows(guard, 14, 65536.0) == [""] * 14  # down to 8: it has begun far too high, as always
    play(guard, normal_losses(4))
    with pytest.raises(FloatingPointError) as stopped:
        overflows(guard, 3, 4.0, start=18)
    told = str(stopped.value)
    assert told.startswith(f"step 21 ({PLAN.task_of(20)}): the gradient overflows in fp16 at a loss scale of 1, ")
    assert "65536 (step 1), 32768 (step 2), " in told and "4 (step 19), 2 (step 20), 1 (step 21)" in told
    assert "the last good checkpoint is that of step 12" in told and "visft.model.precision" in told


def test_a_resumed_run_remembers_where_its_loss_scale_fell(tmp_path: Path) -> None:
    """Steps that stay as they are belong to it as well."""
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(6):
            line = {"kind": "step", "step": step + 1, "loss/loss": 5.0, "loss_scale": 16.0 / 2 ** min(step, 3)}
            file.write(json.dumps({**line, "skipped": float(step < 3)}) + "\n")
    guard = resumed_guard(settings(), tmp_path, PLAN, 5)
    with pytest.raises(
        FloatingPointError, match=r"overflowed at 16 \(step 1\), 8 \(step 2\), 4 \(step 3\), 2 \(step 6\)"
    ):
        overflows(guard, 2, 2.0, start=5)
