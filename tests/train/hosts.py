"""Two hosts on one machine: namespaces with a network, a name and process ids of their own, joined by a cable.

What the ranks of two machines cannot do, these cannot either: see each other's processes, or talk by way of 127.0.0.1.
Needs root and iproute2.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.ranks import start_command

CABLE = "host0"  #: the network interface of each host


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Start a command here; output and errors come through one pipe; signals are for what is below."""
        # The shell stays: the first process of a namespace is deaf to signals that it does not handle.
        inside = 'hostname "$1"; shift; "$@"; exit $?'
        namespaces = ["unshare", "--uts", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        variables = [f"{name}={value}" for name, value in {"GLOO_SOCKET_IFNAME": CABLE, **environment}.items()]
        start = ["ip", "netns", "exec", self.name, *namespaces, "sh", "-c", inside, "sh", self.name]
        return start_command([*start, "env", *variables, *command])


def why_not() -> str:
    """Why there can be no hosts here; "" where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("unshare") is None:
        return "hosts are namespaces: needs root, ip and unshare"
    name = f"visft{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return f"hosts are namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """The hosts, joined; gone afterwards."""
    first, second = (Host(f"visft{os.getpid()}{one}", f"10.77.0.{n}") for n, one in enumerate("ab", 1))
    try:
        for host in (first, second):
            _ip("netns", "add", host.name)
        peers = [["name", CABLE, "netns", host.name] for host in (first, second)]
        _ip("link", "add", *peers[0], "type", "veth", "peer", *peers[1])
        for host in (first, second):
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            for interface in ("lo", CABLE):
                _ip("-n", host.name, "link", "set", interface, "up")
        yield first, second
    finally:
        for host in (first, second):
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
