"""Table of the tasks: a name, and where settings and description of the task are.

Nothing is imported for the table itself: a configuration is read without the tensor library, and only the tasks that a
program uses are loaded. Other packages add theirs by an entry point in the group `visft_ds.tasks`, by `register`, or by
the environment: VISFT_TASKS="name=module:SPEC other=module:SPEC", which `register` sets for its child processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

GROUP, VARIABLE = "visft_ds.tasks", "VISFT_TASKS"


class Location(NamedTuple):
    """Location of a task: of its description and its settings, as "module:name"."""

    spec: str  #: its `TaskSpec`
    config: str = ""  #: the class of its settings; empty: `TaskSpec.config`


#: The tasks of this package; a run's losses are summed, and its tasks listed, in this order.
BUILT_IN = {
    name: Location(f"visft_ds.tasks.{name}.spec:SPEC", f"visft_ds.tasks.{name}.config:CONFIG")
    for name in ("detection", "segmentation", "captioning")
}
_entries: dict[str, Location] = {}


def entries() -> Mapping[str, Location]:
    """Name -> places of every task, those of this package first.

    Raises:
        ValueError: an installed package, or the environment, gives a task a name that is taken.
    """
    if not _entries:
        found = dict(BUILT_IN)
        places = sorted((point.name, point.value) for point in entry_points(group=GROUP))
        words = (word.partition("=") for word in os.environ.get(VARIABLE, "").split())
        for name, place in (*places, *((name, place or name) for name, _, place in words)):
            _check_free(name, place, found)
            found[name] = Location(place)
        _entries.update(found)  # all or none
    return _entries


def register(name: str, spec: str) -> None:
    """Add a task: `register("classification", "my_package.my_task:SPEC")`, where SPEC is a `TaskSpec`.

    Raises:
        ValueError: the name is taken.
    """
    _check_free(name, spec, entries())
    _entries[name] = Location(spec)
    os.environ[VARIABLE] = f"{os.environ.get(VARIABLE, '')} {name}={spec}".strip()


def _check_free(name: str, place: str, taken: Mapping[str, Location]) -> None:
    if name in taken:
        raise ValueError(f"task {name!r} of {place}: the name is that of {taken[name].spec}; choose another one")


@cache
def load(place: str) -> Any:
    """The object at "module:name".

    Raises:
        ValueError: there is none at the place that another package or the environment gives.
    """
    module, _, name = place.partition(":")
    if place.startswith("visft_ds."):
        return getattr(import_module(module), name)
    try:
        return getattr(import_module(module or "?"), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"a task is said to be at {place!r} ({error}): give module:NAME of a TaskSpec") from error


def config_class(name: str) -> Any:
    """Class of the settings of a task, a subclass of `visft_ds.config.task_schema.TaskConfig`."""
    entry = entries()[name]
    return load(entry.config) if entry.config else load(entry.spec).config


def shown_metrics() -> tuple[str, ...]:
    """Metrics of all tasks that a short line has."""
    kinds = [config_class(name) for name in entries()]
    return tuple(name for kind in kinds for name in kind.shown or (kind.main,))


class Table(Mapping[str, Any]):
    """Name -> `TaskSpec`, each loaded when it is first asked for."""

    def __getitem__(self, name: str) -> Any:
        return load(entries()[name].spec)

    def __iter__(self) -> Iterator[str]:
        return iter(entries())

    def __len__(self) -> int:
        return len(entries())
