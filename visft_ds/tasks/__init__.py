"""The tasks a backbone learns from: a folder and a `TaskSpec` each. The loop names no task.

`TASKS` loads a task when it is asked for it, so that a configuration is read without the tensor library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visft_ds.tasks.registry import Table, register

if TYPE_CHECKING:
    from visft_ds.tasks.spec import TaskSpec

__all__ = ["TASKS", "Results", "get_task", "register"]

Results = list[dict[str, Any]]  #: COCO results format
TASKS: Mapping[str, TaskSpec] = Table()


def get_task(name: str) -> TaskSpec:
    """The task of that name; raises ValueError with the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: known tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]
