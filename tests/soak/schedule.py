"""What is done to a run, and when: a function of the seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from signal import SIGINT, SIGKILL, SIGTERM, SIGUSR1, Signals


@dataclass(frozen=True)
class Kind:
    """One way to disturb a run, and what has to follow.

    Where `code` is given the command ends with it, by design, and somebody has to start it again; else it
    restarts the run by itself.
    """

    name: str
    action: str  #: name of a method of `injury.Injury`
    target: str = "rank"  #: who gets the signal: "rank" or "command"
    number: Signals = SIGKILL
    code: int | None = None
    says: str = ""  #: what the output must contain, a regular expression
    lossless: bool = False  #: every step that was made is saved


STOPPED = r"stopped after step \d+"
REQUESTS = [
    *(
        Kind(f"{number.name} to {target}", "send", target, number, code, STOPPED, lossless=True)
        for target in ("rank", "command")
        for number, code in ((SIGTERM, 143), (SIGINT, 130), (SIGUSR1, 85))
    ),
    Kind("SIGKILL to command", "send", "command", code=-SIGKILL, says=STOPPED, lossless=True),
]
_KILLED = r"a process was ended by signal SIGKILL"
HARM = [
    Kind("SIGKILL to rank", "send", says=_KILLED),
    Kind("SIGKILL in a save", "kill_in_save", says=_KILLED),
    Kind("SIGKILL, and again while it starts", "kill_twice", says=_KILLED),
    Kind("SIGSTOP to rank", "hang", says=r"no progress for \d+ s"),
    Kind("everything killed at once", "power_off", code=-SIGKILL),
    Kind("newest checkpoint damaged", "damage_checkpoint", code=-SIGKILL),
    Kind("shard damaged", "damage_shard", code=2),
    Kind("disk full", "fill_disk", code=2, says=r"error: the checkpoint of step \d+ cannot be written"),
]


@dataclass(frozen=True)
class Fault:
    """One disturbance of one run."""

    kind: Kind
    step: int  #: it comes when this step is done; counts from 1
    rank: int  #: of two, where `kind` aims at one
    draw: float  #: in [0, 1): which byte, which moment


def schedule(seed: int, *, gap: int, last: int) -> list[Fault]:
    """The faults of a run up to step `last`, `gap` steps apart in the mean; a longer run has the same ones
    and more.

    Requests to stop and harm take turns; each of either comes once before any comes again.
    """
    return list(takewhile(lambda fault: fault.step <= last, _endless(seed, gap)))


def _endless(seed: int, gap: int) -> Iterator[Fault]:
    generator = random.Random(seed)
    decks: list[list[Kind]] = [[], []]
    step = 0
    while True:
        for deck, kinds in zip(decks, (HARM, REQUESTS), strict=True):
            if not deck:
                deck += generator.sample(kinds, len(kinds))
            step += generator.randint(max(1, gap // 2), gap * 3 // 2)
            yield Fault(deck.pop(), step, generator.randrange(2), generator.random())
