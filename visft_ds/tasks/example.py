"""An image with its labels and a head's predictions, and the picture of both beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from visft_ds.data.decode import as_rgb
from visft_ds.data.samples import RawSample
from visft_ds.tasks import Annotation, Names, Results
from visft_ds.tasks.pictures import Picture, draw_objects, palette, side_by_side


@dataclass(frozen=True)
class Example:
    """Image and a head's predictions for it."""

    raw: RawSample
    results: Results  #: of this image, in COCO's results format
    names: Names  #: category names by raw id
    threshold: float  #: least score that is drawn

    def objects(self) -> list[Annotation]:
        """True objects; crowd regions are not drawn."""
        return [annotation for annotation in self.raw.annotations if not annotation.get("iscrowd", 0)]

    def draw(self, true: Sequence[Annotation], **shapes: Callable[[Annotation], Any]) -> Picture:
        """True and predicted objects beside each other.

        Predictions are those of categories the data set has, with enough score, the best first.

        Args:
            true: the objects of the left panel.
            shapes: boxes= or masks=, which gives the shape of an object, as `draw_objects` takes it.
        """
        shown = [
            result
            for result in self.results
            if result["category_id"] in self.names and result["score"] >= self.threshold
        ]
        shown.sort(key=lambda result: -float(result["score"]))
        return side_by_side(
            (self._panel(true, shapes), f"ground truth: {len(true)}"),
            (self._panel(shown, shapes), f"predicted: {len(shown)}"),
        )

    def _panel(
        self, objects: Sequence[Annotation], shapes: Mapping[str, Callable[[Annotation], Any]]
    ) -> Picture:
        """The image with these objects drawn into it, each with its category, and its score if it has one."""
        names = [self.names[annotation["category_id"]] for annotation in objects]
        tags = []
        for name, annotation in zip(names, objects, strict=True):
            score = f" {annotation['score']:.2f}" if "score" in annotation else ""
            tags.append(f"{name}{score}")
        drawn: dict[str, Any] = {}
        for kind, shape_of in shapes.items():
            drawn[kind] = [shape_of(annotation) for annotation in objects]
        colours = palette(list(self.names.values()))
        return draw_objects(self.pixels(), names, tags, colours, **drawn)

    def pixels(self) -> Picture:
        """The image in the size of the original, in whose pixels labels and predictions are."""
        assert self.raw.image is not None
        height, width = self.raw.size
        return np.asarray(Image.fromarray(as_rgb(self.raw.image)).resize((width, height)))
