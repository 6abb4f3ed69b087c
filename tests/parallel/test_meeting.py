"""Processes of a run that wait for others who never come: one line says how many, where, and what to look at."""

from __future__ import annotations

from datetime import timedelta

import deepspeed
import pytest
from torch.distributed import TCPStore

from visft_ds.parallel.engine import environment_as_found, start_process_group


@pytest.mark.parametrize(
    ("rank", "told"), [(0, "1 of 2 processes came"), (1, "not even rank 0, which listens there, came")]
)
def test_who_never_came_is_said(rank: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the errors of torch itself, which another release may word in another way; the time is cut short."""

    def meet(**_: object) -> None:
        TCPStore("127.0.0.1", 0 if rank == 0 else 1, 2, rank == 0, timedelta(seconds=1))

    monkeypatch.setattr(deepspeed, "init_distributed", meet)
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "node-1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        environment_as_found(),
        pytest.raises(ValueError, match=f"{told} to node-1:1 within 10 min: look in the log"),
    ):
        start_process_group()
