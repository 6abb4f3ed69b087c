"""A disk that fails at one chosen operation: the process dies there, the power goes, the disk is full or
read-only.

Every change that `os` makes is counted: open for writing, write, fsync, replace, unlink, mkdir, rmdir.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from visft_ds.checkpoint.format import delete_checkpoint, newest_checkpoint, open_checkpoint, save_checkpoint
from visft_ds.parallel.state import MOMENTS, EngineState

CHANGES = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir")


class Died(BaseException):
    """The process is gone: nothing in it may handle this."""


class FaultyDisk:
    """Counts operations and lets number `at` (from 0) fail.

    Args:
        kind: "killed" (before the operation; in the middle of it for a write), "power" (killed, and whatever
        was not
            synced is cut at random), or the number of an error that this and all later writes raise.
    """

    def __init__(self, at: int | None, kind: str | int = "killed") -> None:
        self.at, self.kind = at, kind
        self.count = 0
        self.log: list[str] = []
        self.dead = False
        self._paths: dict[int, str] = {}
        self._unsynced: set[str] = set()
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in CHANGES}
        self._real["fsync"] = lambda descriptor: None  # not needed to see what a crash leaves

    @contextmanager
    def installed(self) -> Iterator[FaultyDisk]:
        """Work on this disk inside the block."""
        with mock.patch.multiple(os, **{name: self._wrap(name) for name in CHANGES}):
            yield self

    def _wrap(self, name: str) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & os.O_CREAT:
                return self._remember(args, self._real[name](*args, **options))
            if self.dead:
                raise Died
            number, self.count = self.count, self.count + 1
            self.log.append(f"{name} {args[0] if name != 'write' else len(args[1])}")
            if self.at is not None and number >= self.at:
                self._fail(name, args, first=number == self.at)
            result = self._real[name](*args, **options)
            if name == "open":
                self._remember(args, result)
            elif name == "fsync":
                self._unsynced.discard(self._paths[args[0]])
            elif name == "write":
                self._unsynced.add(self._paths[args[0]])
            elif name == "replace":
                self._moved(str(args[0]), str(args[1]))
            return result

        return operation

    def _remember(self, args: tuple[Any, ...], descriptor: int) -> int:
        self._paths[descriptor] = str(args[0])
        return descriptor

    def _moved(self, source: str, target: str) -> None:
        inside = {path for path in self._unsynced if path == source or path.startswith(f"{source}/")}
        self._unsynced = self._unsynced - inside | {target + path[len(source) :] for path in inside}

    def _fail(self, name: str, args: tuple[Any, ...], *, first: bool) -> None:
        if isinstance(self.kind, int):
            if name in ("open", "write", "mkdir", "fsync") or self.kind == errno.EROFS:
                raise OSError(self.kind, os.strerror(self.kind), args[0])
            return
        if not first:
            return
        if name == "write":
            self._real["write"](args[0], args[1][: len(args[1]) // 2])
        if self.kind == "power":
            generator = random.Random(self.at)
            for path in self._unsynced | ({self._paths[args[0]]} if name in ("write", "fsync") else set()):
                if os.path.isfile(path):
                    os.truncate(path, generator.randrange(os.path.getsize(path) + 1))
        self.dead = True
        raise Died


def state(value: float) -> EngineState:
    """A small state, recognised by `value`."""
    parameters = {
        "backbone.a": torch.full((3, 5), value),
        "heads.b": torch.full((7,), -value),
        "c": torch.tensor(value),
    }
    moments = {f"{key}/{name}": tensor * 0.5 for name, tensor in parameters.items() for key in MOMENTS}
    return EngineState(parameters, moments, updates=int(value))


def value_of(folder: Path) -> tuple[int, float]:
    """(step, value) of the newest whole checkpoint."""
    found, _ = newest_checkpoint(folder)
    assert found is not None, sorted(path.name for path in folder.iterdir())
    loaded = found.load()
    value = float(loaded.parameters["c"])
    expected = state(value)
    assert all(torch.equal(loaded.parameters[name], t) for name, t in expected.parameters.items())
    assert all(torch.equal(loaded.moments[name], t) for name, t in expected.moments.items())
    assert loaded.updates == expected.updates
    return found.step, value


#: What the disk holds before the save, and what the save does. "again" replaces the only checkpoint there is.
SCENES = ("next", "again")


def prepare(folder: Path, scene: str) -> None:
    """Checkpoints before the save of step 8."""
    if scene == "next":
        save_checkpoint(folder, 2, state(2), {})
        save_checkpoint(folder, 4, state(4), {})
        (folder / "step_00000006.tmp").mkdir()  # of a process that was killed
        (folder / "step_00000006.tmp" / "parameters.safetensors").write_bytes(b"half")
    else:
        save_checkpoint(folder, 8, state(8), {})


def save(folder: Path, scene: str) -> None:
    """The save that fails somewhere: step 8 with the value 9, then the oldest is deleted."""
    save_checkpoint(folder, 8, state(9), {"data": "x"})
    if scene == "next":
        delete_checkpoint(folder / "step_00000002")


def check_after_crash(folder: Path, scene: str, where: str) -> None:
    """Something loads, nothing under a final name is half there, and the next save ends as if nothing had
    been.
    """
    assert value_of(folder) in ({(4, 4.0), (8, 9.0)} if scene == "next" else {(8, 8.0), (8, 9.0)}), where
    for path in folder.iterdir():
        assert path.suffix in (".tmp", ".old") or open_checkpoint(path), where
    save_checkpoint(folder, 8, state(9), {"data": "x"})
    assert value_of(folder) == (8, 9.0), where
    left = {path.name for path in folder.iterdir()} - {"step_00000002"}
    assert left == ({"step_00000004", "step_00000008"} if scene == "next" else {"step_00000008"}), where
