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
from visft_ds.tasks.semantic.results import draw_regions, place_map

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
        if (found := self.results.get("detection")) is None:
            return None
        corners = [(x, y, x + width, y + height) for x, y, width, height in (one["bbox"] for one in found)]
        return Boxes(*self._labels(found), np.array(corners, dtype=np.float32).reshape(-1, 4))

    @cached_property
    def masks(self) -> Masks | None:
        """Masks of the segmentation head; None if the model has none."""
        if (found := self.results.get("segmentation")) is None:
            return None
        masks = np.zeros((0, *self.image.shape[:2]), dtype=np.bool_)
        if found:
            masks = (
                coco_mask.decode([one["segmentation"] for one in found]).transpose(2, 0, 1).astype(np.bool_)
            )
        return Masks(*self._labels(found), masks)

    @property
    def semantic(self) -> npt.NDArray[np.uint8] | None:
        """Category ids (H, W), the numbers of the label maps; None if the model has no semantic head."""
        found, ids = self.results.get("semantic"), {id_: id_ for id_ in self.categories}
        return None if found is None else place_map(found, self.image.shape[:2], ids)

    @property
    def caption(self) -> str | None:
        """Text of the captioning head; None if the model has none."""
        return self.results["captioning"][0]["caption"] if "captioning" in self.results else None

    def _labels(self, results: Results) -> tuple[Floats, npt.NDArray[np.int64], tuple[str, ...]]:
        scores, ids = [one["score"] for one in results], [one["category_id"] for one in results]
        names = tuple(category_name(id_, self.categories) for id_ in ids)
        return np.array(scores, dtype=np.float32), np.array(ids, dtype=np.int64), names

    def __repr__(self) -> str:
        parts = [f"{self.image.shape[0]} x {self.image.shape[1]} pixels"]
        parts += [f"{len(objects)} {kind}" for kind, (objects, _) in self._objects().items()]
        parts += [*([] if self.caption is None else [repr(self.caption)]), *self._lines()]
        return f"Prediction({'' if self.path is None else f'{self.path}: '}{', '.join(parts)})"

    def draw(self, *, side: int = SIDE) -> Image.Image:
        """The image, its boxes and its masks side by side, with the caption; `side`: pixels of the longer
        side.
        """
        objects = self._objects()
        colours = palette(
            [*self.categories.values(), *(name for found, _ in objects.values() for name in found.names)]
        )
        lines = [*([] if self.caption is None else [self.caption or "(no words)"]), *self._lines()]
        panels = [(with_text(self.image, lines, side), "image")]
        for kind, (found, shapes) in objects.items():
            tags = [f"{name} {score:.2f}" for name, score in zip(found.names, found.scores, strict=True)]
            drawn = draw_objects(self.image, found.names, tags, colours, **{kind: shapes}, side=side)
            panels.append((drawn, f"{kind}: {len(found)}"))
        if regions := self.results.get("semantic"):
            panels.append((draw_regions(self.image, regions, self.categories, side), "classes"))
        return Image.fromarray(side_by_side(*panels))

    def _objects(self) -> dict[str, tuple[Objects, Any]]:
        """The boxes and the masks that there are, with their shapes as drawings take them."""
        found: dict[str, tuple[Objects, Any]] = {}
        if self.boxes is not None:
            found["boxes"] = self.boxes, [one["bbox"] for one in self.results["detection"]]
        if self.masks is not None:
            found["masks"] = self.masks, self.masks.masks
        return found

    def _lines(self) -> list[str]:
        """Lines of other tasks about the image."""
        return [
            TASKS[n].describe(found, self.categories) for n, found in self.results.items() if n not in _SHOWN
        ]

    def to_coco(self, image_id: int) -> dict[str, Results]:
        """Task -> predictions in COCO's results format, as an evaluation writes them."""
        return {
            task: [{**one, "image_id": image_id} for one in results] for task, results in self.results.items()
        }
