"""Depth as a task: what training, evaluation, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from visft_ds.data.dataset import labels_of_split
from visft_ds.data.depth import values_of
from visft_ds.data.samples import Batch, Sample
from visft_ds.data.shards import ShardReader
from visft_ds.data.transforms import Geometry, ShortSides, Size, of_options
from visft_ds.tasks import Names, Numbers, Results, Shapes, Truth
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.depth.config import DepthTask, DptHeadConfig
from visft_ds.tasks.depth.data import DepthTargets, depth_targets, packed_depth
from visft_ds.tasks.depth.dpt import DptDepth
from visft_ds.tasks.depth.head import LinearDepth
from visft_ds.tasks.depth.loss import DepthCriterion
from visft_ds.tasks.depth.results import colour_range, coloured, depth_results, measure_depth
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import SIDE, Picture, scaled, side_by_side
from visft_ds.tasks.task import Classes, Content, ImageTargets, Options, Task, Words


class Depth(Task):
    """Metres of every pixel, by a linear head or by a DPT head."""

    name = "depth"
    config = DepthTask

    def geometry(self, options: Options) -> Geometry:
        return of_options(ShortSides, options)

    def targets(self, train: bool, options: Options, words: Words, classes: Classes) -> ImageTargets:
        return partial(depth_targets, options)

    def pack(self, samples: Sequence[Sample], frame: Size) -> DepthTargets:
        return packed_depth(samples, self.name, frame)

    def blank(self, images: int, size: Size, content: Content, options: Options) -> DepthTargets:
        return DepthTargets(
            depth=torch.ones(images, *size),
            sizes=torch.tensor([size] * images),
            known=torch.ones(images, dtype=torch.int64),
            relative=torch.zeros(images, dtype=torch.bool),
        )

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        if isinstance(head, DptHeadConfig):
            return DptDepth(shapes, head)
        return LinearDepth([width for width, _ in shapes], head)

    def losses(self, head: Any, loss: Any) -> Criterion:
        return DepthCriterion(loss)

    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        return depth_results(output, batch)

    def truth(self, reader: ShardReader, indices: Sequence[int]) -> dict[str, Any]:
        """Images with their depth maps as labels have them, or None."""
        images = []
        for label in labels_of_split(reader, indices):
            images.append({"id": label["image_id"], "depth": label.get("depth")})
        return {"images": images}

    def measure(self, truth: Truth, results: Results, head: Any, of_record: bool) -> Numbers:
        return measure_depth(truth, results, head)

    def describe(self, results: Results, names: Names) -> str:
        """The nearest and the farthest depth of an image, as far as it has a unit."""
        values = values_of(results[0]["depth"])
        if results[0]["depth"]["metres"] is None:
            return "relative depth without a unit"
        return f"{values.min():.2f} to {values.max():.2f} m"

    def picture(self, example: Example) -> Picture:
        """The image above its depth map, beside the prediction in the same colours; of a relative map in its
        own.
        """
        predicted = values_of(example.results[0]["depth"])
        has_unit = example.results[0]["depth"]["metres"] is not None
        bounds = colour_range(predicted, relative=not has_unit)
        above = [np.asarray(scaled(example.pixels(), SIDE))]
        title = "image"
        stored = example.raw.depth
        if stored is not None:
            true = values_of(stored)
            is_relative = stored["metres"] is None
            true_bounds = colour_range(true, relative=is_relative)
            title = "relative depth"
            if not is_relative:
                bounds = true_bounds if has_unit else bounds
                title = f"true: {true_bounds[0]:.2f} to {true_bounds[1]:.2f} m"
            above.append(np.asarray(scaled(coloured(true, *true_bounds), SIDE)))
        beside = np.asarray(scaled(coloured(predicted, *bounds), SIDE))
        caption = f"predicted: {self.describe(example.results, {})}"
        return side_by_side((np.concatenate(above), title), (beside, caption))


SPEC = Depth()
