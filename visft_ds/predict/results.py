"""Predictions for one image: boxes, masks and a caption with their names, and a drawing of them.

Letters: H W pixels of the image, n objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image

from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.pictures import SIDE, draw_objects, palette, side_by_side, with_text
from visft_ds.tasks.semantic.results import draw_regions, number_map

Floats = npt.NDArray[np.float32]
_SHOWN = ("detection", "segmentation", "captioning")  #: tasks with an attribute of their own


@dataclass(frozen=True, eq=False)
class Objects:
    """Objects found in an image, sorted by confidence."""

    scores: Floats  #: (n,) from 0 to 1
    ids: npt.NDArray[np.int64]  #: (n,) category ids
    names: tuple[str, ...]  #: of the categories

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True, eq=False)
class Boxes(Objects):
    """Boxes of an image, sorted by confidence."""

    xyxy: Floats  #: (n, 4) left, top, right, bottom in pixels of the image; may extend past its border


@dataclass(frozen=True, eq=False)
class Masks(Objects):
    """Masks of an image, sorted by confidence; they may overlap."""

    masks: npt.NDArray[np.bool_]  #: (n, H, W)


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Boxes, masks and caption of one image, as far as the model has such heads."""

    image: npt.NDArray[np.uint8]  #: (H, W, 3) RGB, upright
    path: Path | None  #: of its file
    categories: Mapping[int, str]  #: names of all categories of the model by id
    results: Mapping[str, Results]  #: task -> predictions in COCO's results format, sorted by confidence

    @cached_property
    def boxes(self) -> Boxes | None:
        """Boxes of the detection head; None if the model has none."""
        results = self.results.get("detection")
        if results is None:
            return None
        xywh = np.array([result["bbox"] for result in results], dtype=np.float64).reshape(-1, 4)
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        return Boxes(*self._labels(results), corners.astype(np.float32))

    @cached_property
    def masks(self) -> Masks | None:
        """Masks of the segmentation head; None if the model has none."""
        results = self.results.get("segmentation")
        if results is None:
            return None
        masks = np.zeros((0, *self.image.shape[:2]), dtype=np.bool_)
        if results:
            decoded = coco_mask.decode([result["segmentation"] for result in results])  # (H, W, n)
            masks = decoded.transpose(2, 0, 1).astype(np.bool_)
        return Masks(*self._labels(results), masks)

    @property
    def semantic(self) -> npt.NDArray[np.uint8] | None:
        """Category ids (H, W), the numbers of the label maps; None if the model has no semantic head."""
        results = self.results.get("semantic")
        if results is None:
            return None
        return number_map(results, self.image.shape[:2], {id_: id_ for id_ in self.categories})

    @property
    def caption(self) -> str | None:
        """Text of the captioning head; None if the model has none."""
        if "captioning" not in self.results:
            return None
        text: str = self.results["captioning"][0]["caption"]
        return text

    def _labels(self, results: Results) -> tuple[Floats, npt.NDArray[np.int64], tuple[str, ...]]:
        scores = np.array([result["score"] for result in results], dtype=np.float32)
        ids = [result["category_id"] for result in results]
        names = tuple(category_name(id_, self.categories) for id_ in ids)
        return scores, np.array(ids, dtype=np.int64), names

    def _other_tasks(self) -> list[str]:
        """A line about the image for each task without an attribute of its own."""
        lines = []
        for task, results in self.results.items():
            if task not in _SHOWN:
                lines.append(TASKS[task].describe(results, self.categories))
        return lines

    def __repr__(self) -> str:
        parts = [f"{self.image.shape[0]} x {self.image.shape[1]} pixels"]
        if self.boxes is not None:
            parts.append(f"{len(self.boxes)} boxes")
        if self.masks is not None:
            parts.append(f"{len(self.masks)} masks")
        if self.caption is not None:
            parts.append(repr(self.caption))
        text = ", ".join([*parts, *self._other_tasks()])
        return f"Prediction({text})" if self.path is None else f"Prediction({self.path}: {text})"

    def draw(self, *, side: int = SIDE) -> Image.Image:
        """The image, its boxes and its masks side by side, with the caption; `side`: pixels of the longer
        side.
        """
        lines = self._other_tasks()
        if self.caption is not None:
            lines.insert(0, self.caption or "(no words)")
        panels = [(with_text(self.image, lines, side), "image")]
        if self.boxes is not None:
            shapes = [result["bbox"] for result in self.results["detection"]]
            panels.append((self._drawn(self.boxes, side, boxes=shapes), f"boxes: {len(self.boxes)}"))
        if self.masks is not None:
            drawn = self._drawn(self.masks, side, masks=self.masks.masks)
            panels.append((drawn, f"masks: {len(self.masks)}"))
        regions = self.results.get("semantic")
        if regions:
            panels.append((draw_regions(self.image, regions, self.categories, side), "classes"))
        return Image.fromarray(side_by_side(*panels))

    def _drawn(self, objects: Objects, side: int, **shapes: Any) -> npt.NDArray[np.uint8]:
        """The image with the objects' shapes, `boxes` or `masks`, in colours that all panels share."""
        names = list(self.categories.values())
        for found in (self.boxes, self.masks):
            names += [] if found is None else found.names
        tags = [f"{name} {score:.2f}" for name, score in zip(objects.names, objects.scores, strict=True)]
        return draw_objects(self.image, objects.names, tags, palette(names), side=side, **shapes)

    def to_coco(self, image_id: int) -> dict[str, Results]:
        """Task -> predictions in COCO's results format, as an evaluation writes them."""
        return {
            task: [{**result, "image_id": image_id} for result in results]
            for task, results in self.results.items()
        }
