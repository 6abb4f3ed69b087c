"""Errors of a rank: who prints them, and the exit code they end in. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterator

from visft_ds.redaction import redacted

#: Exit code of a rank that stops because another one, or its launcher, was killed or hangs.
LOST_CODE = 3
#: Exit code after a Ctrl-C.
INTERRUPTED = 130
#: What gloo and NCCL say to a rank whose peer is gone.
LOST_PEER = re.compile(r"Connection (closed|reset) by|remote process exited|Broken pipe|recvValue failed")


class RankError(ValueError):
    """Mistake that a user can mend and that one rank alone meets; a plain ValueError is met by all."""


class Diverged(FloatingPointError):
    """The end of a training whose numbers are not finite, met by all ranks; a plain FloatingPointError by one."""


class StoreFailed(RuntimeError):
    """A server, a network or the disk of a cache that failed again and again."""


class RanksDiffer(RuntimeError):
    """Ranks that ought to have or do the same do not; every rank knows and stops."""


class LostRank(RuntimeError):
    """Another rank died or ended with an error; this one cannot go on."""


@contextlib.contextmanager
def met_by_one_rank() -> Iterator[None]:
    """Make a ValueError a `RankError`, which each rank prints, where there are other ranks."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, RankError) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
            raise
        raise RankError(str(error)) from error


def exit_code(error: BaseException) -> int:
    """Exit code of a rank: 2 for what the user can mend (a server of the data that does not answer counts as such),
    3 after the loss of another rank, 4 when training diverged, 130 after a Ctrl-C, 1 for a bug."""
    if isinstance(error, LostRank):
        return LOST_CODE
    if isinstance(error, FloatingPointError):
        return 4
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # nobody reads the output, as after `visft ... | head`
        return 128 + signal.SIGPIPE
    return 2 if isinstance(error, (ValueError, OSError, StoreFailed, RanksDiffer)) else 1


def tell(error: Exception, name: str = "error") -> int:
    """Print an error that ends a command, on each rank that meets it alone or on one of each machine. Returns its code.

    Args:
        name: in front of the message: "error", or the command.

    Raises:
        Exception: the error itself, where it is a bug, whose traceback is wanted.
    """
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        # The rank that failed reports why; the traceback of one that only waited for it would bury that.
        error = LostRank("another rank ended first")
    code = exit_code(error)
    if code == 1:
        raise error
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes at its end
        return code
    rank, alone = os.environ.get("RANK", "0"), isinstance(error, (FloatingPointError, LostRank))
    by_all = isinstance(error, (ValueError, Diverged, RanksDiffer)) and not isinstance(error, RankError)
    if not by_all or "0" in (rank, os.environ.get("LOCAL_RANK", rank)):
        tag = f"[rank {rank}] " if rank != "0" or alone else ""
        print(f"{tag}{'stopped' if isinstance(error, LostRank) else name}: {redacted(error)}", file=sys.stderr)
        sys.stderr.flush()
    return code
