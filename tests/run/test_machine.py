"""What is compared between ranks, and room in shared memory and on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from visft_ds.config import ResolvedConfig, derive_batches, resolve
from visft_ds.run import machine
from visft_ds.run.machine import check_shared_memory, rank_facts


class Usage(NamedTuple):
    free: int


def config(*settings: str) -> ResolvedConfig:
    return resolve(stage=1, model="debug", settings=settings)


def test_every_setting_counts() -> None:
    ours, theirs = rank_facts(config()), rank_facts(config("visft.run.save_every=7", "visft.seed=4"))
    assert {key for key in ours if ours[key] != theirs[key]} == {"visft.run.save_every", "visft.seed"}
    assert {"version of torch", "version of deepspeed"} <= ours.keys()
    other = rank_facts(resolve(stage=1, model="debug", engine="zero3"))
    assert "zero_optimization.stage" in {key for key in ours if ours[key] != other.get(key)}


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visft_ds.flags.find_spec", lambda name: None)
    told = r"visft\.run\.track needs wandb, not installed here: pip install .*\[wandb\]"
    with pytest.raises(ValueError, match=told):
        machine.check_machine(config("visft.run.track=wandb"), 12)


def test_worker_processes_need_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64_000_000))
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    many = ["visft.data.num_workers=8", "visft.shared.image.fixed_size=1024"]
    wide = config(*many)
    with pytest.raises(
        ValueError,
        match=r"has 64 MB free; 13 batches for each training process of this machine may need \d+ MB.*num_workers=0",
    ):
        check_shared_memory(wide, derive_batches(wide, 1), tmp_path)
    for fine in (config(many[0]), config("visft.data.num_workers=0", many[1])):
        check_shared_memory(fine, derive_batches(fine, 1), tmp_path)
