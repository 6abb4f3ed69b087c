"""Runs over two hosts, each with a launcher of its own: the same losses as on one host, one signal stops both.

The hosts are namespaces (see `hosts.py`): another name, other process ids, and no way to each other but a network.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from tests.ranks import finish, free_port, run_ranks, wait_for
from tests.tiny import STEPS, command, equal, steps_recorded
from tests.train.hosts import Host, two_hosts, why_not
from visft_ds.resilience.heartbeat import FOLDER, read_beats

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
Launch = Callable[[int, str, str, Path], list[str]]  #: (number of the host, address of the first, port, folder)


def torchrun(number: int, address: str, port: str, folder: Path) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    return [*start, "--node_rank", str(number), "--master_addr", address, "--master_port", port]


def deepspeed(number: int, address: str, port: str, folder: Path) -> list[str]:
    hostfile = folder / "hostfile"
    hostfile.write_text("node-1 slots=1\nnode-2 slots=1\n")
    start = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh"]
    return [*start, "--node_rank", str(number), "--master_addr", address, "--master_port", port]


#: Seconds that torchrun may wait for the one of another host, which was told to end, before it ends.
LONGEST = 400
LAUNCHERS: dict[str, tuple[Launch, str]] = {
    "torchrun": (torchrun, "torch.distributed.run"),
    "deepspeed": (deepspeed, "deepspeed.launcher.launch"),
}


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as both:
        yield both


@pytest.fixture(scope="module")
def straight(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks on one host."""
    out = tmp_path_factory.mktemp("straight") / "run"
    run_ranks(["launchers/train.py", *command(shards, out)])
    return out


def pythons(host: subprocess.Popen[str]) -> list[psutil.Process]:
    """The programs below the first process of a host."""
    below = psutil.Process(host.pid).children(recursive=True)
    return [process for process in below if Path(process.exe()).name.startswith("python")]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_same_run_as_on_one_host_and_a_signal_to_one_launcher_stops_both(
    launcher: str, hosts: tuple[Host, Host], shards: Path, straight: Path, tmp_path: Path
) -> None:
    """The second launcher is told to end; both hosts save the same step, and one host alone goes on from it."""
    launch, program = LAUNCHERS[launcher]
    out, port = tmp_path / "run", str(free_port())

    def start(arguments: Sequence[str]) -> list[subprocess.Popen[str]]:
        return [
            host.start([*launch(number, hosts[0].address, port, tmp_path), "launchers/train.py", *arguments])
            for number, host in enumerate(hosts)
        ]

    whole = tmp_path / "whole"
    codes, outputs = finish(start(command(shards, whole)), LONGEST)
    assert codes == [0, 0], outputs
    assert equal(whole, straight)
    assert {beat.rank: beat.host for beat in read_beats(whole / FOLDER)} == {
        number: host.name for number, host in enumerate(hosts)
    }
    assert f"step {STEPS}/{STEPS}" in outputs[0] and "step 1/" not in outputs[1]  # told once, by rank 0

    processes = start(command(shards, out, extra={"visft.run.save_every": 100}))
    lines = wait_for(processes[0], "step 2/")
    ranks = [one for host in processes for one in pythons(host) if "RANK" in one.environ()]
    (target,) = [one for one in pythons(processes[1]) if program in one.cmdline()]
    target.send_signal(signal.SIGTERM)
    said = "".join(lines + wait_for(processes[0], "stopped after step"))
    _, alive = psutil.wait_procs(ranks, 600)
    assert len(ranks) == 2 and not alive, said
    (code,), outputs = finish([processes[1]])
    assert code != 0, outputs  # a launcher that is told to end does not say that all is well
    finish([processes[0]], LONGEST)
    saved = len(steps_recorded(out))
    assert 2 <= saved < STEPS and (out / "checkpoints" / f"step_{saved:08d}").is_dir()

    run_ranks(["launchers/train.py", *command(shards, out, extra={"visft.run.save_every": 100})])
    assert equal(out, straight)


def test_names_that_lead_nowhere_are_said_to(hosts: tuple[Host, Host], shards: Path, tmp_path: Path) -> None:
    """Without being told the interface, gloo binds to what the host's own name means: nothing here."""
    port, processes = str(free_port()), []
    for rank, host in enumerate(hosts):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "DEEPSPEED_TIMEOUT": "1"}
        meeting = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port}
        arguments = [sys.executable, "launchers/train.py", *command(shards, tmp_path / "run")]
        processes.append(host.start(["env", "-u", "GLOO_SOCKET_IFNAME", *arguments], **place, **meeting))
    codes, outputs = finish(processes[:1])
    processes[1].kill()  # it hears that the meeting place is gone, or waits for its own time to run out
    processes[1].communicate()
    assert codes == [2], outputs
    assert f"have met at {hosts[0].address} and then could not reach each other" in outputs[0], outputs
    assert "set GLOO_SOCKET_IFNAME" in outputs[0] and "Traceback" not in outputs[0], outputs


def test_a_rank_that_dies_on_another_host_is_named_with_its_host(
    hosts: tuple[Host, Host], shards: Path, tmp_path: Path
) -> None:
    """Nobody can look for its process from here: the network tells that one is gone, its heartbeat which."""
    out, port = tmp_path / "run", str(free_port())
    extra = {"scheduler.params.total_num_steps": 100_000, "visft.run.heartbeat_timeout": 5.0}
    processes = []
    for rank, host in enumerate(hosts):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": port}
        arguments = [sys.executable, "launchers/train.py", *command(shards, out, extra=extra)]
        processes.append(host.start(arguments, **place, **meeting))
    wait_for(processes[0], "step 2/")
    (victim,) = pythons(processes[1])
    victim.kill()
    codes, outputs = finish(processes)
    assert codes[0] == 3 and codes[1] != 0, outputs
    told = "[rank 0] stopped: another rank ended first: no sign of life since then from rank 1 (process"
    assert told in outputs[0] and f" on {hosts[1].name}, last seen: " in outputs[0], outputs[0]
    assert "Traceback" not in outputs[0]
