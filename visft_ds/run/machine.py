"""Checks of a machine, and that all machines are alike, before a run starts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from visft_ds.config import Batches, ResolvedConfig
from visft_ds.config.resolve import flatten
from visft_ds.config.schema import RunConfig
from visft_ds.monitor.metrics import versions
from visft_ds.parallel import distributed
from visft_ds.prepare.datasets import workers_of
from visft_ds.run.lock import locked

_SHARED_MEMORY = Path("/dev/shm")
#: Bytes of a checkpoint for each value that trains: the value and two moments, in fp32; and its moving average.
_CHECKPOINT_BYTES, _AVERAGE_BYTES = 12, 4
_PIXEL = 3  #: bytes; images travel as uint8


def rank_facts(config: ResolvedConfig) -> dict[str, str]:
    """Facts that must be equal on all ranks, by name: every setting, the code, the versions of its dependencies."""
    facts = {key: json.dumps(value) for key, value in flatten(config.to_dict())}
    installed = {f"version of {name}": version for name, version in versions().items() if name != "platform"}
    return {**facts, "code of visft_ds": code_digest(), **installed}


@cache
def code_digest() -> str:
    """Digest of this package's source files, edited ones included, where there is no git as well."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def check_shared_memory(config: ResolvedConfig, batches: Batches, folder: Path = _SHARED_MEMORY) -> None:
    """Worker processes hand batches over in shared memory; where it runs out they die with a bus error.

    Raises:
        ValueError: it cannot hold what the workers of this machine may have ready at once.
    """
    kind, number, _ = workers_of(config.visft.data)
    if kind != "processes" or not folder.is_dir():
        return
    largest = 0
    for name, stream in config.visft.streams().items():
        side = stream.image.get("fixed_size") or stream.image.get("size") or stream.image["max_long"]
        largest = max(largest, batches.micro[name] * _PIXEL * side**2)
    ready = config.visft.data.prefetch_steps * batches.accumulation + 1 + number
    needed, free = largest * ready * distributed.processes_here(), shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e6:.0f} MB free; {ready} batches for each training process of this machine may "
            f"need {needed / 1e6:.0f} MB: give the container more (docker run --shm-size=8g), or use --set "
            "visft.data.workers=threads, or a smaller visft.data.prefetch_steps"
        )


@contextlib.contextmanager
def locked_for_all_ranks(out: Path) -> Iterator[None]:
    """`locked` by the main process for all of them. Collective.

    Raises:
        ValueError: on every rank, as `locked`.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if distributed.is_main():
            try:
                stack.enter_context(locked(out))
            except ValueError as error:
                problem = str(error)
        problem = distributed.broadcast_object(problem)
        if problem:
            raise ValueError(problem)
        yield


def check_space(out: Path, values: int, run: RunConfig) -> None:
    """Refuse a run whose checkpoints do not fit on the disk, before it has trained for hours.

    Args:
        values: number of values that train.
        run: says which checkpoints are kept; one more is there while it replaces the oldest. Those that
            `keep_every` keeps for good are not counted.

    Raises:
        ValueError: naming what is free and what is needed.
    """
    there = sum(1 for path in (out / "checkpoints").glob("step_*") if path.is_dir())
    size = values * (_CHECKPOINT_BYTES + (_AVERAGE_BYTES if run.ema else 0))
    needed = size * max(1, run.keep_last + 1 + (run.keep_best is not None) - there)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise ValueError(
            f"{out}: {free / 1e9:.2f} GB are free, checkpoints need {needed / 1e9:.2f} GB more: make room, choose "
            "another --out, or keep fewer (--set visft.run.keep_last=1)"
        )
