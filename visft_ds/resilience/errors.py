"""Errors of a rank: who meets them, who prints them, and the exit code they end in.

Imports nothing heavy, so that what it offers is there before torch is.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Literal

from visft_ds.redaction import redacted

#: Exit code of a rank that stops because another one was killed or hangs.
LOST_CODE = 3
#: Exit code after a Ctrl-C that waits for no step.
INTERRUPTED = 130
#: What gloo and NCCL say to a rank whose peer is gone.
LOST_PEER = re.compile(r"Connection (closed|reset) by|remote process exited|Broken pipe|recvValue failed")
#: Which ranks meet an error: all of them, or one alone, for which the others wait without knowing why.
Scope = Literal["all ranks", "one rank"]


class RankError(ValueError):
    """Mistake that a user can mend and that one rank alone meets; a plain ValueError is met by all."""

    scope: Scope = "one rank"


class Diverged(FloatingPointError):
    """The end of a training whose numbers are not finite, met by all ranks; a plain FloatingPointError by one."""

    scope: Scope = "all ranks"


class StoreFailed(RuntimeError):
    """A server, a network or the disk of a cache that failed again and again."""

    scope: Scope = "one rank"


class RanksDiffer(RuntimeError):
    """Ranks that ought to have or do the same do not; every rank knows and stops."""

    scope: Scope = "all ranks"


class LostRank(RuntimeError):
    """Another rank died or ended with an error; this one cannot go on.

    Args:
        code: exit code of the other one, where it left one.
    """

    scope: Scope = "one rank"

    def __init__(self, message: str, code: int = LOST_CODE) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def met_by_one_rank() -> Iterator[None]:
    """Give mistakes within the scope of one rank, where there are others; errors of files and servers have it anyway.

    Raises:
        RankError: instead of another ValueError.
    """
    try:
        yield
    except RankError:
        raise
    except ValueError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        raise RankError(str(error)) from error


def scope_of(error: BaseException) -> Scope:
    """Which ranks meet an error: where nothing is known, a mistake is met by all, and anything else by one."""
    if isinstance(error, (RankError, Diverged, StoreFailed, RanksDiffer, LostRank)):
        return error.scope
    return "all ranks" if isinstance(error, ValueError) else "one rank"


def exit_code(error: BaseException) -> int:
    """Exit code of a rank: 2 for what the user can mend (a server of the data that does not answer counts as such),
    4 when training diverged, 130 for a second Ctrl-C, the code of the rank that it followed, 1 for a bug.

    Launchers report the first code that they find, in the order of ranks: who follows must not hide the reason.
    """
    if isinstance(error, LostRank):
        return error.code
    if isinstance(error, FloatingPointError):
        return 4
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 2 if isinstance(error, (ValueError, OSError, StoreFailed, RanksDiffer)) else 1


def tell(error: Exception, name: str = "error") -> int:
    """Print an error that ends a command, on each rank that meets it alone or on one of each machine. Returns its code.

    Args:
        name: in front of the message: "error", or the command.

    Raises:
        Exception: the error itself, where it is a bug, whose traceback is wanted.
    """
    rank = os.environ.get("RANK", "0")
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        # The rank that failed reports why; the traceback of one that only waited for it would bury that.
        error = LostRank("another rank ended first")
    code = exit_code(error)
    if code == 1:
        raise error
    tag = f"[rank {rank}] " if rank != "0" or isinstance(error, (FloatingPointError, LostRank)) else ""
    if scope_of(error) == "one rank" or rank == "0" or os.environ.get("LOCAL_RANK", rank) == "0":
        print(
            f"{tag}{'stopped' if isinstance(error, LostRank) else name}: {redacted(error)}", file=sys.stderr, flush=True
        )
    return code
