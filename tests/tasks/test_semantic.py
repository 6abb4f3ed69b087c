"""Semantic segmentation: labels, loss, windows, results against torch, transformers and scikit-learn; the
whole way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as coco_mask
from PIL import Image

from tests.coco_tree import ON_PHOTOS, PHOTOS
from tests.map_folder import write_own
from tests.ranks import run_ranks
from tests.tasks.cases import batch_of, extents_of, map_of
from tests.tiny import SETTINGS
from visft_ds import evaluate, fit
from visft_ds.data.samples import RawSample, Sample
from visft_ds.data.transforms import Crop, Flip, Op, Pad, Size, final_size
from visft_ds.randomness import generator
from visft_ds.shards.cli import main as make_shards
from visft_ds.tasks import TASKS
from visft_ds.tasks.channels import measure_channels
from visft_ds.tasks.masks.data import MaskTargets, mask_targets
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.semantic.config import SemanticHeadConfig, SemanticLoss
from visft_ds.tasks.semantic.head import LinearHead, SemanticCriterion, SemanticOutput, cell_labels
from visft_ds.tasks.semantic.results import (
    Windows,
    cut_windows,
    measure_semantic,
    number_map,
    semantic_results,
)

VOID, CLASSES = 255, 19


def _annotations(numbers: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for number in np.unique(numbers[numbers != VOID]).tolist():
        code = coco_mask.encode(np.asfortranarray(numbers == number).view(np.uint8))
        segmentation = {"size": list(numbers.shape), "counts": code["counts"].decode()}
        about = {"category_id": number, "iscrowd": 0, "bbox": coco_mask.toBbox(code).tolist()}
        found.append({**about, "segmentation": segmentation})
    return found


def _packed(
    *maps: np.ndarray, stride: int = 1, ops: Sequence[Op] = (), frame: Size | None = None
) -> MaskTargets:
    """Labels of images with these maps, whose padding fills `frame`."""
    places, samples = {number: number for number in range(CLASSES)}, []
    for index, numbers in enumerate(maps):
        raw = RawSample(index, index, numbers.shape, None, _annotations(numbers), ())
        found, size = mask_targets(places, raw, ops, generator(0), stride), final_size(raw.size, ops)
        samples.append(Sample(index, index, raw.size, size, None, 0, {"semantic": found}))
    return TASKS["semantic"].pack(samples, frame or samples[0].size)


def _maps(draw: np.random.Generator, *size: int) -> np.ndarray:
    numbers = draw.integers(0, CLASSES, size).astype(np.uint8)
    numbers[draw.random(size) < 0.1] = VOID
    return numbers


def test_labels_are_the_map_and_padding_has_no_class() -> None:
    numbers = _maps(np.random.default_rng(0), 30, 40)
    (found,) = cell_labels(_packed(numbers, ops=[Flip(), Pad(36, 50, 0), Crop(4, 6, 32, 44)]))
    padded = np.pad(numbers[:, ::-1], ((0, 6), (0, 10)), constant_values=VOID)
    assert np.array_equal(found, padded[4:36, 6:50])


def test_a_cell_has_the_class_of_most_of_it() -> None:
    numbers = np.full((8, 8), VOID, dtype=np.uint8)
    numbers[:3, :4], numbers[3:4, :4], numbers[:4, 4:5] = 1, 2, 3  # 12, 4 and 4 of 16 pixels
    numbers[4:, 4:7] = 4
    (found,) = cell_labels(_packed(numbers, stride=4))
    assert found.tolist() == [[1, VOID], [VOID, 4]]


def test_the_loss_is_torch_s_and_depends_on_no_division_and_no_padding() -> None:
    draw, criterion = (
        np.random.default_rng(0),
        SemanticCriterion(SemanticLoss()),
    )
    maps = [_maps(draw, 16, 24) for _ in range(2)]
    logits, packed = torch.randn(2, CLASSES, 8, 12, dtype=torch.float64), _packed(*maps)
    number = criterion.count(batch_of(2, {"semantic": packed}))["cells"]

    def loss(logits: torch.Tensor, targets: Any, share: tuple[float, float] = (1.0, 1.0)) -> torch.Tensor:
        return criterion(
            SemanticOutput(logits, torch.tensor([share] * len(logits))),
            targets,
            {"cells": torch.tensor(number, dtype=torch.float64)},
        )["ce"]

    labels = torch.from_numpy(np.stack(maps)).long()
    fine = F.interpolate(logits, (16, 24), mode="bilinear")
    expected = F.cross_entropy(fine, labels, ignore_index=VOID)
    assert number == (labels != VOID).sum() and torch.allclose(loss(logits, packed), expected, rtol=1e-12)
    alone = [loss(logits[n : n + 1], _packed(maps[n])) for n in range(2)]
    assert torch.allclose(alone[0] + alone[1], expected, rtol=1e-12)
    wider = _packed(*maps, frame=(20, 32))
    padded = F.pad(logits, (0, 4, 0, 2), value=7.0)
    share = (16 / 20, 24 / 32)  # in float32
    assert torch.allclose(loss(padded, wider, share), expected, rtol=1e-6)


def test_the_head_starts_small_and_sees_a_cell_alone() -> None:
    head = LinearHead([16, 8], SemanticHeadConfig(num_classes=CLASSES)).eval()
    fine, coarse = torch.randn(2, 16, 8, 12), torch.randn(2, 8, 4, 6)
    same = F.interpolate(coarse, (8, 12), mode="bilinear")

    def logits(*maps: torch.Tensor) -> torch.Tensor:
        return head(
            [
                map_of(feature_map, torch.ones(len(feature_map), *feature_map.shape[2:], dtype=torch.bool))
                for feature_map in maps
            ]
        ).logits

    whole, part = logits(fine, coarse), logits(fine[:1, :, 1:3, 2:6], same[:1, :, 1:3, 2:6])
    assert torch.allclose(whole[:1, :, 1:3, 2:6], part, atol=1e-6) and 0.02 < whole.std() < 0.1


def test_the_head_norms_each_map_and_then_adds_their_scores() -> None:
    """As a batch norm of DINOv3's would with the same numbers, before a convolution on the joined maps."""
    head = LinearHead([16, 8], SemanticHeadConfig(num_classes=CLASSES)).eval()
    torch.nn.init.normal_(head.bias)
    maps = [3 + 2 * torch.randn(2, 16, 8, 12), 5 * torch.randn(2, 8, 4, 6) - 1]
    read = tuple(map_of(map_, torch.ones(2, *map_.shape[2:], dtype=torch.bool)) for map_ in maps)
    measure_channels([head], head, [read], lambda value: value)
    normed = [F.batch_norm(map_, None, None, training=True) for map_ in maps]
    joined = torch.cat((normed[0], F.interpolate(normed[1], (8, 12), mode="bilinear")), dim=1)
    weight = torch.cat([classifier.weight for classifier in head.classifiers], dim=1)
    assert torch.allclose(head(read).logits, F.conv2d(joined, weight, head.bias), atol=1e-5)


def test_results_are_the_class_that_torch_s_interpolation_makes_the_most_probable() -> None:
    sizes, stored = torch.tensor([[64, 96], [64, 96]]), torch.tensor([[75, 113], [40, 50]])
    batch = batch_of(2, images=torch.zeros(2, 3, 64, 96), sizes=sizes, original_sizes=stored)
    output = SemanticOutput(torch.randn(2, CLASSES, 8, 12, dtype=torch.float64) * 3, extents_of(batch))
    actual = semantic_results(output, batch, [10 * index for index in range(CLASSES)])
    for image, size in ((1, (75, 113)), (2, (40, 50))):
        expected = F.interpolate(output.logits[image - 1 : image].softmax(dim=1), size, mode="bilinear")[
            0
        ].argmax(dim=0)
        own = [one for one in actual if one["image_id"] == image]
        assert np.array_equal(number_map(own, size, {10 * n: n for n in range(CLASSES)}), expected.numpy())
    part = semantic_results(output, replace(batch, real=torch.tensor([True, False])))
    assert {one["image_id"] for one in part} == {1}


@pytest.mark.parametrize("head", ["linear", "plain"])
def test_windows_and_their_mean_are_those_of_transformers(head: str) -> None:
    """EoMT's image processor cuts and merges, and sums masks, like PMT's and EoMT's own code."""
    eomt = pytest.importorskip("transformers.models.eomt.image_processing_eomt")
    processor, side = eomt.EomtImageProcessor(), 32
    stored = [(48, 117), (150, 60), (40, 40)]
    sizes = [eomt.get_size_with_aspect_ratio(size, side, None) for size in stored]
    images = [torch.randint(0, 255, (1, 3, *size), dtype=torch.uint8) for size in sizes]
    height, width = (max(one) for one in zip(*sizes, strict=True))
    whole = torch.cat([F.pad(one, (0, width - one.shape[3], 0, height - one.shape[2])) for one in images])
    batch = batch_of(3, images=whole, sizes=torch.tensor(sizes), original_sizes=torch.tensor(stored))
    cut, starts = cut_windows(batch, side)
    parts, offsets = [], []
    for number, image in enumerate(images):
        shape = type("Size", (), {"shortest_edge": side})()
        some, where = processor._split_image(image, shape, [number])
        parts, offsets = [*parts, *some], [*offsets, *where]
    assert [start for _, start, _ in offsets] == [start for places in starts for start in places]
    assert torch.equal(cut.images, torch.stack(parts)) and cut.image_ids.tolist() == [1] * 3 + [2] * 3 + [3]
    size = {"shortest_edge": side, "longest_edge": None}
    if head == "linear":
        logits = torch.randn(len(parts), CLASSES, 4, 4) * 3
        output: SemanticOutput | MaskOutput = SemanticOutput(logits, extents_of(cut))
        fine = F.interpolate(logits.softmax(dim=1), (side, side), mode="bilinear")
        expected = processor.merge_image_patches(fine, offsets, stored, size)
    else:
        masks, logits = (
            torch.randn(1, len(parts), 30, 8, 8) * 3,
            torch.randn(1, len(parts), 30, CLASSES + 1) * 3,
        )
        output = MaskOutput(logits, masks, extents_of(cut))
        theirs = SimpleNamespace(
            masks_queries_logits=masks[0], class_queries_logits=logits[0], patch_offsets=offsets
        )
        results = processor.post_process_semantic_segmentation(
            theirs, stored, size, return_segmentation_scores=True
        )
        expected = [result.segmentation_scores for result in results]
    actual = semantic_results(Windows(output, starts, (side, side)), batch)
    for image, (size, scores) in enumerate(zip(stored, expected, strict=True), 1):
        own = number_map(
            [one for one in actual if one["image_id"] == image], size, {n: n for n in range(CLASSES)}
        )
        best = scores.topk(2, dim=0)
        clear = (best.values[0] - best.values[1] > 1e-5).numpy()
        assert clear.mean() > 0.999 and np.array_equal(own[clear], best.indices[0].numpy()[clear])


def test_mean_iou_and_accuracy_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    draw, true, predicted = np.random.default_rng(0), [], []
    for _ in range(3):
        numbers = _maps(draw, 30, 40) % 7
        numbers[numbers == VOID % 7] = VOID
        true.append(numbers)
        predicted.append(
            np.where(draw.random((30, 40)) < 0.5, numbers, draw.integers(4, 12, (30, 40))).astype(np.uint8)
        )
        predicted[-1][predicted[-1] == VOID] = 8
    images = [{"id": number, "height": 30, "width": 40} for number in range(3)]
    entries = [
        [{**annotation, "image_id": n} for n in range(3) for annotation in _annotations(part[n])]
        for part in (true, predicted)
    ]
    categories = [{"id": number, "name": f"class {number}"} for number in range(CLASSES)]
    truth = {"images": images, "annotations": entries[0], "categories": categories}
    measures = measure_semantic(truth, entries[1], per_category=True)
    known = np.stack(true) != VOID
    pairs = np.stack(true)[known], np.stack(predicted)[known]
    there = np.union1d(*pairs).tolist()
    ious = sklearn.jaccard_score(*pairs, average=None, labels=there)
    assert measures["semantic/mIoU"] == pytest.approx(ious.mean(), rel=1e-12)
    assert measures["semantic/accuracy"] == pytest.approx(sklearn.accuracy_score(*pairs), rel=1e-12)
    assert [measures[f"semantic/IoU/class {n}"] for n in there] == pytest.approx(ious.tolist(), rel=1e-12)
    assert measures["semantic/IoU/class 18"] == -1
    with pytest.raises(ValueError, match="labelled"):
        measure_semantic({**truth, "annotations": []}, entries[1], per_category=False)


WAY = """
import json, sys
from pathlib import Path
import numpy as np
import visft_ds
from tests.tiny import Here
from visft_ds.cli import main
from visft_ds.run import evaluation

evaluation.ProcessPoolExecutor = Here
root, settings, whole = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "whole"
data, shards = root / "data", root / "data-shards"


def run(*words):
    assert main([*map(str, words)]) == 0, words


run("shards", data)
run("shards", "verify", shards)
given = dict(model="debug", engine="zero1", data=shards)
visft_ds.fit(stage=1, out=root / "stage1", settings=settings, **given)
adapted = {**settings, "visft.heads.path": str(root / "stage1/export"), "visft.lora.rank": 2}
visft_ds.fit(stage=2, out=root / "stage2", settings=adapted, **given)
run("evaluate", "--run", root / "stage2", "--visualizations", 1)
run("predict", data / "images/val", "--run", root / "stage2", "--out", root / "found")
if whole:
    run("report", root / "stage1", root / "stage2", "--out", root / "report.html")
    run("export", root / "stage2", "--format", "timm", "--out", root / "merged")
    merged = ("--run", root / "merged", "--heads", root / "stage1/export")
    run("predict", data / "images/val", *merged, "--out", root / "m")
    sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    sets += ["--set=visft.tasks=semantic", "--model=debug", "--engine=zero1"]
    run("plan", "--cluster=1xH100-80GB", "--stage=1", *sets)
found = visft_ds.load(root / "stage2").predict(data / "images/val/0val.png")
found.draw().save(root / "drawn.png")
kind = settings["visft.tasks.semantic"]["head"]["type"]
adapted["visft.tasks.semantic"]["head"] = {"type": "plain" if kind == "linear" else "linear"}
try:
    visft_ds.fit(stage=2, out=root / "other", settings=adapted, **given)
except ValueError as error:
    refused = str(error)
print(json.dumps([repr(found), found.semantic.shape, np.unique(found.semantic).tolist(), refused]))
"""
PLAIN = {"type": "plain", "hidden_dim": 16, "num_heads": 2, "blocks": 1, "num_queries": 4}


@pytest.mark.parametrize(
    ("head", "how"),
    [
        ({"type": "linear"}, "short"),
        pytest.param({"type": "linear"}, "whole", marks=pytest.mark.slow),
        pytest.param(PLAIN, "whole", marks=pytest.mark.slow),
    ],
    ids=["linear-short", "linear", "plain"],
)
def test_the_whole_way(tmp_path: Path, head: dict[str, object], how: str) -> None:
    """From a folder of maps to predictions; `whole`: with a report, merged weights and a plan besides."""
    write_own(tmp_path / "data")
    image = {"size": 56, "min_size_test": 28, "max_size_test": 112, "window": 28}
    settings = {
        **{key: value for key, value in SETTINGS.items() if ".tasks." not in key},
        "visft.mode": "sampled",
        "scheduler.params.total_num_steps": 4,
        "visft.run.eval_every": 4,
        "visft.tasks.semantic": {"batch_size": 4, "micro_batch": 2, "image": image, "head": head},
    }
    (printed,) = run_ranks(["-c", WAY, str(tmp_path), json.dumps(settings), how], world=1)
    told, size, ids, refused = json.loads(printed.splitlines()[-1])
    assert (
        "%" in told
        and size == [64, 40]
        and set(ids) <= {0, 1, 2}
        and f"trained with type {head['type']}" in refused
    )
    losses = json.loads((tmp_path / "stage1/metrics.jsonl").read_text().splitlines()[0]).keys()
    assert ("loss/semantic/dice_0" in losses) == (head is PLAIN)
    measured = json.loads((tmp_path / "stage2/evaluation-val/metrics.json").read_text())
    assert 0 <= measured["metrics"]["semantic/mIoU"] <= 1 and "semantic/IoU/house" in measured["metrics"]
    assert measured["settings"]["semantic"]["window"] == 28
    results = json.loads((tmp_path / "found/predictions.json").read_text())
    assert results["semantic"] and {"id": 0, "name": "sky"} in results["categories"]
    if how == "whole":
        assert "semantic/mIoU" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@ON_PHOTOS
@pytest.mark.parametrize(("head", "steps", "least"), [("linear", 400, 0.48), ("plain", 500, 0.8)])
def test_photographs_are_learnt_by_heart(tmp_path: Path, head: str, steps: int, least: float) -> None:
    """Label maps of the objects of COCO's at 224 pixels, by a linear head or a plain one on three maps."""
    content = json.loads((PHOTOS / "annotations/instances_train2017.json").read_text())
    used = sorted({annotation["category_id"] for annotation in content["annotations"]})
    for image in content["images"]:
        size, name = (image["height"], image["width"]), Path(image["file_name"])
        numbers, own = np.full(size, VOID, dtype=np.uint8), []
        for one in content["annotations"]:
            if one["image_id"] == image["id"] and not one["iscrowd"]:
                own.append((used.index(one["category_id"]), decode_mask(one["segmentation"], size)))
        for place, mask in sorted(own, key=lambda pair: -int(pair[1].sum())):
            numbers[mask] = place
        path = tmp_path / f"data/labels/train/{name.stem}.png"
        for folder in (path.parent, tmp_path / "data/images/train"):
            folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbers).save(path)
        (tmp_path / f"data/images/train/{name}").write_bytes((PHOTOS / "train2017" / name).read_bytes())
    (tmp_path / "data/classes.txt").write_text("\n".join(str(number) for number in used))
    assert make_shards([str(tmp_path / "data")]) == 0
    settings = {
        "scheduler.params.total_num_steps": steps,
        "visft.features.views": 1,
        "visft.run.eval_every": 0,
    }
    settings |= {"visft.shared.image": {"fixed_size": 224, "flip": 0.0}}
    if head == "linear":
        settings |= {"visft.tasks.semantic.head.dropout": 0.0}
    else:
        options = {"type": "plain", "num_queries": 40, "hidden_dim": 64, "num_heads": 4, "blocks": 3}
        settings |= {"visft.tasks.semantic.head": options, "visft.tasks.semantic.loss.train_num_points": 512}
    settings |= {"visft.param_groups": [{"name": "heads", "params": "heads.*", "lr": 3e-3}]}
    fit(data=tmp_path / "data-shards", out=tmp_path / "run", settings=settings)
    assert evaluate(tmp_path / "run", split="train", visualizations=0).metrics["semantic/mIoU"] > least
