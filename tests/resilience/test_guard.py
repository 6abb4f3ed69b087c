"""Losses that are no numbers: how many may pass, and where they begin."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.parallel.engine_case import build, global_batch, loss_denominators
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.model import MultiTaskModel
from visft_ds.parallel.engine import StepReport
from visft_ds.resilience.guard import LossGuard, watched

PLAN = Plan({"detection": TaskPlan({"train": SetPlan(np.arange(8))}, 4)}, seed=3)
STEP_OF_ALL = 3  #: in which all three tasks learn
IMAGE = 2  #: the id of the image that goes wrong, also its place in the batch


def observed(guard: LossGuard, *losses: float) -> str:
    said = ""
    for step, loss in enumerate(losses):
        refused: Literal["", "loss"] = "" if math.isfinite(loss) else "loss"
        faults = {1: ["detection/ce is nan"]} if refused else {}
        said = guard.observe(PLAN.step(step), StepReport({"loss": loss}, 1.0, {}, False, refused, faults))
    return said


def test_bad_steps_stop_a_run_only_in_a_row() -> None:
    guard = LossGuard(2)
    assert not observed(guard, math.nan, math.inf, 5.0)
    said = observed(guard, -math.inf, math.nan)
    assert "no update was made" in said and "rank 1: detection/ce is nan" in said and not guard.ends
    said = observed(guard, math.nan)
    assert guard.ends
    with pytest.raises(FloatingPointError, match="checkpoint is that of step 500"):
        guard.stop(said, saved=500)


def test_overflows_of_fp16_end_the_run_at_the_least_scale() -> None:
    guard = LossGuard(0)
    for scale in (65536.0, 2.0):
        report = StepReport({"loss": 1.0}, math.inf, {}, True, loss_scale=scale)
        assert not guard.observe(PLAN.step(0), report) and not guard.ends
    assert "overflows" in guard.observe(
        PLAN.step(0), StepReport({"loss": 1.0}, math.inf, {}, True, loss_scale=1.0)
    )
    assert guard.ends


@pytest.fixture(name="case")
def _case() -> tuple[MultiTaskModel, Any, Any]:
    module, _ = build(1)
    batch = global_batch(STEP_OF_ALL)
    return module.train(), batch, loss_denominators(module, batch, 1)


def examine(case: tuple[MultiTaskModel, Any, Any]) -> list[str]:
    module, batch, divisors = case
    found: list[str] = []
    module.faults = []  # as engines do: a fault of the matching is noted
    with watched(module, found):
        losses = module(batch, divisors)
        losses["loss"].backward()
    return found


def test_the_first_module_and_the_image_are_named(case: tuple[MultiTaskModel, Any, Any]) -> None:
    def overflow(module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor:
        worse = output.clone()
        worse.view(len(case[1].image_ids), -1)[IMAGE, 0] = torch.inf  # rows of all images
        return worse

    assert examine(case) == []
    case[0].backbone.blocks[1].attn.register_forward_hook(overflow)
    found = examine(case)
    assert found[0].startswith("output of backbone.blocks.1.attn: ")
    assert next(one for one in found if "images" in one).endswith(f"images [{IMAGE}]")


def test_a_parameter_comes_before_what_it_spoils(case: tuple[MultiTaskModel, Any, Any]) -> None:
    with torch.no_grad():
        case[0].heads["captioning"].get_parameter("embedding.weight")[1] = torch.nan
    assert examine(case)[0].startswith("parameter heads.captioning.embedding.weight: ")


def test_a_gradient_is_found_where_it_begins(case: tuple[MultiTaskModel, Any, Any]) -> None:
    """All values are finite: the root of 0 has no finite gradient."""
    module, batch, divisors = case
    criterion = module.criteria["captioning"]

    class Rooted:
        weights, count = criterion.weights, criterion.count

        def __call__(self, output: Any, *rest: Any) -> dict[str, Tensor]:
            parts = criterion(output, *rest)
            name = next(iter(parts))
            return {**parts, name: parts[name] + (output.scores[IMAGE] * 0).sum().sqrt()}

    module.criteria["captioning"] = Rooted()  # type: ignore[assignment]
    found = examine((module, batch, divisors))
    assert found[0].startswith("gradient of the output of heads.captioning: ")
    assert found[0].endswith(f"images [{IMAGE}]")
