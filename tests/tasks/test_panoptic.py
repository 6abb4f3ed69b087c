"""Panoptic segmentation: quality by its definition, merging as transformers' EoMT; the whole way."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as coco_mask
from PIL import Image

from tests.panoptic_folder import NUMBERS, places, png_of, write_panoptic
from tests.tasks.cases import batch_of, extents_of
from tests.tasks.whole_way import check_engines, of_one_task, whole_way
from tests.tiny import STEPS, losses, words_of
from visft_ds.data.panoptic import read_segment_numbers, stored_panoptic
from visft_ds.data.samples import RawSample
from visft_ds.data.transforms import Flip, Resize
from visft_ds.randomness import generator
from visft_ds.shards.cli import main as make_shards
from visft_ds.tasks.panoptic.config import PanopticHeadConfig
from visft_ds.tasks.panoptic.head import PanopticOutput
from visft_ds.tasks.panoptic.metrics import measure_panoptic
from visft_ds.tasks.panoptic.results import panoptic_results
from visft_ds.tasks.panoptic.spec import panoptic_targets

CATEGORIES = [{"id": 3 * n, "name": f"class {n}", "isthing": int(n < 3)} for n in range(1, 7)]


def _segments(numbers: np.ndarray, categories: Sequence[int], crowds: Sequence[int], image_id: int) -> Any:
    """Segments of an image of numbers from 1, 0 is void."""
    segments = []
    for number in np.unique(numbers[numbers > 0]).tolist():
        code = coco_mask.encode(np.asfortranarray(numbers == number).view(np.uint8))
        entry = {"image_id": image_id, "id": number, "category_id": categories[number], "score": 1.0}
        segmentation = {"size": list(numbers.shape), "counts": code["counts"].decode()}
        segments.append({**entry, "iscrowd": int(number in crowds), "segmentation": segmentation})
    return segments


def _made_up(seed: int) -> tuple[Any, Any]:
    """True and predicted segments of a picture with void, crowds and mistakes of all kinds."""
    draw = np.random.default_rng(seed)
    true = np.kron(draw.integers(0, 9, (4, 5)), np.ones((4, 4), dtype=int))
    predicted = np.where(draw.random(true.shape) < 0.2, draw.integers(0, 12, true.shape), true)
    predicted[draw.random(true.shape) < 0.1] = 0
    categories = [3 * int(n) for n in draw.integers(1, 7, 12)]
    theirs = [category if draw.random() < 0.75 else 3 * int(draw.integers(1, 7)) for category in categories]
    crowds = []
    for number in draw.integers(1, 9, 2).tolist():  # of one category there is one in an image at most
        if categories[number] not in [categories[crowd] for crowd in crowds]:
            crowds.append(number)
    return _segments(true, categories, crowds, seed), _segments(predicted, theirs, [], seed)


def _pixels(segment: Mapping[str, Any]) -> set[int]:
    return set(np.flatnonzero(coco_mask.decode(dict(segment["segmentation"]))).tolist())


def _by_definition(true: Any, predicted: Any, images: int) -> dict[int, Counter[str]]:
    """Kirillov et al., section 4, pixel by pixel: sums of IoUs, TP, FP and FN by category."""
    sums: dict[int, Counter[str]] = {category["id"]: Counter() for category in CATEGORIES}
    for image in range(images):
        own = [(one, _pixels(one)) for one in true if one["image_id"] == image]
        theirs = [(one, _pixels(one)) for one in predicted if one["image_id"] == image]
        void = set(range(320)).difference(*(pixels for _, pixels in own))
        missed = {one["id"] for one, _ in own if not one["iscrowd"]}
        for answer, pixels in theirs:
            sum_ = sums[answer["category_id"]]
            ignored = set(void)
            is_hit = False
            for one, there in own:
                if one["category_id"] != answer["category_id"]:
                    continue
                if one["iscrowd"]:
                    ignored |= there
                    continue
                iou = len(pixels & there) / len((pixels | there) - (void & pixels))
                if iou > 0.5:
                    is_hit = True
                    missed.discard(one["id"])
                    sum_["iou"] += iou  # type: ignore[assignment]
                    sum_["tp"] += 1
            if not is_hit and len(pixels & ignored) <= 0.5 * len(pixels):
                sum_["fp"] += 1
        for one, _ in own:
            sums[one["category_id"]]["fn"] += one["id"] in missed
    return sums


def test_quality_is_that_of_its_definition() -> None:
    pictures = [_made_up(seed) for seed in range(100)]
    true = [one for own, _ in pictures for one in own]
    predicted = [one for _, own in pictures for one in own]
    images = [{"id": seed, "height": 16, "width": 20} for seed in range(100)]
    truth = {"images": images, "annotations": true, "categories": CATEGORIES}
    found = measure_panoptic(truth, predicted, per_category=True)
    wanted: dict[str, list[float]] = {}
    total: Counter[str] = Counter()
    for category in CATEGORIES:
        sum_ = _by_definition(true, predicted, 100)[category["id"]]  # type: ignore[index]
        total += sum_
        half = (sum_["fp"] + sum_["fn"]) / 2
        qualities = {"PQ": sum_["iou"] / (sum_["tp"] + half), "SQ": sum_["iou"] / sum_["tp"]}
        qualities["RQ"] = sum_["tp"] / (sum_["tp"] + half)
        kind = "things" if category["isthing"] else "stuff"
        for name, value in qualities.items():
            wanted.setdefault(name, []).append(value)
            wanted.setdefault(f"{name}_{kind}", []).append(value)
            assert found[f"panoptic/{name}/{category['name']}"] == pytest.approx(value, rel=1e-12)
    assert min(total["tp"], total["fp"], total["fn"]) > 100
    for name, values in wanted.items():
        assert found[f"panoptic/{name}"] == pytest.approx(np.mean(values), rel=1e-12), name
    exact = measure_panoptic(truth, [one for one in true if not one["iscrowd"]], per_category=False)
    assert set(exact.values()) == {1.0}
    things = [one for one in true if one["category_id"] in (3, 6)]
    few = {**truth, "annotations": things, "categories": CATEGORIES[:2]}
    nothing = measure_panoptic(few, predicted, per_category=False)
    assert nothing["panoptic/PQ"] == nothing["panoptic/PQ_things"] > 0 > nothing["panoptic/PQ_stuff"]
    with pytest.raises(ValueError, match="no panoptic maps"):
        measure_panoptic({**truth, "annotations": []}, predicted, per_category=False)


def test_masks_are_merged_as_those_of_transformers() -> None:
    """EoMT's post-processing, on images that fill parts of a square; two classes are stuff."""
    eomt = pytest.importorskip("transformers.models.eomt.image_processing_eomt")
    side, classes = 32, 5
    processor = eomt.EomtImageProcessor()
    stored = [(48, 90), (75, 60), (40, 40)]
    sizes = [eomt.get_size_with_aspect_ratio(size, side, side) for size in stored]
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 30, classes + 1) * 4
    masks = F.interpolate(torch.randn(3, 30, 3, 3) * 6, (8, 8), mode="bicubic")[None]
    outputs = type("Outputs", (), {"masks_queries_logits": masks[0], "class_queries_logits": logits[0]})
    rules = {"mask_threshold": 0.5, "overlap_mask_area_threshold": 0.1, "stuff_classes": [1, 4]}
    size = {"shortest_edge": side, "longest_edge": side}
    theirs = processor.post_process_panoptic_segmentation(outputs, stored, 0.4, size=size, **rules)
    options = PanopticHeadConfig(num_classes=classes, stuff=(10, 40), score=0.4, overlap=0.1)
    batch = batch_of(
        3,
        images=torch.zeros(3, 3, side, side),
        sizes=torch.tensor(sizes),
        original_sizes=torch.tensor(stored),
    )
    output = PanopticOutput(logits, masks, extents_of(batch), options=options)
    actual = panoptic_results(output, batch, [10 * label for label in range(classes)])
    for image, expected in enumerate(theirs, 1):
        own = [one for one in actual if one["image_id"] == image]
        infos = expected["segments_info"]
        assert [one["id"] for one in own] == [info["id"] + 1 for info in infos]
        for one, info in zip(own, infos, strict=True):
            assert one["category_id"] == 10 * info["label_id"] and one["score"] == pytest.approx(
                info["score"], abs=1e-6
            )
            there = (expected["segmentation"] == info["id"]).numpy()
            assert (coco_mask.decode(one["segmentation"]) == there).mean() > 0.999
    kinds = Counter((one["image_id"], one["category_id"]) for one in actual)
    assert len(actual) > 12 and max(kinds.values()) > 1
    assert {count for (_, category), count in kinds.items() if category in (10, 40)} == {1}
    part = panoptic_results(
        output, replace(batch, real=torch.tensor([False, True, False])), range(classes), 0.9
    )
    assert {one["image_id"] for one in part} == {2} and all(one["score"] >= 0.9 for one in part)


def test_segments_become_targets_but_crowds_and_void() -> None:
    numbers = NUMBERS[places(1, 48, 64)]
    picture = png_of(numbers)
    segments = [
        {"id": 5, "category_id": 2, "iscrowd": 0},
        {"id": 9, "category_id": 7, "iscrowd": 0},
        {"id": 12, "category_id": 7, "iscrowd": 1},
        {"id": 77, "category_id": 7, "iscrowd": 0},  # it has no pixel
    ]
    raw = RawSample(0, 0, (48, 64), None, (), (), panoptic=stored_panoptic(_bytes(picture), segments))
    target = panoptic_targets({2: 0, 7: 1}, raw, [Flip(), Resize(48, 64)], generator(0))
    assert target["labels"].tolist() == [0, 1]
    shares = target["masks"][0] / 255
    assert shares.sum() * 16 == pytest.approx((numbers == 5).sum(), rel=0.01)
    assert not panoptic_targets({}, replace(raw, panoptic=None), [], generator(0))["labels"].size


def _bytes(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("how", ["short", pytest.param("whole", marks=pytest.mark.slow)])
def test_the_whole_way(tmp_path: Path, how: str) -> None:
    """From COCO's files to predictions in COCO's form; `whole`: with a stage 2, a report, a plan and exports
    besides.
    """
    write_panoptic(tmp_path / "data")
    image = {"size": 56, "min_size_test": 42, "max_size_test": 56}
    head = {"hidden_dim": 16, "num_heads": 2, "blocks": 1, "num_queries": 6, "score": 0.2, "overlap": 0.1}
    settings = of_one_task("panoptic", 3, micro_batch=2, image=image, head=head)
    if how == "whole":
        settings["visft.run.visualizations"] = 1
        settings["visft.run.memory_check"] = True
    in_words, shape, least, _ = whole_way(tmp_path, "panoptic", "val2017", settings, whole=how == "whole")
    assert "pixels" in in_words and shape == [64, 40] and least >= 0
    assert {"loss/panoptic/ce", "loss/panoptic/dice_0"} <= losses(tmp_path / "stage1")[0].keys()
    last = tmp_path / ("stage2" if how == "whole" else "stage1")
    measured = json.loads((last / "evaluation-val/metrics.json").read_text())["metrics"]
    assert 0 <= measured["panoptic/PQ"] <= 1 and "panoptic/SQ/box" in measured
    whole = json.loads((tmp_path / "found/predictions.json").read_text())
    coco = orjson.loads((tmp_path / "found/panoptic.json").read_bytes())
    assert {category["name"]: category["isthing"] for category in coco["categories"]} == {
        "box": 1,
        "sky": 0,
        "ground": 0,
    }
    for annotation, listed in zip(coco["annotations"], whole["images"], strict=True):
        numbers = read_segment_numbers((tmp_path / "found/panoptic" / annotation["file_name"]).read_bytes())
        assert annotation["image_id"] == listed["id"] and numbers.shape == (listed["height"], listed["width"])
        areas = {info["id"]: info["area"] for info in annotation["segments_info"]}
        assert areas == {n: int((numbers == n).sum()) for n in np.unique(numbers[numbers > 0]).tolist()}
    if how == "whole":
        assert "panoptic/PQ" in (tmp_path / "report.html").read_text(encoding="utf-8")
        exported = orjson.loads((tmp_path / "found-onnx/panoptic.json").read_bytes())
        assert exported["categories"] == coco["categories"]
        for theirs, ours in zip(exported["annotations"], coco["annotations"], strict=True):
            kinds = [Counter(info["category_id"] for info in one["segments_info"]) for one in (theirs, ours)]
            assert kinds[0] == kinds[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_the_same_under_every_engine(tmp_path: Path) -> None:
    """One process, and ZeRO-3 on two."""
    assert make_shards([str(write_panoptic(tmp_path / "data", 8, 1))]) == 0
    head = {"hidden_dim": 16, "num_heads": 2, "blocks": 1, "num_queries": 6}
    loss = {"train_num_points": 64}
    settings = of_one_task("panoptic", STEPS, micro_batch=1, head=head, loss=loss, image={"fixed_size": 56})
    words = ["--stage=1", "--model=debug", f"--data={tmp_path / 'data-shards'}", *words_of(settings)]
    check_engines(tmp_path, [*words, "--set=visft.run.eval_every=0"], "loss/panoptic/dice")
