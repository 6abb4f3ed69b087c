"""Memory of this machine and process."""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: of the allocator on a GPU, of all its memory (libraries too) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def host_memory() -> int:
    """Bytes that this process's machine has, or fewer where its control group (version 2) or one around it says so.

    In a container the own group is the root; a scheduler such as SLURM limits one in the middle of the path.
    """
    listed = _OWN_GROUP.read_text(encoding="utf-8").splitlines() if _OWN_GROUP.is_file() else []
    own = next((Path(line[4:]) for line in listed if line.startswith("0::/")), Path())
    files = [_GROUPS / group / "memory.max" for group in (own, *own.parents)]
    limits = [file.read_text(encoding="utf-8").strip() for file in files if file.is_file()]
    return min([int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit != "max")])
