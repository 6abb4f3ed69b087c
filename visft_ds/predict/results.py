"""Predictions for one image: boxes, masks and a caption with their names, and a drawing of them.

Letters: H W pixels of the image, n objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image

from visft_ds.data.depth import Values, values_of
from visft_ds.data.labels import box_corners
from visft_ds.data.masks import code_of
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.depth.results import colour_range, coloured
from visft_ds.tasks.masks.regions import draw_regions, segment_numbers
from visft_ds.tasks.pictures import SIDE, draw_objects, palette, scaled, side_by_side, with_text
from visft_ds.tasks.semantic.results import number_map

Floats = npt.NDArray[np.float32]
_SHOWN_OBJECTS = 5  #: of a repr
_SHOWN = ("detection", "segmentation", "captioning")  #: tasks with an attribute of their own


@dataclass(frozen=True, eq=False)
class Instance:
    """Object of an image.

    Example:
        >>> instance = visft_ds.load("runs/stage2").predict("dog.jpg", threshold=0).masks[0]
        >>> instance.mask.shape, 0 <= instance.score <= 1
        ((56, 56), True)
    """

    name: str  #: name of its category
    id: int  #: category id
    score: float  #: from 0 to 1
    xyxy: Floats  #: (4,) left, top, right, bottom in pixels of the image; may extend past its border
    mask: npt.NDArray[np.bool_] | None = None  #: (H, W); None of a box without one


@dataclass(frozen=True, eq=False, repr=False)
class Objects:
    """Objects found in an image, sorted by confidence; each field has one entry per object."""

    scores: Floats  #: (n,) from 0 to 1
    ids: npt.NDArray[np.int64]  #: (n,) category ids
    names: npt.NDArray[np.str_]  #: (n,) names of the categories
    xyxy: Floats  #: (n, 4) left, top, right, bottom in pixels of the image; may extend past its border

    def __len__(self) -> int:
        return len(self.scores)

    @overload
    def __getitem__(self, index: int | np.integer[Any]) -> Instance: ...
    @overload
    def __getitem__(self, index: slice | npt.NDArray[Any] | Sequence[Any]) -> Self: ...
    def __getitem__(self, index: Any) -> Instance | Self:
        """Object as an `Instance`, or those that a slice, numbers or n booleans choose, as of an array.

        Raises IndexError for anything else, and beyond the last object.
        """
        chosen = np.arange(len(self))[index]
        if chosen.ndim > 1:
            raise IndexError(f"index {index!r}: give a number, a slice, or an array of numbers or booleans")
        values = {field.name: getattr(self, field.name)[chosen] for field in fields(self)}
        if chosen.ndim == 1:
            return type(self)(**values)
        return Instance(
            name=str(values["names"]),
            id=int(values["ids"]),
            score=float(values["scores"]),
            xyxy=values["xyxy"],
            mask=values.get("masks"),
        )

    def __iter__(self) -> Iterator[Instance]:
        for index in range(len(self)):
            yield self[index]

    def __repr__(self) -> str:
        shown = [f"{instance.name} {instance.score:.2f}" for instance in self[:_SHOWN_OBJECTS]]
        if len(self) > _SHOWN_OBJECTS:
            shown.append("...")
        return f"{type(self).__name__}({len(self)}: {', '.join(shown)})"

    def to_coco(self, image_id: int) -> Results:
        """The objects in COCO's results format: boxes as left, top, width, height; masks run-length coded."""
        results = Results()
        for instance in self:
            left, top, right, bottom = instance.xyxy.tolist()
            result = {
                "image_id": image_id,
                "category_id": instance.id,
                "bbox": [left, top, right - left, bottom - top],
                "score": instance.score,
            }
            if instance.mask is not None:
                result["segmentation"] = code_of(instance.mask)
            results.append(result)
        return results

    def to_supervision(self) -> Any:
        """`supervision.Detections` of the objects; their names are its `data["class_name"]`.

        Raises ValueError if supervision is not installed.
        """
        supervision = _library("supervision")
        return supervision.Detections(
            xyxy=self.xyxy,
            mask=getattr(self, "masks", None),
            confidence=self.scores,
            class_id=self.ids,
            data={"class_name": self.names},
        )

    def to_pandas(self) -> Any:
        """`pandas.DataFrame` with a row per object: name, id, score, and xmin, ymin, xmax, ymax in pixels.

        Raises ValueError if pandas is not installed.
        """
        columns: dict[str, Any] = {"name": self.names, "id": self.ids, "score": self.scores}
        for side, name in enumerate(("xmin", "ymin", "xmax", "ymax")):
            columns[name] = self.xyxy[:, side]
        return _library("pandas").DataFrame(columns)


def _library(name: str) -> Any:
    """A package that visft_ds does not bring along. Raises ValueError if it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"to_{name}() needs {error.name}, not installed here: pip install {name}") from error


class Boxes(Objects):
    """Boxes of an image, sorted by confidence.

    `boxes[0]` is the first as an `Instance`, and a loop takes one after the other. `boxes[:5]`,
    `boxes[boxes.scores > 0.5]` and `boxes[boxes.names == "cat"]` choose some, as of an array.

    Example:
        >>> boxes = visft_ds.load("runs/stage2").predict("dog.jpg", threshold=0).boxes
        >>> boxes.xyxy.shape, boxes[boxes.scores > 0.5].xyxy.shape[1], len(boxes[:2])
        ((4, 4), 4, 2)
        >>> [box.name for box in boxes] == list(boxes.names)
        True
    """


@dataclass(frozen=True, eq=False, repr=False)
class Masks(Objects):
    """Masks of an image, sorted by confidence; they may overlap.

    Indexed, iterated and filtered as `Boxes`; `xyxy` are the boxes around them.

    Example:
        >>> masks = visft_ds.load("runs/stage2").predict("dog.jpg", threshold=0).masks
        >>> masks.masks.shape[1:], sorted(masks.to_coco(image_id=1)[0])
        ((56, 56), ['bbox', 'category_id', 'image_id', 'score', 'segmentation'])
    """

    masks: npt.NDArray[np.bool_]  #: (n, H, W)


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Boxes, masks and caption of one image, as far as the model has such heads.

    Example:
        >>> prediction = visft_ds.load("runs/stage2").predict("dog.jpg", threshold=0)
        >>> prediction.image.shape, len(prediction.boxes), type(prediction.caption)
        ((56, 56, 3), 4, <class 'str'>)
        >>> prediction.draw().save("out.png")
    """

    #: (H, W, 3) RGB, upright; of a model of bands the first three, or the first as grey, over their range
    image: npt.NDArray[np.uint8]
    path: Path | None  #: its file, if it is from one
    categories: Mapping[int, str]  #: names of all categories of the model by id
    results: Mapping[str, Results]  #: task to predictions in COCO's results format, sorted by confidence
    has_instances: bool = False  #: results of the detection head have masks as well

    @property
    def instances(self) -> Boxes | Masks | None:
        """Objects of the image, each with one box, one score and, if the model has masks, one mask; None if
        it has no such head.

        Of a model with separate heads for boxes and masks, the masks: nothing says which box belongs to
        which.
        """
        return self.masks if self.masks is not None else self.boxes

    @cached_property
    def boxes(self) -> Boxes | None:
        """Boxes of the detection head; None if the model has none. Where it has masks, `masks` are of the
        same objects, in the same order.
        """
        results = self.results.get("detection")
        return None if results is None else Boxes(**self._fields(results))

    @cached_property
    def masks(self) -> Masks | None:
        """Masks of the segmentation head, or of the boxes' head if that has some; None without either."""
        results = self.results.get("detection" if self.has_instances else "segmentation")
        if results is None:
            return None
        masks = np.zeros((0, *self.image.shape[:2]), dtype=np.bool_)
        if results:
            decoded = coco_mask.decode([result["segmentation"] for result in results])  # (H, W, n)
            masks = decoded.transpose(2, 0, 1).astype(np.bool_)
        return Masks(**self._fields(results), masks=masks)

    @property
    def semantic(self) -> npt.NDArray[np.uint8] | None:
        """Category ids (H, W), the numbers of the label maps; None if the model has no semantic head."""
        results = self.results.get("semantic")
        if results is None:
            return None
        return number_map(results, self.image.shape[:2], {id_: id_ for id_ in self.categories})

    @property
    def depth(self) -> Values | None:
        """Metres (H, W) along the camera's axis; None if the model has no depth head.

        Of a head that learnt relative maps, where `depth_has_unit` is False: numbers above 0 of any scale and
        offset, the nearer the larger.
        """
        results = self.results.get("depth")
        return None if results is None else values_of(results[0]["depth"])

    @property
    def depth_has_unit(self) -> bool:
        """True if `depth` is in metres."""
        return "depth" in self.results and self.results["depth"][0]["depth"]["metres"] is not None

    @property
    def panoptic(self) -> npt.NDArray[np.int32] | None:
        """Segment (H, W) of each pixel, the `id` of an entry of `results["panoptic"]`, 0 of none; None if the
        model has no panoptic head.
        """
        results = self.results.get("panoptic")
        return None if results is None else segment_numbers(results, self.image.shape[:2])

    @property
    def caption(self) -> str | None:
        """Text of the captioning head; None if the model has none."""
        if "captioning" not in self.results:
            return None
        text: str = self.results["captioning"][0]["caption"]
        return text

    def _fields(self, results: Results) -> dict[str, Any]:
        """The fields of `Objects` by name."""
        ids = [result["category_id"] for result in results]
        names = [category_name(id_, self.categories) for id_ in ids]
        return {
            "scores": np.array([result["score"] for result in results], dtype=np.float32),
            "ids": np.array(ids, dtype=np.int64),
            "names": np.array(names, dtype=np.str_),
            "xyxy": box_corners(results).astype(np.float32),
        }

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
        boxes = [result["bbox"] for result in self.results.get("detection", ())]
        if self.has_instances and self.masks is not None:
            drawn = self._drawn(self.masks, side, boxes=boxes, masks=self.masks.masks)
            panels.append((drawn, f"objects: {len(self.masks)}"))
        elif self.boxes is not None:
            panels.append((self._drawn(self.boxes, side, boxes=boxes), f"boxes: {len(self.boxes)}"))
        if self.masks is not None and not self.has_instances:
            drawn = self._drawn(self.masks, side, masks=self.masks.masks)
            panels.append((drawn, f"masks: {len(self.masks)}"))
        for task, title in (("semantic", "classes"), ("panoptic", "segments")):
            regions = self.results.get(task)
            if regions:
                panels.append((draw_regions(self.image, regions, self.categories, side), title))
        depth = self.depth
        if depth is not None:
            title = "depth" if self.depth_has_unit else "relative depth"
            picture = coloured(depth, *colour_range(depth, relative=not self.depth_has_unit))
            panels.append((np.asarray(scaled(picture, side)), f"{title}, near is bright"))
        return Image.fromarray(side_by_side(*panels))

    def _drawn(self, objects: Objects, side: int, **shapes: Any) -> npt.NDArray[np.uint8]:
        """The image with the objects' shapes, `boxes` or `masks`, in colours that all panels share."""
        names = list(self.categories.values())
        for shown in (self.boxes, self.masks):
            if shown is not None:
                names += shown.names.tolist()
        tags = [f"{instance.name} {instance.score:.2f}" for instance in objects]
        return draw_objects(self.image, objects.names.tolist(), tags, palette(names), side=side, **shapes)

    def to_coco(self, image_id: int) -> dict[str, Results]:
        """Predictions by task in COCO's results format, as an evaluation writes them."""
        return {
            task: [{**result, "image_id": image_id} for result in results]
            for task, results in self.results.items()
        }
