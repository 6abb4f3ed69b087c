"""Boxes stay on what they surround, whatever happens to the picture; pixels are never needed for targets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tvf
from PIL import Image

from tests.options import alone, drawn
from visft_ds.data.samples import RawSample
from visft_ds.data.transforms import (
    Crop,
    Flip,
    Op,
    Resize,
    apply_to_boxes,
    apply_to_image,
    final_size,
    short_side_size,
)
from visft_ds.randomness import generator
from visft_ds.tasks.detection.data import detection_targets

SMALL = {
    "min_size_train": (60, 72, 84),
    "max_size_train": 84,
    "crop_min_size": (50, 62),
    "crop_size": (48, 75),
    "min_size_test": 100,
    "max_size_test": 84,
}


def _annotation(box: list[float], category: int = 7, crowd: int = 0) -> dict[str, Any]:
    return {"id": 1, "bbox": box, "category_id": category, "iscrowd": crowd, "area": 1.0}


def _sample(size: tuple[int, int], *annotations: dict[str, Any], pixels: bool = True) -> RawSample:
    image = np.zeros((*size, 3), dtype=np.uint8) if pixels else None
    return RawSample(0, 5, size, image, annotations, ())


def test_boxes_follow_the_pixels() -> None:
    """A bright rectangle on black is found where its box says, after any flip, crop and scaling."""
    transform = alone("detection", True, **SMALL)
    kinds = set()
    for key in range(60):
        raw = _sample((100, 130), _annotation([30, 25, 50, 35]))
        assert raw.image is not None
        raw.image[25:60, 30:80] = 255
        ops = drawn(transform, raw.size, generator(key))
        kinds.add(tuple(type(op).__name__ for op in ops))
        sample = transform(raw, generator(key))
        assert sample.image is not None
        (cx, cy, width, height) = sample.targets["detection"]["boxes"][0] * np.tile(sample.size[::-1], 2)
        rows, columns = (np.flatnonzero((sample.image[0] > 127).any(axis)) for axis in (1, 0))
        found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        expected = [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]
        # The border of a scaled rectangle falls between two pixels.
        np.testing.assert_allclose(found, expected, atol=1.0)
    assert len(kinds) == 4, "with and without flip, with and without crop"


def test_scaling_equals_pillow() -> None:
    """The recipe was made with Pillow's bilinear filter, which smooths before it shrinks."""
    image = np.random.default_rng(1).integers(0, 256, (97, 61, 3), dtype=np.uint8)
    scaled = apply_to_image(image, [Resize(40, 33)]).permute(1, 2, 0).numpy()
    reference = np.array(Image.fromarray(image).resize((33, 40), Image.Resampling.BILINEAR))
    # Both round to 8 bits between the two passes, in fixed-point arithmetic of different width.
    assert np.abs(scaled.astype(int) - reference).max() <= 1


@pytest.mark.parametrize(
    ("size", "short", "cap", "expected"),
    [
        ((480, 640), 480, 672, (480, 640)),
        ((480, 640), 672, 672, (504, 672)),
        ((640, 480), 800, 672, (672, 504)),
        ((427, 640), 800, 672, (448, 671)),  # round(672 * 427 / 640) = 448, int(448 * 640 / 427) = 671
        ((500, 500), 672, 672, (672, 672)),
        ((480, 640), 400, None, (400, 533)),
        ((193, 640), 480, 672, (203, 673)),  # rounding up passes the cap by a pixel, as in the recipe
        ((2, 4000), 480, 672, (1, 672)),  # no side may vanish, and a strip may not be longer than the cap
    ],
)
def test_sizes_follow_the_cap_rule(
    size: tuple[int, int], short: int, cap: int | None, expected: tuple[int, int]
) -> None:
    assert short_side_size(size, short, cap) == expected


def test_training_draws_what_the_recipe_says() -> None:
    transform = alone("detection", True)
    ops_of = [drawn(transform, (480, 640), generator(key)) for key in range(2000)]
    flips = sum(isinstance(ops[0], Flip) for ops in ops_of)
    crops = [op for ops in ops_of for op in ops if isinstance(op, Crop)]
    # Four standard deviations of a fair coin thrown 2000 times.
    assert abs(flips - 1000) < 90 and abs(len(crops) - 1000) < 90
    sizes = [final_size((480, 640), ops) for ops in ops_of]
    assert max(max(size) for size in sizes) == 672
    assert {min(size) for size, ops in zip(sizes, ops_of, strict=True) if len(ops) == 1} <= {480, 504}
    before_crops = {(op.height, op.width) for ops in ops_of for op in ops[:-1] if isinstance(op, Resize)}
    assert before_crops == {(400, 533), (500, 666), (600, 800)}
    assert min(crop.width for crop in crops) >= 384 and max(crop.width for crop in crops) <= 600
    assert min(crop.height for crop in crops) >= 384 and max(crop.height for crop in crops) == 600


def test_evaluation_draws_nothing() -> None:
    transform = alone("detection", False)
    assert drawn(transform, (480, 640), generator(1)) == [Resize(504, 672)]


@pytest.mark.parametrize("train", [True, False])
def test_a_fixed_size_is_a_square(train: bool) -> None:
    transform = alone("detection", train, fixed_size=112)
    found: list[tuple[Op, ...]] = [tuple(drawn(transform, (48, 64), generator(key))) for key in range(30)]
    plain = (Resize(112, 112),)
    assert set(found) == ({plain, (Flip(), *plain)} if train else {plain})


def test_pictures_smaller_than_the_crop_are_cut_to_what_there_is() -> None:
    transform = alone("detection", True, **{**SMALL, "crop_size": (500, 600)})
    sizes = [transform(_sample((30, 40)), generator(key)).size for key in range(20)]
    assert max(map(max, sizes)) <= 84 and len(set(sizes)) > 1


def test_crowds_and_boxes_without_area_give_no_target() -> None:
    annotations = [
        _annotation([1, 2, 3, 4], category=11),
        _annotation([1, 2, 3, 4], crowd=1),
        _annotation([5, 5, 0, 4]),
        _annotation([5, 5, 4, 0]),
        _annotation([40, 5, 4, 4]),  # outside
        _annotation([-3, -3, 5, 5], category=12),  # partly outside
    ]
    targets = detection_targets(None, _sample((20, 40), *annotations), [], generator(0))
    assert targets["labels"].tolist() == [11, 12] and targets["labels"].dtype == np.int64
    expected = [[2.5 / 40, 4 / 20, 3 / 40, 4 / 20], [1 / 40, 1 / 20, 2 / 40, 2 / 20]]
    # Exact numbers but for the rounding to float32.
    np.testing.assert_allclose(targets["boxes"], expected, rtol=1e-6)
    assert targets["boxes"].dtype == np.float32


def test_boxes_cut_away_by_a_crop_vanish() -> None:
    annotations = [_annotation([0, 0, 10, 10], category=1), _annotation([8, 8, 20, 10], category=2)]
    targets = detection_targets(None, _sample((40, 40), *annotations), [Crop(10, 10, 20, 20)], generator(0))
    assert targets["labels"].tolist() == [2]
    np.testing.assert_allclose(targets["boxes"], [[0.45, 0.2, 0.9, 0.4]], rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "expected"), [((1280, 1920), (427, 640)), ((400, 300), (640, 480)), ((9, 9000), (1, 640))]
)
def test_images_of_one_long_side_keep_their_shape(size: tuple[int, int], expected: tuple[int, int]) -> None:
    """Also the windows of zooms: a circle stays a circle."""
    options = {"fixed_size": 640, "keep_shape": True, "zoom": (0.5, 1.4)}
    assert final_size(size, drawn(alone("detection", False, **options), size, generator(0))) == expected
    for key in range(20):
        *earlier, last = drawn(alone("detection", True, **options), size, generator(key))
        height, width = final_size(size, earlier)
        assert isinstance(last, Resize) and max(last.height, last.width) == 640
        assert abs(last.width * height - last.height * width) <= max(height, width)  # to half a pixel


def test_zooms_take_a_window_in_or_around_the_image() -> None:
    """What the window shows is where targets say, and nothing but grey lies beyond the image."""
    pixels = np.random.default_rng(0).integers(0, 100, (60, 80, 3), dtype=np.uint8)
    transform, windows = alone("detection", train=True, fixed_size=32, zoom=(0.5, 1.4), flip=0.0), []
    for key in range(60):
        ops = drawn(transform, (60, 80), generator(key, 0))
        assert final_size((60, 80), ops) == (32, 32)
        windows += [op for op in ops if isinstance(op, Crop)]
    assert 40 <= len(windows) <= 58  # five of six
    shares = [(op.height / 60 * op.width / 80) ** 0.5 for op in windows]
    assert 0.48 < min(shares) < 0.6 and 1.2 < max(shares) < 1.42
    around = next(op for op in windows if op.top < 0 and op.left < 0)
    shown = apply_to_image(pixels, [around])
    box = apply_to_boxes(np.array([[0.0, 0, 80, 60]]), (60, 80), [around])[0].astype(int)
    assert np.array_equal(shown[:, box[1] : box[3], box[0] : box[2]].permute(1, 2, 0).numpy(), pixels)
    shown[:, box[1] : box[3], box[0] : box[2]] = 128
    assert shown.eq(128).all()


@pytest.mark.parametrize("size", [(40, 52), (90, 33), (61, 77), (200, 300)])
def test_pictures_are_scaled_as_by_torchvision(size: tuple[int, int]) -> None:
    """Bit for bit, also of the view that a decoded picture is."""
    pixels = generator(3).integers(0, 256, (61, 77, 3), dtype=np.uint8)
    expected = tvf.resize(torch.from_numpy(pixels).permute(2, 0, 1), list(size), antialias=True)
    assert torch.equal(apply_to_image(pixels, [Resize(*size)]), expected)
