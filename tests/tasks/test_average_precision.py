"""Average precision: by both evaluators that of pycocotools, from shards as from the JSON file, without objects that have no
mask.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pycocotools.coco
import pycocotools.cocoeval
import pycocotools.mask
import pytest

from visft_ds.data.dataset import coco_dataset
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.tasks.average_precision import WITHOUT_MASK, coco_average_precision

SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
Results = list[dict[str, Any]]


def _truth(images: int = 12) -> dict[str, Any]:
    """Objects of all sizes, some of them crowds, in categories 1, 5, 90; category 7 has none; one image is
    empty.
    """
    rng = np.random.default_rng(0)
    annotations = []
    for image_id in range(1, images):
        for _ in range(int(rng.integers(1, 9))):
            x, y = rng.uniform(0, 200, 2).tolist()
            width, height = (float(side) for side in 10 ** rng.uniform(0.8, 2.4, 2))
            annotations.append(
                {
                    "id": 500 + len(annotations),
                    "image_id": image_id,
                    "category_id": int(rng.choice([1, 5, 90])),
                    "bbox": [x, y, width, height],
                    "area": 0.7 * width * height,  # of the mask; decides what counts as small
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": [[x, y, x + width, y, x + width, y + height]],
                }
            )
    return {
        "images": [{"id": n, "width": 500, "height": 500, "file_name": f"{n}.jpg"} for n in range(images)],
        "annotations": annotations,
        "categories": [{"id": n, "name": f"name {n}"} for n in (1, 5, 7, 90)],
    }


def _results(truth: dict[str, Any]) -> Results:
    """Moved copies of the objects, some scores equal; false ones; more than the limit of 100 in one image."""
    rng = np.random.default_rng(1)
    results = []
    for annotation in truth["annotations"]:
        for _ in range(2):
            box = np.array(annotation["bbox"])
            moved = box + rng.normal(0, 0.08, 4) * box[2:].repeat(2)
            category = annotation["category_id"] if rng.random() < 0.9 else 5
            results.append(
                _result(annotation["image_id"], category, moved.tolist(), round(rng.uniform(0.2, 1), 1))
            )
    for _ in range(150):
        results.append(_result(2, 1, rng.uniform(1, 200, 4).tolist(), round(rng.uniform(), 1)))
    return results


def _result(image_id: int, category_id: int, bbox: list[float], score: float) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def _as_masks(results: Results) -> Results:
    masks = []
    for result in results:
        x, y, width, height = result["bbox"]
        corners = [[x, y, x + width, y, x + width, y + height]]
        mask = pycocotools.mask.merge(pycocotools.mask.frPyObjects(corners, 500, 500))
        masks.append(
            {**{name: result[name] for name in ("image_id", "category_id", "score")}, "segmentation": mask}
        )
    return masks


def _oracle(truth: dict[str, Any], results: Results, iou_type: str) -> tuple[Any, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = pycocotools.coco.COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = pycocotools.cocoeval.COCOeval(coco, coco.loadRes(copy.deepcopy(results)), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval["precision"]


@pytest.mark.parametrize(("iou_type", "prefix"), [("bbox", "box"), ("segm", "mask")])
def test_numbers_are_those_of_pycocotools(
    iou_type: str, prefix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    truth = _truth()
    results = _results(truth) if iou_type == "bbox" else _as_masks(_results(truth))
    stats, precision = _oracle(truth, results, iou_type)
    before = copy.deepcopy((truth, results))
    fast = coco_average_precision(truth, results, masks=iou_type == "segm")
    ours = coco_average_precision(truth, results, masks=iou_type == "segm", of_record=True)
    assert capfd.readouterr() == ("", "") and (truth, results) == before
    assert 0.05 < stats[0] < 0.9, "the case must not be trivial"
    for name, place in SUMMARY.items():
        assert ours[f"{prefix}/{name}"] == stats[place], name
        # float64 means of the same hundred numbers, summed in another order
        assert fast[f"{prefix}/{name}"] == pytest.approx(stats[place], abs=1e-12), name
    for place, category in enumerate((1, 5, 7, 90)):
        expected = precision[:, :, place, 0, -1].mean()  # all -1 for category 7, which has no object
        assert ours[f"{prefix}/AP/name {category}"] == pytest.approx(expected, abs=1e-12)
    assert len(ours) == len(SUMMARY) + 4 and len(fast) == len(SUMMARY)


@pytest.mark.parametrize("of_record", [False, True])
def test_all_objects_of_a_full_picture_count(of_record: bool) -> None:
    """Perfect results for 180 objects have AP 1, and 100 of them may not be all that is looked at."""
    objects = []
    for number in range(180):
        row, column = divmod(number, 20)
        box = [column * 24.0, row * 24.0, 20.0, 20.0]
        objects.append(
            {"id": number + 1, "image_id": 1, "category_id": 1, "bbox": box, "area": 400.0, "iscrowd": 0}
        )
    truth = {
        "images": [{"id": 1, "width": 500, "height": 500, "file_name": "1.jpg"}],
        "annotations": objects,
        "categories": [{"id": 1, "name": "cell"}],
    }
    results = [_result(1, 1, entry["bbox"], 0.9) for entry in objects]
    measured = coco_average_precision(truth, results, of_record=of_record, max_detections=300)
    assert measured["box/AP"] == measured["box/AR300"] == 1
    hundred = coco_average_precision(truth, results, of_record=of_record)
    assert hundred["box/AR100"] == pytest.approx(100 / 180)


def test_shards_and_file_give_the_same(split: Manifest) -> None:
    """The labels in the shards replace the annotation file, crowds included."""
    source = json.loads((split.root.parent / "tree/instances.json").read_text())
    results = _results(source)[:-150]
    with ShardReader(split) as reader:
        from_shards = coco_average_precision(coco_dataset(reader), results, of_record=True)
    assert from_shards == coco_average_precision(source, results, of_record=True)
    assert (
        any(annotation["iscrowd"] for annotation in source["annotations"]) and 0 < from_shards["box/AP"] < 1
    )


def test_results_of_categories_that_do_not_exist_are_left_out() -> None:
    """The head has classes for the holes in COCO's ids. No results are zeros, and -1 where nothing is to be
    found.
    """
    truth = _truth()
    results = _results(truth)
    strange = [{**result, "category_id": 12, "score": 1.0} for result in results]
    assert coco_average_precision(truth, results + strange) == coco_average_precision(truth, results)
    truth["annotations"] = [annotation for annotation in truth["annotations"] if annotation["area"] < 96**2]
    for of_record in (False, True):
        found = coco_average_precision(truth, strange, of_record=of_record)
        assert found["box/AP"] == 0 and found["box/APl"] == -1


def test_predictions_that_are_not_finite_are_refused() -> None:
    for box, score in (([0, 0, 5, 5], float("nan")), ([0, 0, 5, 5], None), ([0, np.inf, 5, 5], 0.5)):
        with pytest.raises(ValueError, match="finite"):  # None: what JSON holds in place of NaN
            coco_average_precision(_truth(), [_result(3, 1, box, score)])  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", ["absent", None, []])
def test_objects_without_masks_are_left_out_of_masks_and_counted(mask: Any) -> None:
    truth = _truth()
    masks = _as_masks(_results(truth))
    without = [dict(annotation) for annotation in truth["annotations"]]
    for annotation in without[4:6]:
        annotation["segmentation"] = mask
        if mask == "absent":
            del annotation["segmentation"]
    odd, boxes = {**truth, "annotations": without}, _results(truth)
    assert coco_average_precision(odd, boxes) == coco_average_precision(truth, boxes)
    measured = coco_average_precision(odd, masks, masks=True)
    assert measured.pop(WITHOUT_MASK) == 2
    assert measured == coco_average_precision(
        {**truth, "annotations": without[:4] + without[6:]}, masks, masks=True
    )
    with pytest.raises(ValueError, match="mask"):
        coco_average_precision({**truth, "annotations": without[4:6]}, masks, masks=True)
