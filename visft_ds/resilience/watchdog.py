"""Watchdog of a rank: a step that hangs ends the process, after saying where it is and which collective it
waits for.

A rank that dies is noticed by its launcher, which ends the others; by gloo at once; by NCCL after its own
timeout. What is left for us: a hang with nobody dead, and an error of the backend that does not say it is
about another rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch._C import _distributed_c10d

from visft_ds.errors import LOST_CODE, LOST_PEER, LostRank

_LOOK = 1.0  #: seconds between looks at the clock
#: Seconds that a rank waits which only follows another one: a launcher gives the code of the first that has
#: ended.
_AFTER_YOU = 3.0


@dataclass
class Watchdog:
    """Ends this process, which is `rank`, when a timed phase takes longer than `timeout` seconds; 0:
    never.
    """

    rank: int
    timeout: float
    _doing: str = "starting"
    _since: float = field(default_factory=time.monotonic)
    _timed: bool = False
    _leave: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def phase(self, doing: str, *, timed: bool = True) -> Iterator[None]:
        """Time what is inside as one phase; `timed=False` for what may take any time, such as an export.

        Time starts anew at its beginning and behind its end. After an error the phase stays: messages about
        a lost rank name it.
        """
        outer = (self._doing, self._timed)
        self._begin(doing, timed)
        yield
        self._begin(*outer)

    def _begin(self, doing: str, timed: bool) -> None:
        self._doing = doing
        self._timed = timed
        self._since = time.monotonic()

    def leave(self) -> None:
        """Stop watching: from here on this process needs no other."""
        self._leave.set()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Watch everything inside; a backend's error about a lost peer becomes a `LostRank` that says where
        we were.
        """
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        try:
            yield self
        except RuntimeError as error:
            if not LOST_PEER.search(str(error)):
                raise
            time.sleep(_AFTER_YOU)
            raise LostRank(f"another rank ended first; here: {self._doing}; {last_collective()}") from error
        finally:
            self._leave.set()

    def _watch(self) -> None:
        while not self._leave.wait(_LOOK):
            seconds = time.monotonic() - self._since
            if self.timeout and self._timed and seconds > self.timeout:
                text = f"no progress for {seconds:.0f} s in: {self._doing}; {last_collective()}"
                where = f"[rank {self.rank}]"
                print(f"{where} stopped: {text}; stacks of this process:", file=sys.stderr, flush=True)
                # The stderr of a notebook has no descriptor.
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    faulthandler.dump_traceback(sys.__stderr__ or sys.stderr, all_threads=True)
                os._exit(LOST_CODE)


def last_collective() -> str:
    """Text about this process's last collective, from torch's flight recorder."""
    # A private name, which another torch may lack.
    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    entries: list[dict[str, Any]] = json.loads(dump(True, False)).get("entries", []) if dump else []
    if not entries:
        return "no collective recorded"
    last = entries[-1]
    sizes = f" of {last['input_sizes'][0]}" if last["input_sizes"] else ""
    return (
        f"last collective: number {last['record_id'] + 1}, {last['profiling_name']}{sizes}, {last['state']}"
    )
