"""Transform of an image for any set of tasks: one geometry (`data.transforms`), and the targets of every task in it.

It is drawn before anything else, the caption last: neither the pixels nor the choice of tasks can move it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from visft_ds.config.task_schema import SHARED, Stream
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.samples import Batch, RawSample, Sample, stack_samples
from visft_ds.data.transforms import Geometry, Op, Pad, ShortSides, apply_to_image, final_size, of_options
from visft_ds.tasks import TASKS
from visft_ds.tasks.spec import ImageTargets
from visft_ds.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class ImageTransform:
    """Transform from a raw sample to one with the targets of some tasks."""

    train: bool
    geometry: Geometry
    tasks: Mapping[str, ImageTargets]

    def __call__(self, raw: RawSample, generator: np.random.Generator, ops: Sequence[Op] | None = None) -> Sample:
        """Transform one sample, by `ops` or those of the geometry; evaluation draws nothing from `generator`."""
        ops = self.geometry.draw(raw.size, self.train, generator) if ops is None else ops
        inside = [op for op in ops if not (isinstance(op, Pad) and op.outside)]
        return Sample(
            index=raw.index,
            image_id=raw.image_id,
            original_size=raw.size,
            size=final_size(raw.size, inside),
            image=None if raw.image is None else apply_to_image(raw.image, ops),
            random_key=0,
            targets={task: targets(raw, inside, generator) for task, targets in self.tasks.items()},
            frame=final_size(raw.size, ops),
        )


def pipeline_of(stream: Stream, vocabulary: Vocabulary | None, *, train: bool) -> SamplePipeline:
    """Transform and collate of a stream, with the sizes of its configuration."""
    classes = stream.classes
    made = {task: TASKS[task].targets(train, stream.image, vocabulary, classes.get(task)) for task in stream.tasks}
    # What several tasks share cuts nothing out, as a caption describes the whole image.
    shared = of_options(ShortSides, stream.image) if stream.name == SHARED else None
    geometry = shared or TASKS[stream.name].geometry(stream.image)
    return SamplePipeline(ImageTransform(train, geometry, made), collate_joint)


def collate_joint(samples: Sequence[Sample]) -> Batch:
    """A batch with the targets of every task of the samples, in their order; none if no labels were read."""
    batch = stack_samples(samples)
    assert batch.frames is not None
    height, width = batch.frames.amax(dim=0).tolist()  # who reads labels only has no pixels that tell
    return replace(batch, targets={task: TASKS[task].pack(samples, (height, width)) for task in samples[0].targets})
