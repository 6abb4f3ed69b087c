"""An exported file beside our own predictions, picture by picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
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
_NEVER = 1e9  #: cost of a pair of two categories


@dataclass
class Difference:
    """The largest differences of a task on some pictures."""

    task: str
    objects: int = 0  #: compared
    boxes: float = 0.0  #: pixels
    beyond: int = 0  #: objects whose box differs by more than BOXES
    shares: float = 0.0  #: largest difference of these, as a share of the longer side of the picture
    scores: float = 0.0
    masks: float = 1.0  #: least share of equal pixels of a mask or class map
    depths: float = 0.0  #: as a share of the largest value of a picture
    pixels: int = 0  #: of all masks or class maps that differ
    borders: int = 0  #: pairs of neighbouring pixels of which one is inside, or has another class
    other: str = ""  #: what cannot be compared at all, of the first such picture
    cells: int = 0  #: that queries of a Mask2Former could look at, compared
    choices: int = 0  #: of which only one side looked at
    farthest: float = 0.0  #: largest logit of these, as a share of the largest of its picture

    def problems(self) -> list[str]:
        """Sentences about what is beyond the limits."""
        problems = [self.other] if self.other else []
        if self.shares > SHARE:
            limits = f"limits {BOXES:g}, and {SHARE:g} of the longer side"
            problems.append(f"boxes differ by {self.boxes:.3g} pixels ({limits})")
        if self.scores > SCORES:
            problems.append(f"scores differ by {self.scores:.3g} (limit {SCORES:g})")
        if self.masks < MASKS:
            problems.append(f"{self.masks:.2%} of the pixels of a mask are equal (limit {MASKS:.1%})")
        if self.depths > DEPTHS:
            problems.append(f"depths differ by {self.depths:.2%} of the largest (limit {DEPTHS:.1%})")
        if self.pixels > max(1, BORDERS * self.borders):  # one is within rounding, however few there are
            problems.append(f"{self._pixels()} (limit {BORDERS:.0%})")
        if self.farthest > CHOICES:
            problems.append(f"{self._choices()} (limit {CHOICES:g})")
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
        if self.borders:
            text += f", {self._pixels()}"
        return f"{text}, {self._choices()}" if self.cells else text

    def _pixels(self) -> str:
        return f"{self.pixels:,} pixels differ of {self.borders:,} at borders"

    def _choices(self) -> str:
        text = f"queries look at {self.choices:,} other cells of {self.cells:,}"
        return (
            f"{text}, {self.farthest:.0e} of the largest logit from the threshold" if self.choices else text
        )

    def follow(self, model: Model, image: OpenedImage, attended: npt.NDArray[np.bool_]) -> Prediction:
        """Our prediction with the cells (1, layers, Q, S) that an exported Mask2Former looked at.

        A query looks where its mask has a probability of at least one half. Rounding may move a cell to the
        other side, and then all that follows differs by more than rounding. So our prediction looks at the
        export's cells, and these may be others than ours only where a logit is almost 0.
        """
        layers = iter(torch.from_numpy(attended).unbind(1))

        def choose(masks: Tensor, covered: Tensor) -> Tensor:
            theirs = next(layers)
            is_other = theirs != covered
            logits = masks.flatten(2).abs()
            self.cells += is_other.numel()
            self.choices += int(is_other.sum())
            if is_other.any():
                self.farthest = max(self.farthest, float(logits[is_other].max() / logits.max()))
            return theirs

        with choosing(model.head("segmentation"), choose):
            (prediction,) = model.predict_opened([image], 0.0)
        return prediction

    def add(self, ours: Prediction, theirs: Prediction) -> None:
        """Count a picture in."""
        size = ours.image.shape[:2]
        our_answer = _answer(self.task, ours)
        their_answer = _answer(self.task, theirs)
        if self.task == "captioning":
            if our_answer != their_answer:
                self._say(f"caption {their_answer!r}, ours {our_answer!r}")
        elif self.task == "semantic":
            self._add_mask(our_answer, their_answer)
        elif self.task == "depth":
            apart = np.abs(our_answer - their_answer).max() / our_answer.max()
            self.depths = max(self.depths, float(apart))
        elif self.task == "panoptic":
            self._add_segments(our_answer, their_answer, size)
        else:
            self._add_objects(our_answer, their_answer, max(size))

    def _add_objects(self, ours: Objects, theirs: Objects, longer: int) -> None:
        # Equal scores may stand in any order: each object is compared with the nearest one of its category.
        apart = np.abs(ours.xyxy[:, None] - theirs.xyxy[None]).max(axis=2, initial=0)
        unequal = np.abs(ours.scores[:, None] - theirs.scores[None])
        for row, column in self._pairs("objects", ours.ids, theirs.ids, apart + unequal):
            side = apart[row, column]
            score = unequal[row, column]
            if isinstance(ours, Masks) and isinstance(theirs, Masks):
                mask = theirs.masks[column]
                moved = self._add_mask(ours.masks[row], mask)
                if self.task == "segmentation":
                    # Boxes are those around masks, scores have the mean probability inside: a pixel that
                    # rounding moves has one half there.
                    around: Any = Image.fromarray(mask).getbbox()
                    side = np.abs(around - theirs.xyxy[column]).max()
                    score = score - 0.5 * moved / max(1, ours.masks[row].sum())
            self.boxes = max(self.boxes, float(side))
            if side > BOXES:
                self.beyond += 1
                self.shares = max(self.shares, float(side) / longer)
            self.scores = max(self.scores, float(score))

    def _add_segments(self, ours: Results, theirs: Results, size: tuple[int, int]) -> None:
        # Each segment is compared with that of its category which shares the most pixels with it.
        our_places = segment_places(ours, size)
        their_places = segment_places(theirs, size)
        columns = len(theirs) + 1
        shape = (len(ours) + 1, columns)
        common = np.bincount((our_places * columns + their_places).ravel(), minlength=math.prod(shape))
        our_ids = [segment["category_id"] for segment in ours]
        their_ids = [segment["category_id"] for segment in theirs]
        pairs = self._pairs("segments", our_ids, their_ids, -common.reshape(shape)[1:, 1:])
        numbers = np.zeros(columns, dtype=np.int32)
        for row, column in pairs:
            numbers[column + 1] = row + 1
            self.scores = max(self.scores, abs(ours[row]["score"] - theirs[column]["score"]))
        if pairs:
            self._add_mask(our_places, numbers[their_places])

    def _pairs(
        self, kind: str, our_ids: npt.ArrayLike, their_ids: npt.ArrayLike, costs: npt.NDArray[Any]
    ) -> list[tuple[int, int]]:
        """Each of ours with one of theirs of its category, at the least costs; none where that cannot be."""
        number, their_number = costs.shape
        if number != their_number:
            self._say(f"{their_number} {kind}, ours {number}")
            return []
        is_other = np.not_equal.outer(our_ids, their_ids)
        rows, columns = linear_sum_assignment(np.where(is_other, _NEVER, costs))
        if is_other[rows, columns].any():
            self._say(f"{kind} of other categories")
            return []
        self.objects += len(rows)
        return list(zip(rows, columns, strict=True))

    def _add_mask(self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> int:
        """Count a mask or class map in; returns how many pixels differ."""
        moved = int((ours != theirs).sum())
        self.masks = min(self.masks, 1 - moved / ours.size)
        self.pixels += moved
        for axis in (0, 1):
            self.borders += int(np.count_nonzero(np.diff(ours.astype(np.int16), axis=axis)))
        return moved

    def _say(self, text: str) -> None:
        self.other = self.other or text


def _answer(task: str, prediction: Prediction) -> Any:
    """What a prediction says of a task."""
    if task == "panoptic":
        return prediction.results[task]
    if task == "detection":
        return prediction.masks if prediction.has_instances else prediction.boxes
    return getattr(prediction, {"captioning": "caption", "segmentation": "masks"}.get(task, task))
