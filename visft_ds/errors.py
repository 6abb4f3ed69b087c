"""Errors of a rank: who prints them, and the exit code they end in. Imports nothing heavy."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys

from visft_ds.redaction import redacted, visible

#: Exit code of a rank that stops because another one, or its launcher, was killed or hangs.
LOST_CODE = 3
#: Exit code of a rank whose server or disk did not answer, and may answer later.
NO_ANSWER_CODE = 5
#: Attribute of an error that `flags.speaking_python` has changed: its message for the command line.
IN_FLAGS = "message_with_flags"
#: What gloo and NCCL say to a rank whose peer is gone or hangs.
LOST_PEER = re.compile(
    r"Connection (closed|reset|was likely closed)|remote process exited|Broken pipe|recvValue failed|"
    r"Timed out waiting"
)
#: What allocators say that raise a plain RuntimeError or OSError: torch's for the CPU and the GPU, C++,
#: cuBLAS, Linux.
NO_MEMORY = re.compile(r"(can't|Cannot) allocate memory|out of memory|bad_alloc|CUBLAS_STATUS_ALLOC_FAILED")
#: Numbers of the operating system for a server, network or disk that is away; a full disk or a missing file
#: is not.
_NO_ANSWER = {
    errno.EIO,
    errno.ESTALE,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
}


class RankError(ValueError):
    """Mistake of the user that one rank alone meets; a plain ValueError is met by all ranks."""


class LostRank(RuntimeError):
    """Death or error of another rank, after which this one cannot continue."""


class MainError(OSError):
    """Error of the operating system that the main process met; all ranks raise it, one prints it."""


def does_not_answer(error: BaseException) -> bool:
    """Return True for the error of a server, network or disk that may answer later."""
    if isinstance(error, BrokenPipeError):  # the reader of our output
        return False
    away = isinstance(error, TimeoutError | ConnectionError)
    return away or (isinstance(error, OSError) and error.errno in _NO_ANSWER)


def retold(text: str, *, away: bool, kind: type[OSError] = OSError) -> OSError:
    """An error of the operating system in words of ours; `away` as `does_not_answer` says of the first
    one.
    """
    error = kind(text)
    if away:
        error.errno = errno.ETIMEDOUT
    return error


def exit_code(error: BaseException) -> int:
    """Exit code of a rank: 2 for what the user can fix, 3 after the loss of another rank, 4 when training
    diverged, 5 when a server or a disk does not answer, 130 after a Ctrl-C, 141 when nobody reads the output,
    1 for a bug.
    """
    if does_not_answer(error):
        return NO_ANSWER_CODE
    codes: dict[type[BaseException], int] = {
        LostRank: LOST_CODE,
        FloatingPointError: 4,
        KeyboardInterrupt: 128 + signal.SIGINT,
        BrokenPipeError: 128 + signal.SIGPIPE,
        ValueError: 2,
        OSError: 2,
    }
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def tell(error: Exception, name: str = "error") -> int:
    """Print an error that ends a command, and return its exit code.

    All ranks meet a ValueError, a MainError or training that diverged: the first of each machine prints it.
    Anything else is printed by the rank that meets it.

    Args:
        name: in front of the message: "error", or the command.

    Raises:
        Exception: the error itself, where it is a bug, whose traceback is wanted.
    """
    if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
        # The rank that failed reports why; the traceback of one that only waited for it would bury that.
        error = LostRank("another rank ended first")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))):
        error = RankError(
            f"out of memory: give smaller images or batches; {' '.join(str(error).split())[:200]}"
        )
    code = exit_code(error)
    if code == 1:
        raise error
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would complain when it flushes at its end
        return code
    rank = os.environ.get("RANK", "0")
    by_all = isinstance(error, ValueError | FloatingPointError | MainError) and not isinstance(
        error, RankError
    )
    if not by_all or "0" in (rank, os.environ.get("LOCAL_RANK", rank)):
        tag = f"[rank {rank}] " if rank != "0" or isinstance(error, LostRank) else ""
        what = "stopped" if isinstance(error, LostRank) else name
        message = getattr(error, IN_FLAGS, None) or _worded(error)
        print(f"{tag}{what}: {visible(redacted(message))}", file=sys.stderr, flush=True)
    return code


def _worded(error: Exception) -> str:
    """The message of an error; the system's own with the file in front, and without its number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror[0].lower()}{error.strerror[1:]}"
    return str(error)
