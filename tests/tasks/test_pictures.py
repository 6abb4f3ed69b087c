"""Pictures of each task: what is drawn where."""

from __future__ import annotations

import numpy as np

from visft_ds.data.samples import RawSample
from visft_ds.tasks import TASKS
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import draw_objects, palette, split_panels

NAMES = {1: "cat", 2: "dog"}
COLOURS = palette(list(NAMES.values()))
SQUARE = [[10.0, 40.0, 40.0, 40.0, 40.0, 70.0, 10.0, 70.0]]


def _example(*results: dict[str, object]) -> Example:
    image = np.full((112, 112, 3), 128, dtype=np.uint8)
    true = {"category_id": 1, "bbox": [10, 40, 30, 30], "iscrowd": 0, "segmentation": SQUARE}
    return Example(
        RawSample(0, 7, (112, 112), image, (true,), ("A grey square.",)), list(results), NAMES, 0.5
    )


def _share(picture: np.ndarray, colour: tuple[int, int, int]) -> float:
    return float((np.abs(picture.astype(int) - colour).max(axis=-1) < 8).mean())


def test_truth_is_left_and_predictions_above_the_threshold_are_right() -> None:
    found = {"category_id": 2, "bbox": [20, 50, 30, 30], "segmentation": SQUARE, "score": 0.9}
    example = _example(found, {**found, "category_id": 1, "score": 0.4})
    left, right = split_panels(TASKS["detection"].picture(example))
    assert _share(left, COLOURS["cat"]) > 0.005 and _share(left, COLOURS["dog"]) == 0
    assert _share(right, COLOURS["dog"]) > 0.005 and _share(right, COLOURS["cat"]) == 0
    half = {name: tuple((np.array(colour) + 128) // 2) for name, colour in COLOURS.items()}
    left, right = split_panels(TASKS["segmentation"].picture(example))
    assert _share(left, half["cat"]) > 0.04 and _share(right, half["dog"]) > 0.04, "half of the mask's colour"
    said = TASKS["captioning"].picture(_example({"caption": "a square " * 60}))
    assert said.shape[0] > 448 and said.shape[1] > 2 * 448


def test_tags_hide_no_small_box() -> None:
    """Of two small boxes one above the other, the tag of the lower one goes below it."""
    image = np.full((400, 400, 3), 128, dtype=np.uint8)
    boxes = [[100, 100, 14, 14], [100, 116, 14, 14]]
    picture = draw_objects(image, ["cat", "dog"], ["cat", "dog"], COLOURS, boxes=boxes, side=400)
    for x, y, width, height in boxes:
        inside = picture[y + 3 : y + height - 2, x + 3 : x + width - 2]
        assert (inside == 128).all()
    assert (picture[133:160] == COLOURS["dog"]).all(axis=-1).sum() > 50
    assert (picture[60:98] == COLOURS["cat"]).all(axis=-1).sum() > 50


def test_boxes_lie_where_the_objects_are() -> None:
    """A 50 x 100 image at four times its size: the frame of (10, 20, 30, 40) runs from (40, 80) to (160,
    240).
    """
    image = np.full((100, 50, 3), 128, dtype=np.uint8)
    odd = [[-50, -50, 20, 20], [30, 90, 500, 500], [5, 5, 0, 0]]
    picture = draw_objects(image, ["cat"], ["cat"], COLOURS, boxes=[[10, 20, 30, 40]], side=400)
    seen = (picture == COLOURS["cat"]).all(axis=-1)
    assert (seen[110:].any(axis=1).nonzero()[0] + 110).max() == 240  # below the tag
    columns = seen[110:].any(axis=0).nonzero()[0]
    assert (columns.min(), columns.max()) == (40, 160)
    assert draw_objects(image, ["cat"] * 3, ["cat"] * 3, COLOURS, boxes=odd, side=40).shape == (40, 20, 3)
