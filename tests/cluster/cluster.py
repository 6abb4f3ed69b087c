"""Two hosts with a real SLURM and sshd on one machine, in namespaces that end with the process that asked for them.

    controller 10.88.0.1 ── host-1 10.88.0.11, host-2 10.88.0.12

Nothing outside a temporary folder is written, nothing is installed, and no process is left, however this one ends: the
first process of the namespaces reads from a pipe that only this one holds open.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.ranks import REPOSITORY

HOSTS = ("host-1", "host-2")
SLURM = ("slurmctld", "slurmd", "sbatch", "munged")
SSH = ("pdsh", "ssh", "ssh-keygen", "/usr/sbin/sshd")
PACKAGES = "slurmctld slurmd slurm-client munge pdsh openssh-server"
PATIENCE = 600.0  #: seconds for whatever takes one alone

NAMES = "127.0.0.1 localhost\n10.88.0.1 controller\n10.88.0.11 host-1\n10.88.0.12 host-2\n"
#: cred_expire: a job that is queued again waits for it, two minutes by default. No cgroups, which namespaces lack here.
SLURM_CONF = """\
ClusterName=try
SlurmctldHost=controller
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5
StateSaveLocation=DIR/state
SlurmdSpoolDir=DIR/spool/%n
SlurmctldPidFile=DIR/slurmctld.pid
SlurmdPidFile=DIR/slurmd-%n.pid
SlurmctldLogFile=DIR/log/slurmctld
SlurmdLogFile=DIR/log/slurmd-%n
ProctrackType=proctrack/linuxproc
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=5,sched_interval=5
JobRequeue=1
ReturnToService=2
SlurmdTimeout=600
SlurmctldTimeout=600
KillWait=KILL_WAIT
NodeName=host-1 NodeAddr=10.88.0.11 CPUs=4 RealMemory=4000
NodeName=host-2 NodeAddr=10.88.0.12 CPUs=4 RealMemory=4000
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED State=UP
"""
SSHD_CONFIG = """\
HostKey DIR/host_key
AuthorizedKeysFile DIR/user_key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
PidFile none
"""
SSH_CONFIG = """\
Host *
    IdentityFile DIR/user_key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""


def why_not() -> str:
    """Why there can be no cluster here; "" where there can."""
    needed = ("ip", "unshare", "nsenter", *SLURM, *SSH)
    if missing := [name for name in needed if shutil.which(name) is None]:
        return f"no {', '.join(missing)} here: apt-get install --no-install-recommends iproute2 {PACKAGES}"
    if os.geteuid() != 0:
        return "a cluster is made of namespaces, which needs root"
    tried = subprocess.run([*_UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True)
    return f"a cluster is made of namespaces: {tried.stderr.strip()}" if tried.returncode else ""


_UNSHARE = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")


@dataclass(frozen=True)
class Cluster:
    """The hosts and the place from which jobs are submitted."""

    folder: Path
    places: dict[str, int]  #: "controller" or a host -> process id of its first process

    def start(self, command: list[str], place: str = "controller", **variables: str) -> subprocess.Popen[str]:
        """Start a command in a place, in a session of its own; output and errors come through one pipe."""
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PYTHONUNBUFFERED": "1",
            **variables,
        }
        enter = ["nsenter", "--target", str(self.places[place]), "--net", "--mount", "--uts", "--ipc", "--pid"]
        return subprocess.Popen(
            [*enter, f"--wd={REPOSITORY}", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, place: str = "controller", **variables: str) -> str:
        """What a command that has to succeed says."""
        process = self.start(list(command), place, **variables)
        said = process.communicate(timeout=PATIENCE)[0]
        assert process.returncode == 0, f"{' '.join(command)}: {said}"
        return said.strip()

    def pythons(self, host: str) -> list[psutil.Process]:
        """The ranks that run on a host."""
        found = psutil.Process(self.places[host]).children(recursive=True)
        return [process for process in found if _is_rank(process)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "launchers/train.py" in process.cmdline() and process.environ().get("RANK") is not None
    except psutil.Error:
        return False


def until(found: Callable[[], bool], what: Callable[[], str]) -> None:
    """Wait for something; fails with what is to be said where it does not come."""
    end = time.monotonic() + PATIENCE
    while not found():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


@contextmanager
def cluster(folder: Path, kill_wait: int = 600) -> Iterator[Cluster]:
    """A cluster whose hosts are ready.

    Args:
        kill_wait: seconds that a job has to end in when it is told to; SLURM's default is 30.
    """
    for name in ("state", "spool", "log"):
        (folder / name).mkdir()
    (folder / "hosts").write_text(NAMES)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    for name, text in (("slurm.conf", SLURM_CONF), ("sshd_config", SSHD_CONFIG), ("ssh_config", SSH_CONFIG)):
        (folder / name).write_text(text.replace("DIR", str(folder)).replace("KILL_WAIT", str(kill_wait)))
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    with (folder / "log" / "namespaces").open("w") as log:
        process = subprocess.Popen(
            [*_UNSHARE, "bash", str(Path(__file__).with_name("namespaces.sh")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHON": sys.executable},
            start_new_session=True,
        )
    try:
        places = {}

        def ready() -> bool:
            assert process.poll() is None, logs(folder)
            places.update(_first_processes(process.pid, folder))
            if len(places) < 1 + len(HOSTS):
                return False
            sinfo = made.start(["sinfo", "--noheader", "--format=%D %t"])
            return sinfo.communicate(timeout=PATIENCE)[0].strip() == f"{len(HOSTS)} idle"

        made = Cluster(folder, places)
        until(ready, lambda: logs(folder))
        yield made
    finally:
        assert process.stdin is not None
        process.stdin.close()  # with which all ends
        process.wait()


def _first_processes(pid: int, folder: Path) -> dict[str, int]:
    """Process ids, seen from here, of the first process of each place that has one by now."""
    found = {}
    for process in psutil.Process(pid).children(recursive=True):
        try:
            words, numbers = process.cmdline(), Path(f"/proc/{process.pid}/status").read_text().split("NSpid:")[1]
        except (psutil.Error, OSError):
            continue
        if str(folder) in words and words[0] == "bash" and numbers.splitlines()[0].split()[-1] == "1":
            found[words[words.index(str(folder)) + 1] if words[-1] in HOSTS else "controller"] = process.pid
    return found


def logs(folder: Path) -> str:
    """The ends of all logs."""
    return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted((folder / "log").iterdir()))
