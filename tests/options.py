"""Options of heads, losses and images for tests: the schema's defaults, with what a test changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from visft_ds.data.transforms import Op, Size
from visft_ds.settings.task_schema import SHARED, SharedImage, Stream
from visft_ds.tasks import TASKS
from visft_ds.tasks.transform import ImageTransform, pipeline_of
from visft_ds.tasks.vocabulary import Vocabulary

NO_CLASSES: Mapping[str, tuple[int, ...]] = MappingProxyType({})


def options(task: str, part: Literal["image", "head", "loss"], **changed: Any) -> dict[str, Any]:
    """Options of a part of a task."""
    defaults = TASKS[task].options(part, {})
    assert changed.keys() <= defaults.keys(), changed.keys() - defaults.keys()
    return defaults | changed


def head_of(task: str, in_channels: int, vocabulary_size: int | None = None, **changed: Any) -> Any:
    """A head of the task."""
    settings = TASKS[task].settings("head", options(task, "head", **changed))
    return TASKS[task].build_head([(in_channels, 16)], settings, vocabulary_size)


def criterion_of(task: str, **changed: Any) -> Any:
    """A criterion of the task; `changed` are options of the loss, else of the head."""
    loss = TASKS[task].options("loss", {})
    head = {name: changed.pop(name) for name in [*changed] if name not in loss}
    return TASKS[task].criterion(head, changed)


def alone(
    task: str, train: bool, *, vocabulary: Vocabulary | None = None, classes: Any = None, **changed: Any
) -> ImageTransform:
    """The transform of images for one task, as in mode "sampled"."""
    given = NO_CLASSES if classes is None else {task: tuple(classes)}
    stream = Stream(task, (task,), 1.0, 1, 1, options(task, "image", **changed), given)
    return pipeline_of(stream, vocabulary, train=train).transform


def together(
    train: bool, tasks: Sequence[str], *, vocabulary: Vocabulary | None = None, **changed: Any
) -> ImageTransform:
    """The transform of images that tasks share."""
    image = SharedImage().model_dump()
    assert changed.keys() <= image.keys(), changed.keys() - image.keys()
    stream = Stream(SHARED, tuple(tasks), 1.0, 1, 1, image | changed)
    return pipeline_of(stream, vocabulary, train=train).transform


def drawn(transform: ImageTransform, size: Size, random: np.random.Generator) -> list[Op]:
    """Operations for an image of `size`."""
    return transform.geometry.draw(size, transform.train, random)


def known_keys(model: Any = None, prefix: str = "") -> list[str]:
    """Every key a configuration may set, dotted; "0" stands for a position in a list."""
    from visft_ds.config.resolve import models_in
    from visft_ds.config.schema import Recipe, complete

    complete()
    found = []
    for name, info in (model or Recipe).model_fields.items():
        found.append(f"{prefix}{name}")
        item = "0." if "tuple[" in str(info.annotation) else ""
        for inner in models_in(info.annotation):
            found += known_keys(inner, f"{prefix}{name}.{item}")
    return found
