"""The tasks a backbone learns from: one `TaskSpec` each, in the literal table `TASKS`. The loop names no task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from visft_ds.data.collate import collate_detection
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.transforms import DetectionTransform
from visft_ds.tasks import detection

Transform = Callable[[RawSample, np.random.Generator], Sample]


class Criterion(Protocol):
    """Losses of one task. Holds no parameters; build it anywhere."""

    weights: dict[str, float]  #: factor of each loss; an entry that is not in here is for the log only

    def count(self, batch: Batch) -> dict[str, float]:
        """Numbers, from the labels alone, whose sum over ranks and micro-batches normalises the losses."""
        ...

    def __call__(
        self, output: Any, targets: Any, normaliser: Mapping[str, Tensor], image_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses by name: sums over the micro-batch divided by `normaliser` (the keys of `count`)."""
        ...


@dataclass(frozen=True)
class TaskSpec:
    """What the training loop and the evaluation need to know of a task."""

    name: str
    build_head: Callable[..., nn.Module]  #: (in_channels, **head options); called with (features, valid)
    build_criterion: Callable[..., Criterion]  #: (**loss options)
    shared_options: tuple[str, ...]  #: head options that the criterion must be given too
    build_transform: Callable[..., Transform]  #: (train, **image options)
    collate: Callable[[Sequence[Sample]], Batch]
    postprocess: Callable[[Any, Batch], list[dict[str, Any]]]  #: COCO results format, real images only

    def criterion(self, head_options: Mapping[str, Any], loss_options: Mapping[str, Any]) -> Criterion:
        """The criterion that fits a head: options they share are stated once, with the head."""
        shared = {name: head_options[name] for name in self.shared_options if name in head_options}
        doubled = sorted(shared.keys() & loss_options.keys())
        if doubled:
            raise ValueError(
                f"task {self.name!r}: {doubled} stand with the head already: remove them from the loss options"
            )
        return self.build_criterion(**shared, **loss_options)


TASKS: dict[str, TaskSpec] = {
    "detection": TaskSpec(
        name="detection",
        build_head=detection.DetectionHead,
        build_criterion=detection.DetectionCriterion,
        shared_options=("num_queries", "decoder_layers"),
        build_transform=DetectionTransform,
        collate=collate_detection,
        postprocess=detection.postprocess,
    ),
}


def get_task(name: str) -> TaskSpec:
    """The task of that name; raises ValueError with the known ones."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: known tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]
