"""Predictions for one image: boxes, masks and a caption with their names, and a drawing of them.

Letters: H W pixels of the image, n objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image

from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.pictures import SIDE, draw_objects, palette, side_by_side, with_text

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes of an image, the surest first."""

    xyxy: Floats  #: (n, 4) left, top, right, bottom in pixels of the image; may reach beyond its borders
    scores: Floats  #: (n,) from 0 to 1
    ids: npt.NDArray[np.int64]  #: (n,) category ids
    names: tuple[str, ...]  #: of the categories

    @classmethod
    def of(cls, results: Results, categories: Mapping[int, str]) -> Boxes:
        """From results in COCO's format, in their order."""
        corners = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in results)]
        xyxy = np.array(corners, dtype=np.float32).reshape(-1, 4)
        return cls(xyxy, *_labels(results, categories))

    def __len__(self) -> int:
        return len(self.scores)

    def shape(self, place: int) -> list[float]:
        """Left, top, width, height of one of them."""
        x0, y0, x1, y1 = self.xyxy[place].tolist()
        return [x0, y0, x1 - x0, y1 - y0]


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of an image, the surest first; they may overlap."""

    masks: npt.NDArray[np.bool_]  #: (n, H, W)
    scores: Floats  #: (n,) from 0 to 1
    ids: npt.NDArray[np.int64]  #: (n,) category ids
    names: tuple[str, ...]  #: of the categories

    @classmethod
    def of(cls, results: Results, categories: Mapping[int, str], size: tuple[int, int]) -> Masks:
        """From results in COCO's format for an image of `size` (height, width), in their order."""
        masks = np.zeros((0, *size), dtype=np.bool_)
        if results:
            masks = coco_mask.decode([result["segmentation"] for result in results]).transpose(2, 0, 1).astype(np.bool_)
        return cls(masks, *_labels(results, categories))

    def __len__(self) -> int:
        return len(self.scores)

    def shape(self, place: int) -> npt.NDArray[np.bool_]:
        """(H, W), one of them."""
        return self.masks[place]


def _labels(results: Results, categories: Mapping[int, str]) -> tuple[Floats, npt.NDArray[np.int64], tuple[str, ...]]:
    ids = [result["category_id"] for result in results]
    names = tuple(category_name(id_, categories) for id_ in ids)
    return np.array([result["score"] for result in results], dtype=np.float32), np.array(ids, dtype=np.int64), names


def category_name(id_: int, categories: Mapping[int, str]) -> str:
    """The name of a category; heads for COCO's ids may have classes that their training data had no name for."""
    return categories.get(id_, f"category {id_}")


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Boxes, masks and caption of one image, as far as the model has such heads."""

    image: npt.NDArray[np.uint8]  #: (H, W, 3) RGB, upright
    path: Path | None  #: of its file
    categories: Mapping[int, str]  #: names of all categories of the model by id
    boxes: Boxes | None = None  #: None: the model has no such task
    masks: Masks | None = None
    caption: str | None = None
    others: Mapping[str, Results] = field(default_factory=dict)  #: task of another package -> results

    def __repr__(self) -> str:
        parts = [f"{self.image.shape[0]} x {self.image.shape[1]} pixels"]
        parts += [] if self.boxes is None else [f"{len(self.boxes)} boxes"]
        parts += [] if self.masks is None else [f"{len(self.masks)} masks"]
        parts += [] if self.caption is None else [repr(self.caption)]
        parts += self._lines()
        return f"Prediction({'' if self.path is None else f'{self.path}: '}{', '.join(parts)})"

    def draw(self, threshold: float = 0.0, *, side: int = SIDE) -> Image.Image:
        """The image above its caption, its boxes and its masks beside each other.

        Args:
            threshold: least score that is drawn, beyond that of the prediction.
            side: length of the longer side of each panel's image, pixels.
        """
        colours = palette([*self.categories.values(), *_names(self.boxes), *_names(self.masks)])
        lines = [*([] if self.caption is None else [self.caption or "(no words)"]), *self._lines()]
        panels = [(with_text(self.image, lines, side), "image")]
        for kind, objects in (("boxes", self.boxes), ("masks", self.masks)):
            if objects is not None:
                shown = [place for place, score in enumerate(objects.scores) if score >= threshold]
                names = [objects.names[place] for place in shown]
                tags = [f"{objects.names[place]} {objects.scores[place]:.2f}" for place in shown]
                shapes: dict[str, Any] = {kind: [objects.shape(place) for place in shown]}
                picture = draw_objects(self.image, names, tags, colours, **shapes, side=side)
                panels.append((picture, f"{kind}: {len(names)}"))
        return Image.fromarray(side_by_side(*panels))

    def _lines(self) -> list[str]:
        """Lines of tasks of other packages about the image."""
        return [TASKS[task].describe(results, self.categories) for task, results in self.others.items()]

    def to_coco(self, image_id: int) -> dict[str, Results]:
        """Task -> predictions in COCO's results format, as an evaluation writes them."""
        found: dict[str, Results] = {}
        if self.boxes is not None:
            found["detection"] = [
                {"image_id": image_id, "category_id": id_, "bbox": self.boxes.shape(place), "score": score}
                for place, (id_, score) in enumerate(
                    zip(self.boxes.ids.tolist(), self.boxes.scores.tolist(), strict=True)
                )
            ]
        if self.masks is not None:
            codes = coco_mask.encode(self.masks.masks.transpose(1, 2, 0).astype(np.uint8, order="F"))
            masks = zip(codes, self.masks.scores.tolist(), self.masks.ids.tolist(), strict=True)
            found["segmentation"] = [
                {
                    "image_id": image_id,
                    "category_id": id_,
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode("ascii")},
                    "bbox": coco_mask.toBbox(code).tolist(),
                    "score": score,
                }
                for code, score, id_ in masks
            ]
        if self.caption is not None:
            found["captioning"] = [{"image_id": image_id, "caption": self.caption}]
        for task, results in self.others.items():
            found[task] = [{**result, "image_id": image_id} for result in results]
        return found


def _names(objects: Boxes | Masks | None) -> tuple[str, ...]:
    return () if objects is None else objects.names
