"""Masks of the dense head's boxes: where features are read, what is learnt, one entry for each object."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as coco_mask
from PIL import Image
from torch import Tensor
from torchvision.ops import roi_align

from tests.tasks.cases import batch_of, map_of
from visft_ds.data.samples import RawSample, Sample
from visft_ds.data.transforms import Crop, Flip, Resize, final_size
from visft_ds.tasks import TASKS
from visft_ds.tasks.detection.data import InstanceTargets, instance_targets
from visft_ds.tasks.detection.dense import DenseOutput, Detections, dense_results
from visft_ds.tasks.detection.roi import SIDE, features_in_boxes, mask_code
from visft_ds.tasks.masks.rasters import draw_masks

SPEC = TASKS["detection"]
OPTIONS = {"type": "dense", "num_classes": 3, "width": 32, "masks": True, "box_map": 1}
TRIANGLE = [[10, 20, 50, 20, 10, 60]]
RAW = RawSample(
    index=0,
    image_id=7,
    size=(100, 120),
    image=None,
    annotations=(
        {"iscrowd": 0, "category_id": 4, "bbox": [10, 20, 40, 40], "segmentation": TRIANGLE},
        {"iscrowd": 0, "category_id": 9, "bbox": [70, 30, 20, 30]},
        {
            "iscrowd": 1,
            "category_id": 4,
            "bbox": [0, 0, 120, 100],
            "segmentation": [[0, 0, 120, 0, 120, 100]],
        },
    ),
    captions=(),
)


def _boxes(images: int, number: int) -> Tensor:
    corners = torch.rand(images, number, 2, 2, dtype=torch.float64).sort(dim=2).values
    return corners.flatten(2)


def test_features_are_read_as_by_roi_align() -> None:
    features = torch.randn(2, 5, 20, 30, dtype=torch.float64)
    boxes = _boxes(2, 6)
    ours = features_in_boxes(map_of(features, torch.ones(2, 20, 30, dtype=torch.bool)), boxes)
    in_cells = boxes * torch.tensor([30.0, 20.0, 30.0, 20.0])
    theirs = roi_align(features, list(in_cells), 14, sampling_ratio=2, aligned=True)
    torch.testing.assert_close(ours.flatten(0, 1), theirs)
    valid = torch.ones(2, 20, 30, dtype=torch.bool)
    valid[:, 12:] = valid[:, :, 21:] = False
    padded = features_in_boxes(map_of(features, valid), boxes)
    alone = features_in_boxes(map_of(features[..., :12, :21], valid[:, :12, :21]), boxes)
    torch.testing.assert_close(padded, alone)


@pytest.mark.parametrize(
    "corners", [[10.0, 20.0, 66.0, 76.0], [-9.5, 3.2, 20.7, 99.0], [90.0, 60.0, 150.0, 130.0]]
)
def test_a_mask_is_interpolated_in_its_box_alone(corners: list[float]) -> None:
    """Pixel by pixel, by hand; the box may reach beyond the picture."""
    logits = torch.randn(7, 7).repeat_interleave(4, 0).repeat_interleave(4, 1)
    left, top, right, bottom = corners
    y = (torch.arange(100) + 0.5 - top) / (bottom - top) * 2 - 1
    x = (torch.arange(120) + 0.5 - left) / (right - left) * 2 - 1
    grid = torch.stack((x.expand(100, -1), y[:, None].expand(-1, 120)), dim=-1)
    sampled = torch.nn.functional.grid_sample(
        logits[None, None], grid[None], padding_mode="border", align_corners=False
    )
    expected = (sampled[0, 0] > 0) & (grid.abs() <= 1).all(dim=-1)
    code = mask_code(logits.numpy(), corners, (100, 120))
    drawn = coco_mask.decode(code).astype(bool)
    assert (drawn == expected.numpy()).mean() > 0.999 and expected.any()
    assert coco_mask.area(mask_code(logits.numpy(), [5.2, 5.2, 5.4, 5.4], (100, 120))) == 0


@pytest.mark.parametrize("ops", [[], [Flip(), Resize(50, 60)], [Crop(15, 5, 60, 80), Resize(240, 320)]])
def test_targets_are_masks_in_boxes_that_move_a_little(ops: list[Flip | Resize | Crop]) -> None:
    """They are the object as it is drawn; objects without a mask and crowds teach none."""
    targets = instance_targets({4: 0, 9: 1}, RAW, ops, np.random.default_rng(0))
    assert targets["labels"].tolist() == [0, 1] and len(targets["masks"]) == 1
    x, y, width, height = targets["boxes"][0]
    box = np.array([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    moved = np.abs(targets["regions"][0] - box) / [width, height, width, height]
    assert 0 < moved.max() <= 0.1 + 1e-5
    rows, columns = final_size(RAW.size, ops)
    left, top, right, bottom = (targets["regions"][0] * [columns, rows, columns, rows]).round().astype(int)
    whole = draw_masks([TRIANGLE], RAW.size, ops, stride=1)[0, top:bottom, left:right]
    expected = np.asarray(Image.fromarray(whole).resize((SIDE, SIDE), Image.Resampling.BOX))
    assert np.abs(targets["masks"][0] / 255 - expected / 255).mean() < 0.03


def test_one_object_is_one_box_one_mask_one_score() -> None:
    """The second of three boxes is too uncertain for a mask, and the threshold leaves out the third."""
    boxes = torch.tensor([[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.9, 0.9]]])
    detections = Detections(torch.tensor([[0.9, 0.2, 0.005]]), torch.tensor([[1, 0, 2]]), boxes)
    masks = torch.ones(2, SIDE, SIDE)
    masks[1, :, SIDE // 2 :] = -1
    cells = torch.zeros(1, 4, 3), torch.zeros(1, 4, 4), torch.zeros(1, 4, 2)
    output = DenseOutput(
        *cells,
        torch.ones(1, 2),
        torch.ones(1, 4, dtype=torch.bool),
        detections=detections,
        chosen=torch.tensor([0, 1]),
        masks=masks,
    )
    batch = batch_of(1, original_sizes=torch.tensor([[100, 200]]))
    found = dense_results(output, batch, classes=(7, 11, 13))
    assert [(entry["category_id"], round(entry["score"], 3)) for entry in found] == [(11, 0.9), (7, 0.2)]
    assert [int(coco_mask.area(entry["segmentation"])) for entry in found] == [80 * 40, 100 * 100]
    assert coco_mask.toBbox(found[0]["segmentation"]).tolist() == pytest.approx(found[0]["bbox"], abs=1e-3)
    assert len(dense_results(output, batch, classes=(7, 11, 13), threshold=0.5)) == 1


def test_a_head_learns_masks_of_the_objects_that_have_one() -> None:
    """Of three images, one without objects; the loss of masks is a mean over those of the batch."""
    options = {"masks": True}
    make = SPEC.targets(True, options, None, (4, 9))
    empty = RawSample(index=1, image_id=8, size=(100, 120), image=None, annotations=(), captions=())
    samples = []
    for number, raw in enumerate((RAW, empty, RAW)):
        targets = make(raw, [], np.random.default_rng(number))
        samples.append(Sample(number, number, raw.size, raw.size, None, 0, {"detection": targets}))
    packed = SPEC.pack(samples, (100, 120))
    assert isinstance(packed, InstanceTargets)
    assert packed.regions.shape == (3, 1, 4) and packed.chosen.tolist() == [0, 2]
    settings = SPEC.settings("head", OPTIONS)
    head = SPEC.build_head([(6, 8), (5, 16)], settings, None)
    maps = [
        map_of(torch.randn(3, 6, 12, 16), torch.ones(3, 12, 16, dtype=torch.bool)),
        map_of(torch.randn(3, 5, 6, 8), torch.ones(3, 6, 8, dtype=torch.bool)),
    ]
    output = head(maps, regions=packed.regions, chosen=packed.chosen)
    assert output.logits.shape == (3, 48, 3), "boxes are on the coarse grid"
    criterion = SPEC.criterion(OPTIONS, {})
    batch = batch_of(3, targets={"detection": packed})
    assert criterion.count(batch) == {"boxes": 4.0, "masks": 2.0}
    losses = criterion(output, packed, {"boxes": torch.tensor(4.0), "masks": torch.tensor(2.0)})
    inside = (packed.masks > 127).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(output.masks, inside)
    torch.testing.assert_close(losses["mask"], expected)
    losses["mask"].backward()
    assert head.masks.input_projs[0].weight.grad.abs().sum() > 0
    none = SPEC.pack([samples[1]], (100, 120))
    assert isinstance(none, InstanceTargets)
    alone = [map_of(map_.features[:1], map_.valid[:1]) for map_ in maps]
    nothing = head(alone, regions=none.regions, chosen=none.chosen)
    losses = criterion(nothing, none, {"boxes": torch.tensor(1.0), "masks": torch.tensor(1.0)})
    assert losses["mask"] == 0


def test_boxes_and_masks_of_the_same_objects_are_both_measured() -> None:
    square = [[20.0, 20.0, 60.0, 20.0, 60.0, 60.0, 20.0, 60.0]]
    entry = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [20, 20, 40, 40], "area": 1600, "iscrowd": 0}
    truth = {
        "images": [{"id": 1, "width": 120, "height": 100}],
        "annotations": [{**entry, "segmentation": square}],
        "categories": [{"id": 4, "name": "tile"}],
    }
    code = mask_code(np.ones((SIDE, SIDE), np.float32), [20, 20, 60, 60], (100, 120))
    results = [
        {"image_id": 1, "category_id": 4, "bbox": [20, 20, 40, 40], "score": 0.7, "segmentation": code}
    ]
    head = SPEC.settings("head", OPTIONS)
    measured = SPEC.measure(truth, results, head, False)
    assert measured["box/AP"] == measured["mask/AP"] == measured["mask/AR100"] == 1
    boxes_alone = SPEC.measure({**truth, "annotations": [entry]}, results, head, False)
    assert boxes_alone["box/AP"] == 1 and boxes_alone["mask/objects without mask"] == 1
