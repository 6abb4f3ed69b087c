"""Panoptic quality (Kirillov et al., arXiv 1801.00868, section 4), with void and crowds as in
https://github.com/cocodataset/panopticapi.

Letters: T true and P predicted segments of an image.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from visft_ds.data.transforms import FloatArray, Size
from visft_ds.tasks import Annotations, Numbers, Results, Truth
from visft_ds.tasks.masks.regions import by_image, segment_places

_SAME = 0.5  # IoU above which two segments are one
_IGNORED = 0.5  # part of a segment in void or crowds, above which it counts nowhere


def measure_panoptic(truth: Truth, results: Results, per_category: bool) -> Numbers:
    """PQ, SQ and RQ of all categories that the labels or the predictions have, of things and of stuff; in
    [0, 1], -1 where there is none of a kind.

    With `per_category` also `panoptic/PQ/<category name>`, SQ and RQ. `truth` has images, annotations (true
    segments, crowds included) and categories with `isthing`, as COCO writes them; predictions for other
    images are left out.

    Raises ValueError without true segments.
    """
    if not truth["annotations"]:
        raise ValueError("the data has no panoptic maps, which predictions are compared with")
    true = by_image(truth["annotations"])
    predicted = by_image(results)
    sums = {category["id"]: np.zeros(4) for category in truth["categories"]}
    for image in truth["images"]:
        size = image["height"], image["width"]
        _add(sums, true[image["id"]], predicted[image["id"]], size)
    qualities = {id_: _qualities(counts) for id_, counts in sums.items() if counts[1:].any()}
    kinds: dict[str, list[FloatArray]] = {"": [], "_things": [], "_stuff": []}
    for category in truth["categories"]:
        if category["id"] in qualities:
            quality = qualities[category["id"]]
            kinds[""].append(quality)
            kinds["_things" if category["isthing"] else "_stuff"].append(quality)
    metrics = dict[str, float]()
    for kind, of_kind in kinds.items():
        means = np.mean(of_kind, axis=0) if of_kind else np.full(3, -1.0)
        for name, value in zip(("PQ", "SQ", "RQ"), means.tolist(), strict=True):
            metrics[f"panoptic/{name}{kind}"] = value
    if per_category:
        for category in truth["categories"]:
            quality = qualities.get(category["id"], np.full(3, -1.0))
            for name, value in zip(("PQ", "SQ", "RQ"), quality.tolist(), strict=True):
                metrics[f"panoptic/{name}/{category['name']}"] = value
    return metrics


def _qualities(counts: FloatArray) -> FloatArray:
    """PQ, SQ and RQ of the sum of IoUs, and the numbers of true and false positives and false negatives."""
    iou, hits, false, missed = counts
    segments = hits + false / 2 + missed / 2
    return np.array([iou / segments, iou / max(hits, 1), hits / segments])


def _add(
    sums: Mapping[int, FloatArray],
    true: Annotations,
    predicted: Annotations,
    size: Size,
) -> None:
    """Count an image in."""
    columns = len(predicted) + 1
    pairs = segment_places(true, size) * columns + segment_places(predicted, size)
    pixels = np.bincount(pairs.ravel(), minlength=(len(true) + 1) * columns).reshape(-1, columns)
    common = pixels[1:, 1:]  # (T, P)
    in_void = pixels[0, 1:]
    true_areas = pixels.sum(axis=1)[1:]
    areas = pixels.sum(axis=0)[1:]
    true_ids = np.array([segment["category_id"] for segment in true], dtype=np.int64)
    ids = np.array([segment["category_id"] for segment in predicted], dtype=np.int64)
    is_crowd = np.array([segment["iscrowd"] for segment in true], dtype=bool)
    of_category = true_ids[:, None] == ids
    unions = true_areas[:, None] + areas - common - in_void
    ious = common / unions.clip(min=1)
    is_hit = (ious > _SAME) & of_category & ~is_crowd[:, None]
    for row, column in np.argwhere(is_hit):
        sums[int(true_ids[row])][:2] += ious[row, column], 1
    for row in np.flatnonzero(~is_hit.any(axis=1) & ~is_crowd):
        sums[int(true_ids[row])][3] += 1
    in_crowds = (common * (of_category & is_crowd[:, None])).sum(axis=0)
    is_ignored = in_void + in_crowds > _IGNORED * areas
    for column in np.flatnonzero(~is_hit.any(axis=0) & ~is_ignored):
        if int(ids[column]) in sums:
            sums[int(ids[column])][2] += 1
