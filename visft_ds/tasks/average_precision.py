"""COCO average precision of boxes and masks: by pycocotools, whose numbers are those of record, and by
faster-coco-eval during training, which is several times faster.

The ground truth of shards is `visft_ds.data.dataset.coco_dataset(reader)`; no annotation file is needed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

from visft_ds.tasks import Results

#: Measure -> its position in the evaluator's summary, the order of the COCO API
#: (https://cocodataset.org/#detection-eval).
_SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
#: Number of objects that are left out of the measures of masks, among which it stands if it is not 0.
WITHOUT_MASK = "mask/objects without mask"


def coco_average_precision(
    truth: Mapping[str, Any],
    results: Results,
    *,
    masks: bool = False,
    of_record: bool = False,
) -> dict[str, float]:
    """Average precision and recall by name.

    The names are `box/` and those of _SUMMARY. With `of_record` pycocotools measures, and there is also
    `box/AP/<category name>`. With `masks` the names begin with `mask/`, and objects that have none are left
    out and counted (`WITHOUT_MASK`). Values are in [0, 1]; -1 marks a measure without any ground truth (no
    large object, say), as in the COCO API.

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
    evaluate = _evaluate_of_record if of_record else _evaluate_fast
    summary, precision = evaluate(ground_truth, predictions, "segm" if masks else "bbox")
    measures = {}
    for name, position in _SUMMARY.items():
        measures[f"{prefix}/{name}"] = float(summary[position])
    if len(objects) < len(annotations):
        measures[WITHOUT_MASK] = float(len(annotations) - len(objects))
    if of_record:
        for position, category in enumerate(sorted(names)):
            of_category = precision[:, :, position]
            values = of_category[of_category > -1]
            measures[f"{prefix}/AP/{names[category]}"] = float(values.mean()) if values.size else -1.0
    return measures


#: The twelve numbers of the COCO API; and precision (IoU thresholds, recall thresholds, categories in the
#: order of their ids) of objects of any area and at most 100 predictions of an image.
_Evaluated = tuple[Sequence[float], npt.NDArray[np.float64]]


def _evaluate_fast(truth: dict[str, Any], predictions: list[dict[str, Any]], kind: str) -> _Evaluated:
    """Results of `kind` "bbox" or "segm" compared with the truth by faster-coco-eval."""
    coco = COCO(truth)
    evaluation = COCOeval_faster(
        coco, coco.loadRes(predictions), iouType=kind, print_function=lambda *_: None
    )
    evaluation.run()
    return evaluation.all_stats, np.asarray(evaluation.eval["precision"])[..., 0, -1]


def _evaluate_of_record(truth: dict[str, Any], predictions: list[dict[str, Any]], kind: str) -> _Evaluated:
    """The same by pycocotools."""
    import pycocotools.coco
    import pycocotools.cocoeval

    with redirect_stdout(io.StringIO()):  # each step of it prints
        coco = pycocotools.coco.COCO()
        coco.dataset = truth
        coco.createIndex()
        if predictions:
            results = coco.loadRes(predictions)
        else:  # which its loadRes fails on
            results = pycocotools.coco.COCO()
            results.dataset = {**truth, "annotations": []}
            results.createIndex()
        evaluation = pycocotools.cocoeval.COCOeval(coco, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"][..., 0, -1]


def _check_finite(results: Results) -> None:
    """Raise ValueError for a score or a box that is not finite."""
    numbers = [[result["score"], *result.get("bbox", ())] for result in results]
    if not np.isfinite(np.array(numbers, dtype=np.float64)).all():
        raise ValueError("a score or box of the predictions is not finite: the training has diverged")


def _ground_truth(
    truth: Mapping[str, Any],
    objects: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
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
