"""A process that has imported what training needs and forks ranks: they begin in no time instead of after 5 s
of CPU.

Started by `tests.ranks`, one for each number of a rank, so that ranks differ in the hashes of their strings
as real ones do. Processes that test side by side connect to the same ones. A request names the arguments of
`python`, environment and current folder, and brings two pipes: for the output of the rank, and for its
process id and exit code.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import sys
from importlib import import_module
from types import ModuleType

import deepspeed.module_inject.auto_ep
import deepspeed.module_inject.auto_ep_layer  # noqa: F401
import numpy as np
import scipy.optimize  # noqa: F401 - matches
import torch._dynamo  # for every engine
import torch.utils.tensorboard  # noqa: F401
from deepspeed.ops import __compatible_ops__  # noqa: F401 - asks a compiler
from PIL import Image

import visft_ds.launch
import visft_ds.parallel.pipeline
import visft_ds.train  # noqa: F401
from visft_ds.tasks import BUILT_IN

STATUS = struct.Struct("i")
os.fsync = lambda fd: None  # as in tests/conftest.py
Image.init()
for name in BUILT_IN:  # not by `TASKS`, which would look for those of other packages once and for all
    import_module(f"visft_ds.tasks.{name}.spec")


def requests(server: socket.socket) -> None:
    """Fork for each request; returns in the new ranks, and never in the process that was started."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who waits for a rank is not waited for
    # What was imported stays: ranks need neither look through it nor copy it, at their end least of all.
    # Libraries that then report it as leaked are not heard.
    gc.freeze()
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
    clients = [server.accept()[0]]  # who started this process has connected before
    while clients:
        for ready in select.select([server, *clients], [], [])[0]:
            if ready is server:
                clients.append(server.accept()[0])
                continue
            message, pipes, *_ = socket.recv_fds(ready, 1 << 20, 2)
            if not message:
                clients.remove(ready)
                ready.close()
                continue
            if os.fork() == 0:
                for connection in (server, *clients):
                    connection.close()
                return _begin(json.loads(message), *pipes)
            for pipe in pipes:
                os.close(pipe)
    os._exit(0)


def _begin(request: dict[str, object], output: int, status: int) -> None:
    """Fork the rank, which returns; this process tells how it ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if rank := os.fork():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.close(output)
        os.write(status, STATUS.pack(rank))
        os.write(status, STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])))
        os._exit(0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for pipe in (output, status):
        os.close(pipe)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    random.seed()
    np.random.seed()
    sys.argv[:] = request["arguments"]  # type: ignore[call-overload]


def run() -> None:
    """What `python ARGUMENTS` does, with the arguments in sys.argv."""
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif sys.argv[0] == "-c":
        code = compile(sys.argv.pop(1), "<string>", "exec")
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(code, vars(main))
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    requests(socket.socket(fileno=int(sys.argv[1])))
    run()
