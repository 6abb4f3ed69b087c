"""What launchers/slurm.sbatch needs of SLURM, on one machine: `srun` and `scontrol` as their manuals describe them.

Run by files of these names on PATH: python fake_slurm.py srun|scontrol ARGUMENTS. The tasks are processes here; the
machines are told apart by SLURM_NODEID alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REQUEUED = "requeued"  #: file in the folder of the job that has a line for each `scontrol requeue`


def install(folder: Path, *, nodes: int, tasks: int) -> dict[str, str]:
    """Put the two commands into a folder; the environment of a batch script on so many machines."""
    for name in ("srun", "scontrol"):
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
    """Start every task, pass signals on to all, and return the largest exit code."""
    first = next(place for place, word in enumerate(arguments) if not word.startswith("--"))
    nodes, each = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
    tasks: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):  # before there is a task that could say it is ready
        signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks] and None)
    for rank in range(nodes * each):
        place = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % each, "SLURM_NODEID": rank // each}
        environment = {name: str(value) for name, value in {**place, "SLURM_NTASKS": nodes * each}.items()}
        tasks.append(subprocess.Popen(arguments[first:], env={**os.environ, **environment}))
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scontrol(arguments: Sequence[str]) -> int:
    if arguments[:2] == ["show", "hostnames"]:
        print("127.0.0.1\nnode-2")  # where rank 0 really is
    else:
        with (Path(os.environ["FAKE_SLURM"]) / REQUEUED).open("a") as file:
            file.write(" ".join(arguments) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": srun, "scontrol": scontrol}[sys.argv[1]](sys.argv[2:]))
