"""Memory of this machine and process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: of the allocator on a GPU, of all its memory (libraries too) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def host_memory_available() -> int:
    """Bytes that are free: what the kernel calls available, or less where a control group says so."""
    free = [limit - used for limit, used in _group_limits()]
    return max(0, min([int(psutil.virtual_memory().available), *free]))


def host_memory() -> int:
    """Bytes that this process's machine has, or fewer where a control group says so."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _group_limits())])


def _group_limits() -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of this process's control group (version 2) and of those around it that have a limit.

    In a container the own one is the root; a scheduler such as SLURM limits one in the middle of the path.
    """
    listed = _OWN_GROUP.read_text(encoding="utf-8").splitlines() if _OWN_GROUP.is_file() else []
    own = next((Path(line[4:]) for line in listed if line.startswith("0::/")), Path())
    for group in (own, *own.parents):
        limit, used, numbers = (_GROUPS / group / f"memory.{name}" for name in ("max", "current", "stat"))
        if limit.is_file() and (text := limit.read_text(encoding="utf-8").strip()).isdecimal():  # else "max"
            # Files that were read once count as used until somebody needs the room.
            idle = dict(line.split() for line in numbers.read_text(encoding="utf-8").splitlines()).get("inactive_file")
            yield int(text), int(used.read_text(encoding="utf-8")) - int(idle or 0)
