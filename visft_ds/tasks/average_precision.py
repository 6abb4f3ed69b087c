"""COCO average precision of boxes and masks, and a compact form of results for gathering them from ranks.

Computed by faster-coco-eval, or by pycocotools, several times slower; the tests hold both against each other.
The ground truth of shards is `data.loader.coco_dataset(reader)`, so that no annotation file is needed.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
from faster_coco_eval import COCO, COCOeval_faster

from visft_ds.tasks import Results

IouType = Literal["bbox", "segm"]
Scorer = Literal["faster-coco-eval", "pycocotools"]

_PREFIX: dict[IouType, str] = {"bbox": "box", "segm": "mask"}
#: Places in the evaluator's summary, the order of the COCO API (https://cocodataset.org/#detection-eval).
_SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}

_PACKED_COLUMNS = 7


def coco_average_precision(
    ground_truth: Mapping[str, Any] | Path | str,
    results: Sequence[Mapping[str, Any]],
    iou_type: IouType = "bbox",
    *,
    per_category: bool = False,
    scorer: Scorer = "faster-coco-eval",
) -> dict[str, float]:
    """Average precision and recall by name.

    The names are `box/AP`, `box/AP50`, `box/AP75`, `box/APs`, `box/APm`, `box/APl`, `box/AR100`; with
    `per_category` also `box/AP/<category name>`. For masks (`iou_type="segm"`) they start with `mask/`. Values are in
    [0, 1]; -1 marks, as in the COCO API, a measure without any ground truth (no large object, say).

    `ground_truth` is a COCO dictionary or the path of its JSON file; neither it nor `results` is changed. `results`
    are in COCO's results format. A result of a category that the ground truth does not list is left out: a head with
    raw COCO ids has classes for ids that no category has. No results at all give zeros.

    Raises ValueError for a ground truth without images or categories, an annotation or result of an unknown image, an
    annotation of an unknown category, a score or box that is not finite, and an annotation or result without the box or
    mask it needs.
    """
    data = _load(ground_truth)
    categories = _names(data)
    truth = _plain_ground_truth(data, categories, iou_type)
    kept = _plain_results(results, {image["id"] for image in truth["images"]}, categories, iou_type)
    score = _by_pycocotools if scorer == "pycocotools" else _by_faster_coco_eval
    stats, precision, order = score(truth, kept, iou_type)
    prefix = _PREFIX[iou_type]
    measures = {f"{prefix}/{name}": float(stats[place]) for name, place in _SUMMARY.items()}
    if per_category:
        # (IoU thresholds, recall thresholds, categories, areas, detection limits): all areas, the largest limit
        for place, category_id in enumerate(order):
            values = precision[:, :, place, 0, -1]
            values = values[values > -1]
            measures[f"{prefix}/AP/{categories[int(category_id)]}"] = float(values.mean()) if values.size else -1.0
    return measures


def _by_faster_coco_eval(
    truth: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType
) -> tuple[Sequence[float], npt.NDArray[np.float64], Sequence[int]]:
    """Summary, precision (see `coco_average_precision`) and the order of its categories."""
    coco = COCO(truth)
    evaluation = COCOeval_faster(coco, coco.loadRes(results), iouType=iou_type, print_function=_quiet)
    evaluation.run()
    return evaluation.all_stats, np.asarray(evaluation.eval["precision"]), evaluation.params.catIds


def _by_pycocotools(
    truth: dict[str, Any], results: list[dict[str, Any]], iou_type: IouType
) -> tuple[Sequence[float], npt.NDArray[np.float64], Sequence[int]]:
    """The same by the reference, which prints what it does."""
    import pycocotools.coco
    import pycocotools.cocoeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco, found = pycocotools.coco.COCO(), pycocotools.coco.COCO()
        coco.dataset, found.dataset = truth, {**truth, "annotations": []}
        coco.createIndex()
        found.createIndex()  # `loadRes` cannot do without any result
        evaluation = pycocotools.cocoeval.COCOeval(coco, coco.loadRes(results) if results else found, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"], evaluation.params.catIds


def check_ground_truth(ground_truth: Mapping[str, Any], iou_type: IouType) -> None:
    """Raise ValueError, as `coco_average_precision` would, where nothing can be compared with this ground truth."""
    data = _load(ground_truth)
    _plain_ground_truth(data, _names(data), iou_type)


def pack_results(results: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float64]:
    """Box results as (n, 7) float64: image_id, category_id, x, y, w, h, score. Ids are exact below 2**53."""
    rows = [(r["image_id"], r["category_id"], *r["bbox"], r["score"]) for r in results]
    return np.array(rows, dtype=np.float64).reshape(-1, _PACKED_COLUMNS)


def unpack_results(packed: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """The inverse of `pack_results`; arrays of several ranks may be concatenated before."""
    return [
        {"image_id": int(row[0]), "category_id": int(row[1]), "bbox": row[2:6], "score": row[6]}
        for row in packed.tolist()
    ]


def _load(ground_truth: Mapping[str, Any] | Path | str) -> Mapping[str, Any]:
    where = "the ground truth" if isinstance(ground_truth, Mapping) else str(ground_truth)
    data = ground_truth if isinstance(ground_truth, Mapping) else orjson.loads(Path(ground_truth).read_bytes())
    for name in ("images", "categories"):
        if not data.get(name):
            raise ValueError(
                f"{where} has no {name}: average precision needs a COCO instances file or the shards' labels"
            )
    return data


def _names(data: Mapping[str, Any]) -> dict[int, str]:
    return {int(category["id"]): str(category["name"]) for category in data["categories"]}


def _plain_ground_truth(data: Mapping[str, Any], categories: Mapping[int, str], iou_type: IouType) -> dict[str, Any]:
    """Copy what the evaluator reads into new objects, because it writes into them.

    Annotations are numbered anew from 1: the evaluator marks "unmatched" by id 0, and ids need not be unique.
    """
    images = {int(image["id"]): image for image in data["images"]}
    annotations = []
    for number, annotation in enumerate(data.get("annotations", ()), start=1):
        image_id, category_id, bbox = annotation["image_id"], annotation["category_id"], annotation["bbox"]
        if image_id not in images or category_id not in categories:
            raise ValueError(
                f"annotation {annotation.get('id', number)} belongs to image_id {image_id} and category_id "
                f"{category_id}, of which the ground truth lists at least one not: the file is inconsistent"
            )
        if iou_type == "segm" and not annotation.get("segmentation"):
            raise ValueError(_without_mask(annotation.get("id", number), data["annotations"]))
        annotations.append(
            {
                "id": number,
                "image_id": image_id,
                "category_id": category_id,
                "bbox": list(bbox),
                "area": annotation.get("area", bbox[2] * bbox[3]),
                "iscrowd": annotation.get("iscrowd", 0),
                **({"segmentation": annotation["segmentation"]} if iou_type == "segm" else {}),
            }
        )
    return {
        "images": [{"id": id_, "width": image["width"], "height": image["height"]} for id_, image in images.items()],
        "annotations": annotations,
        "categories": [{"id": id_, "name": name} for id_, name in categories.items()],
    }


def _without_mask(first: int, annotations: Sequence[Mapping[str, Any]]) -> str:
    count = sum(not annotation.get("segmentation") for annotation in annotations)
    return (
        f"{count} of the {len(annotations)} annotations have no 'segmentation' (the first is annotation {first}), "
        "which mask AP compares with: nothing could ever match them. Leave these objects out of the data, or evaluate "
        "other tasks only"
    )


def _plain_results(
    results: Sequence[Mapping[str, Any]], image_ids: set[int], categories: Mapping[int, str], iou_type: IouType
) -> list[dict[str, Any]]:
    """Checked results of known categories, as new objects, with what this kind of evaluation needs and no more."""
    shape = "bbox" if iou_type == "bbox" else "segmentation"
    kept = []
    for result in results:
        image_id, score = result["image_id"], result["score"]
        if image_id not in image_ids:
            raise ValueError(f"there is a result for image_id {image_id}, which the ground truth does not have")
        # None: JSON has no NaN, so that is what a result file holds in its place.
        if score is None or not math.isfinite(score):
            raise ValueError(
                f"the score of a result for image_id {image_id} is {score}: the predictions are not finite"
            )
        if shape not in result:
            raise ValueError(f"a result for image_id {image_id} has no {shape!r}, which iou_type {iou_type!r} compares")
        if iou_type == "bbox" and not all(side is not None and math.isfinite(side) for side in result["bbox"]):
            raise ValueError(f"the box of a result for image_id {image_id} is {result['bbox']}: it is not finite")
        if result["category_id"] in categories:
            kept.append(
                {"image_id": image_id, "category_id": result["category_id"], "score": score, shape: result[shape]}
            )
    return kept


def _quiet(*_: object) -> None:
    """The evaluator's table; the numbers are returned instead."""


def average_precision_of(
    iou_type: IouType, truth: Mapping[str, Any], results: Results, each: bool, scorer: Scorer = "faster-coco-eval"
) -> dict[str, float]:
    """`coco_average_precision` with the arguments of `Evaluator.measure`."""
    return coco_average_precision(truth, results, iou_type, per_category=each, scorer=scorer)
