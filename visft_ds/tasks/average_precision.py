"""COCO average precision of boxes and masks: by pycocotools, whose numbers are those of record, and by
faster-coco-eval during training, which is several times faster.

The ground truth of shards is `visft_ds.data.dataset.coco_dataset(reader)`; no annotation file is needed.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from visft_ds.data.transforms import FloatArray
from visft_ds.tasks import Annotations, Names, Numbers, Results, Truth

#: Places among the IoU thresholds 0.50, 0.55, ... 0.95, and among the ranges of area, of the COCO API
#: (https://cocodataset.org/#detection-eval).
_IOU_50 = 0
_IOU_75 = 5
_ALL = 0
_SMALL = 1
_MEDIUM = 2
_LARGE = 3
#: Number of objects that are left out of the measures of masks, among which it stands if it is not 0.
WITHOUT_MASK = "mask/objects without mask"


def coco_average_precision(
    truth: Truth,
    results: Results,
    *,
    masks: bool = False,
    of_record: bool = False,
    max_detections: int = 100,
) -> Numbers:
    """Average precision and recall by name.

    The names are `box/AP`, `AP50`, `AP75`, `APs`, `APm`, `APl` and, with `max_detections` = 100, `AR100`.
    With `of_record` pycocotools measures, and there is also `box/AP/<category name>`. With `masks` the names
    begin with `mask/`, and objects that have none are left out and counted (`WITHOUT_MASK`). Of each image
    and category the `max_detections` results with the highest scores count. Values are in [0, 1]; -1 marks a
    measure without any ground truth (no large object, say), as in the COCO API.

    `truth` is a COCO dictionary, `results` are in COCO's results format; neither is changed. Results of
    categories that the ground truth does not list are left out: a head with raw COCO ids has classes for ids
    that no category has.

    Raises:
        ValueError: no categories; objects of which none has a mask; a result whose score or box is not
        finite.
    """
    prefix = "mask" if masks else "box"
    shape = "segmentation" if masks else "bbox"
    names = {int(category["id"]): str(category["name"]) for category in truth["categories"]}
    if not names:
        raise ValueError("average precision needs data with categories, and this has none")
    annotations = truth["annotations"]
    objects = annotations
    if masks:
        objects = [annotation for annotation in annotations if annotation.get("segmentation")]
    if annotations and not objects:
        raise ValueError(f"none of the {len(annotations)} objects has a mask, which mask AP compares with")
    _check_finite(results)
    # New objects, because the evaluator writes into them.
    predictions = []
    for result in results:
        if result["category_id"] in names:
            predictions.append({key: result[key] for key in ("image_id", "category_id", "score", shape)})
    ground_truth = _ground_truth(truth, objects, names, shape)
    kind = "segm" if masks else "bbox"
    precision, recall = _evaluated(ground_truth, predictions, kind, max_detections, of_record)
    measures = {
        f"{prefix}/AP": _mean(precision[..., _ALL]),
        f"{prefix}/AP50": _mean(precision[_IOU_50, ..., _ALL]),
        f"{prefix}/AP75": _mean(precision[_IOU_75, ..., _ALL]),
        f"{prefix}/APs": _mean(precision[..., _SMALL]),
        f"{prefix}/APm": _mean(precision[..., _MEDIUM]),
        f"{prefix}/APl": _mean(precision[..., _LARGE]),
        f"{prefix}/AR{max_detections}": _mean(recall[..., _ALL]),
    }
    if len(objects) < len(annotations):
        measures[WITHOUT_MASK] = float(len(annotations) - len(objects))
    if of_record:
        for position, category in enumerate(sorted(names)):
            measures[f"{prefix}/AP/{names[category]}"] = _mean(precision[:, :, position, _ALL])
    return measures


#: Precision (IoU thresholds, recall thresholds, categories in the order of their ids, ranges of area), and
#: recall (IoU thresholds, categories, ranges of area); -1 where there is no object.
_Curves = tuple[FloatArray, FloatArray]


def _mean(values: FloatArray) -> float:
    """The mean where there are objects; -1 where there is none at all."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def _evaluated(
    truth: dict[str, Any],
    predictions: list[dict[str, Any]],
    kind: str,
    max_detections: int,
    of_record: bool,
) -> _Curves:
    """Results of `kind` "bbox" or "segm" compared with the truth, by pycocotools if `of_record`.

    Its `summarize` knows 100 results of an image only.
    """
    new_index: Callable[[], Any] = COCO
    new_evaluation: Callable[..., Any] = partial(COCOeval_faster, print_function=print)
    if of_record:
        from pycocotools import coco, cocoeval

        new_index = coco.COCO
        new_evaluation = cocoeval.COCOeval
    with redirect_stdout(io.StringIO()):  # each step prints
        true = new_index()
        true.dataset = truth
        true.createIndex()
        results = new_index()  # by its own `loadRes`, none would be an error
        results.dataset = {**truth, "annotations": []}
        results.createIndex()
        if predictions:
            results = true.loadRes(predictions)
        evaluation = new_evaluation(true, results, kind)
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = np.asarray(evaluation.eval["precision"])
    recall = np.asarray(evaluation.eval["recall"])
    return precision[..., 0], recall[..., 0]


def _check_finite(results: Results) -> None:
    """Raise ValueError for a score or a box that is not finite."""
    numbers = [[result["score"], *result.get("bbox", ())] for result in results]
    if not np.isfinite(np.array(numbers, dtype=np.float64)).all():
        raise ValueError("a score or box of the predictions is not finite: the training has diverged")


def _ground_truth(
    truth: Truth,
    objects: Annotations,
    names: Names,
    shape: str,
) -> dict[str, Any]:
    """A COCO dictionary with all that the evaluator reads: these objects and categories, as new objects."""
    annotations = []
    for number, annotation in enumerate(objects, start=1):  # id 0 means "unmatched" there
        width, height = annotation["bbox"][2:]
        entry = {key: annotation[key] for key in ("image_id", "category_id", "bbox", shape)}
        entry["id"] = number
        entry["area"] = annotation.get("area", width * height)
        entry["iscrowd"] = annotation.get("iscrowd", 0)
        annotations.append(entry)
    return {
        "images": [{key: image[key] for key in ("id", "width", "height")} for image in truth["images"]],
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for id_, name in names.items()],
    }
