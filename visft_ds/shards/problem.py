"""Problems of finished shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_SHOWN = 5


@dataclass(frozen=True)
class Problem:
    """A problem of a file of a split."""

    file: str
    message: str
    keys: tuple[str, ...] = ()  #: of the samples concerned, where it is known
    offset: int | None = None  #: in the file, in bytes
    fix: str = ""  #: what to do about it


def some(names: Sequence[str]) -> str:
    """The first few of a list of names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
