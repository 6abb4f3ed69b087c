"""Several tasks in one configuration: which are on, how the steps and images are shared out, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.options import known_keys
from visft_ds.config import ResolvedConfig, deepspeed_dict, derive_batches, resolve
from visft_ds.config.resolve import NOT_IDENTITY, flatten
from visft_ds.config.task_schema import SHARED

TASKS = ("detection", "segmentation", "captioning")


def debug(*settings: str, stage: int = 2) -> ResolvedConfig:
    return resolve(stage=stage, model="debug", settings=settings)


def recipe(*settings: str, stage: int = 1) -> ResolvedConfig:
    return resolve(stage=stage, model="eva_e", settings=settings)


def complaint(call: Callable[..., ResolvedConfig], *settings: str, stage: int = 2) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the caller looks at the text
        call(*settings, stage=stage)
    return str(caught.value)


# Which tasks are on


@pytest.mark.parametrize("given", ["detection,captioning", "captioning, detection", '["captioning", "detection"]'])
def test_a_list_of_names_turns_the_other_tasks_off(given: str) -> None:
    config = recipe(f"visft.tasks={given}")
    assert list(config.visft.tasks.enabled()) == ["detection", "captioning"]  # one order, whatever was typed
    assert config.visft.tasks.segmentation is None
    assert [group.name for group in config.visft.param_groups] == ["detection", "captioning"]
    assert config.total_steps == 250_000
    assert config.sources["visft.tasks.segmentation"].startswith("--set visft.tasks=")


@pytest.mark.parametrize(
    ("given", "word"),
    [("detektion", "did you mean detection"), ("detection,", "has no settings"), ("[]", "no task is on"), ("null", "")],
)
def test_names_that_are_no_tasks(given: str, word: str) -> None:
    assert word in complaint(debug, f"visft.tasks={given}")


def test_a_task_without_settings_cannot_be_kept() -> None:
    """The first list has thrown the settings of captioning away; the second must not end in an empty run."""
    text = complaint(debug, "visft.tasks=detection", "visft.tasks=detection,captioning")
    assert "no settings of a task 'captioning'" in text


def test_no_task_at_all_is_one_error() -> None:
    """The length of stage 1 follows from the tasks: it must not be complained about, too."""
    text = complaint(recipe, *(f"visft.tasks.{task}=null" for task in TASKS), stage=1)
    assert text.startswith("the configuration has 1 error:") and "no task is on" in text


def test_groups_of_heads_that_are_off_are_dropped_and_others_stay() -> None:
    groups = (
        'visft.param_groups=[{"name": "a", "params": "heads.captioning.*"}, '
        '{"name": "b", "params": "heads.captioning.fc.*"}, '
        '{"name": "c", "params": "heads.detection.*,heads.captioning.*"}, '
        '{"name": "d", "params": "backbone.*.lora_*"}, {"name": "e", "params": "heads.*.nothing"}]'
    )
    kept = debug("visft.tasks=detection,segmentation", groups).visft.param_groups
    assert [group.name for group in kept] == ["c", "d", "e"] and kept[0].params == "heads.detection.*"
    assert len(debug(groups).visft.param_groups) == 5


# How the steps are shared out


def test_the_length_follows_from_the_updates() -> None:
    updates = [f"visft.tasks.{task}.updates={number}" for task, number in zip(TASKS, (3000, 2500, 4000), strict=True)]
    assert recipe(*updates).total_steps == 9500
    assert recipe(*updates, "visft.mode=shared").total_steps == 4000  # every step teaches all of them
    assert recipe(*updates, "scheduler.params.total_num_steps=2500").total_steps == 2500
    assert [stream.share for stream in recipe(*updates).visft.streams().values()] == [3000, 2500, 4000]


def test_a_warm_up_longer_than_the_run_shrinks_to_a_tenth_of_it() -> None:
    updates = [f"visft.tasks.{task}.updates=700" for task in TASKS]
    assert recipe(*updates).scheduler.params.warmup_num_steps == 2000  # of 2100 steps
    config = recipe(*updates, "visft.tasks=detection,captioning", stage=1)
    assert (config.total_steps, config.scheduler.params.warmup_num_steps) == (1400, 140)
    assert config.adapted == ("warm-up: 2000 -> 140 steps, because of the length of the run",)


def test_every_sampled_task_states_updates() -> None:
    assert "captioning.updates = null (--set): missing" in complaint(debug, "visft.tasks.captioning.updates=null")


def test_a_length_that_follows_from_nothing() -> None:
    # In mode "shared" there is nothing to share out: neither is needed beside a length.
    bare = [f"visft.tasks.{task}.updates=null" for task in TASKS]
    assert debug(*bare, "visft.mode=shared").total_steps == 300
    assert "missing: state it" in complaint(debug, *bare, "visft.mode=shared", "scheduler.params.total_num_steps=null")


# Streams and batches


def test_sampled_tasks_have_a_stream_each_and_shared_ones_have_one() -> None:
    sampled = debug("visft.tasks.detection.image.flip=0").visft.streams()
    assert {name: stream.tasks for name, stream in sampled.items()} == {task: (task,) for task in TASKS}
    assert sampled["detection"].image["flip"] == 0 and sampled["captioning"].image["size"] == 112
    config = debug("visft.mode=shared", "visft.tasks=captioning,detection", "visft.shared.image.flip=0.25")
    (stream,) = config.visft.streams().values()
    assert (stream.name, stream.tasks) == (SHARED, ("detection", "captioning"))
    assert (stream.batch_size, stream.micro_batch, stream.image["flip"]) == (8, 16, 0.25)


def test_mode_shared_needs_its_settings() -> None:
    assert 'missing: mode "shared" needs' in complaint(debug, "visft.mode=shared", "visft.shared=null")
    with pytest.raises(ValueError, match=r"visft\.shared\.batch_size = 10 on 4 processes.*Use batch_size 8 or 12"):
        derive_batches(debug("visft.mode=shared", "visft.shared.batch_size=10"), 4)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_256_captions_and_8_pictures_with_masks_accumulate_alike(world: int, accumulation: int) -> None:
    """DeepSpeed knows one accumulation; the micro-batches differ instead."""
    config = recipe()
    batches = derive_batches(config, world)
    assert batches.accumulation == accumulation
    assert dict(batches.micro) == {"detection": 1, "segmentation": 1, "captioning": 32}
    told = deepspeed_dict(config, world, "bf16")  # the largest stream, so that DeepSpeed's own equation holds
    assert (told["train_batch_size"], told["train_micro_batch_size_per_gpu"]) == (256, 32)


@given(shares=st.tuples(*[st.integers(1, 24)] * 3), micro=st.tuples(*[st.integers(1, 8)] * 3), world=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_the_common_accumulation_is_the_smallest_that_exists(
    shares: tuple[int, ...], micro: tuple[int, ...], world: int
) -> None:
    sizes = [f"visft.tasks.{task}.batch_size={share * world}" for task, share in zip(TASKS, shares, strict=True)]
    limits = [f"visft.tasks.{task}.micro_batch={most}" for task, most in zip(TASKS, micro, strict=True)]
    config = debug(*sizes, *limits)
    possible = [
        a
        for a in range(1, min(shares) + 1)
        if all(s % a == 0 and s // a <= m for s, m in zip(shares, micro, strict=True))
    ]
    if not possible:
        with pytest.raises(ValueError, match=f"too small.* x {math.gcd(*shares)} accumulation"):
            derive_batches(config, world)
        return
    batches = derive_batches(config, world)
    assert batches.accumulation == possible[0]
    assert [batches.micro[task] for task in TASKS] == [share // possible[0] for share in shares]


# What is written down and compared


@pytest.mark.parametrize("stage", [1, 2])
def test_a_recorded_configuration_is_the_same_run(stage: int) -> None:
    first = debug("visft.tasks=segmentation,detection", "visft.mode=shared", stage=stage)
    second = resolve(whole=(first.to_dict(), "run.json"))
    assert second.to_dict() == first.to_dict()
    assert second.visft == first.visft and second.visft.streams() == first.visft.streams()
    assert (second.fingerprint(), second.total_steps) == (first.fingerprint(), first.total_steps)


def test_every_exception_of_the_identity_fits_a_key() -> None:
    """A glob that fits nothing is a key that was renamed and is now compared without anybody wanting it."""
    import fnmatch

    keys = [*known_keys(), *(key for key, _ in flatten(debug().to_dict()))]
    assert [glob for glob in NOT_IDENTITY if not fnmatch.filter(keys, glob)] == []
