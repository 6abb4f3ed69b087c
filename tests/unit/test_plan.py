"""The plan is a pure function of (seed, step), however it is split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visft_ds.data.plan import Plan, StepPlan, TaskPlan, generator

MIXTURE = {"detection": TaskPlan(131, 24, 5), "segmentation": TaskPlan(97, 48, 3), "captioning": TaskPlan(60, 12, 2)}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(MIXTURE, seed=7)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (3, 2), (4, 3), (1, 12), (12, 1)])
def test_parts_of_a_step_are_disjoint_and_make_up_the_step(plan: Plan, ranks: int, accumulation: int) -> None:
    for step in range(40):
        whole = plan.step(step)
        parts = [
            plan.micro_batch(step, rank, ranks, accumulation, micro)
            for micro in range(accumulation)
            for rank in range(ranks)
        ]
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
        np.testing.assert_array_equal(np.concatenate([part.keys for part in parts]), whole.keys)
        assert len(set(whole.indices.tolist())) == len(whole.indices)


def test_an_epoch_shows_each_sample_at_most_once_and_the_next_another_order(plan: Plan) -> None:
    seen: dict[tuple[str, int], list[int]] = {}
    for step in range(60):
        part = plan.step(step)
        seen.setdefault((part.task, part.epoch), []).extend(part.indices.tolist())
    assert all(len(set(indices)) == len(indices) for indices in seen.values())
    assert set(seen["detection", 0]) != set(seen["detection", 1]), "the rest left out must differ between epochs"
    first, second = seen["detection", 0], seen["detection", 1]
    assert len(first) == len(second) == 131 // 24 * 24
    assert first != second


def test_every_sample_has_its_turn() -> None:
    plan = Plan({"a": TaskPlan(10, 4)}, seed=0)
    assert {index for step in range(40) for index in plan.step(step).indices.tolist()} == set(range(10))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**62), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_counting_steps_is_exact(ratios: list[int], seed: int, steps: int) -> None:
    plan = Plan({f"t{n}": TaskPlan(2, 1, ratio) for n, ratio in enumerate(ratios)}, seed)
    tasks = [plan.task_of(step) for step in range(steps)]
    assert {name: plan.steps_before(steps, name) for name in plan.tasks} == {n: tasks.count(n) for n in plan.tasks}


def test_shares_hold_at_every_moment_and_far_away(plan: Plan) -> None:
    shares = {"detection": 0.5, "segmentation": 0.3, "captioning": 0.2}
    for step in [*range(0, 2000), 10**6, 10**9]:
        for task, share in shares.items():
            # The discrepancy of a golden-ratio sequence grows like log(step); independent draws would be off by
            # sqrt(step * share), more than 20 at step 2000 and 500 at step 10**6.
            assert abs(plan.steps_before(step, task) - share * step) < 6


def test_a_far_step_needs_no_walk(plan: Plan) -> None:
    step = 10**15 + 3
    part = plan.step(step)
    assert part.position == plan.steps_before(step, part.task)
    assert part.epoch == part.position // plan.steps_per_epoch(part.task)


def test_the_order_of_tasks_in_a_file_does_not_matter(plan: Plan) -> None:
    turned = Plan(dict(reversed(MIXTURE.items())), seed=7)
    assert [turned.task_of(step) for step in range(50)] == [plan.task_of(step) for step in range(50)]


def test_only_eligible_samples_are_planned() -> None:
    eligible = np.array([3, 5, 8, 13, 21])
    plan = Plan({"a": TaskPlan(eligible, 2)}, seed=1)
    assert {index for step in range(20) for index in plan.step(step).indices.tolist()} == set(eligible.tolist())


def test_keys_belong_to_sample_epoch_task_and_seed() -> None:
    def keys(seed: int, task: str, step: int) -> dict[int, int]:
        part = Plan({task: TaskPlan(8, 8)}, seed).step(step)
        return dict(zip(part.indices.tolist(), part.keys.tolist(), strict=True))

    reference = keys(0, "a", 0)
    assert reference == keys(0, "a", 0)
    others = [keys(1, "a", 0), keys(0, "b", 0), keys(0, "a", 1)]
    everything = [key for table in [reference, *others] for key in table.values()]
    assert len(set(everything)) == len(everything)
    assert min(everything) >= 0


def test_streams_of_a_key_are_unrelated() -> None:
    assert generator(5).random() == generator(5).random()
    assert len({generator(5).random(), generator(5, 1).random(), generator(6).random()}) == 3


def test_values_never_change() -> None:
    """A run must resume in the same order after an update of anything: these numbers may not be edited."""
    plan = Plan({"a": TaskPlan(9, 3, 2), "b": TaskPlan(9, 3, 1)}, seed=42)
    assert "".join(plan.task_of(step) for step in range(12)) == TASKS
    assert _numbers(plan.step(0)) == FIRST
    assert _numbers(plan.step(1000)) == LATER


def _numbers(part: StepPlan) -> tuple[str, int, list[int], list[int]]:
    return part.task, part.epoch, part.indices.tolist(), part.keys.tolist()


TASKS = "babaabaababa"
FIRST = ("b", 0, [8, 1, 4], [1367660360511087098, 7986541897807337607, 5116559099801740055])
LATER = ("b", 111, [7, 6, 8], [7857864092350674587, 8994673236064456399, 4525936457926430475])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "at least one task"),
        ({"a": TaskPlan(25, 32)}, "25 samples are fewer than one global batch of 32"),
        ({"a": TaskPlan(25, 0)}, "global batch 0"),
        ({"a": TaskPlan(25, 5, 0.0)}, "ratio 0.0"),
        ({"a": TaskPlan(25, 5, float("nan"))}, "ratio nan"),
    ],
)
def test_impossible_plans_are_refused(tasks: dict[str, TaskPlan], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(tasks, seed=0)


def test_a_batch_that_cannot_be_split_is_refused(plan: Plan) -> None:
    with pytest.raises(ValueError, match=r"global batch of 12 cannot be split over 5 .* x 1"):
        plan.micro_batch(0, 0, 5, 1, 0)
    with pytest.raises(ValueError, match="rank 4 is not allowed: ranks go from 0 to 3"):
        plan.micro_batch(0, 4, 4, 1, 0)
