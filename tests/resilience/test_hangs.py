"""A rank that is killed or hangs: the others stop in time, name it, and show what everyone was doing."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.ranks import finish, start_ranks, wait_for
from tests.tiny import command

LONG = {"scheduler.params.total_num_steps": 100_000, "visft.run.save_every": 2}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_with_the_stacks_of_all(victim: int, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["launchers/train.py", *command(shards, out, extra={**LONG, "visft.run.heartbeat_timeout": 6.0})]
    processes = start_ranks(arguments)
    wait_for(processes[0], "step 3/")
    processes[victim].send_signal(signal.SIGSTOP)
    witness = processes[1 - victim]
    said = witness.communicate(timeout=600)[0]
    assert witness.returncode == 3
    assert f"stopped: rank {victim} (process {processes[victim].pid} on " in said
    assert "its process is stopped" in said
    assert re.search(r"last collective: number \d+, gloo:", said)
    assert "all_reduce" in said or "barrier" in said or "train_step" in said  # its own stack
    codes, outputs = finish([processes[victim]], timeout=600)  # it was let go on to print its stacks
    assert codes != [0]
    assert "most recent call first" in outputs[0]


#: launchers/train.py, of which rank 1 does not come back from its fourth step.
NEVER_BACK = """
import sys, time
from visft_ds.launch import main
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import ZeroEngine
original = ZeroEngine.train_step
def train_step(engine, step, *rest):
    if step == 3 and distributed.rank() == 1:
        time.sleep(600)
    return original(engine, step, *rest)
ZeroEngine.train_step = train_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_that_makes_no_progress_stops_all_of_four_with_their_stacks(shards: Path, tmp_path: Path) -> None:
    """It lives and gives its heartbeat; what tells is that nobody gets on."""
    extra = {**LONG, "visft.run.heartbeat_timeout": 10.0, "visft.run.step_timeout": 15.0}
    processes = start_ranks(["-c", NEVER_BACK, *command(shards, tmp_path / "run", extra=extra)], 4)
    codes, outputs = finish(processes)
    assert codes == [3] * 4, outputs
    for rank, said in enumerate(outputs):
        assert f"[rank {rank}] stopped: no progress for 1" in said
        assert f"behind the others: rank 1 (process {processes[1].pid} on " in said
        assert "last seen: step 4 (shared): forward, backward, update), " in said
        assert "most recent call first" in said
    assert 'File "<string>", line 9 in train_step' in outputs[1]


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_same_command_goes_on(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["launchers/train.py", *command(shards, out, extra={**LONG, "visft.run.heartbeat_timeout": 10.0})]
    processes = start_ranks(arguments)
    wait_for(processes[0], "step 5/")
    beat, deadline = out / "heartbeats/rank_00001.json", time.monotonic() + 600
    while '"doing": "step' not in beat.read_text():  # one is written every two seconds
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[1].kill()
    codes, outputs = finish(processes, timeout=600)
    assert codes == [3, -signal.SIGKILL]
    assert f"rank 1 (process {processes[1].pid} on {os.uname().nodename}, last seen: step" in outputs[0]
    assert "was killed, or out of memory" in outputs[0]
    assert "last collective: number" in outputs[0] and "stack:" in outputs[0] and "train.py" in outputs[0]
    processes = start_ranks(arguments)
    lines = wait_for(processes[0], "img/s")
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, outputs = finish(processes, timeout=600)
    assert codes == [0, 0], outputs
    assert re.search(r"from step [1-9]", "".join(lines) + outputs[0])


#: launchers/train.py, whose disk is full from the first checkpoint on.
FULL = """
import errno, sys
from pathlib import Path
from visft_ds.launch import main
from visft_ds.checkpoint import saver
def full(*arguments, **named):
    raise OSError(errno.ENOSPC, "No space left on device")
def save(*arguments):
    Path.write_text = full
    full()
saver.save_checkpoint = save
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_rank_whose_disk_is_full_tells_the_others(shards: Path, tmp_path: Path) -> None:
    """Its last heartbeat cannot be written as a new file either."""
    codes, outputs = finish(start_ranks(["-c", FULL, *command(shards, tmp_path / "run", extra=LONG)]))
    assert codes == [2, 2], outputs  # who follows ends as the first one did
    told = r"another rank ended first: rank 0 \(process \d+ on .*\): OSError: \[Errno 28\] No space left on device"
    assert re.search(told, outputs[1]), outputs[1]
    assert "Traceback" not in "".join(outputs)
