"""What a start finds out: what `visft.model.activation_checkpointing` = "auto" becomes, where and why; facts that ranks
share.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.run.recompute_case import configured, needs
from visft_ds.config import ResolvedConfig, changed, resolve
from visft_ds.resilience import memory
from visft_ds.run import machine
from visft_ds.run.folder import look_into
from visft_ds.run.record import write_run

CPU = torch.device("cpu")


def settled(monkeypatch: pytest.MonkeyPatch, room: int, config: ResolvedConfig) -> tuple[str, str]:
    """(policy, reason) of a start on a machine that has room for so many bytes."""
    monkeypatch.setattr(machine, "memory_of", lambda device: room)
    chosen, there = machine.settle_checkpointing(
        config, machine.check_machine(config), None, look_into(Path(config.visft.run.out or ""))
    )
    return chosen.visft.model.activation_checkpointing, there.why_checkpointing


def test_the_first_that_fits_is_chosen_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    need = {policy: needs(policy) for policy in ("none", "mlp", "block")}
    assert need["none"] > need["mlp"] > need["block"]
    for policy, room in need.items():
        chosen, why = settled(monkeypatch, room, configured())
        assert chosen == policy and why.startswith("chosen: needs 0.0 of 0.0 GiB")
    with pytest.raises(ValueError, match=r"even with block a step needs .*What helps: --set "):
        settled(monkeypatch, need["block"] - 1, configured())


def test_the_debug_model_states_its_policy() -> None:
    """So that planning takes no part of the way to the first loss."""
    config = resolve(stage=2, model="debug")
    assert config.visft.model.activation_checkpointing == "none"
    assert machine.check_machine(config).why_checkpointing == "as configured"


def test_a_run_keeps_its_policy_though_memory_differs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, room = changed(configured(), [f"visft.run.out={tmp_path}"]), needs("block")
    assert settled(monkeypatch, room, config)[0] == "block"
    write_run(
        tmp_path, changed(config, ["visft.model.activation_checkpointing=block"]).to_dict(), 1, ["train"]
    )
    assert settled(monkeypatch, 10**12, config)[0] == "none"  # that run has saved nothing to go on with
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    assert settled(monkeypatch, 10**12, config) == ("block", "as the run began")


def test_the_rank_with_the_least_room_decides_for_all(tmp_path: Path) -> None:
    """Each rank alone would choose another policy."""
    out = tmp_path / "chosen"
    run_ranks(["-m", "tests.run.recompute_case", str(out)], world=2)
    found = [json.loads(Path(f"{out}.{rank}").read_text(encoding="utf-8")) for rank in range(2)]
    assert found[0] == found[1] and found[0][0] == "block", found


def test_a_limit_of_the_control_group_is_all_that_a_cpu_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A scheduler limits a group in the middle of the path: the process's own has no limit."""
    group = tmp_path / "groups/slurm/job_7/step_0"
    group.mkdir(parents=True)
    limits = ((group, "max"), (group.parent, str(8 * 2**30)), (group.parent.parent, str(64 * 2**30)))
    for folder, limit in limits:
        (folder / "memory.max").write_text(limit + "\n", encoding="utf-8")
    own = tmp_path / "cgroup"
    own.write_text("0::/slurm/job_7/step_0\n", encoding="utf-8")
    monkeypatch.setattr(memory, "_OWN_GROUP", own)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: Memory())
    assert memory.host_memory() == 8 * 2**30
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert machine.memory_of(CPU) == int(0.8 * 8 * 2**30) // 2 - 950_000_000  # libraries


class Memory:
    total = available = 256 * 2**30


def test_every_setting_is_compared_between_ranks() -> None:
    plain = resolve(stage=1, model="debug")
    ours, theirs = machine.rank_facts(plain), machine.rank_facts(changed(plain, ["visft.seed=4"]))
    assert {key for key in ours if ours[key] != theirs[key]} == {"visft.seed"}
    assert {"version of torch", "version of deepspeed"} <= ours.keys()
    other = machine.rank_facts(resolve(stage=1, model="debug", engine="zero3"))
    assert "zero_optimization.stage" in {key for key in ours if ours[key] != other.get(key)}
