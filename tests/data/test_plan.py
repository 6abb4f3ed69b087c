"""The plan is a pure function of (seed, step), however it is split."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import factorial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visft_ds.data.plan import WINDOW, Plan, SetPlan, StepPlan, TaskPlan, _order
from visft_ds.randomness import generator


def one(samples: int, batch_size: int, ratio: float = 1) -> TaskPlan:
    """A task with one data set, all of whose samples teach it."""
    return TaskPlan({"coco": SetPlan(np.arange(samples))}, batch_size, ratio)


MIXTURE = {"detection": one(131, 24, 5), "segmentation": one(97, 48, 3), "captioning": one(60, 12, 2)}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan(MIXTURE, seed=7)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 1), (2, 1), (3, 2), (4, 3), (1, 12), (12, 1)])
def test_parts_of_a_step_are_disjoint_and_make_up_the_step(plan: Plan, ranks: int, accumulation: int) -> None:
    for step in range(40):
        whole = plan.step(step)
        parts = [
            plan.split(whole, rank, ranks, accumulation)[micro]
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
    assert set(seen["detection", 0]) != set(seen["detection", 1]), (
        "the rest left out must differ between epochs"
    )
    first, second = seen["detection", 0], seen["detection", 1]
    assert len(first) == len(second) == 131 // 24 * 24
    assert first != second


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**62), st.integers(0, 300))
@settings(max_examples=60, deadline=None)
def test_counting_steps_is_exact(ratios: list[int], seed: int, steps: int) -> None:
    plan = Plan({f"t{n}": one(2, 1, ratio) for n, ratio in enumerate(ratios)}, seed)
    tasks = [plan.step(step).task for step in range(steps + 1)]
    assert plan.step(steps).position == tasks[:-1].count(tasks[-1])


def test_shares_hold_at_every_moment_and_far_away(plan: Plan) -> None:
    shares = {"detection": 0.5, "segmentation": 0.3, "captioning": 0.2}
    for step in [*range(0, 2000), 10**6, 10**9]:
        part = plan.step(step)
        # The discrepancy of a golden-ratio sequence grows like log(step); independent draws would be off by
        # sqrt(step * share), more than 20 at step 2000 and 500 at step 10**6.
        assert abs(part.position - shares[part.task] * step) < 6


def test_a_far_step_needs_no_walk(plan: Plan) -> None:
    part = plan.step(10**15 + 3)
    assert part.epoch == part.position // plan.steps_per_epoch(part.task, "coco")


def test_the_order_of_tasks_in_a_file_does_not_matter(plan: Plan) -> None:
    turned = Plan(dict(reversed(MIXTURE.items())), seed=7)
    assert [turned.step(step).task for step in range(50)] == [plan.step(step).task for step in range(50)]


def test_only_eligible_samples_are_planned() -> None:
    eligible = np.array([3, 5, 8, 13, 21])
    samples = np.flatnonzero(np.isin(np.arange(24), eligible))
    plan = Plan({"a": TaskPlan({"coco": SetPlan(samples)}, 2)}, seed=1)
    assert {index for step in range(20) for index in plan.step(step).indices.tolist()} == set(
        eligible.tolist()
    )


def test_keys_belong_to_sample_epoch_task_and_seed() -> None:
    def keys(seed: int, task: str, step: int) -> dict[int, int]:
        part = Plan({task: one(8, 8)}, seed).step(step)
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
    plan = Plan({"a": one(9, 3, 2), "b": one(9, 3, 1)}, seed=42)
    assert "".join(plan.step(step).task for step in range(12)) == TASKS
    assert _numbers(plan.step(0)) == FIRST
    assert _numbers(plan.step(1000)) == LATER


def _numbers(part: StepPlan) -> tuple[str, int, list[int], list[int]]:
    return part.task, part.epoch, part.indices.tolist(), part.keys.tolist()


TASKS = "aababaabaaaa"
FIRST = ("a", 0, [6, 2, 7], [5837735442352826613, 6536507118599111953, 8207720218413388596])
LATER = ("a", 222, [1, 4, 0], [2991898658078678196, 2845352270947173412, 3881813900610913570])


@pytest.mark.parametrize(
    ("task", "key"), [("a", "visft.tasks.a.batch_size"), ("shared", "visft.shared.batch_size")]
)
def test_a_set_smaller_than_a_batch_is_refused(task: str, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Plan({task: one(25, 32)}, seed=0)


# Data sets

SETS = {
    "detection": TaskPlan(
        {"coco": SetPlan(np.arange(90), 3), "objects": SetPlan(np.arange(400), 1)}, batch_size=8, ratio=2
    ),
    "captioning": TaskPlan(
        {"coco": SetPlan(np.arange(90), 1), "captions": SetPlan(np.arange(200), 1)}, batch_size=8, ratio=1
    ),
}


def test_a_step_draws_from_one_set_that_carries_its_labels_in_exact_proportion() -> None:
    plan, drawn = Plan(SETS, seed=3), dict[tuple[str, str], int]()
    for step in range(3000):
        whole = plan.step(step)
        assert whole.indices.max() < len(SETS[whole.task].sets[whole.dataset].samples)
        drawn[whole.task, whole.dataset] = drawn.get((whole.task, whole.dataset), 0) + 1
    shares = {
        ("detection", "coco"): 1500,
        ("detection", "objects"): 500,
        ("captioning", "coco"): 500,
        ("captioning", "captions"): 500,
    }
    assert drawn.keys() == shares.keys()
    # Independent draws would be off by sqrt(500), about 22.
    assert all(abs(drawn[key] - count) <= 6 for key, count in shares.items()), drawn


def test_each_set_has_epochs_of_its_own_in_every_task() -> None:
    plan, seen = Plan(SETS, seed=3), dict[tuple[str, str, int], list[int]]()
    for step in range(400):
        whole = plan.step(step)
        seen.setdefault((whole.task, whole.dataset, whole.epoch), []).extend(whole.indices.tolist())
    assert all(len(set(indices)) == len(indices) for indices in seen.values())
    assert max(epoch for task, dataset, epoch in seen if (task, dataset) == ("detection", "coco")) > 10
    assert {epoch for task, dataset, epoch in seen if (task, dataset) == ("captioning", "captions")} == {
        0,
        1,
        2,
    }
    assert seen["detection", "coco", 0] != seen["captioning", "coco", 0]


def test_what_decides_the_order_is_described() -> None:
    bigger = {**SETS, "detection": TaskPlan({"coco": SetPlan(np.arange(91), 3)}, 8, 2)}
    windows = {"detection": TaskPlan({"coco": SetPlan(np.arange(90), 3, np.arange(90) // 9)}, 8, 2)}
    plans = [Plan(SETS, 3), Plan(SETS, 4), Plan(SETS, 3, 2), Plan(bigger, 3), Plan(windows, 3)]
    assert len({plan.describe() for plan in plans}) == len(plans)
    assert Plan(dict(reversed(SETS.items())), 3).describe() == plans[0].describe()


# The order inside a set


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_every_sample_has_exactly_one_place(size: int, key: int) -> None:
    np.testing.assert_array_equal(np.sort(_order(SetPlan(np.arange(size)), key)), np.arange(size))


def test_all_orders_are_equally_likely() -> None:
    size, keys, part = 4, 6_000, SetPlan(np.arange(4))
    counts = Counter(tuple(_order(part, key).tolist()) for key in range(keys))
    orders = factorial(size)
    expected = keys / orders
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in permutations(range(size)))
    # mean orders - 1, standard deviation sqrt(2 (orders - 1))
    assert abs(chi_square - (orders - 1)) < 4 * (2 * (orders - 1)) ** 0.5


def test_a_windowed_order_needs_each_shard_once_an_epoch() -> None:
    shards = np.repeat(np.arange(20), 25)
    plan = Plan({"a": TaskPlan({"coco": SetPlan(np.arange(500), 1, shards)}, 10)}, seed=1)
    epochs = []
    for epoch in range(3):
        steps = [plan.step(step).indices for step in range(50 * epoch, 50 * epoch + 50)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(500))
        used = [set(shards[indices].tolist()) for indices in steps]
        for shard in range(20):
            places = [step for step, numbers in enumerate(used) if shard in numbers]
            assert places[-1] - places[0] < WINDOW * 25 // 10, "one stretch, no longer than a window"
        assert max(map(len, used)) == WINDOW
        epochs.append(steps[0].tolist())
    assert len(set(map(tuple, epochs))) == 3


def test_no_order_is_made_twice_however_many_sets_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve pairs of a task and a set; the reader is three steps ahead of the loop."""
    made: list[int] = []

    def counted(part: SetPlan, key: int) -> npt.NDArray[np.int64]:
        made.append(key)
        return _order(part, key)

    monkeypatch.setattr("visft_ds.data.plan._order", counted)
    sets = {f"s{number}": SetPlan(np.arange(20)) for number in range(3)}
    plan = Plan({f"t{number}": TaskPlan(sets, 4) for number in range(4)}, 0)
    for step in range(400):
        plan.step(step + 3)
        plan.step(step)
    assert len(made) == len(set(made)) > 60
