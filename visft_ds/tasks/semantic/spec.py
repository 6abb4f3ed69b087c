"""Semantic segmentation as a task: what training, evaluation, export, prediction and planning ask of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from visft_ds.data.samples import Batch
from visft_ds.tasks import Numbers, Results, Shapes, Truth
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.criterion import Criterion
from visft_ds.tasks.example import Example
from visft_ds.tasks.masks.regions import draw_regions
from visft_ds.tasks.masks.task import MaskTask
from visft_ds.tasks.pictures import Picture, side_by_side
from visft_ds.tasks.semantic.config import LOSSES, SemanticHeadConfig, SemanticTask
from visft_ds.tasks.semantic.head import LinearHead, SemanticCriterion
from visft_ds.tasks.semantic.results import (
    Windows,
    cut_windows,
    measure_semantic,
    semantic_results,
)
from visft_ds.tasks.task import Classes, Options, Predict, Words


class Semantic(MaskTask):
    """A linear head on the maps, or the plain mask head, which learn from masks of classes."""

    name = "semantic"
    config = SemanticTask
    pad_value = 0
    categories = range(VOID)

    def outputs(self, predict: Predict, batch: Batch, options: Options) -> Mapping[str, Any]:
        side = options.get("window")
        if side is None or options["fixed_size"] is not None:
            return predict(batch)
        windows, starts = cut_windows(batch, side)
        output = predict(windows)[self.name]
        return {self.name: Windows(output, starts, windows.images.shape[-2:])}

    def build_head(self, shapes: Shapes, head: Any, vocabulary_size: int | None) -> nn.Module:
        if isinstance(head, SemanticHeadConfig):
            return LinearHead([width for width, _ in shapes], head)
        return super().build_head(shapes, head, vocabulary_size)

    def losses(self, head: Any, loss: Any) -> Criterion:
        if isinstance(head, SemanticHeadConfig):
            return SemanticCriterion(loss)
        return super().losses(head, loss)

    def criterion(self, head_options: Options, loss_options: Options) -> Criterion:
        head = self.settings("head", head_options)
        return self.losses(head, LOSSES[head.type](**loss_options))

    def results(
        self,
        output: Any,
        batch: Batch,
        words: Words,
        classes: Classes = None,
        threshold: float = 0.0,
    ) -> Results:
        return semantic_results(output, batch, classes)

    def measure(self, truth: Truth, results: Results, head: Any, of_record: bool) -> Numbers:
        return measure_semantic(truth, results, per_category=of_record)

    def picture(self, example: Example) -> Picture:
        pixels = example.pixels()
        true = draw_regions(pixels, example.raw.annotations, example.names)
        predicted = draw_regions(pixels, example.results, example.names)
        return side_by_side((true, "ground truth"), (predicted, "predicted"))


SPEC = Semantic()
