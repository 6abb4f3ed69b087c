"""Joint transform of an image for several heads: one geometry, and the targets of every enabled task in it.

As in `transforms`, the geometry comes from the sample's random numbers and the stored size alone. It is drawn before
anything else, the caption last: neither the pixels nor the choice of tasks can move it.

Shape letters: B images, H W pixels, n objects of one image, hm wm cells of the masks, T caption length in ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.config.task_schema import CaptionChoice
from visft_ds.data.samples import Batch, RawSample, Sample, has_targets, stack_samples
from visft_ds.data.transforms import Op, ShortSides, Size, apply_to_image, final_size
from visft_ds.tasks import TASKS
from visft_ds.tasks.captioning.data import choice_for
from visft_ds.tasks.vocabulary import Vocabulary


class JointTransform:
    """Transform with one geometry for all heads of an image, so that one backbone forward serves them all.

    Training: mirror with probability `flip`, then scale the short side to one of `short_sides` with the long side
    capped at `max_long`. Nothing is cut out, unlike in the recipes of detection and segmentation alone: a caption
    describes the whole image. (A mirrored image keeps its caption; where "left" and "right" matter, give
    `flip` 0.) Evaluation: short side `eval_short`, long side at most `eval_max_long`. With `fixed_size`, both only
    scale to a square of that many pixels, and training also mirrors. The rounding of sides, and how far that may pass
    a cap, is that of `short_side_size`.

    The sample's `targets` have exactly the entries `tasks`, in the order of TASKS, each as the transform of that task
    alone gives it for the same geometry; of the tasks of this package:
        "detection": {"boxes": (n, 4) float32, cxcywh relative to the transformed image, "labels": (n,) int64, raw
            category ids, or places in `classes["detection"]` where it is given}.
        "segmentation": {"masks": (n, hm, wm) uint8, covered part of cells of at most `mask_stride` pixels, "labels":
            (n,) int64, places in `classes["segmentation"]`, by default among COCO's 80 categories, "frame": (2,) int64,
            height and width}. The frame is the image: nothing is padded. An object without a mask has a box only, so n
            may be smaller than in detection.
        "captioning": {"tokens": (T,) int64, "references": (captions,) str objects}: one caption among those with 1 to
            `max_words` words, chosen as by `CaptionTransform`.

    Args:
        tasks: one or more of `TASKS`, each once.
        vocabulary: the ids of words; captioning needs it, the others do not.
        classes: task -> raw ids of its classes, see above.

    Raises:
        ValueError: no, unknown or repeated tasks; captioning without a vocabulary; an unknown choice of captions;
            sizes, numbers of words or probabilities out of range; when called, a category without a class or a
            segmentation that cannot be read (names image and annotation).
    """

    def __init__(
        self,
        train: bool,
        tasks: Sequence[str],
        *,
        vocabulary: Vocabulary | None = None,
        short_sides: Sequence[int] = (480, 512, 544, 576, 608, 640, 672),
        max_long: int = 672,
        flip: float = 0.5,
        eval_short: int = 800,
        eval_max_long: int = 672,
        fixed_size: int | None = None,
        mask_stride: int = 4,
        caption_choice: CaptionChoice = "random",
        max_words: int = 50,
        classes: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        # a bare string would be read letter by letter
        if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks) or not set(tasks) <= set(TASKS):
            raise ValueError(
                f"tasks={tasks!r} is not allowed: give a list of one or more of {', '.join(TASKS)}, each once"
            )
        if min(mask_stride, max_words) < 1:
            raise ValueError(f"mask_stride={mask_stride} and max_words={max_words} must be at least 1")
        self.train = train
        self.tasks = tuple(tasks)
        self.vocabulary = vocabulary
        self.sides = ShortSides(tuple(short_sides), max_long, flip, eval_short, eval_max_long, fixed_size)
        self.mask_stride = mask_stride
        self.caption_choice = choice_for(train, caption_choice)
        self.max_words = max_words
        self._targets = {task: TASKS[task].joint(self, classes.get(task)) for task in TASKS if task in tasks}

    def __call__(self, raw: RawSample, generator: np.random.Generator) -> Sample:
        """Transform one sample; evaluation draws nothing from `generator`."""
        ops = self.geometry(raw.size, generator)
        return Sample(
            index=raw.index,
            image_id=raw.image_id,
            original_size=raw.size,
            size=final_size(raw.size, ops),
            image=None if raw.image is None else apply_to_image(raw.image, ops),
            random_key=0,
            targets=self.targets(raw, ops, generator),
        )

    def geometry(self, size: Size, generator: np.random.Generator) -> list[Op]:
        """Geometric operations for an image of `size`, in order."""
        return [*self.sides.mirror(self.train, generator), self.sides.scale(size, self.train, generator)]

    def extremes(self, size: Size) -> set[Size]:
        """The size of most pixels that training can give an image of `size`; it is the highest and widest, too."""
        return {self.sides.largest(size)}

    def targets(
        self, raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
    ) -> dict[str, Mapping[str, npt.NDArray[Any]]]:
        """Labels of each task for the image after `ops`."""
        return {task: targets(raw, ops, generator) for task, targets in self._targets.items()}


def collate_joint(samples: Sequence[Sample]) -> Batch:
    """A batch with the targets of every task of the samples; without any where no labels were read.

    Images are padded right and bottom with 0 to the largest height and width of the batch. Targets stand in the order
    of `TASKS`, so that losses are summed in one order however the tasks were listed.
    """
    batch = stack_samples(samples)
    # from the sizes, not from the pixels: a process that reads labels only has none
    frame = (max(sample.size[0] for sample in samples), max(sample.size[1] for sample in samples))
    taught = [task for task in TASKS if has_targets(samples, task)]
    return replace(batch, targets={task: TASKS[task].pack(samples, frame) for task in taught})
