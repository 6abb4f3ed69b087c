"""Segmentation: labels of every layout at their own size, numbers against scikit-learn, and the published
protocol.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from faster_coco_eval import mask as coco_mask
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import jaccard_score
from torch.nn import functional as F

from visft_ds.evals.judge import dense_probes
from visft_ds.evals.judge.benchmark import ImageSet, Label
from visft_ds.evals.judge.crops import label_of
from visft_ds.evals.judge.dense_sets import NOTHING, DenseSet, Thing, read_train_and_test
from visft_ds.evals.judge.encoding import Settings
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.miou import contenders, largest, mean_iou
from visft_ds.evals.judge.model_text import parse_model
from visft_ds.evals.judge.models import load_encoder
from visft_ds.evals.judge.protocol import PUBLISHED, QUICK
from visft_ds.evals.judge.segmentation import pooled, segmentation
from visft_ds.evals.judge.sheet import typical
from visft_ds.shards.build import build
from visft_ds.shards.options import Options
from visft_ds.tasks.classes import VOID

SIDE = 112  # of the pictures here


def _request(source: Path) -> Request:
    return Request(QUICK, "segmentation/x", str(source))


def _picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3)).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("labels", "parts", "void"),
    [("annotations", ("training", "validation"), 0), ("labels", ("train", "val"), VOID)],
)
def test_label_maps(tmp_path: Path, labels: str, parts: tuple[str, str], void: int) -> None:
    """Class numbers are those of the file, and what the layout, ADE20K's or any, calls void is none."""
    numbers = np.repeat(np.array([[1, 2]], dtype=np.uint8), SIDE // 2, axis=1).repeat(SIDE, axis=0)
    numbers[:20] = void
    for folder in parts:
        _picture(tmp_path / "images" / folder / "one.jpg")
        (tmp_path / labels / folder).mkdir(parents=True)
        Image.fromarray(numbers).save(tmp_path / labels / folder / "one.png")
    (tmp_path / labels / "other").mkdir()  # without images: no part
    first = int(void == 0)  # 0 of ADE20K's is no class
    for part in read_train_and_test(_request(tmp_path)):
        label = part.label(0)
        assert (label[:20] == VOID).all() and part.images.stretched and not part.things
        assert (label[20:, : SIDE // 2] == 1 - first).all() and (label[20:, SIDE // 2 :] == 2 - first).all()
        assert part.classes == tuple("012"[: 3 - first])


def test_voc_and_wrong_maps(tmp_path: Path) -> None:
    """Pascal VOC lists its parts; a map of another size than its image, or of one class alone, is refused."""
    numbers = np.zeros((SIDE, SIDE), dtype=np.uint8)
    numbers[:5], numbers[5:9] = 3, VOID
    (tmp_path / "SegmentationClass").mkdir()
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    for part in ("train", "val"):
        _picture(tmp_path / f"JPEGImages/{part}.jpg")
        Image.fromarray(numbers).save(tmp_path / f"SegmentationClass/{part}.png")
        (tmp_path / f"ImageSets/Segmentation/{part}.txt").write_text(f"{part}\n")
    train, test = read_train_and_test(_request(tmp_path))
    assert train.images.names == ["JPEGImages/train.jpg"] and np.array_equal(test.label(0), numbers)
    (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("train\n")
    assert np.array_equal(
        read_train_and_test(_request(tmp_path))[0].label(0), numbers
    )  # its maps are not there
    (tmp_path / "SegmentationClassAug").mkdir()
    Image.fromarray(numbers + (numbers == 3)).save(tmp_path / "SegmentationClassAug/train.png")
    train, test = read_train_and_test(_request(tmp_path))
    assert (train.label(0)[:5] == 4).all() and (test.label(0)[:5] == 3).all()
    for wrong, word in ((numbers[1:], "pixels"), (np.full_like(numbers, VOID), "one class")):
        Image.fromarray(wrong).save(tmp_path / "SegmentationClass/val.png")
        with pytest.raises(ValueError, match=word):
            read_train_and_test(_request(tmp_path))


def _box(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def _coco(root: Path) -> None:
    """A large object by its polygon, a small one on top by its run-length code, one by its box alone, a
    crowd.
    """
    code = np.zeros((SIDE, SIDE), np.uint8, order="F")
    code[8:16, 8:16] = 1
    packed = coco_mask.encode(code)
    annotations: list[dict[str, Any]] = [
        {
            "category_id": 9,
            "bbox": [8, 8, 8, 8],
            "segmentation": {"size": [SIDE, SIDE], "counts": packed["counts"].decode()},
        },
        {"category_id": 5, "bbox": [0, 0, 40, 40], "segmentation": _box(0, 0, 40, 40)},
        {"category_id": 5, "bbox": [60, 60, 20, 20], "segmentation": []},
        {"category_id": 9, "bbox": [100, 0, 4, 4], "iscrowd": 1, "segmentation": _box(100, 0, 4, 4)},
    ]
    for number, one in enumerate(annotations):
        one |= {"id": number + 1, "image_id": 1, "area": 1.0, "iscrowd": one.get("iscrowd", 0)}
    (root / "annotations").mkdir()
    for part in ("train", "val"):
        _picture(root / f"{part}2017/1.jpg")
        image = {"id": 1, "file_name": "1.jpg", "height": SIDE, "width": SIDE, "license": 1}
        categories = [{"id": 9, "name": "dog"}, {"id": 5, "name": "cat"}]
        content = {"images": [image], "annotations": annotations, "categories": categories}
        (root / f"annotations/instances_{part}2017.json").write_text(json.dumps(content))


def _check_coco(part: DenseSet) -> None:
    label = part.label(0)
    assert part.classes == ("", "cat", "dog")
    assert (label[8:16, 8:16] == 2).all() and (label[:8, :40] == 1).all()
    assert (label[60:80, 60:80] == NOTHING).all()  # nobody drew what is in this box
    assert (label[:4, 100:104] == NOTHING).all() and (label[90:] == 0).all()
    # by size; crowds and boxes are none
    assert [(thing.label, thing.owner) for thing in part.things] == [(1, 0), (2, 0)]
    assert coco_mask.area(part.things[1].code) == 8 * 8


def test_outlines_of_a_coco_tree_and_of_shards(tmp_path: Path) -> None:
    tree, shards = tmp_path / "tree", tmp_path / "shards"
    tree.mkdir()
    _coco(tree)
    for part in read_train_and_test(_request(tree)):
        _check_coco(part)
    for split in ("train", "val"):
        build(
            Options(
                split, tree / f"{split}2017", tree / f"annotations/instances_{split}2017.json", out=shards
            )
        )
    for part in read_train_and_test(_request(shards)):
        _check_coco(part)
        assert part.images.read(0).size == (SIDE, SIDE)


def test_overlaps_are_scikit_learns() -> None:
    """At the size of each label, over the classes that are there or said; void counts nowhere."""
    rng = np.random.default_rng(0)
    labels = [rng.choice([0, 1, 3, VOID], size).astype(np.uint8) for size in ((30, 41), (17, 23))]
    labels[1][3:] = 90
    maps = torch.from_numpy(rng.normal(size=(2, 3, 99, 4, 6)))
    maps[:, :, 2] = -9  # a class that is neither there nor said
    score = mean_iou("x", maps, partial(label_of, _set(labels, "a" * 99)), 99)
    for draw in range(3):
        said = [
            F.interpolate(feature_map[draw : draw + 1], label.shape, mode="bilinear")[0].argmax(dim=0).numpy()
            for feature_map, label in zip(maps, labels, strict=True)
        ]
        step = 4 if draw else 1  # of resamples only the spread is asked for
        several = [
            (label[::step, ::step], one[::step, ::step]) for label, one in zip(labels, said, strict=True)
        ]
        truth = np.concatenate([label[label != VOID] for label, _ in several])
        answers = np.concatenate([one[label != VOID] for label, one in several])
        expected = jaccard_score(truth, answers, average="macro")
        assert (score.value if draw == 0 else score.retrained[draw - 1]) == pytest.approx(expected)  # type: ignore[index]


def test_pictures_of_a_page_are_typical_ones() -> None:
    """Nine changes in disorder: three pictures are the second, the median and the eighth, not the largest."""
    changes = np.array([0.9, -0.5, 0.1, 0.0, 0.3, -0.1, 0.2, 0.05, -0.9])
    assert [changes[place] for place in typical(changes, 3)] == [-0.5, 0.05, 0.3]
    assert typical(changes[:2], 6) == [1, 0]


@pytest.mark.parametrize("size", [(30, 41), (3, 5)])
def test_classes_that_cannot_win_are_left_out_and_none_else(size: tuple[int, int]) -> None:
    """Of sharp maps most; the answers are those of all classes enlarged."""
    generator = torch.Generator().manual_seed(0)
    there = (
        torch.randint(0, 12, (3, 2, 2), generator=generator).repeat_interleave(3, 1).repeat_interleave(2, 2)
    )
    maps = torch.randn(3, 40, 6, 4, generator=generator) + 4 * F.one_hot(there, 40).permute(0, 3, 1, 2)
    assert 12 < contenders(maps).sum() < 3 * 40
    expected = F.interpolate(maps, size, mode="bilinear").argmax(dim=1)
    assert torch.equal(largest(maps, size), expected)
    assert torch.equal(largest(maps, size, 2), expected[:, ::2, ::2])


def _set(labels: list[Label], names: str, things: tuple[Thing, ...] = ()) -> DenseSet:
    """Images whose grey levels are their labels."""
    pictures = [Image.fromarray((60 * (label % 4)).astype(np.uint8)).convert("RGB") for label in labels]
    images = ImageSet(
        [str(index) for index in range(len(labels))], lambda index: pictures[index], "x", stretched=True
    )
    return DenseSet(images, lambda index: labels[index], tuple(names), things)


def test_objects_are_means_over_their_outlines() -> None:
    rng = np.random.default_rng(0)
    masks = [np.asfortranarray(rng.integers(0, 2, (12, 18)), dtype=np.uint8) for _ in range(3)]
    things = tuple(
        Thing(owner, 0, coco_mask.encode(mask)) for owner, mask in zip((0, 2, 2), masks, strict=True)
    )
    maps = torch.from_numpy(rng.normal(size=(3, 5, 4, 6)))
    found = pooled(maps, things).features
    for one, thing, mask in zip(found, things, masks, strict=True):
        share = mask.reshape(4, 3, 6, 3).mean(axis=(1, 3))
        mean = (maps[thing.owner].numpy() * share).sum(axis=(1, 2)) / share.sum()
        np.testing.assert_allclose(one.numpy(), mean, rtol=1e-5)


def _blocks(rng: np.random.Generator, count: int) -> list[Label]:
    """Labels (32, 32) of four squares, each of one of three classes."""
    return [rng.integers(0, 3, (2, 2)).repeat(16, 0).repeat(16, 1).astype(np.uint8) for _ in range(count)]


def test_quick_numbers_and_the_choice_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that hold the classes are nearly always right, noise is not, and held-out training images
    tell.
    """
    rng = np.random.default_rng(0)
    parts = {name: _set(_blocks(rng, count), "abc") for name, count in (("train", 40), ("test", 10))}
    few = replace(QUICK, segmentation=replace(QUICK.segmentation, steps=60, warm_up=2, rate=0.02))
    monkeypatch.setattr(dense_probes, "BRIEF", few)
    benchmark = segmentation("segmentation/x", parts["train"], parts["test"], few)
    good, bad = {}, {}
    for name, part in parts.items():
        truth = np.stack([part.label(index)[8::16, 8::16] for index in range(len(part.images))])
        noise = torch.from_numpy(rng.normal(size=(len(truth), 4, 2, 2))).float()
        bad[name] = {"patches": noise}
        good[name] = {"patches": noise + 6 * F.one_hot(torch.from_numpy(truth).long(), 4).permute(0, 3, 1, 2)}
    assert benchmark.names == ["in-context mIoU", "linear mIoU"]
    for name in benchmark.names:
        (found,), (chance,) = benchmark.scores(good, [name]), benchmark.scores(bad, [name])
        assert found.name == name and found.value > 0.6 > 0.4 > chance.value
        assert found.retrained is not None and found.retrained.std() < 0.05
        assert benchmark.layer_choice is not None
        held_out = benchmark.layer_choice.held_out
        assert held_out(good["train"], name) > 0.4 > held_out(bad["train"], name)


def test_training_images_of_one_group_are_drawn_together() -> None:
    """All of one patient: there is nothing to draw, so that every resample is the same."""
    rng = np.random.default_rng(0)
    code = coco_mask.encode(np.asfortranarray(np.eye(32, dtype=np.uint8)))
    things = tuple(Thing(owner, number, code) for owner in range(12) for number in (1, 2))
    train, test = (replace(_set(_blocks(rng, 12), "abc"), things=things) for _ in range(2))
    together = replace(train, images=replace(train.images, groups=np.zeros(12, dtype=np.int64)))
    features = {part: {"patches": torch.randn(12, 4, 2, 2)} for part in ("train", "test")}
    for name in ("in-context mIoU", "objects kNN"):
        for part, is_drawn in ((train, True), (together, False)):
            (score,) = segmentation("segmentation/x", part, test, QUICK).scores(features, [name])
            assert score.retrained is not None and (score.retrained.std() > 0) == is_drawn, name


def test_the_published_protocol(tmp_path: Path) -> None:
    """Augmented crops teach, windows judge, at a size that is not the labels'; the same with workers."""
    rng = np.random.default_rng(0)
    train, test = _set(_blocks(rng, 6), "abc"), _set(_blocks(rng, 2), "abc")
    code = coco_mask.encode(np.asfortranarray(np.eye(32, dtype=np.uint8)))
    train, test = (replace(one, things=(Thing(0, 1, code), Thing(1, 2, code))) for one in (train, test))
    steps = replace(PUBLISHED.segmentation, steps=3, warm_up=1)
    benchmark = segmentation(
        "segmentation/x", train, test, replace(PUBLISHED, memory=100, segmentation=steps)
    )
    net = timm.create_model("test_efficientnet", num_classes=0)
    save_file(
        {key: value.contiguous() for key, value in net.state_dict().items()}, tmp_path / "net.safetensors"
    )
    spec = parse_model(f"timm:test_efficientnet:{tmp_path}/net.safetensors")
    encoder = replace(load_encoder(spec, "fp32"), side=64)
    assert benchmark.published is not None
    first, second = (
        {score.name: score for score in benchmark.published(encoder, settings, benchmark.names)}
        for settings in (Settings(torch.device("cpu"), "fp32", tmp_path, 4, threads) for threads in (0, 2))
    )
    assert list(first) == benchmark.names == ["in-context mIoU", "linear mIoU", "objects kNN"]
    for name, score in first.items():
        assert 0 <= score.value <= 1 and np.array_equal(score.values, second[name].values)
