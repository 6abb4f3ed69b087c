"""Methods that segmentation and semantic segmentation share as tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from visft_ds.data.samples import Sample
from visft_ds.data.transforms import Geometry, Size, of_options
from visft_ds.tasks import Names, Results, Shapes
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.masks.config import MaskTaskConfig
from visft_ds.tasks.masks.data import LargeScaleJitter, MaskTargets, mask_targets, packed_masks
from visft_ds.tasks.masks.loss import MaskCriterion
from visft_ds.tasks.masks.plain import PlainHead
from visft_ds.tasks.masks.rasters import STRIDE, grid_size
from visft_ds.tasks.masks.regions import shares_in_words
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Task, Words


class MaskTask(Task):
    """A task whose targets are masks with classes, and which has a plain head beside its own."""

    config: ClassVar[type[MaskTaskConfig]]
    pad_value: ClassVar[int]  #: 0 to 255, of what a training image is extended by
    categories: ClassVar[Sequence[int]]  #: ids of the classes of a head whose data does not say them
    #: Called with the label of each category, and what `ImageTargets` says.
    of_image: ClassVar[Callable[..., Any]] = staticmethod(mask_targets)

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        return PlainHead(shapes, head)

    def losses(self, head: Any, loss: Any) -> Criterion:
        return MaskCriterion(head, loss, self.name)

    def geometry(self, options: Options) -> Geometry:
        return of_options(LargeScaleJitter, {**options, "pad_value": self.pad_value})

    def targets(
        self,
        train: bool,
        options: Options,
        words: Words,
        classes: Classes,
    ) -> ImageTargets:
        categories = self.categories if classes is None else classes
        return partial(self.of_image, {id_: label for label, id_ in enumerate(categories)})

    def describe(self, results: Results, names: Names) -> str:
        """Regions by their shares of the image, the largest first."""
        return shares_in_words(results, names)

    def pack(self, samples: Sequence[Sample], frame: Size) -> MaskTargets:
        return packed_masks(samples, self.name, frame)

    def blank(
        self,
        images: int,
        size: Size,
        content: Content,
        options: Options,
    ) -> MaskTargets:
        objects = images * content.objects
        grid = grid_size(size, STRIDE)
        return MaskTargets(
            masks=torch.empty(objects, *grid, dtype=torch.uint8),
            labels=torch.zeros(objects, dtype=torch.int64),
            grids=torch.tensor([grid] * images),
            counts=torch.full((images,), content.objects),
            keys=torch.arange(images),
        )
