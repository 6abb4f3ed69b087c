"""An exported file beside our own predictions, picture by picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from visft_ds.predict.results import Objects, Prediction
from visft_ds.tasks import Results

BOXES = 1e-3  #: largest difference of a side, pixels
SCORES = 1e-5  #: largest difference of a score
MASKS = 0.999  #: least share of the pixels of a picture that a mask or class map has in common
DEPTHS = 1e-3  #: largest difference of a depth, as a share of the farthest one of its picture
FEATURES = 1e-4  #: largest difference of a map, as a share of its norm


@dataclass
class Difference:
    """The largest differences of a task on some pictures."""

    task: str
    objects: int = 0  #: compared
    boxes: float = 0.0  #: pixels
    scores: float = 0.0
    masks: float | None = None  #: least share of equal pixels of a mask or class map; None: there are none
    depths: float = 0.0  #: as a share of the farthest depth of a picture
    other: str = ""  #: what cannot be compared at all, of the first such picture

    def problems(self) -> list[str]:
        """Sentences about what is beyond the limits."""
        problems = []
        if self.boxes > BOXES:
            problems.append(f"boxes differ by {self.boxes:.3g} pixels (limit {BOXES:g})")
        if self.scores > SCORES:
            problems.append(f"scores differ by {self.scores:.3g} (limit {SCORES:g})")
        if self.masks is not None and self.masks < MASKS:
            problems.append(f"{self.masks:.2%} of the pixels of a mask are equal (limit {MASKS:.1%})")
        if self.depths > DEPTHS:
            problems.append(f"depths differ by {self.depths:.2%} of the farthest (limit {DEPTHS:.1%})")
        if self.other:
            problems.append(self.other)
        return [f"{self.task}: {problem}" for problem in problems]

    def describe(self) -> str:
        """The numbers in a line."""
        if self.task == "captioning":
            return "captions equal"
        if self.task == "semantic":
            return f"{self.masks:.3%} of pixels equal"
        if self.task == "depth":
            return f"depths differ by {self.depths:.1e} of the farthest"
        if self.objects == 0:
            return "no objects on either side, nothing was compared"
        text = f"{self.objects} objects, boxes {self.boxes:.1e} px, scores {self.scores:.1e}"
        return text if self.masks is None else f"{text}, masks {self.masks:.3%} equal"

    def add(self, ours: Prediction, theirs: Prediction) -> None:
        """Count a picture in."""
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
        elif self.task == "segmentation" or ours.has_instances:
            assert ours.masks is not None and theirs.masks is not None
            self._add_objects(ours.masks, theirs.masks)
        else:
            assert ours.boxes is not None and theirs.boxes is not None
            self._add_objects(ours.boxes, theirs.boxes)

    def _add_objects(self, ours: Objects, theirs: Objects) -> None:
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
        self.boxes = max(self.boxes, float(apart[rows, columns].max(initial=0)))
        self.scores = max(self.scores, float(unequal[rows, columns].max(initial=0)))
        if hasattr(ours, "masks") and hasattr(theirs, "masks"):
            for row, column in zip(rows, columns, strict=True):
                self._add_mask(ours.masks[row], theirs.masks[column])

    def _add_mask(self, ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> None:
        equal = float((ours == theirs).mean())
        self.masks = equal if self.masks is None else min(self.masks, equal)

    def _say(self, text: str) -> None:
        self.other = self.other or text


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
