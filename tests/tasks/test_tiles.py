"""Tiles: how pictures are cut, what a tile shows, and one object out of what several tiles saw of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import mask as coco_mask

from tests.coco_tree import make_split
from tests.options import alone
from visft_ds.data.dataset import SamplePipeline, read_raw
from visft_ds.data.loader import StepLoader, evaluation_batches
from visft_ds.data.plan import Plan, SetPlan, TaskPlan
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import ShardReader
from visft_ds.data.transforms import Crop, Flip, Resize
from visft_ds.randomness import generator
from visft_ds.settings.tiles import Tiles, Window, is_visible
from visft_ds.tasks.masks.data import mask_targets
from visft_ds.tasks.paste import pasted
from visft_ds.tasks.tiles import joined_masks, merged
from visft_ds.tasks.transform import collate_joint

SIZE = (100, 180)
#: Three tiles in a row, columns 0 to 80, 50 to 130 and 100 to 180.
TILES = Tiles(80, 30)
ROW = [window for window in TILES.windows(*SIZE) if window.top == 0]


@pytest.mark.parametrize(
    ("size", "tops", "lefts"),
    [
        ((100, 180), [0, 20], [0, 50, 100]),
        ((80, 80), [0], [0]),
        ((80, 81), [0], [0, 1]),
        ((10, 130), [0], [0, 50]),
    ],
)
def test_tiles_cover_the_picture_and_stay_inside(
    size: tuple[int, int], tops: Sequence[int], lefts: Sequence[int]
) -> None:
    windows = TILES.windows(*size)
    assert [(window.top, window.left) for window in windows] == [(t, left) for t in tops for left in lefts]
    shown = np.zeros(size, dtype=bool)
    for top, left, height, width in windows:
        assert top + height <= size[0] and left + width <= size[1]
        shown[top : top + height, left : left + width] = True
    assert shown.all()


def test_numbers_of_tiles_name_their_picture() -> None:
    index = np.array([(100, 180), (80, 80), (10, 130)], dtype=[("height", int), ("width", int)])
    numbers = TILES.samples(index, np.array([0, 2]))
    assert numbers.tolist() == [0, 3, 6, 9, 12, 15, 2, 5]


def test_an_object_counts_where_enough_of_it_is_visible() -> None:
    window = Window(0, 50, 80, 80)
    assert is_visible((40, 0, 20, 10), window) and not is_visible((40, 0, 15, 10), window)
    assert not is_visible((0, 0, 20, 20), window)
    # larger than the window: of what it could show
    assert is_visible((0, 10, 400, 20), window) and is_visible((-300, -300, 900, 900), window)
    assert is_visible((98, 10, 400, 20), window) and not is_visible((99, 10, 400, 20), window)


def _found(tile: int, box: Sequence[float], score: float, category: int = 1, **more: Any) -> dict[str, Any]:
    """A result of a tile whose box (x, y, w, h) is in pixels of the picture."""
    x, y, width, height = box
    window = ROW[tile]
    bbox = [x - window.left, y - window.top, width, height]
    return {"image_id": tile, "category_id": category, "bbox": bbox, "score": score, **more}


@pytest.mark.parametrize(
    ("results", "boxes"),
    [
        # whole in both: the better one
        ([(0, (55, 10, 15, 20), 0.8), (1, (56, 10, 15, 20), 0.9)], [(56, 10, 15, 20)]),
        # the border of the first cuts it: the second shows all, whatever its score
        ([(0, (60, 10, 20, 20), 0.9), (1, (60, 10, 40, 20), 0.6)], [(60, 10, 40, 20)]),
        ([(0, (60, 10, 20, 20), 0.9)], []),
        # larger than what the tiles have in common: one box out of both
        ([(0, (20, 10, 60, 20), 0.9), (1, (50, 11, 50, 20), 0.6)], [(20, 10, 80, 21)]),
        # over three tiles, the best of them at an end or in the middle, none of them exact
        (
            [(0, (10, 10, 70, 20), 0.9), (1, (51, 11, 78, 19), 0.5), (2, (100, 9, 70, 20), 0.6)],
            [(10, 9, 160, 21)],
        ),
        (
            [(0, (10, 10, 69, 20), 0.5), (1, (50, 11, 80, 19), 0.9), (2, (101, 9, 69, 20), 0.6)],
            [(10, 9, 160, 21)],
        ),
        # one tile took its part for the whole, and another one shows how it goes on
        ([(0, (20, 10, 52, 20), 0.9), (1, (50, 11, 50, 20), 0.6)], [(20, 10, 80, 21)]),
        # a bad guess makes no object larger, and is none
        ([(0, (20, 10, 60, 20), 0.9), (1, (50, 9, 75, 22), 0.2)], [(20, 10, 60, 20)]),
        # one long object after another, which the tiles in common show the ends of
        (
            [
                (0, (10, 10, 58, 20), 0.9),
                (0, (70, 10, 10, 20), 0.5),
                (1, (50, 10, 18, 20), 0.5),
                (1, (70, 10, 60, 20), 0.8),
                (2, (100, 10, 70, 20), 0.7),
            ],
            [(10, 10, 58, 20), (70, 10, 100, 20)],
        ),
        # a long one beside another, and a small one in the corner of the box of a large one
        (
            [
                (0, (20, 10, 60, 20), 0.9),
                (1, (50, 10, 50, 20), 0.6),
                (0, (20, 28, 60, 20), 0.8),
                (1, (50, 28, 50, 20), 0.5),
            ],
            [(20, 10, 80, 20), (20, 28, 80, 20)],
        ),
        (
            [(0, (20, 10, 60, 60), 0.9), (1, (50, 10, 50, 60), 0.8), (1, (60, 12, 9, 9), 0.7)],
            [(20, 10, 80, 60), (60, 12, 9, 9)],
        ),
        # beside each other there, or of two classes, or in one tile: two objects
        ([(0, (20, 10, 60, 20), 0.9), (1, (50, 40, 50, 20), 0.6)], [(20, 10, 60, 20), (50, 40, 50, 20)]),
        ([(0, (55, 10, 15, 20), 0.8, 2), (1, (55, 10, 15, 20), 0.9)], [(55, 10, 15, 20)] * 2),
        ([(0, (10, 10, 30, 30), 0.8), (0, (12, 12, 9, 9), 0.7)], [(10, 10, 30, 30), (12, 12, 9, 9)]),
        # at the border of the picture nothing is cut
        ([(0, (0, 0, 20, 20), 0.9)], [(0, 0, 20, 20)]),
        ([], []),
    ],
)
def test_what_tiles_saw_of_an_object_becomes_one(
    results: Sequence[tuple[Any, ...]], boxes: Sequence[tuple[float, ...]]
) -> None:
    whole = merged([_found(*result) for result in results], ROW, (80, 180))
    assert [tuple(result["bbox"]) for result in whole] == boxes
    scores = [result["score"] for result in whole]
    assert scores == sorted(scores, reverse=True) and all("image_id" not in result for result in whole)


@pytest.mark.parametrize("best", range(4))
def test_an_object_over_four_tiles_is_one(best: int) -> None:
    windows = Tiles(80, 30).windows(130, 130)
    left, top, right, bottom = 20, 15, 110, 120
    results = []
    for number, window in enumerate(windows):
        x = max(left - window.left, 0)
        y = max(top - window.top, 0)
        width = min(right - window.left, window.width) - x
        height = min(bottom - window.top, window.height) - y
        score = 0.9 if number == best else 0.5
        results.append({"image_id": number, "category_id": 1, "bbox": [x, y, width, height], "score": score})
    (whole,) = merged(results, windows, (130, 130))
    assert whole["bbox"] == [left, top, right - left, bottom - top] and whole["score"] == 0.9


def test_masks_are_joined_across_borders() -> None:
    picture = np.zeros((80, 180), dtype=np.uint8)
    picture[10:30, 20:100] = 1
    picture[12, 30] = 0

    def seen(tile: int) -> dict[str, Any]:
        top, left, height, width = ROW[tile]
        part = picture[top : top + height, left : left + width]
        return coco_mask.encode(np.asfortranarray(part))

    results = [
        _found(0, (20, 10, 60, 20), 0.9, segmentation=seen(0)),
        _found(1, (50, 10, 50, 20), 0.6, segmentation=seen(1)),
    ]
    (whole,) = merged(results, ROW, (80, 180))
    assert np.array_equal(coco_mask.decode(whole["segmentation"]), picture)
    full = np.asfortranarray(np.ones((80, 80), dtype=np.uint8))
    code = joined_masks([(coco_mask.encode(full), window) for window in ROW], (80, 180))
    assert coco_mask.decode(code).all()
    empty = joined_masks([(coco_mask.encode(full * 0), ROW[0])], (80, 180))
    assert not coco_mask.decode(empty).any()


def test_a_zoom_shows_no_mask_beyond_its_tile() -> None:
    square = [[0.0, 0.0, 60.0, 0.0, 60.0, 40.0, 0.0, 40.0]]
    annotation = {"bbox": [0, 0, 60, 40], "iscrowd": 0, "category_id": 1, "segmentation": square}
    raw = RawSample(0, 0, (40, 80), None, [annotation], ())
    ops = [Crop(0, 40, 40, 40), Flip(), Crop(-20, -20, 80, 80), Resize(80, 80)]
    masks = mask_targets({1: 0}, raw, ops, generator(0))["masks"]
    # of columns 40 to 60, at 20 to 40 of 80 before it was mirrored
    expected = np.zeros((1, 20, 20), dtype=np.uint8)
    expected[0, 5:15, 10:15] = 255
    assert np.array_equal(masks, expected)


def _pipeline(*, train: bool) -> SamplePipeline:
    sizes = {"fixed_size": 32, "keep_shape": True, "zoom": (0.5, 1.4)}
    paste = partial(pasted, most=2) if train else None
    return SamplePipeline(alone("detection", train, **sizes), collate_joint, Tiles(24, 8), paste)


def test_tiles_are_read_out_of_the_pictures_of_a_split(tmp_path: Path) -> None:
    """Every tile is a sample of its own, and batches follow from the plan alone, wherever a run begins."""
    reader = ShardReader(make_split(tmp_path, 6))
    tiles = Tiles(24, 8)
    numbers = tiles.samples(reader.manifest.index, np.arange(6))
    assert len(numbers) > 6 and len(set(numbers.tolist())) == len(numbers)
    seen = []
    for rank in (0, 1):
        for batch in evaluation_batches(reader, _pipeline(train=False), 4, rank, 2, numbers):
            assert batch.original_sizes.max() <= 24 and batch.sizes.max() == 32
            seen += batch.image_ids[batch.real].tolist()
    assert sorted(seen) == sorted(numbers.tolist())

    plan = Plan({"detection": TaskPlan({"toy": SetPlan(numbers)}, 4)}, seed=1)
    pipelines = {"detection": {"toy": _pipeline(train=True)}}
    whole = list(StepLoader({"toy": reader}, plan, pipelines).steps(0, 4))
    resumed = list(StepLoader({"toy": reader}, plan, pipelines).steps(2, 4))
    for (_, (first,)), (_, (again,)) in zip(whole[2:], resumed, strict=True):
        assert first.indices.tolist() == again.indices.tolist()
        assert first.images.equal(again.images)
        assert first.targets["detection"].boxes.equal(again.targets["detection"].boxes)
    epoch = [number for plan_of_step, _ in whole for number in plan_of_step.indices.tolist()]
    assert len(set(epoch)) == min(len(epoch), len(numbers) // 4 * 4)


def test_a_tile_has_the_pixels_and_boxes_of_its_part(tmp_path: Path) -> None:
    reader = ShardReader(make_split(tmp_path, 6))
    picture = max(range(6), key=lambda number: reader.manifest.index["num_annotations"][number])
    raw = read_raw(reader, picture)
    tiles = Tiles(24, 8)
    numbers = tiles.samples(reader.manifest.index, np.array([picture]))
    transform = alone("detection", False, fixed_size=24, keep_shape=True)
    pipeline = SamplePipeline(transform, collate_joint, tiles)
    assert raw.image is not None
    shown = 0
    for batch in evaluation_batches(reader, pipeline, 1, 0, 1, numbers):
        top, left, height, width = tiles.windows(*raw.size)[int(batch.image_ids[0]) // 6]
        part = raw.image[top : top + height, left : left + width]
        assert np.array_equal(batch.images[0].permute(1, 2, 0).numpy(), part)
        for cx, cy, w, h in batch.targets["detection"].boxes.tolist():
            low = (left + (cx - w / 2) * width, top + (cy - h / 2) * height)
            assert any(
                x - 0.1 <= low[0] <= x + wide and y - 0.1 <= low[1] <= y + high
                for x, y, wide, high in (annotation["bbox"] for annotation in raw.annotations)
            )
            shown += 1
    assert shown
