"""Heartbeat of a rank, as a file for the others. Light: no tensor library.

<run>/heartbeats/rank_00000.json
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from visft_ds.config.fields import STRICT
from visft_ds.config.records import Whole, read_record
from visft_ds.resilience.processes import state

FOLDER = "heartbeats"


@dataclass(frozen=True)
class Beat:
    """State that a rank reports of itself."""

    __pydantic_config__ = STRICT

    start: str  #: which start of the run it belongs to; files of earlier starts stay behind
    rank: Whole
    host: str
    pid: Whole
    born: str  #: when the process started, by its kernel: process ids come again
    count: Whole = 0  #: grows while the process lives
    position: Whole = 0  #: grows with every part of a step, equally on all ranks
    doing: str = "starting"
    collectives: Whole = 0  #: how many it has begun, as far as torch's flight recorder tells
    ended: str = ""  #: why it left in good order
    code: Whole = 0  #: its exit code, where that was an error
    machine: str = ""  #: where its process id means this process, see `machine`; "" where that is not known

    def where(self) -> str:
        """Rank, process and what it was last seen doing."""
        return f"rank {self.rank} (process {self.pid} on {self.host}, last seen: {self.doing})"


def read_beats(folder: Path) -> Iterator[Beat]:
    """All heartbeats in a folder, also those of earlier starts; files that cannot be read now are left out."""
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beat = read_record(path, Beat)
        except ValueError:
            continue
        if path.stem == f"rank_{beat.rank:05d}":
            yield beat


def last_start(folder: Path) -> str:
    """The start that rank 0's heartbeat belongs to; "" before the first."""
    return next((beat.start for beat in read_beats(folder) if beat.rank == 0), "")


def ended_well(folder: Path, before: str) -> bool:
    """Return True if the ranks of the last start were done, or ended because somebody sent one of them a signal.

    Args:
        before: `last_start` of an earlier time; a start that has left no heartbeat since then has not ended well.
    """
    start = last_start(folder)
    endings = [beat.ended for beat in read_beats(folder) if beat.start == start != before]
    return any(ended == "done" or ended.startswith("stopped: signal") for ended in endings)


def process_state(beat: Beat) -> str:
    """The state of a rank's process in words, "gone" where there is no such process, "" where it is unknown."""
    return state(beat.pid, beat.born, beat.machine)
