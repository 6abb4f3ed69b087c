"""Memory of this machine and process: what is free and used, and a limit that raises an error instead of a kill."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

#: Control groups of version 2 and 1: folder, controllers in the process's list of groups, limit, use, and the entry of
#: memory.stat for cached files.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
_OWN_GROUPS = Path("/proc/self/cgroup")
_STATUS = Path("/proc/self/status")
#: Limits of a process, and the line of its status that counts towards each.
_LIMITS = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: of the allocator on a GPU, of all its memory (libraries too) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def memory_in_use() -> dict[int, int]:
    """Bytes that count towards RLIMIT_AS and RLIMIT_DATA of this process; nothing where there is no /proc."""
    if not _STATUS.is_file():
        return {}
    status = _STATUS.read_text(encoding="utf-8")
    return {limit: int(re.findall(rf"^{name}:\s+(\d+) kB", status, re.M)[0]) * 1024 for limit, name in _LIMITS.items()}


def host_memory_available() -> int:
    """Bytes that are free: what the kernel calls available, or less where a control group says so."""
    available = int(psutil.virtual_memory().available)
    for limit, used in _control_group_limits():
        available = min(available, limit - used)
    return max(available, 0)


def host_memory() -> int:
    """Bytes that this process's machine has, or fewer where a control group says so."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _control_group_limits())])


def _control_group_limits() -> Iterator[tuple[int, int]]:
    """(limit, use) in bytes of this process's control group and of those around it that have a limit.

    In a container the own one is the root; a scheduler such as SLURM limits one in the middle of the path.
    """
    listed = _OWN_GROUPS.read_text(encoding="utf-8").splitlines() if _OWN_GROUPS.is_file() else []
    own = {names: path for _, names, path in (line.split(":", 2) for line in listed)}
    for root, controller, limit, used, cache in _CONTROL_GROUPS:
        path = next((path for names, path in own.items() if controller in names.split(",")), "/")
        for group in (Path(path.lstrip("/")), *Path(path.lstrip("/")).parents):
            files = [Path(root) / group / name for name in (limit, used, "memory.stat")]
            if all(file.is_file() for file in files):
                most, now, statistics = (file.read_text(encoding="utf-8") for file in files)
                if most.strip().isdecimal():  # else "max": no limit
                    # Files that were read once count as used until somebody needs the room.
                    idle = re.findall(rf"^{cache} (\d+)", statistics, re.M)
                    yield int(most), int(now) - int(idle[0] if idle else 0)


@contextmanager
def memory_bounded(device: torch.device, processes: int) -> Iterator[None]:
    """On a CPU, let allocations fail when this process's share of the free memory is used up.

    Without a bound the kernel lets them succeed and kills the process when the pages are used. On a GPU, or where there
    is no /proc: nothing.
    """
    used = memory_in_use()
    if device.type != "cpu" or not used:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = used[resource.RLIMIT_AS] + int(0.9 * host_memory_available()) // processes
    known = [limit for limit in (bound, soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(known), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
