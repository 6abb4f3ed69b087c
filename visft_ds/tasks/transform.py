"""Transform of an image for any set of tasks: one geometry, and the targets of every task in it.

The geometry comes from the sample's random numbers and the stored size alone, before any pixel is looked at: a process
that reads labels only arrives at the same targets as one that also has the image. It is drawn before anything else, the
caption last: neither the pixels nor the choice of tasks can move it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.config.task_schema import SHARED, Stream
from visft_ds.data.samples import Batch, RawSample, Sample, has_targets, stack_samples
from visft_ds.data.transforms import Geometry, Op, Pad, ShortSides, apply_to_image, final_size, of_options
from visft_ds.tasks import TASKS
from visft_ds.tasks.registry import entries
from visft_ds.tasks.spec import ImageTargets
from visft_ds.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class ImageTransform:
    """Transform from a raw sample to one with the targets of some tasks.

    The sample's `targets` have an entry for each task, in the order of TASKS; of the tasks of this package:
        "detection": {"boxes": (n, 4) float32, cxcywh relative to the transformed image, "labels": (n,) int64, raw
            category ids, or places among the classes of the head where they are not COCO's}.
        "segmentation": {"masks": (n, hm, wm) uint8, covered part of each cell, "labels": (n,) int64, places among the
            classes of the head, by default COCO's 80}. An object without a mask has a box only, so n may be smaller
            than in detection.
        "captioning": {"tokens": (T,) int64, "references": (captions,) str objects}.
    Letters: n objects of one image, hm wm cells of the masks, T caption length in ids.
    """

    train: bool
    geometry: Geometry
    tasks: Mapping[str, ImageTargets]

    def __call__(self, raw: RawSample, generator: np.random.Generator) -> Sample:
        """Transform one sample; evaluation draws nothing from `generator`.

        Raises:
            ValueError: a category without a class, or a segmentation that cannot be read; names image and annotation.
        """
        ops = self.geometry.draw(raw.size, self.train, generator)
        inside = [op for op in ops if not (isinstance(op, Pad) and op.outside)]
        return Sample(
            index=raw.index,
            image_id=raw.image_id,
            original_size=raw.size,
            size=final_size(raw.size, inside),
            image=None if raw.image is None else apply_to_image(raw.image, ops),
            random_key=0,
            targets=self.targets(raw, inside, generator),
            frame=final_size(raw.size, ops),
        )

    def targets(
        self, raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
    ) -> dict[str, Mapping[str, npt.NDArray[Any]]]:
        """Labels of each task for the image after `ops`."""
        return {task: targets(raw, ops, generator) for task, targets in self.tasks.items()}

    def modules(self) -> set[str]:
        """Modules that it works with: this one, and those that describe its tasks."""
        return {__name__, *(entries()[task].spec.partition(":")[0] for task in self.tasks)}


def transform_of(stream: Stream, vocabulary: Vocabulary | None, *, train: bool) -> ImageTransform:
    """The transform of a stream.

    Raises:
        ValueError: a task that works with words, without a vocabulary.
    """
    targets = {}
    for task in TASKS:
        if task in stream.tasks:
            own = TASKS[task].of_data(vocabulary, stream.classes.get(task))
            targets[task] = TASKS[task].targets(train, stream.image, **own)
    return ImageTransform(train, geometry_of(stream), targets)


def geometry_of(stream: Stream) -> Geometry:
    """The geometry of a stream.

    Several tasks share one that cuts nothing out, unlike those of detection and segmentation alone: a caption
    describes the whole image. (A mirrored image keeps its caption; where "left" and "right" matter, give `flip` 0.)
    """
    if stream.name == SHARED:
        return of_options(ShortSides, stream.image)
    return TASKS[stream.name].geometry(stream.image)


def collate_joint(samples: Sequence[Sample]) -> Batch:
    """A batch with the targets of every task of the samples; without any where no labels were read.

    Images are padded right and bottom with 0 to the largest height and width of the batch. Targets stand in the order
    of `TASKS`, so that losses are summed in one order however the tasks were listed.
    """
    batch = stack_samples(samples)
    assert batch.frames is not None
    height, width = batch.frames.amax(dim=0).tolist()  # who reads labels only has no pixels that tell
    taught = [task for task in TASKS if has_targets(samples, task)]
    return replace(batch, targets={task: TASKS[task].pack(samples, (height, width)) for task in taught})
