"""Labels of boxes and of regions that predictions deny, the most doubtful first (boxes after ObjectLab, arXiv
2309.00832).

A score ranks labels of one split; `with_probabilities` says of which share of them the model is sure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask

from visft_ds.data.masks import object_of
from visft_ds.tasks import Annotation, Annotations, Truth
from visft_ds.tasks.classes import VOID
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.masks.regions import by_image
from visft_ds.tasks.semantic.results import number_map

Kind = Literal["class", "box", "nothing", "missing", "twice", "region", "caption"]
#: Kind of doubt -> what it says of the label.
KINDS: Mapping[Kind, str] = {
    "class": "another class",
    "box": "another box",
    "nothing": "no object there",
    "missing": "an object without a label",
    "twice": "a second label of the same object",
    "region": "another class of a region",
    "caption": "another picture's caption",
}
SAME = 0.5  #: overlap from which two boxes are of one object
DUPLICATE = 0.9  #: overlap from which two labels of a class are of one object
FREE = 0.3  #: overlap below which a prediction is of an object that no label is of
NEAR = 0.1  #: overlap from which a predicted box may be that of a label that lies beside its object
LEAST_SCORE = 0.2  #: of a prediction that proposes a box
LEAST_REGION = 0.001  #: share of a picture of a region that is looked at
ENOUGH = 100  #: labels from which on probabilities of error are estimated
_WINDOW = 9  # labels, next to each other by score, that the probability of the middle one is estimated from
_ONE_SIGMA = 0.159  # share of a normal distribution that lies more than its width below its centre


@dataclass(frozen=True)
class Doubt:
    """Label that predictions deny, or object that has none."""

    kind: Kind
    score: float  #: 0 to 1, the higher the more doubtful
    image_id: int
    given: Annotation | None  #: label; None: it is missing
    proposed: Annotation | None  #: what should stand in its place; None: nothing
    #: That the label is wrong, a cautious estimate; None: there are not enough labels to tell.
    probability: float | None = None


def doubts_of(labels: Annotations, predictions: Annotations) -> list[Doubt]:
    """A doubt for each label of a data set, and one for each object that seems to have none, the highest
    score first.

    Args:
        labels: annotations of COCO; crowds stay out, and so does what lies in them.
        predictions: in COCO's results format, those of low scores too.
    """
    labels_of_image = by_image(labels)
    predictions_of_image = by_image(predictions)
    doubts = list[Doubt]()
    for image_id in sorted(labels_of_image.keys() | predictions_of_image.keys()):
        doubts += doubts_of_image(image_id, labels_of_image[image_id], predictions_of_image[image_id])
    return sorted(doubts, key=lambda doubt: -doubt.score)


def doubts_of_image(image_id: int, labels: Annotations, predictions: Annotations) -> list[Doubt]:
    """The doubts about the labels of an image, as `doubts_of`."""
    crowds = [label for label in labels if label.get("iscrowd")]
    labels = [label for label in labels if not label.get("iscrowd")]
    overlaps = _overlaps(predictions, labels)  # (P, L)
    scores = np.array([prediction["score"] for prediction in predictions], dtype=np.float64)
    classes = np.array([prediction["category_id"] for prediction in predictions], dtype=np.int64)
    label_classes = np.array([label["category_id"] for label in labels], dtype=np.int64)
    is_same_class = classes[:, None] == label_classes
    support = scores[:, None] * overlaps
    agreeing = np.where(is_same_class, support, 0.0)
    denying = np.where(is_same_class, 0.0, support)
    own = agreeing.max(axis=0, initial=0.0)
    other = denying.max(axis=0, initial=0.0)
    doubtful = ((1 - own + other) / 2).tolist()
    #: What a prediction is of: a label of its class that it covers.
    is_taken = (is_same_class & (overlaps >= SAME)).any(axis=1)
    may_be_box = is_same_class & (overlaps >= NEAR) & (scores >= LEAST_SCORE)[:, None]
    may_be_box &= ~is_taken[:, None] | (overlaps >= SAME)
    doubts = list[Doubt]()
    proposed = set[int]()  # predictions that correct a label are no further objects
    twins = _twins(labels)
    for number, label in enumerate(labels):
        score = doubtful[number]
        if number in twins:
            doubts.append(Doubt("twice", (1 + twins[number]) / 2, image_id, label, None))
        elif other[number] > own[number] and overlaps[denying[:, number].argmax(), number] >= SAME:
            best = int(denying[:, number].argmax())
            proposed.add(best)
            correction = {**label, "category_id": predictions[best]["category_id"]}
            doubts.append(Doubt("class", score, image_id, label, correction))
        elif may_be_box[:, number].any():
            best = int(np.where(may_be_box[:, number], support[:, number], -1.0).argmax())
            proposed.add(best)
            doubts.append(Doubt("box", score, image_id, label, predictions[best]))
        else:
            doubts.append(Doubt("nothing", score, image_id, label, None))
    unclaimed = [prediction for number, prediction in enumerate(predictions) if number not in proposed]
    doubts += _missing(image_id, unclaimed, labels, crowds)
    return doubts


def with_probabilities(doubts: Sequence[Doubt]) -> list[Doubt]:
    """The doubts of `doubts_of`, with probabilities if they are about `ENOUGH` labels.

    A probability is a local false discovery rate (Efron, JASA 99, 2004): logits of the scores of right labels
    are taken to be normal about the median of all, and as wide as the lower half of all. Labels that are more
    than that are wrong. Wrong labels raise both the median and the width, so estimates are rather too low.
    Second labels of an object have none: predictions do not tell which of two it is.
    """
    uncertain = [doubt for doubt in doubts if doubt.given is not None and doubt.kind != "twice"]
    scores = np.clip([doubt.score for doubt in uncertain], 0.01, 0.99)
    if len(scores) < ENOUGH:
        return list(doubts)
    logits = np.log(scores / (1 - scores))
    centre = float(np.median(logits))
    width = centre - float(np.quantile(logits, _ONE_SIGMA))
    if width <= 0:
        return list(doubts)
    right = NormalDist(centre, width)
    #: How many right labels have at least the score of the first, the second and so on.
    expected = np.array([0.0] + [len(logits) * (1 - right.cdf(logit)) for logit in logits])
    numbers = np.arange(len(logits))
    starts = np.maximum(numbers - _WINDOW // 2, 0)
    ends = np.minimum(numbers + _WINDOW // 2 + 1, len(logits))
    shares_of_right = (expected[ends] - expected[starts]) / (ends - starts)
    falling = np.minimum.accumulate(np.clip(1 - shares_of_right, 0, 1)).tolist()
    probabilities = dict(zip(map(id, uncertain), falling, strict=True))
    return [replace(doubt, probability=probabilities.get(id(doubt))) for doubt in doubts]


def region_doubts(content: Truth, predictions: Annotations) -> list[Doubt]:
    """A doubt for each region of label maps of which some pixels are predicted to be of another class, the
    highest score first.

    A region is a connected part of a class. Its score is that of a box, `s` and `d` being the shares of its
    pixels that are predicted to be of its class, and of the most frequent other one.

    Args:
        content: COCO dictionary with an annotation for each class of an image.
        predictions: the same of what the head says.
    """
    labels_of_image = by_image(content["annotations"])
    predictions_of_image = by_image(predictions)
    ids = [category["id"] for category in content["categories"]]
    numbers = {category_id: number for number, category_id in enumerate(ids)}
    doubts = list[Doubt]()
    for image in content["images"]:
        size = image["height"], image["width"]
        answer = number_map(predictions_of_image[image["id"]], size, numbers)
        for label in labels_of_image[image["id"]]:
            for region in _parts(decode_mask(label["segmentation"], size)):
                counts = np.bincount(answer[region], minlength=VOID + 1)[: len(ids)]
                shares = counts / region.sum()
                number = numbers[label["category_id"]]
                own = shares[number]
                shares[number] = 0
                other = shares.max()
                if other > 0:
                    given = {**object_of(region), "category_id": label["category_id"]}
                    proposed = {**given, "category_id": ids[int(shares.argmax())]}
                    doubts.append(Doubt("region", float(1 - own + other) / 2, image["id"], given, proposed))
    return sorted(doubts, key=lambda doubt: -doubt.score)


def _parts(mask: npt.NDArray[np.bool_]) -> Iterator[npt.NDArray[np.bool_]]:
    """The connected parts (H, W) of a mask that are not too small to look at."""
    from scipy import ndimage  # a quarter of a second, which boxes do not need

    numbers, count = ndimage.label(mask)
    areas = np.bincount(numbers.ravel(), minlength=count + 1)
    for number in range(1, count + 1):
        if areas[number] >= LEAST_REGION * mask.size:
            yield numbers == number


def _missing(
    image_id: int,
    predictions: Annotations,
    labels: Annotations,
    crowds: Annotations,
) -> list[Doubt]:
    """A doubt for each certain prediction where no label is; of several of one object, the most certain."""
    nearest = _overlaps(predictions, labels).max(axis=1, initial=0.0)
    in_crowd = _overlaps(predictions, crowds, are_crowds=True).max(axis=1, initial=0.0)
    between = _overlaps(predictions, predictions)
    doubts = list[Doubt]()
    chosen = list[int]()
    for number in sorted(range(len(predictions)), key=lambda number: -predictions[number]["score"]):
        prediction = predictions[number]
        if prediction["score"] < LEAST_SCORE or nearest[number] >= FREE or in_crowd[number] >= SAME:
            continue
        if chosen and between[number, chosen].max() >= SAME:
            continue
        chosen.append(number)
        score = (1 + prediction["score"] - float(nearest[number])) / 2
        doubts.append(Doubt("missing", score, image_id, None, prediction))
    return doubts


def _twins(labels: Annotations) -> dict[int, float]:
    """Position of each label that repeats an earlier one -> their overlap."""
    overlaps = _overlaps(labels, labels)
    twins = dict[int, float]()
    for earlier, number in combinations(range(len(labels)), 2):
        is_same_class = labels[earlier]["category_id"] == labels[number]["category_id"]
        if is_same_class and overlaps[number, earlier] >= DUPLICATE:
            twins[number] = float(overlaps[number, earlier])
    return twins


def _overlaps(first: Annotations, second: Annotations, are_crowds: bool = False) -> npt.NDArray[np.float64]:
    """(n, m) intersections over unions of boxes; of crowds, over the area of the first box."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    boxes = [np.array([entry["bbox"] for entry in entries], dtype=np.float64) for entries in (first, second)]
    overlaps = coco_mask.iou(*boxes, [int(are_crowds)] * len(second))
    return np.asarray(overlaps, dtype=np.float64).reshape(len(first), len(second))
