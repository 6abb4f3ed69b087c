"""An exported file beside our own predictions, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from visft_ds.predict.images import OpenedImage
from visft_ds.predict.model import Model
from visft_ds.predict.results import Masks, Objects, Prediction
from visft_ds.tasks import Results
from visft_ds.tasks.masks.regions import segment_places
from visft_ds.tasks.segmentation.head import choosing

BOXES = 1e-3  #: largest difference of a side, pixels
#: The same as a share of the longer side of a picture, where that is more: a DETR in float32 is up to 2e-6 of
#: it from itself in float64, in torch, and 5e-6 in onnxruntime.
SHARE = 1e-5
SCORES = 1e-5  #: largest difference of a score
MASKS = 0.999  #: least share of the pixels of a picture that a mask or class map has in common
DEPTHS = 1e-3  #: largest difference of a depth, as a share of the largest value of its picture
#: Largest number of pixels that differ, as a share of those at the borders of all masks or regions of a map:
#: rounding moves a few, a shift by half a pixel moves a quarter of them.
BORDERS = 0.01
FEATURES = 1e-4  #: largest difference of a map, as a share of its norm
#: Largest logit of a cell that one side takes for covered and the other does not, as a share of the largest
#: one of its picture.
CHOICES = 1e-4


class Choices:
    """Cells that the queries of an exported Mask2Former looked at, beside those that ours would.

    A query looks where its mask has a probability of at least one half. Rounding may move a cell to the other
    side, and then all that follows differs by more than rounding. So our prediction looks at the export's
    cells, and these may be others than ours only where a logit is almost 0.
    """

    def __init__(self) -> None:
        self.cells = 0  #: compared, over all pictures, layers and queries
        self.others = 0  #: of which only one side looked at
        self.farthest = 0.0  #: largest logit of these, as a share of the largest of its picture

    def predict(self, model: Model, image: OpenedImage, attended: npt.NDArray[np.bool_]) -> Prediction:
        """Our prediction for an image, with the export's cells (1, layers, Q, S)."""
        layers = iter(torch.from_numpy(attended).unbind(1))

        def choose(masks: Tensor, covered: Tensor) -> Tensor:
            theirs = next(layers)
            is_other = theirs != covered
            logits = masks.flatten(2).abs()
            self.cells += is_other.numel()
            self.others += int(is_other.sum())
            if is_other.any():
                self.farthest = max(self.farthest, float(logits[is_other].max() / logits.max()))
            return theirs

        with choosing(model.head("segmentation"), choose):
            (prediction,) = model.predict_opened([image], 0.0)
        return prediction

    def problems(self) -> list[str]:
        """Sentences about what is beyond the limits."""
        if self.farthest <= CHOICES:
            return []
        return [
            f"segmentation: queries look at other cells, {self.farthest:.2g} of the largest logit from the "
            f"threshold (limit {CHOICES:g})"
        ]

    def describe(self) -> str:
        """The numbers in a line."""
        text = f"segmentation: queries look at {self.others:,} other cells of {self.cells:,}"
        if self.others:
            text += f", at most {self.farthest:.0e} of the largest logit from the threshold"
        return text


@dataclass
class Difference:
    """The largest differences of a task on some pictures."""

    task: str
    objects: int = 0  #: compared
    boxes: float = 0.0  #: pixels
    beyond: int = 0  #: objects whose box differs by more than BOXES
    shares: float = 0.0  #: largest difference of these, as a share of the longer side of the picture
    scores: float = 0.0
    masks: float | None = None  #: least share of equal pixels of a mask or class map; None: there are none
    depths: float = 0.0  #: as a share of the largest value of a picture
    pixels: int = 0  #: of all masks or class maps that differ
    borders: int = 0  #: pairs of neighbouring pixels of which one is inside, or has another class
    other: str = ""  #: what cannot be compared at all, of the first such picture

    def problems(self) -> list[str]:
        """Sentences about what is beyond the limits."""
        problems = []
        if self.shares > SHARE:
            limits = f"limits {BOXES:g}, and {SHARE:g} of the longer side"
            problems.append(f"boxes differ by {self.boxes:.3g} pixels ({limits})")
        if self.scores > SCORES:
            problems.append(f"scores differ by {self.scores:.3g} (limit {SCORES:g})")
        if self.masks is not None and self.masks < MASKS:
            problems.append(f"{self.masks:.2%} of the pixels of a mask are equal (limit {MASKS:.1%})")
        if self.depths > DEPTHS:
            problems.append(f"depths differ by {self.depths:.2%} of the largest (limit {DEPTHS:.1%})")
        if self.pixels > max(1, BORDERS * self.borders):  # one is within rounding, however few there are
            problems.append(f"{self._pixels()} (limit {BORDERS:.0%})")
        if self.other:
            problems.append(self.other)
        return [f"{self.task}: {problem}" for problem in problems]

    def describe(self) -> str:
        """The numbers in a line."""
        if self.task == "captioning":
            return "captions equal"
        if self.task == "semantic":
            return self._pixels()
        if self.task == "depth":
            return f"depths differ by {self.depths:.1e} of the largest"
        if self.objects == 0:
            return "no objects on either side, nothing was compared"
        if self.task == "panoptic":
            return f"{self.objects} segments, scores {self.scores:.1e}, {self._pixels()}"
        text = f"{self.objects} objects, boxes {self.boxes:.1e} px"
        if self.beyond:
            text += f" ({self.beyond} beyond {BOXES:g})"
        text += f", scores {self.scores:.1e}"
        return text if self.masks is None else f"{text}, {self._pixels()}"

    def _pixels(self) -> str:
        return f"{self.pixels:,} pixels differ of {self.borders:,} at borders"

    def add(self, ours: Prediction, theirs: Prediction) -> None:
        """Count a picture in."""
        longer = max(ours.image.shape[:2])
        if self.task == "captioning":
            if ours.caption != theirs.caption:
                self._say(f"caption {theirs.caption!r}, ours {ours.caption!r}")
        elif self.task == "semantic":
            assert ours.semantic is not None and theirs.semantic is not None
            self._add_mask(ours.semantic, theirs.semantic)
        elif self.task == "depth":
            assert ours.depth is not None and theirs.depth is not None
            apart = float(np.abs(ours.depth - theirs.depth).max() / ours.depth.max())
            self.depths = max(self.depths, apart)
        elif self.task == "panoptic":
            self._add_segments(ours.results["panoptic"], theirs.results["panoptic"], ours.image.shape[:2])
        elif self.task == "segmentation" or ours.has_instances:
            assert ours.masks is not None and theirs.masks is not None
            self._add_objects(ours.masks, theirs.masks, longer)
        else:
            assert ours.boxes is not None and theirs.boxes is not None
            self._add_objects(ours.boxes, theirs.boxes, longer)

    def _add_objects(self, ours: Objects, theirs: Objects, longer: int) -> None:
        if len(ours) != len(theirs):
            self._say(f"{len(theirs)} objects, ours {len(ours)}")
            return
        # Equal scores may stand in any order: each object is compared with the nearest one of its category.
        apart = np.abs(ours.xyxy[:, None] - theirs.xyxy[None]).max(axis=2, initial=0)
        unequal = np.abs(ours.scores[:, None] - theirs.scores[None])
        costs = apart + unequal + 1e6 * (ours.ids[:, None] != theirs.ids[None])
        rows, columns = linear_sum_assignment(costs)
        if (ours.ids[rows] != theirs.ids[columns]).any():
            self._say("other categories")
            return
        self.objects += len(rows)
        for row, column in zip(rows, columns, strict=True):
            side = apart[row, column]
            score = unequal[row, column]
            if isinstance(ours, Masks) and isinstance(theirs, Masks):
                mask = ours.masks[row]
                moved = self._add_mask(mask, theirs.masks[column])
                if self.task == "segmentation":
                    # Boxes are those around masks, scores have the mean probability inside: a pixel that
                    # rounding moves has one half there.
                    side = np.abs(_around(theirs.masks[column]) - theirs.xyxy[column]).max()
                    score = score - 0.5 * moved / max(1, mask.sum())
            self.boxes = max(self.boxes, float(side))
            if side > BOXES:
                self.beyond += 1
                self.shares = max(self.shares, float(side) / longer)
            self.scores = max(self.scores, float(score))

    def _add_segments(self, ours: Results, theirs: Results, size: tuple[int, int]) -> None:
        if len(ours) != len(theirs):
            self._say(f"{len(theirs)} segments, ours {len(ours)}")
            return
        # Each segment is compared with that of its category which shares the most pixels with it.
        our_places = segment_places(ours, size)
        their_places = segment_places(theirs, size)
        columns = len(ours) + 1
        pairs = np.bincount((our_places * columns + their_places).ravel(), minlength=columns**2)
        common = pairs.reshape(columns, columns)[1:, 1:]
        our_ids = np.array([segment["category_id"] for segment in ours])
        their_ids = np.array([segment["category_id"] for segment in theirs])
        is_other = our_ids[:, None] != their_ids
        rows, matches = linear_sum_assignment(common - math.prod(size) * is_other, maximize=True)
        if is_other[rows, matches].any():
            self._say("segments of other categories")
            return
        self.objects += len(ours)
        numbers = np.zeros(columns, dtype=np.int32)
        numbers[matches + 1] = rows + 1
        self._add_mask(our_places, numbers[their_places])
        for row, match in zip(rows, matches, strict=True):
            self.scores = max(self.scores, abs(ours[row]["score"] - theirs[match]["score"]))

    def _add_mask(self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> int:
        """Count a mask or class map in; returns how many pixels differ."""
        moved = int((ours != theirs).sum())
        equal = 1 - moved / ours.size
        self.masks = equal if self.masks is None else min(self.masks, equal)
        self.pixels += moved
        for axis in (0, 1):
            self.borders += int(np.count_nonzero(np.diff(ours.astype(np.int16), axis=axis)))
        return moved

    def _say(self, text: str) -> None:
        self.other = self.other or text


def _around(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Left, top, right and bottom of the smallest box around a mask (H, W) that is not empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])


def compare(
    tasks: Sequence[str],
    ours: Sequence[Prediction],
    theirs: Sequence[Prediction],
) -> dict[str, Difference]:
    """Differences of all tasks on the same pictures."""
    differences = {task: Difference(task) for task in tasks}
    for our, their in zip(ours, theirs, strict=True):
        for difference in differences.values():
            difference.add(replace(our), replace(their))  # copies: masks they decode go with them
    return differences


def results_of(predictions: Mapping[int, Prediction], task: str) -> Results:
    """Results of a task in COCO's format, of predictions by image id."""
    results = Results()
    for image_id, prediction in predictions.items():
        results += prediction.to_coco(image_id)[task]
    return results
