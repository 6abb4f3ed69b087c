"""Processes that work beside a training process: they end with it, and its signals do not reach them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait


def start_worker(number: int = 0) -> None:
    """Begin a process of `fork_server`: it ends with its training process, however that ends.

    Torch looks at the parent, which is the fork server, and the fork server lives as long as its workers.
    """
    # Ctrl-C reaches the whole process group; the training process decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def kill_pool(pool: ProcessPoolExecutor) -> None:
    """End the processes of a pool at once, whatever they are doing."""
    for process in list((pool._processes or {}).values()):  # `kill_workers` comes with Python 3.14
        process.kill()
        process.join(1.0)  # the pool would write to a process that is about to end, and print a traceback
    pool.shutdown(wait=False, cancel_futures=True)


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Start the server whose children the workers will be, deaf to the signals that ask a training process to
    stop.

    A fork of a process with threads or a GPU may hang, and a fresh start would load torch again every time:
    the server loads what the pipelines work with once. Launchers and schedulers send signals to every process
    below them; without its workers a training process could not finish its step. A mask is inherited, and no
    signal is lost meanwhile.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["visft_ds.data.loader", *sorted(m for m in sys.modules if m.startswith("visft_ds.tasks."))]
    )
    # first, because starting it unblocks signals that this thread has blocked
    resource_tracker.ensure_running()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return context
