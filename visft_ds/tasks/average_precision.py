"""COCO average precision of boxes and masks by faster-coco-eval.

The ground truth of shards is `visft_ds.data.dataset.coco_dataset(reader)`; no annotation file is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from visft_ds.tasks import Results

#: Places in the evaluator's summary, the order of the COCO API (https://cocodataset.org/#detection-eval).
_SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
#: Number of objects that are left out of the measures of masks, among which it stands if it is not 0.
WITHOUT_MASK = "mask/objects without mask"


def coco_average_precision(
    truth: Mapping[str, Any], results: Results, *, masks: bool = False, per_category: bool = False
) -> dict[str, float]:
    """Average precision and recall by name.

    The names are `box/` and those of _SUMMARY; with `per_category` also `box/AP/<category name>`. With
    `masks` they begin with `mask/`, and objects that have none are left out and counted (`WITHOUT_MASK`).
    Values are in [0, 1]; -1 marks a measure without any ground truth (no large object, say), as in the COCO
    API.

    `truth` is a COCO dictionary, `results` are in COCO's results format; neither is changed. Results of
    categories that the ground truth does not list are left out: a head with raw COCO ids has classes for ids
    that no category has.

    Raises:
        ValueError: no categories; objects of which none has a mask; a result whose score or box is not
        finite.
    """
    prefix, shape, iou_type = ("mask", "segmentation", "segm") if masks else ("box", "bbox", "bbox")
    names = {int(category["id"]): str(category["name"]) for category in truth["categories"]}
    if not names:
        raise ValueError("average precision needs data with categories, and this has none")
    objects = [one for one in truth["annotations"] if not masks or one.get("segmentation")]
    if truth["annotations"] and not objects:
        raise ValueError(
            f"none of the {len(truth['annotations'])} objects has a mask, which mask AP compares with"
        )
    found = [{key: one[key] for key in ("image_id", "category_id", "score", shape)} for one in results]
    numbers = [[one["score"], *one.get("bbox", ())] for one in found]
    if not np.isfinite(np.array(numbers, dtype=np.float64)).all():
        raise ValueError("a score or box of the predictions is not finite: the training has diverged")
    # New objects, because the evaluator writes into them. They are numbered from 1: id 0 means "unmatched"
    # there.
    coco = COCO(
        {
            "images": [{key: image[key] for key in ("id", "width", "height")} for image in truth["images"]],
            "annotations": [
                {
                    "id": number,
                    "area": one.get("area", one["bbox"][2] * one["bbox"][3]),
                    "iscrowd": one.get("iscrowd", 0),
                    **{key: one[key] for key in {"image_id", "category_id", "bbox", shape}},
                }
                for number, one in enumerate(objects, start=1)
            ],
            "categories": [{"id": id_, "name": name} for id_, name in names.items()],
        }
    )
    kept = [one for one in found if one["category_id"] in names]
    evaluation = COCOeval_faster(coco, coco.loadRes(kept), iouType=iou_type, print_function=lambda *_: None)
    evaluation.run()
    measures = {f"{prefix}/{name}": float(evaluation.all_stats[place]) for name, place in _SUMMARY.items()}
    if len(objects) < len(truth["annotations"]):
        measures[WITHOUT_MASK] = float(len(truth["annotations"]) - len(objects))
    if per_category:
        # (IoU thresholds, recall thresholds, categories, areas, detection limits): all areas, the largest
        # limit
        precision = np.asarray(evaluation.eval["precision"])[..., 0, -1]
        for place, category in enumerate(evaluation.params.catIds):
            values = precision[:, :, place][precision[:, :, place] > -1]
            measures[f"{prefix}/AP/{names[int(category)]}"] = float(values.mean()) if values.size else -1.0
    return measures
