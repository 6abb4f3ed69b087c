"""Runs of the tiny model on a cluster: jobs of SLURM, and signals that do not race with the end of a run."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.cluster import Cluster, logs, until
from tests.tiny import command

SCRIPT = "launchers/slurm.sbatch"
LAST = 40  #: steps of a run
#: Nothing is saved in between, and nobody loses patience with a rank that a test holds.
SETTINGS = {
    "scheduler.params.total_num_steps": LAST,
    "visft.run.save_every": 10_000,
    "visft.run.heartbeat_timeout": 300.0,
}


def training(shards: Path, out: Path, **settings: object) -> list[str]:
    """The command, without python."""
    return ["launchers/train.py", *command(shards, out, extra={**SETTINGS, **settings})]


@dataclass(frozen=True)
class Job:
    """A job of SLURM."""

    hosts: Cluster
    name: str  #: its number; NUMBER_ELEMENT of an array
    log: Path

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` tells."""
        words = self.hosts.run("scontrol", "show", "job", "--oneline", self.name).split()
        return {name: value for name, equals, value in (word.partition("=") for word in words) if equals}

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def until(self, *states: str) -> dict[str, str]:
        """Facts of the job once it is in one of these states."""
        until(lambda: self.facts()["JobState"] in states, lambda: f"{self.facts()}\n{self.said()}\n{self._daemons()}")
        return self.facts()

    def until_said(self, text: str) -> None:
        until(lambda: text in self.said(), lambda: f"{self.facts()}\n{self.said()}\n{self._daemons()}")

    def _daemons(self) -> str:
        return logs(self.hosts.folder)


def submit(hosts: Cluster, log: Path, words: Sequence[str], *options: str, **variables: str) -> Job:
    """Submit launchers/slurm.sbatch for one task on each host; options come after these, before the file."""
    given = ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1", f"--output={log}", *options]
    variables = {"PYTHON": sys.executable, **variables}
    return Job(hosts, hosts.run("sbatch", "--parsable", *given, SCRIPT, *words, **variables), log)


@contextmanager
def held(rank: psutil.Process, number: signal.Signals) -> Iterator[None]:
    """Stop a rank, and so the run, until it has been sent a signal."""
    rank.send_signal(signal.SIGSTOP)
    yield
    until(lambda: number in _pending(rank), lambda: f"{number.name} never came")
    rank.send_signal(signal.SIGCONT)


def _pending(process: psutil.Process) -> set[int]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return {number for number in range(1, 65) if any(mask >> (number - 1) & 1 for mask in masks)}
