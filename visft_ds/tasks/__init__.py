"""The tasks a backbone learns from: a folder and a `Task` each. The loop names no task.

* `task`: what a task has to say of itself; `criterion`: what its losses are, and what they are divided by;
  `example`: an image with labels and predictions, and its drawing. `transform`: samples and batches of
  tasks. `tiles`: predictions of tiles joined; `paste`: objects of another picture.
* `detection/`, `segmentation/`, `captioning/`, `semantic/`, `depth/`, `panoptic/`: the tasks; `config.py` of
  each has its keys, and `spec.py` its `Task`. `masks/` is what the three tasks of masks share.
* `matching`, `transformer`, `vocabulary`, `average_precision`, `pictures`, `channels`, `linear`, `classes`,
  `head_files`: for all.

A folder of a task imports what all share, and none of another task but `masks/`. Names of parameters and of
losses stand in files, as do keys: they may not change. Nothing of a task is imported before it is asked for:
a configuration is read without the tensor library. Other packages add theirs by an entry point in the group
`visft_ds.tasks`, scripts of one process by `register`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visft_ds.tasks.task import Task

Annotation = Mapping[str, Any]  #: an object in COCO's format, or a result for one, which has a score
Annotations = Sequence[Annotation]
Results = list[dict[str, Any]]  #: COCO results format
Truth = Mapping[str, Any]  #: images, annotations and categories, as COCO writes them
Names = Mapping[int, str]  #: of categories, by raw id
Shapes = Sequence[tuple[int, int]]  #: (width, pixels to a cell) of each map of a backbone
Numbers = dict[str, float]  #: by name: metrics, or counts
#: The tasks of this package; a run's losses are summed, and its tasks listed, in this order.
BUILT_IN = ("detection", "segmentation", "captioning", "semantic", "depth", "panoptic")


@cache
def entries() -> dict[str, str]:
    """Name of every task -> "module:NAME" of its `Task`; those of this package first."""
    table = {name: f"visft_ds.tasks.{name}.spec:SPEC" for name in BUILT_IN}
    for point in sorted(entry_points(group="visft_ds.tasks"), key=lambda point: point.name):
        _add(table, point.name, point.value)
    return table


def register(name: str, address: str) -> None:
    """Add a task to this process: `register("classification", "my_package.my_task:SPEC")`, where SPEC is a
    `Task`.

    Raises:
        ValueError: the name is taken.
    """
    _add(entries(), name, address)


def _add(table: dict[str, str], name: str, address: str) -> None:
    if name in table:
        raise ValueError(f"task {name!r} of {address}: the name is taken by {table[name]}")
    table[name] = address


class _Table(Mapping[str, "Task"]):
    """Name -> `Task`, each loaded when it is first asked for."""

    def __getitem__(self, name: str) -> Task:
        address = entries()[name]
        module, _, attribute = address.partition(":")
        try:
            task: Task = getattr(import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            if address.startswith("visft_ds."):
                raise
            raise ValueError(
                f"no task at {address!r}, which must be module:NAME of a Task: {error}"
            ) from error
        return task

    def __iter__(self) -> Iterator[str]:
        return iter(entries())

    def __len__(self) -> int:
        return len(entries())


TASKS: Mapping[str, Task] = _Table()


def get_task(name: str) -> Task:
    """The task of that name; raises ValueError with the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: known tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def config_class(name: str) -> Any:
    """Class of the settings of a task, a subclass of `visft_ds.settings.task_schema.TaskConfig`."""
    if name in BUILT_IN:
        return import_module(f"visft_ds.tasks.{name}.config").CONFIG
    return get_task(name).config


def shown_metrics(tasks: Iterable[str] | None = None) -> tuple[str, ...]:
    """Metrics that a short line has, of these or all tasks."""
    if tasks is None:
        tasks = entries()
    metrics: list[str] = []
    for name in tasks:
        config = config_class(name)
        metrics += config.shown or (config.main,)
    return tuple(dict.fromkeys(metrics))
