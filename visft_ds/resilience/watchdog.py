"""Noticing a rank that died or hangs, in time that does not depend on the backend, and saying which one and where.

    <run>/heartbeats/rank_00000.json    what each rank last said of itself

A rank writes its heartbeat from a thread; it reads those of the others and compares them with its own clock only, so
that clocks of machines need not agree. Gloo reports a dead peer at once, NCCL waits for its timeout; neither says who.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._C import _distributed_c10d

from visft_ds.checkpoint.disk import explained
from visft_ds.parallel import distributed
from visft_ds.resilience.errors import LOST_CODE, LOST_PEER, LostRank, exit_code
from visft_ds.resilience.heartbeat import FOLDER, Beat, process_state, read_beats
from visft_ds.resilience.processes import machine, started

#: A rank prints the stacks of its threads on this signal; peers on its machine send it when they find that it hangs.
STACKS = signal.SIGUSR2
#: Faulthandler writes to a descriptor, which sys.stderr need not have (a notebook, a test that catches it) and which
#: the process's own may have lost. Stacks are a help, nothing that a run ends for.
_NO_DESCRIPTOR = (OSError, ValueError, AttributeError, RuntimeError)
#: What a rank says that ends because of another one.
_FOLLOWED = "another rank ended first"
_SHOWN = 8  #: ranks in a message
_LONGEST_BEAT = 5.0  #: seconds between two heartbeats, at most


@dataclass
class _Seen:
    beat: Beat | None
    alive: float  #: when its count last changed, by our clock
    missing: int = 0  #: how many looks in a row found no such process


class Peers:
    """Judges the ranks of a run by their heartbeats.

    Args:
        world: number of ranks.
        own: rank that judges.
        heartbeat_timeout: seconds without a sign of life after which a rank counts as lost.
        step_timeout: seconds without progress after which ranks count as hanging; 0: for ever.
        now: our clock, in seconds.
        alike: all ranks begin the same collectives, as they do unless they are stages of a pipeline.
    """

    def __init__(
        self, world: int, own: int, heartbeat_timeout: float, step_timeout: float, now: float, *, alike: bool = True
    ) -> None:
        self._alike = alike
        self._own, self._patience, self._step_timeout = own, heartbeat_timeout, step_timeout
        self._seen = {rank: _Seen(None, now) for rank in range(world)}
        self._moved, self._looked, self._timed = now, now, False

    @property
    def beats(self) -> dict[int, Beat]:
        """The newest heartbeat of each rank that has ever given one."""
        return {rank: seen.beat for rank, seen in self._seen.items() if seen.beat is not None}

    def look(self, beats: Mapping[int, Beat], now: float, *, timed: bool) -> tuple[str, list[Beat]]:
        """Problem ("" if there is none) and the ranks that caused it, if they ever wrote a heartbeat.

        Args:
            beats: by rank, as found now.
            now: our clock.
            timed: whether what this rank does is bound by `step_timeout`.
        """
        if now - self._looked > self._patience / 2 or timed != self._timed:
            # We ourselves were stopped (a scheduler that suspends a job stops all of it), or a new count begins.
            self._moved = now
            if now - self._looked > self._patience / 2:
                for seen in self._seen.values():
                    seen.alive = now
        self._looked, self._timed = now, timed
        for rank, beat in ((rank, beat) for rank, beat in beats.items() if rank in self._seen):
            seen = self._seen[rank]
            if rank == self._own and (seen.beat is None or beat.position != seen.beat.position):
                self._moved = now
            if seen.beat is None or beat.count != seen.beat.count:
                seen.alive = now
            seen.beat = beat
        return self._lost(now) or self._hanging(now) or ("", [])

    def _lost(self, now: float) -> tuple[str, list[Beat]] | None:
        for rank, seen in self._seen.items():
            if rank == self._own:
                continue
            beat, silent = seen.beat, now - seen.alive
            if beat is None:
                if silent > self._patience:
                    return f"rank {rank} has never given a sign of life ({silent:.0f} s)", []
                continue
            if beat.ended:
                if silent > self._patience:  # it ended in good order; we would wait for it for ever
                    return f"{beat.where()} has ended: {beat.ended}", []
                continue
            state = process_state(beat)
            seen.missing = seen.missing + 1 if state == "gone" else 0
            if seen.missing > 1:  # at the first look its last words may not have been written yet
                return f"{beat.where()} is gone: killed, or out of memory", []
            if silent > self._patience:
                note = f"; its process is {state}" if state else ""
                return f"{beat.where()} has given no sign of life for {silent:.0f} s{note}", [beat]
        return None

    def _hanging(self, now: float) -> tuple[str, list[Beat]] | None:
        still = now - self._moved
        if not self._step_timeout or not self._timed or still <= self._step_timeout:
            return None
        # Within a part of a step, whoever has begun fewer collectives is where the others are not.
        places = {rank: (beat.position, beat.collectives * self._alike) for rank, beat in self.beats.items()}
        behind = [beat for rank, beat in self.beats.items() if places[rank] == min(places.values())]
        if len(set(places.values())) == 1:
            return f"no progress for {still:.0f} s; all ranks are at the same point: {behind[0].doing}", []
        names = ", ".join(f"{beat.where()}, {beat.collectives} collectives begun" for beat in behind)
        return f"no progress for {still:.0f} s; behind the others: {names}", behind


class Watchdog:
    """Gives this rank's heartbeat and watches the others'; a context manager around everything that ranks do together.

    Where a rank dies or hangs, the process prints what it knows and the stacks of its threads, and ends with
    `LOST_CODE`: its main thread is inside a collective and could not be asked. An error by which the main thread
    itself learns of a lost peer becomes a `LostRank` that names it.

    Args:
        folder: the run folder, which all ranks see.
        rank, world: of this process.
        start: the same text on all ranks, another one at each start.
        heartbeat_timeout, step_timeout, alike: as in `Peers`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int,
        world: int,
        start: str,
        heartbeat_timeout: float,
        step_timeout: float,
        alike: bool = True,
    ) -> None:
        self._folder = folder / FOLDER
        self._interval = min(_LONGEST_BEAT, heartbeat_timeout / 5)
        pid = os.getpid()
        self._beat = Beat(start, rank, socket.gethostname(), pid, started(pid), machine=machine())
        self._timed = False
        self._peers = Peers(world, rank, heartbeat_timeout, step_timeout, time.monotonic(), alike=alike)
        self._lock, self._file, self._leave = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def begin(self, doing: str, *, timed: bool = True) -> None:
        """Record the phase that begins; every rank begins the same phases in the same order.

        Args:
            timed: False for what may take any time, such as an evaluation.
        """
        with self._lock:
            self._beat = replace(self._beat, position=self._beat.position + 1, doing=doing)
            self._timed = timed

    def __enter__(self) -> Watchdog:
        with contextlib.suppress(*_NO_DESCRIPTOR):
            faulthandler.register(STACKS, file=sys.__stderr__ or sys.stderr, all_threads=True, chain=False)
        with explained("heartbeats", self._folder, "The same command goes on"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._leave.is_set():
            return
        if error is None:
            return self.leave("done")
        self._leave.set()
        self._thread.join()
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            message, code = self._who_is_gone()
            self._end(_FOLLOWED, code)
            message += f"\n  here: {self._beat.doing}; {last_collective()}"
            if code == LOST_CODE:  # one that ended in good order has said why; else there is nothing but this
                message += "\n  stack:\n" + "".join(traceback.format_tb(trace))
            raise LostRank(message, code) from error
        lines = str(error).splitlines()
        self._end(f"{type(error).__name__}: {lines[0] if lines else ''}", exit_code(error))

    def leave(self, why: str) -> None:
        """Stop watching: from here on this process needs no other."""
        self._leave.set()
        self._thread.join()
        self._end(why)

    def _end(self, why: str, code: int = 0) -> None:
        with self._lock:
            self._beat = replace(self._beat, ended=why, code=code)
        try:
            self._write()
        except OSError:  # a full disk is what a run may end of: the others must hear of it
            with contextlib.suppress(OSError):
                self._write_over()

    def _watch(self) -> None:
        warned = False
        while not self._leave.wait(self._interval):
            with self._lock:
                timed = self._timed
            try:
                self._write()
            except OSError as error:
                # Nobody's heartbeats get there then, and a full disk alone must not end a run: do not judge.
                if not warned:
                    print(f"warning: no heartbeat is being written: {error}", file=sys.stderr, flush=True)
                warned = True
                continue
            problem, blamed = self._peers.look(self._read(), time.monotonic(), timed=timed)
            if problem and not self._leave.is_set():
                self._report(problem, blamed)
                # The others find the same at their next look; an end before that would hide from them why.
                time.sleep(1.5 * self._interval)
                os._exit(LOST_CODE)

    def _report(self, problem: str, blamed: list[Beat]) -> None:
        here = self._beat
        lines = [
            f"[rank {here.rank}] stopped: {problem}",
            f"[rank {here.rank}] here: {here.doing}; {last_collective()}; stacks of this process:",
        ]
        print("\n".join(lines), file=sys.stderr, flush=True)
        with contextlib.suppress(*_NO_DESCRIPTOR):
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
        self._end(_FOLLOWED, LOST_CODE)
        for beat in blamed:
            if beat.rank != here.rank and self._speaks_for(beat) and process_state(beat) not in ("", "gone"):
                _ask_for_stacks(beat)

    def _speaks_for(self, beat: Beat) -> bool:
        """Return True on the one rank of a machine that asks a hanging one there for its stacks."""
        others = [b.rank for b in self._peers.beats.values() if b.machine == beat.machine and b.rank != beat.rank]
        return beat.machine == self._beat.machine and self._beat.rank == min(others, default=-1)

    def _who_is_gone(self) -> tuple[str, int]:
        """Rank that ended, after an error of the backend that does not say, and its exit code if it left one.

        A process of another machine is not to be seen from here: what tells is that its heartbeat stands still while
        those of the others, this rank's too, go on.
        """
        now = time.monotonic()
        deadline, beaten = now + 2 * self._interval, now
        first: dict[int, int] = {}  # rank -> its count at the first look
        while now < deadline:
            found = [beat for rank, beat in self._read().items() if rank != self._beat.rank]
            for beat in found:
                if beat.ended not in ("", _FOLLOWED):
                    return f"{_FOLLOWED}: {beat.where()}: {beat.ended}", beat.code or LOST_CODE
            gone = [beat.where() for beat in found if process_state(beat) == "gone" and not beat.ended]
            if gone:
                return f"{_FOLLOWED}: {', '.join(gone)} was killed, or out of memory", LOST_CODE
            if now - beaten >= self._interval / 2:
                with contextlib.suppress(OSError):  # of a full disk
                    self._write()
                beaten = now
            silent = [
                beat for beat in found if beat.count == first.setdefault(beat.rank, beat.count) and not beat.ended
            ]
            time.sleep(0.02)
            now = time.monotonic()
        if not silent:
            return _FOLLOWED, LOST_CODE
        names = ", ".join(beat.where() for beat in silent[:_SHOWN])
        more = f" and {len(silent) - _SHOWN} others" if len(silent) > _SHOWN else ""
        return f"{_FOLLOWED}: no sign of life since then from {names}{more}", LOST_CODE

    def _write(self) -> None:
        with self._lock:
            begun = _collectives()
            number = begun[-1]["record_id"] + 1 if begun else 0
            self._beat = replace(self._beat, count=self._beat.count + 1, collectives=number)
            text = json.dumps(asdict(self._beat))
        path = self._path()
        temporary = path.with_suffix(".tmp")  # one name: what a killed process leaves is written over
        with self._file:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)

    def _write_over(self) -> None:
        """Write into the file that is there, which needs no room on the disk as long as it stays within its block."""
        path = self._path()
        text = json.dumps(asdict(self._beat)).ljust(path.stat().st_size)  # nothing of the old text may be left
        with path.open("r+", encoding="utf-8") as file:
            file.write(text)

    def _path(self) -> Path:
        return self._folder / f"rank_{self._beat.rank:05d}.json"

    def _read(self) -> dict[int, Beat]:
        return {beat.rank: beat for beat in read_beats(self._folder) if beat.start == self._beat.start}


def watch(folder: Path, heartbeat_timeout: float, step_timeout: float, *, alike: bool = True) -> Watchdog:
    """The watchdog of this process over all ranks of its group. Collective."""
    return Watchdog(
        folder,
        rank=distributed.rank(),
        world=distributed.world_size(),
        start=distributed.broadcast_object(uuid.uuid4().hex),
        heartbeat_timeout=heartbeat_timeout,
        step_timeout=step_timeout,
        alike=alike,
    )


def last_collective() -> str:
    """Entry of torch's flight recorder for this process's last collective."""
    begun = _collectives()
    if not begun:
        return "no collective recorded"
    last = begun[-1]
    sizes = f" of {last['input_sizes'][0]}" if last["input_sizes"] else ""
    state = "" if last["state"] == "scheduled" else f", {last['state']}"
    return f"last collective: number {last['record_id'] + 1}, {last['profiling_name']}{sizes}{state}"


def _collectives() -> list[dict[str, Any]]:
    """The newest entries of the flight recorder; none where this torch does not have that (private) name."""
    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    entries: list[dict[str, Any]] = json.loads(dump(True, False)).get("entries", []) if dump else []
    return entries


def _ask_for_stacks(beat: Beat) -> None:
    """Let a hanging process of this machine print its stacks; one that is stopped has to run for that."""
    print(f"stacks of rank {beat.rank} (process {beat.pid}):", file=sys.stderr, flush=True)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(beat.pid, STACKS)
        os.kill(beat.pid, signal.SIGCONT)
        time.sleep(0.5)  # it writes to the same stream
