"""Flags of visft train: the keys that they set, and what a short run on few images adapts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coco_tree import write_shards
from tests.opened import open_run
from visft_ds.config import ResolvedConfig
from visft_ds.prepare.settle import settle


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), captions=False, train=10, val=10)


def given(shards: Path, *words: object) -> ResolvedConfig:
    flags = ["--stage", 1, "--model", "debug", "--data", shards, "--out", shards.parent / "run", *words]
    return settle([str(word) for word in flags]).config


def test_flags_set_the_keys_that_they_name(shards: Path) -> None:
    config = given(shards, "--steps", 30, "--lr", 0.5, "--batch-size", 4)
    assert (config.total_steps, config.optimizer.params.lr) == (30, 0.5)
    assert {stream.batch_size for stream in config.visft.streams().values()} == {4}
    assert config.scheduler.params.warmup_num_steps == 3, "a tenth of the run; the recipe's is longer than it"
    assert set(config.visft.tasks.enabled()) == {"detection", "segmentation"}, "the data has no captions"


@pytest.mark.parametrize(("mode", "steps"), [("shared", 9), ("sampled", 18)])
def test_epochs_are_passes_of_each_task_through_the_images(shards: Path, mode: str, steps: int) -> None:
    assert (
        given(shards, "--epochs", 3, "--batch-size", 4, f"--set=visft.mode={mode}").total_steps
        == 8 * steps // 9
    )
    assert given(shards, "--epochs", 3, f"--set=visft.mode={mode}").total_steps == steps // 3


def test_fewer_images_than_a_batch_train_with_the_smaller_batch(shards: Path) -> None:
    config, data = open_run(given(shards))
    (stream,) = config.visft.streams().values()
    assert stream.batch_size == data.plan.tasks["shared"].batch_size == 10
    assert [decision.key for decision in config.decisions][-1] == "visft.shared.batch_size"


@pytest.mark.parametrize(
    "words", [("--steps", 0), ("--epochs", 1, "--steps", 2), ("--lr", -1), ("--batch-size", 0)]
)
def test_flags_out_of_range(shards: Path, words: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match=r"--steps|--lr|--batch-size"):
        given(shards, *words)
