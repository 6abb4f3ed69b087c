"""launchers/slurm.sbatch on stand-ins for SLURM's commands: places of ranks, exit codes, signals, another
turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY, wait_for
from tests.train.fake_slurm import REQUEUED, install, job_of

SCRIPT = "launchers/slurm.sbatch"
#: In place of python: shows what a rank is told, waits for a signal if it is one of those that are asked to,
#: and ends with a code of its own.
STAND_IN = """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*"
if [[ "$WAITS" == *$RANK* ]]; then
    trap 'exit 85' USR1
    trap 'exit 0' TERM
    echo ready
    while :; do read -t 0.02 <> <(:); done
fi
exit "$CODE"
"""


@pytest.fixture(name="job")
def _job(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two machines with two GPUs each, whose python is a stand-in."""
    environment = install(tmp_path, nodes=2, tasks=2)
    file = tmp_path / "stand-in"
    file.write_text(STAND_IN)
    file.chmod(0o755)
    return {**environment, "PYTHON": str(file), "CODE": "0", "WAITS": ""}


def requeued(job: dict[str, str]) -> list[str]:
    file = Path(job["FAKE_SLURM"]) / REQUEUED
    return file.read_text().splitlines() if file.exists() else []


def submit(job: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", SCRIPT, *arguments], env=job, cwd=REPOSITORY, capture_output=True, text=True
    )


def test_every_rank_is_told_its_place(job: dict[str, str]) -> None:
    """Whatever `sbatch --export` says, and on a port that Linux gives to no client."""
    done = submit(
        {**job, "SLURM_EXPORT_ENV": "NONE", "SLURM_JOB_ID": "39999"}, "--stage", "2", "--set=root=a folder"
    )
    assert (done.returncode, done.stderr) == (0, "")
    rest = "4 2 127.0.0.1 29999 1 launchers/train.py --stage 2 --set=root=a folder"
    assert sorted(done.stdout.splitlines()) == [f"{rank} {rank % 2} {rest}" for rank in range(4)]


@pytest.mark.parametrize("code", [3, 85, 138])
def test_only_the_code_of_a_stop_by_sigusr1_queues_the_job_again(code: int, job: dict[str, str]) -> None:
    """138: of a rank that SIGUSR1 met before its Python ran. Of an array one element alone has another
    turn.
    """
    job = {**job, "SLURM_ARRAY_JOB_ID": job["SLURM_JOB_ID"], "SLURM_ARRAY_TASK_ID": "3"}
    assert submit({**job, "CODE": str(code)}).returncode == code
    assert requeued(job) == ([f"requeue {job_of(job)}"] if code in (85, 138) else [])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 0)])
def test_a_signal_to_the_script_reaches_every_rank(
    number: signal.Signals, code: int, job: dict[str, str]
) -> None:
    """Of SIGTERM srun would kill them."""
    environment = {**job, "WAITS": "0123"}
    process = subprocess.Popen(
        ["bash", SCRIPT],
        env=environment,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        for _ in environment["WAITS"]:
            wait_for(process, "ready")
        process.send_signal(number)
        process.communicate(timeout=600)
    finally:
        with contextlib.suppress(
            ProcessLookupError
        ):  # after a failure tasks would wait for a signal for ever
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code and len(requeued(job)) == (code == 85)
