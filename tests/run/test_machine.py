"""Facts that are compared between ranks."""

from __future__ import annotations

import pytest

from visft_ds.config import ResolvedConfig, resolve
from visft_ds.run import machine
from visft_ds.run.machine import rank_facts


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
