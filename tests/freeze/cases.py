"""Cases: what is run of a commit, and what of it is compared.

A case may only rely on what must not move: the commands of launchers/ and tools/, their flags, the keys of the
configuration, and the formats of files. It imports nothing of the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.freeze.entries import Entries

Words = tuple[str, ...]  #: a command line, from launchers/... or tools/... on
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    words: Words
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Case:
    """Commands that run one after another in a process of their own, in a folder that all cases share."""

    name: str
    commands: tuple[tuple[Words, ...], ...]  #: each as its forms: the first that does not end with status 2 counts
    read: Callable[[Sequence[Outcome]], Entries]
    needs: tuple[str, ...] = ()  #: cases whose files it uses
    before: Callable[[], None] | None = None  #: makes its input
    status: int | None = 0  #: that every command must end with; None: any, it is an entry then
    environment: Mapping[str, str] = field(default_factory=dict)


#: Entries that may differ by so much, relative to the larger; all others must be equal.
TOLERANCES = {"train/*bf16*": 1e-6}


def flags(settings: Settings) -> Words:
    """Settings as flags of launchers/train.py."""
    return tuple(f"--set={key}={json.dumps(value)}" for key, value in settings.items())
