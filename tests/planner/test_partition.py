"""Where a pipeline is divided, what it predicts, and which configurations have one."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest

from visft_ds.config import ResolvedConfig, derive_batches, resolve
from visft_ds.distributed import PipelinePosition
from visft_ds.planner.memory import planned_run
from visft_ds.planner.partition import Partition, divide
from visft_ds.prepare.model import deepspeed_dict

COSTS = ([0.2, *[1.0] * 12, 6.0], [5.0, 1.0, 1.0, 1.0, 4.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0, 9.0])


def pipeline(*settings: str, stage: int = 1, model: str = "debug") -> ResolvedConfig:
    return resolve(stage=stage, engine="pipeline", model=model, settings=settings)


def planned(stage: int, *settings: str, stages: int = 4, model: str = "debug") -> Partition:
    fast = "visft.tasks=detection"  # counting in heads takes its time
    config = pipeline(f"pipeline.stages={stages}", fast, *settings, stage=stage, model=model)
    partition = planned_run(config, stages, "fp32", None, None).partition
    assert partition is not None
    return partition


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_the_most_expensive_stage_is_as_cheap_as_possible(costs: list[float], stages: int) -> None:
    def worst(bounds: tuple[int, ...]) -> float:
        return max(sum(costs[start:stop]) for start, stop in pairwise(bounds))

    bounds = divide(costs, stages)
    everything = [(0, *cut, len(costs)) for cut in combinations(range(1, len(costs)), stages - 1)]
    assert len(bounds) == stages + 1 and sorted(set(bounds)) == list(bounds)  # none is empty
    assert worst(bounds) == pytest.approx(min(map(worst, everything)))


def test_frozen_blocks_count_as_the_work_they_are() -> None:
    """Stage 1 trains the heads alone: divided by what trains, one stage would get all blocks but a few."""
    partition = planned(1, stages=8, model="eva_e")
    assert [stop - start for start, stop in pairwise(partition.bounds)] == [9, 8, 8, 8, 8, 8, 8, 9]
    assert max(partition.stage_costs()) < 1.05 * sum(partition.costs) / 8
    assert 0 < partition.costs[-1] < partition.costs[1]  # the heads of a giant tower are less than a block


def test_what_trains_costs_its_backward_pass() -> None:
    images = ("visft.mode=shared", "visft.shared.batch_size=4", "visft.shared.micro_batch=1")
    plain = (*images, "visft.model.activation_checkpointing=none")
    heads, adapters = planned(1, *plain), planned(2, *plain)
    assert (
        2.2 * heads.costs[2] < adapters.costs[2] < 3.2 * heads.costs[2]
    )  # the gradient of its input, and adapters
    recomputed = planned(2, *images, "visft.model.activation_checkpointing=block")
    # Once more forward, up to the last product, whose result nobody needs.
    assert 0.6 * heads.costs[2] < recomputed.costs[2] - adapters.costs[2] < heads.costs[2]


def test_stages_wait_as_the_textbook_says() -> None:
    partition = Partition((1.0,) * 4, (0, 1, 2, 3, 4))
    for micro_batches in (1, 4, 32):
        assert partition.bubble(micro_batches) == pytest.approx(3 / (micro_batches + 3))
    uneven = Partition((3.0, 1.0), (0, 1, 2))
    assert uneven.bubble(1000) == pytest.approx(
        1 / 3, rel=1e-2
    )  # the small stage waits two thirds of the time


def test_places_are_numbered_as_deepspeed_numbers_them() -> None:
    places = [PipelinePosition.of_rank(rank, 6, 3) for rank in range(6)]
    assert [(place.stage, place.dp_rank) for place in places] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert [place.role for place in places] == ["images", "images", None, None, "labels", "labels"]


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ("zero_optimization.stage=0", "clips"),
        ("zero_optimization.overlap_comm=true", "overlap_comm"),
        ('bf16={"enabled": true}', "precision"),  # its optimizer wipes gradients of heads
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(setting: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        pipeline(setting)


def test_processes_and_images_are_divided_over_pipelines() -> None:
    config = pipeline("pipeline.stages=3", "visft.model.precision=auto")
    batches = derive_batches(config, 6)
    assert (batches.dp, batches.stages) == (2, 3)
    assert (
        deepspeed_dict(config, batches, "fp32")["train_batch_size"] == 24
    )  # images, not images of each process
    with pytest.raises(ValueError, match="processes"):
        derive_batches(config, 4)
    with pytest.raises(ValueError, match="layers"):
        planned(2, stages=9)


def test_a_run_may_change_its_pipeline_and_go_on() -> None:
    zero = resolve(stage=1, engine="zero1", model="debug")
    assert zero.identity() == pipeline().identity()
    assert zero.pipeline_stages == 1 and pipeline().pipeline_stages == 2
