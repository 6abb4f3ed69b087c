"""Launchers over two hosts that reach each other by ssh: `deepspeed --hostfile` by pdsh, and torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.cluster import HOSTS, PATIENCE, Cluster, until
from tests.cluster.runs import LAST, held, training
from tests.ranks import wait_for
from tests.tiny import equal, steps_recorded

pytestmark = pytest.mark.slow


def deepspeed(
    hosts: Cluster, folder: Path, words: list[str], names: tuple[str, ...] = HOSTS, **variables: str
) -> subprocess.Popen[str]:
    """Start the command on the first host. pdsh passes no OMP_NUM_THREADS on, by which sums would differ."""
    variables = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **variables}
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in names))
    (folder / "environment").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(folder / "hostfile")]
    return hosts.start([*start, *words], HOSTS[0], DS_ENV_FILE=str(folder / "environment"))


def test_deepspeed_over_pdsh_is_the_run_of_one_host_and_saves_when_told_to_end(
    hosts: Cluster, shards: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = deepspeed(hosts, tmp_path, training(shards, out))
    said = "".join(wait_for(process, "step 2/"))
    (rank,) = hosts.pythons("host-2")
    (command,) = psutil.Process(process.pid).children()
    with held(rank, signal.SIGTERM):
        command.send_signal(signal.SIGTERM)
    said += process.communicate(timeout=PATIENCE)[0]
    until(lambda: not hosts.pythons("host-1") + hosts.pythons("host-2"), lambda: said)
    assert 2 <= steps_recorded(out)[-1] < LAST, said

    process = deepspeed(hosts, tmp_path, training(shards, out))
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0 and "from step" in said, said
    assert equal(out, straight, LAST)


def test_a_host_that_is_not_there_is_said_in_one_line(hosts: Cluster, shards: Path, tmp_path: Path) -> None:
    """DeepSpeed looks for the first one only."""
    words = training(shards, tmp_path / "run")
    process = deepspeed(hosts, tmp_path, words, (HOSTS[0], "host-9"), DEEPSPEED_TIMEOUT="1")
    said = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode != 0
    assert "error: 1 of 2 processes came to 10.88.0.11:29500 within 1 min: look in the log of every machine" in said
    assert "pdsh@host-1: host-9: ssh exited with exit code 255" in said and "Traceback" not in said, said


def test_torchrun_over_two_hosts_is_the_run_of_one(
    hosts: Cluster, shards: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    meeting = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=host-1:29400"]
    start = [sys.executable, "-m", "torch.distributed.run", *meeting, *training(shards, out)]
    processes = [hosts.start(start, host, OMP_NUM_THREADS="1") for host in HOSTS]
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert equal(out, straight, LAST)
