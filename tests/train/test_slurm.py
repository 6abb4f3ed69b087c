"""launchers/slurm.sbatch on stand-ins for SLURM's commands: places of ranks, exit codes, signals, another turn.

`tests/cluster` has a real SLURM, where its programs are installed.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch

from tests.ranks import REPOSITORY, below, run_ranks, start_command, wait_for
from tests.tiny import STEPS, command, steps_recorded, trained
from tests.train.fake_slurm import REQUEUED, install, job_of

SCRIPT = "launchers/slurm.sbatch"
#: In place of python: shows what a rank is told, waits for a signal if it is one of those that are asked to, and ends
#: with a code of its own.
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
    return subprocess.run(["bash", SCRIPT, *arguments], env=job, cwd=REPOSITORY, capture_output=True, text=True)


def start(job: dict[str, str]) -> subprocess.Popen[str]:
    """A job whose waiting ranks are ready."""
    process = subprocess.Popen(
        ["bash", SCRIPT], env=job, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in job["WAITS"]:
        wait_for(process, "ready")
    return process


def ended(process: subprocess.Popen[str]) -> int:
    """Exit code of a job."""
    try:
        process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # tasks that wait for a signal would do so for ever
        raise
    return process.returncode


@pytest.mark.parametrize("export", ["ALL", "NONE", "ALL,NAME=value", "NAME=value"])
def test_every_rank_is_told_its_place(export: str, job: dict[str, str]) -> None:
    """Whatever `sbatch --export` says, and on a port that Linux gives to no client."""
    done = submit({**job, "SLURM_EXPORT_ENV": export, "SLURM_JOB_ID": "39999"}, "--stage", "2", "--set=root=a folder")
    assert (done.returncode, done.stderr) == (0, "")
    rest = "4 2 127.0.0.1 29999 1 launchers/train.py --stage 2 --set=root=a folder"
    assert sorted(done.stdout.splitlines()) == [f"{rank} {rank % 2} {rest}" for rank in range(4)]


@pytest.mark.parametrize("array", [False, True], ids=["job", "array"])
@pytest.mark.parametrize("code", [2, 3, 85, 138])
def test_only_the_code_of_a_stop_by_sigusr1_queues_the_job_again(code: int, array: bool, job: dict[str, str]) -> None:
    """138: of a rank that SIGUSR1 met before its Python ran. Of an array one element alone has another turn."""
    if array:
        job = {**job, "SLURM_ARRAY_JOB_ID": job["SLURM_JOB_ID"], "SLURM_ARRAY_TASK_ID": "3"}
    assert submit({**job, "CODE": str(code)}).returncode == code
    assert requeued(job) == ([f"requeue {job_of(job)}"] if code in (85, 138) else [])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 0)])
def test_a_signal_to_the_script_reaches_every_rank(number: signal.Signals, code: int, job: dict[str, str]) -> None:
    """Of SIGTERM srun would kill them."""
    process = start({**job, "WAITS": "0123"})
    process.send_signal(number)
    assert ended(process) == code
    assert len(requeued(job)) == (code == 85)


def test_a_job_whose_ranks_do_not_end_together_ends(job: dict[str, str]) -> None:
    """SLURM may never hear of the end of one; the job would be there until its time is over."""
    assert ended(start({**job, "WAITS": "13", "SLURM_WAIT": "1"})) == 128 + signal.SIGKILL
    assert requeued(job) == []


def test_what_is_missing_is_said_in_one_line(job: dict[str, str], tmp_path: Path) -> None:
    script = str(REPOSITORY / SCRIPT)
    for changes, folder, told in (
        ({}, tmp_path, "submit from the folder of the repository"),
        ({"PYTHON": "no-such-python"}, REPOSITORY, "make install"),
        ({"SLURM_NTASKS_PER_NODE": ""}, REPOSITORY, "state --ntasks-per-node"),
        ({"SLURM_NTASKS": "2"}, REPOSITORY, "leave out --ntasks"),
    ):
        done = subprocess.run(["bash", script], env={**job, **changes}, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_script_is_sound() -> None:
    """Directives stand before the first command, or sbatch would not read them."""
    lines = (REPOSITORY / SCRIPT).read_text().splitlines()
    assert subprocess.run(["bash", "-n", SCRIPT], cwd=REPOSITORY).returncode == 0
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    commands = [number for number, line in enumerate(lines) if line and not line.startswith("#")]
    assert lines[0].startswith("#!") and directives[-1] < commands[0]
    given = {lines[number].split()[1].split("=")[0] for number in directives}
    assert {"--signal", "--requeue", "--open-mode", "--ntasks-per-node"} <= given and "--gpus-per-task" not in given
    assert "--signal=USR1@" in " ".join(lines)  # without B:, which would leave the ranks out


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ranks", "script"])
def test_a_job_that_runs_out_of_time_goes_on_in_its_next_turn(target: str, shards: Path, tmp_path: Path) -> None:
    """SLURM's signal, sent to all tasks or (with "B:") to the script; the same script then ends the run."""
    expected, out = tmp_path / "expected", tmp_path / "run"
    run_ranks(["launchers/train.py", *command(shards, expected)])
    job = install(tmp_path, nodes=2, tasks=1)
    arguments = ["env", *(f"{name}={value}" for name, value in job.items() if os.environ.get(name) != value)]
    arguments += ["bash", SCRIPT, *command(shards, out)]
    process = start_command(arguments)
    lines = wait_for(process, "step 2/")
    ranks = below(process.pid, "launchers/train.py")
    ranks = [rank for rank in ranks if Path(rank.exe()).name.startswith("python") and "srun" not in rank.cmdline()]
    assert len(ranks) == 2 and all(rank.environ()["LOCAL_RANK"] == "0" for rank in ranks)
    for one in ranks if target == "ranks" else [psutil.Process(process.pid)]:
        one.send_signal(signal.SIGUSR1)
    said = "".join(lines) + process.communicate(timeout=600)[0]
    assert process.returncode == 85, said
    assert "stopped after step" in said and len(requeued(job)) == 1
    process = start_command(arguments)
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert "from step" in said and steps_recorded(out) == list(range(1, STEPS + 1))
    ours, theirs = trained(out), trained(expected)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
