"""Circumstances of a measurement (time, versions, commit, hardware, load) in its record and its tables."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from visft_ds.costs.hardware import describe
from visft_ds.monitor.metrics import git_revision, versions

REPOSITORY = Path(__file__).resolve().parents[2]


def circumstances(load: Sequence[float], device: torch.device | None = None) -> dict[str, Any]:
    """Time, versions, commit, hardware and load, under the names that all records have.

    Args:
        load: `os.getloadavg()` from before the measurement, which is a load itself.
        device: what was measured on; None: the cores of this machine.
    """
    return {
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions(),
        "git": git_revision(REPOSITORY),
        **({"cores": os.cpu_count()} if device is None else {"hardware": describe(device)}),
        "load": list(load),
    }


def measured_on(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Device and load of a record with hardware, as rows of a table."""
    hardware, load = record["hardware"], ", ".join(f"{value:.2f}" for value in record["load"])
    return [
        ("device", f"{hardware['device']}, {hardware['threads']} CPU threads of {hardware['cores']} cores"),
        ("load", f"{load} processes in the last 1, 5, 15 minutes before"),
    ]
