"""Who can reach a run: nobody but its own machine, unless its processes meet at an address of the network."""

from __future__ import annotations

import ipaddress
import json

import pytest

from tests.ranks import run_ranks

#: A rank that prints the addresses it listens on. With a name, on a machine that is called so.
LISTENING = """
import ctypes, json, os, socket, sys
import psutil
if sys.argv[1:]:
    if ctypes.CDLL(None, use_errno=True).unshare(0x04000000):  # CLONE_NEWUTS
        sys.exit(0)
    socket.sethostname(sys.argv[1])
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group
start_process_group()
distributed.barrier()
found = psutil.Process().net_connections()
print(json.dumps([one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN]))
distributed.close()
"""


@pytest.mark.parametrize("name", ["", pytest.param("no-such-name.invalid", marks=pytest.mark.slow)])
def test_a_run_on_one_machine_listens_on_its_loopback_address_only(name: str) -> None:
    outputs = run_ranks(["-c", LISTENING, *([name] if name else [])])
    if not all(outputs):
        pytest.skip("a machine's name cannot be changed here")
    for output in outputs:
        (line,) = output.splitlines()  # and no warning of a name that means nothing
        addresses = json.loads(line)
        assert addresses and all(ipaddress.ip_address(one).is_loopback for one in addresses)
