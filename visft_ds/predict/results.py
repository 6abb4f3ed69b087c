"""Predictions for one image: boxes, masks and a caption with their names, and a drawing of them.

Letters: H W pixels of the image, n objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image

from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.captioning.pictures import CAPTION_LINES, text_lines
from visft_ds.tasks.pictures import grid, palette, predicted_boxes, scaled, side_by_side
from visft_ds.tasks.segmentation.pictures import MaskArray, predicted_masks

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


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks of an image, the surest first; they may overlap."""

    masks: MaskArray  #: (n, H, W)
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

    def draw(self, threshold: float = 0.0, *, side: int = 448) -> Image.Image:
        """The image, its boxes and its masks beside each other, the caption below.

        Args:
            threshold: least score that is drawn, beyond that of the prediction.
            side: length of the longer side of each panel's image, pixels.
        """
        colours = palette([*self.categories.values(), *_names(self.boxes), *_names(self.masks)])
        panels = [(np.asarray(scaled(self.image, side)), "image")]
        if self.boxes is not None:
            xywh = self.boxes.xyxy.copy()
            xywh[:, 2:] -= xywh[:, :2]
            picture, count = predicted_boxes(
                self.image,
                xywh.tolist(),
                self.boxes.names,
                self.boxes.scores.tolist(),
                threshold=threshold,
                colours=colours,
                side=side,
            )
            panels.append((picture, f"boxes: {count}"))
        if self.masks is not None:
            picture, count = predicted_masks(
                self.image,
                list(self.masks.masks),
                self.masks.names,
                self.masks.scores.tolist(),
                threshold=threshold,
                colours=colours,
                side=side,
            )
            panels.append((picture, f"masks: {count}"))
        rows = [side_by_side(*panels)]
        if self.caption is not None:
            rows.append(text_lines("", self.caption, rows[0].shape[1], CAPTION_LINES))
        rows += [text_lines("", line, rows[0].shape[1], CAPTION_LINES) for line in self._lines()]
        return Image.fromarray(grid(rows, columns=1))

    def _lines(self) -> list[str]:
        """Lines of tasks of other packages about the image."""
        described = ((TASKS[task].describe, results) for task, results in self.others.items())
        return [describe(results, self.categories) for describe, results in described if describe is not None]

    def to_coco(self, image_id: int) -> dict[str, Results]:
        """Task -> predictions in COCO's results format, as an evaluation writes them."""
        found: dict[str, Results] = {}
        if self.boxes is not None:
            boxes = zip(self.boxes.xyxy.tolist(), self.boxes.scores.tolist(), self.boxes.ids.tolist(), strict=True)
            found["detection"] = [
                {"image_id": image_id, "category_id": id_, "bbox": [x0, y0, x1 - x0, y1 - y0], "score": score}
                for (x0, y0, x1, y1), score, id_ in boxes
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
