"""Results of the segmentation head: masks at the size of the stored image, in COCO's format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as coco_mask
from torch import Tensor

from tests.tasks.cases import batch_of, extents_of
from visft_ds.data.samples import Batch
from visft_ds.tasks import Results
from visft_ds.tasks.average_precision import coco_average_precision
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.segmentation.results import instances


def _scene(grid: tuple[int, int], queries: int = 3) -> MaskOutput:
    smooth = F.interpolate(torch.randn(1, queries, 3, 3), size=grid, mode="bicubic")
    return MaskOutput(torch.randn(1, 1, queries, 81), smooth[None], torch.ones(1, 2))


def _results(
    output: MaskOutput, batch: Batch, categories: Sequence[int] = COCO_CATEGORY_IDS, threshold: float = 0.0
) -> Results:
    return instances(replace(output, extents=extents_of(batch)), batch, categories, threshold)


def _pixels(result: Mapping[str, object]) -> Tensor:
    return torch.from_numpy(coco_mask.decode(result["segmentation"])).bool()


def _show(size: tuple[int, int], frame: tuple[int, int], stored: tuple[int, int], **fields: Tensor) -> Batch:
    images = torch.zeros(1, 3, *frame, dtype=torch.uint8)
    return batch_of(
        1, images=images, sizes=torch.tensor([size]), original_sizes=torch.tensor([stored]), **fields
    )


def test_masks_at_the_stored_size() -> None:
    """Without padding, exactly the bilinear interpolation of the logits, cut at one half."""
    output = replace(_scene((5, 8)), class_ids="published")
    results = _results(output, _show((70, 112), (70, 112), (60, 95)))
    assert len(results) == 3
    expected = F.interpolate(output.masks[0], size=(60, 95), mode="bilinear", align_corners=False)[0]
    scores = output.logits[0, 0].softmax(-1)[:, 1:-1]
    for query, result in enumerate(results):
        seen = _pixels(result)
        assert seen.shape == (60, 95)
        assert (seen != (expected[query] > 0)).sum() <= 1  # a logit of almost exactly 0
        rows, columns = seen.nonzero().unbind(1)
        left, top = int(columns.min()), int(rows.min())
        assert result["bbox"] == [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
        assert isinstance(result["segmentation"]["counts"], str) and result["segmentation"]["size"] == [
            60,
            95,
        ]
        assert result["score"] == pytest.approx(float(scores[query].max()))
        assert result["image_id"] == 1


def test_padding_is_cut_off() -> None:
    """Against the reference's two interpolations: to the padded size, cut, to the stored size."""
    output = replace(_scene((8, 10)), class_ids="published")
    output.masks[..., 6:, :] = output.masks[..., 9:] = 0  # as the head gives them
    results = _results(output, _show((84, 126), (112, 140), (200, 300)))
    large = F.interpolate(output.masks[0], size=(112, 140), mode="bilinear")[..., :84, :126]
    expected = F.interpolate(large, size=(200, 300), mode="bilinear")[0] > 0
    for query, result in enumerate(results):
        # interpolating twice bends the zero line a little; half a percent of the picture
        assert (_pixels(result) != expected[query]).float().mean() < 0.005


def test_categories() -> None:
    """0..79 are COCO's 80 ids; in the published numbering 1..79 are the first 79, and class 0 is never
    named.
    """
    output = _scene((4, 4), queries=4)
    output.logits[:] = 0
    for query, label in enumerate((0, 11, 79, 80)):
        output.logits[0, 0, query, label] = 5
    batch = _show((56, 56), (56, 56), (20, 20))
    assert [result["category_id"] for result in _results(output, batch)][:3] == [1, 13, 90]
    published = _results(replace(output, class_ids="published"), batch)
    assert [result["category_id"] for result in published][1:3] == [11, 89]
    assert published[0]["score"] < 0.01  # its best class says nothing


def test_only_real_images() -> None:
    scene = _scene((4, 4))
    output = MaskOutput(scene.logits.repeat(1, 2, 1, 1), scene.masks.repeat(1, 2, 1, 1, 1), torch.ones(2, 2))
    results = _results(output, batch_of(2, real=torch.tensor([False, True])))
    assert {result["image_id"] for result in results} == {2} and len(results) == 100


def test_a_perfect_mask_of_a_divided_object_has_a_perfect_score() -> None:
    """A bus behind two poles: three pieces of equal size, of which none may be lost, under either
    numbering.
    """
    mask = torch.zeros(64, 64)
    polygons = []
    for left in (4, 24, 44):
        mask[16:48, left : left + 16] = 1
        polygons.append([left, 16, left + 16, 16, left + 16, 48, left, 48])
    annotation = {"image_id": 1, "category_id": 2, "bbox": [4, 16, 56, 32], "segmentation": polygons}
    truth = {"images": [{"id": 1, "width": 64, "height": 64}], "annotations": [annotation]}
    truth["categories"] = [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}]
    logits = torch.tensor([[[[-20.0, 20.0, -20.0]]]])
    batch = _show((64, 64), (64, 64), (64, 64))
    for class_ids in ("contiguous", "published"):
        masks = (mask * 2 - 1)[None, None, None] * 20
        output = MaskOutput(logits, masks, torch.ones(1, 2), class_ids)  # type: ignore[arg-type]
        classes = (1, 2) if class_ids == "contiguous" else (2,)  # there the first one has no class
        results = _results(output, batch, classes)
        assert coco_average_precision(truth, results, masks=True)["mask/AP"] == pytest.approx(1.0), class_ids


def test_a_mask_of_own_heads_counts_by_its_quality() -> None:
    """Two regions in the first mask, of 2 and 6 cells; none in the second."""
    output = _scene((4, 6), queries=2)
    output.masks[:] = -1
    output.masks[0, 0, 0, 0, :2] = 3
    output.masks[0, 0, 0, 2:, 3:] = 1
    batch = _show((4, 6), (4, 6), (4, 6))
    result, *less = _results(output, batch)
    assert all(
        one["segmentation"] == result["segmentation"] and one["score"] <= result["score"] for one in less
    )
    assert result["bbox"] == [0, 0, 6, 4] and coco_mask.area(result["segmentation"]) == 8
    best = float(output.logits[0, 0, 0].softmax(-1)[:-1].max())
    quality = (2 / (1 + math.exp(-3)) + 6 / (1 + math.exp(-1))) / 8
    assert result["score"] == pytest.approx(best * quality, rel=1e-5)
    assert _results(output, batch, threshold=0.9 * best) == []


def test_of_own_heads_the_best_pairs_of_query_and_class_count() -> None:
    """A mask has a result for each class that is likely enough, whichever query it is of."""
    output = _scene((4, 6), queries=2)
    output.logits[:] = -20
    output.masks[:] = 2
    for query, label, logit in ((0, 5, 3.0), (0, 7, 2.0), (1, 9, 1.0), (1, 80, 1.0)):
        output.logits[0, 0, query, label] = logit
    results = _results(output, _show((4, 6), (4, 6), (4, 6)), threshold=0.01)
    inside = float(torch.tensor(2.0).sigmoid())
    expected = [(6, 1 / (1 + math.exp(-1))), (10, 0.5), (8, 1 / (1 + math.exp(1)))]
    assert [result["category_id"] for result in results] == [label for label, _ in expected]
    assert [result["score"] for result in results] == pytest.approx(
        [share * inside for _, share in expected], rel=1e-5
    )


def test_an_empty_mask_is_no_prediction() -> None:
    """However sure of its class; the others stay as they are, in their order, also one of a single pixel."""
    output = replace(_scene((4, 6), queries=4), class_ids="published")
    output.masks[:] = -1
    output.masks[0, 0, 1] = 1
    output.masks[0, 0, 3, 0, 0] = 1
    output.logits[0, 0, 0, 5] = 9
    batch = _show((4, 6), (4, 6), (4, 6))
    whole, pixel = _results(output, batch)
    assert coco_mask.area(whole["segmentation"]) == 24 and whole["bbox"] == [0, 0, 6, 4]
    assert coco_mask.area(pixel["segmentation"]) == 1 and pixel["bbox"] == [0, 0, 1, 1]
    scores = output.logits[0, 0].softmax(-1)[:, 1:-1].max(-1).values.tolist()
    assert [whole["score"], pixel["score"]] == pytest.approx([scores[1], scores[3]])
    output.masks[:] = -1
    assert _results(output, batch) == []
