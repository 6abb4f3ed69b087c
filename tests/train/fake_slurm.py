"""What launchers/slurm.sbatch needs of SLURM, on one machine: `srun`, `scancel` and `scontrol` as the real
ones behave.

Run by files of these names on PATH: python fake_slurm.py srun|scancel|scontrol ARGUMENTS. The tasks are
processes here; the machines are told apart by SLURM_NODEID alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

REQUEUED = "requeued"  #: file in the folder of the job that has a line for each `scontrol requeue`
TASKS = "tasks"  #: file beside it with the processes of the tasks


def install(folder: Path, *, nodes: int, tasks: int) -> dict[str, str]:
    """Put the commands into a folder; the environment of a batch script on so many machines."""
    for name in ("srun", "scancel", "scontrol"):
        file = folder / name
        file.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        file.chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": f"node-[1-{nodes}]",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_CPUS_PER_TASK": "1",
        "FAKE_SLURM": str(folder),
    }


def srun(arguments: Sequence[str]) -> int:
    """Start every task, pass SIGUSR1 on to all, kill all on SIGTERM, and return the largest exit code.

    Of SLURM 24.11: the variables for which sbatch left SLURM_EXPORT_ENV are all that tasks
    get, PATH excluded; and after the first task has ended, the others have `--wait` seconds.
    """
    first = next(place for place, word in enumerate(arguments) if not word.startswith("--"))
    options = dict(word[2:].partition("=")[::2] for word in arguments[:first])
    if "ALL" not in options.get("export", os.environ.get("SLURM_EXPORT_ENV", "ALL")).split(","):
        print(f"slurmstepd: error: execve(): {arguments[first]}: No such file or directory", file=sys.stderr)
        return 2
    nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks: list[subprocess.Popen[bytes]] = []

    def on_signal(number: int, frame: object) -> None:
        for task in tasks:
            task.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)

    for number in (signal.SIGUSR1, signal.SIGTERM):  # before there is a task that could say it is ready
        signal.signal(number, on_signal)
    for rank in range(nodes * each):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
        environment = {name: str(value) for name, value in {**place, "SLURM_NTASKS": nodes * each}.items()}
        tasks.append(subprocess.Popen(arguments[first:], env={**os.environ, **environment}))
    listed = _job() / f"{TASKS}.new"
    listed.write_text(" ".join(str(task.pid) for task in tasks))
    listed.rename(_job() / TASKS)
    patience, ended = float(options.get("wait", 0)), None
    while any(task.poll() is None for task in tasks):
        if ended is None and any(task.returncode is not None for task in tasks):
            ended = time.monotonic()
        if patience and ended is not None and time.monotonic() > ended + patience:
            on_signal(signal.SIGTERM, None)
        time.sleep(0.02)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scancel(arguments: Sequence[str]) -> int:
    """`--signal=NAME JOB`: a signal to the tasks of the job, not to its script."""
    name, job = arguments
    if job != job_of(os.environ):
        return 1
    tasks = _job() / TASKS
    while not tasks.exists():  # a task may be ready before `srun` has listed all
        time.sleep(0.02)
    for pid in tasks.read_text().split():
        os.kill(int(pid), signal.Signals[f"SIG{name.removeprefix('--signal=')}"])
    return 0


def scontrol(arguments: Sequence[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("127.0.0.1\nnode-2")  # where rank 0 really is
    else:
        with (_job() / REQUEUED).open("a") as file:
            file.write(" ".join(arguments) + "\n")
    return 0


def job_of(environment: Mapping[str, str]) -> str:
    """What means this job and no other: of an array, SLURM_JOB_ID of the last element means all."""
    array = environment.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{environment['SLURM_ARRAY_TASK_ID']}" if array else environment["SLURM_JOB_ID"]


def _job() -> Path:
    return Path(os.environ["FAKE_SLURM"])


if __name__ == "__main__":
    sys.exit({"srun": srun, "scancel": scancel, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
