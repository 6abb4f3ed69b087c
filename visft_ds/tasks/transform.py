"""Transform of an image for any set of tasks: one geometry (`data.transforms`), and the targets of every task
in it.

It is drawn before anything else, the caption last: neither the pixels nor the choice of tasks can move it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.transforms import (
    Crop,
    Geometry,
    Op,
    Pad,
    ShortSides,
    apply_to_image,
    final_size,
    of_options,
)
from visft_ds.settings.task_schema import SHARED, Stream
from visft_ds.settings.tiles import is_visible
from visft_ds.tasks import TASKS
from visft_ds.tasks.paste import pasted
from visft_ds.tasks.task import ImageTargets
from visft_ds.tasks.vocabulary import Vocabulary


@dataclass(frozen=True)
class ImageTransform:
    """Transform from a raw sample to one with the targets of some tasks."""

    train: bool
    geometry: Geometry
    tasks: Mapping[str, ImageTargets]

    def __call__(
        self, raw: RawSample, generator: np.random.Generator, ops: Sequence[Op] | None = None
    ) -> Sample:
        """Transform one sample, by `ops` or those of the geometry; evaluation draws nothing from
        `generator`.

        A tile is cut out first, with the objects of which it shows enough.
        """
        size = raw.size
        cut = list[Op]()
        if raw.window is not None:
            size = raw.window.height, raw.window.width
            cut.append(Crop(*raw.window))
            visible = [object_ for object_ in raw.annotations if is_visible(object_["bbox"], raw.window)]
            raw = replace(raw, annotations=visible)
        ops = [*cut, *(self.geometry.draw(size, self.train, generator) if ops is None else ops)]
        inside = [op for op in ops if not (isinstance(op, Pad) and op.outside)]
        return Sample(
            index=raw.index,
            image_id=raw.image_id,
            original_size=size,
            size=final_size(raw.size, inside),
            image=None if raw.image is None else apply_to_image(raw.image, ops),
            random_key=0,
            targets={task: targets(raw, inside, generator) for task, targets in self.tasks.items()},
            frame=final_size(raw.size, ops),
        )


def pipeline_of(stream: Stream, vocabulary: Vocabulary | None, *, train: bool) -> SamplePipeline:
    """Transform and collate of a stream, with the sizes of its configuration."""
    targets = {}
    for task in stream.tasks:
        classes = stream.classes.get(task)
        targets[task] = TASKS[task].targets(train, stream.image, vocabulary, classes)
    collate = partial(collate_joint, mixed=not stream.alike(train=train))
    paste = None
    if train and stream.image.get("paste"):
        paste = partial(pasted, most=stream.image["paste"])
    return SamplePipeline(ImageTransform(train, geometry_of(stream), targets), collate, stream.tiles, paste)


def geometry_of(stream: Stream) -> Geometry:
    """The geometry of the images of a stream."""
    if stream.name == SHARED:  # which cuts nothing out, as a caption describes the whole image
        return of_options(ShortSides, stream.image)
    return TASKS[stream.name].geometry(stream.image)


def collate_joint(samples: Sequence[Sample], *, mixed: bool = True) -> Batch:
    """A batch with the targets of every task of the samples, in their order; none if no labels were read.

    Images are padded right and bottom with 0 to the largest height and width of the batch. `mixed`: see
    `Batch`.
    """
    views = tuple(sample.view for sample in samples if sample.view is not None)
    assert len(views) in (0, len(samples)), "features are kept of some samples of a batch and of some not"
    frames = torch.tensor([sample.frame or sample.size for sample in samples])
    height, width = frames.amax(dim=0).tolist()  # who reads labels only has no pixels that tell
    sizes = torch.tensor([sample.size for sample in samples])
    images = torch.zeros((len(samples), 3, 0, 0), dtype=torch.uint8)
    with_pixels = [sample.image for sample in samples if sample.image is not None]
    if with_pixels:
        images = with_pixels[0].new_zeros((len(samples), len(with_pixels[0]), height, width))
    for padded, sample in zip(images, samples, strict=True):
        if sample.image is not None:
            padded[:, : sample.image.shape[1], : sample.image.shape[2]] = sample.image
    return Batch(
        images=images,
        sizes=sizes,
        original_sizes=torch.tensor([sample.original_size for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        image_ids=torch.tensor([sample.image_id for sample in samples]),
        random_keys=torch.tensor([sample.random_key for sample in samples]),
        real=torch.ones(len(samples), dtype=torch.bool),
        targets={task: TASKS[task].pack(samples, (height, width)) for task in samples[0].targets},
        views=views or None,
        frames=frames,
        mixed=mixed,
    )
