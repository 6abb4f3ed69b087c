"""Layouts of data sets for benchmarks: each is read as its makers meant it; what is damaged or hostile is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visft_ds.evals.judge import classes, objects, ocr, retrieval
from visft_ds.evals.judge.classes import read_classes
from visft_ds.evals.judge.kinds import parse_benchmark, parse_benchmarks
from visft_ds.evals.judge.protocols import QUICK


def _image(path: Path, colour: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def _folders(root: Path, names: list[str], each: int = 2) -> Path:
    for name in names:
        for number in range(each):
            _image(root / name / f"{number}.png")
    return root


def test_imagenet_and_its_relatives(tmp_path: Path) -> None:
    """Names by WordNet id; only classes with a folder may be chosen (-A, -R have 200); OpenAI's 80 templates."""
    names = classes.imagenet()[0]
    synsets = list(names)
    assert (synsets[0], names[synsets[0]], len(synsets)) == ("n01440764", "tench", 1000)
    found = read_classes(str(_folders(tmp_path / "imagenet-r", [synsets[402], synsets[1], synsets[999]])))
    assert found.classes == ("goldfish", "acoustic guitar", "toilet paper")
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(found.templates) == 80
    _folders(tmp_path / "v2", [str(number) for number in range(1000)], each=1)
    found = read_classes(str(tmp_path / "v2"))  # as texts, "10" comes before "2"
    assert found.classes == tuple(names.values())
    assert found.images.names[found.labels.tolist().index(2)] == "2/0.png"


def test_objectnet_is_what_imagenet_shares_without_its_red_border(tmp_path: Path) -> None:
    maps = tmp_path / "objectnet-1.0/mappings"
    maps.mkdir(parents=True)
    labels = {"air_freshener": "Air freshener", "backpack": "Backpack", "pen": "Ballpoint pen"}
    (maps / "folder_to_objectnet_label.json").write_text(json.dumps(labels))
    shared = {"Backpack": "backpack, back pack", "Ballpoint pen": "ballpoint"}
    (maps / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))
    for folder in labels:
        inner = Image.new("RGB", (10, 10), (255, 0, 0))
        inner.paste((0, 0, 255), (2, 2, 8, 8))
        (maps.parent / "images" / folder).mkdir(parents=True)
        inner.save(maps.parent / "images" / folder / "x.png")
    found = read_classes(str(maps.parent))
    assert found.classes == ("Backpack", "Ballpoint pen")
    assert found.images.read(0).size == (6, 6) and np.asarray(found.images.read(1))[..., 0].max() == 0


def test_built_in_digits_are_real() -> None:
    train, test = classes.read_train_and_test("digits")
    assert len(train.images) + len(test.images) == 1797 and train.images.fingerprint != test.images.fingerprint
    assert not set(train.images.names) & set(test.images.names)
    pixels = np.asarray(train.images.read(0))
    assert pixels.max() > 200 and (pixels[..., 0] == pixels[..., 2]).all()


def test_trees_with_splits(tmp_path: Path) -> None:
    _folders(tmp_path / "train", ["hot_dog", "cat"], each=3)
    _folders(tmp_path / "val", ["hot_dog", "cat"])
    (tmp_path / "templates.txt").write_text("a {} on a plate\n")
    train, test = classes.read_train_and_test(str(tmp_path))
    assert (len(train.images), len(test.images)) == (6, 4) and test.classes == ("cat", "hot dog")
    assert test.templates == ("a {} on a plate",)
    (tmp_path / "classnames.txt").write_text("feline\nfrankfurter\n")
    assert read_classes(str(tmp_path), "train").classes == ("feline", "frankfurter")
    (tmp_path / "classnames.txt").unlink()
    _folders(tmp_path / "val", ["bird"])
    with pytest.raises(ValueError, match="other classes: bird"):
        classes.read_train_and_test(str(tmp_path))


def test_captions_of_coco(tmp_path: Path) -> None:
    """In the order of the images, five of each at most."""
    texts = [{"image_id": 3, "caption": f"why {n}"} for n in range(7)] + [{"image_id": 7, "caption": " an x \n"}]
    content = {"images": [{"id": 7, "file_name": "x.jpg"}, {"id": 3, "file_name": "y.jpg"}], "annotations": texts}
    for name in ("x.jpg", "y.jpg"):
        _image(tmp_path / "val2017" / name)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps(content))
    _, captions, owners = retrieval.read_captions(str(tmp_path))
    assert captions == ("an x", *(f"why {n}" for n in range(5))) and owners.tolist() == [0, 1, 1, 1, 1, 1]


def test_captions_of_karpathy(tmp_path: Path) -> None:
    """Images anywhere below; a link to the folder above it is not followed."""
    for name in ("a.jpg", "b.jpg"):
        _image(tmp_path / "images/deep" / name)
    (tmp_path / "images/again").symlink_to(tmp_path)
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": f"{name} {n}"} for n in range(2)]}
        for name, split in (("b.jpg", "test"), ("a.jpg", "train"))
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    assert retrieval.read_captions(str(tmp_path))[1] == ("b.jpg 0", "b.jpg 1")
    assert retrieval.read_captions(str(tmp_path), "train")[1] == ("a.jpg 0", "a.jpg 1")


def test_boxes_are_seen_as_crops() -> None:
    image = Image.new("RGB", (100, 60), (0, 0, 0))
    image.paste((0, 200, 0), (10, 10, 30, 50))
    seen = np.asarray(objects.crop(image, (10, 10, 20, 40)))
    assert seen.shape == (48, 48, 3)  # 1.2 times the longer side
    assert (seen[4:44, 14:34] == (0, 200, 0)).all() and (seen[:, :4] == 128).all() and (seen[0, 10] == 0).all()
    assert np.asarray(objects.crop(image, (200, 200, 20, 20))).min() == 128  # a box outside of its image


def test_boxes_of_a_coco_tree(tmp_path: Path) -> None:
    """Small ones and crowds are left out; what a box is called does not depend on what covers nothing."""
    box = {"iscrowd": 0, "image_id": 1}
    content = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 60, "width": 90}],
        "categories": [{"id": 5, "name": "cat"}, {"id": 9, "name": "dog"}],
        "annotations": [
            {**box, "id": 1, "category_id": 5, "bbox": [0, 0, 20, 30]},
            {**box, "id": 2, "category_id": 9, "bbox": [10, 10, 20, 15]},
            {**box, "id": 3, "category_id": 9, "bbox": [10, 10, 20, 20], "iscrowd": 1},
            {**box, "id": 4, "category_id": 9, "bbox": [30, 10, 40, 20]},
        ],
    }
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        _image(tmp_path / f"{split}2017/a.jpg", size=(90, 60))
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    benchmark = parse_benchmark(f"objects={tmp_path}", QUICK)
    images = benchmark.sets["test"]
    assert [images.read(place).size for place in range(len(images))] == [(48, 48), (36, 36)] and not images.stretched
    features = {part: {"pooled": torch.tensor([[1.0, 0], [0, 1]])} for part in ("train", "test")}
    (score,) = benchmark.scores(features, benchmark.numbers)
    assert (
        score.name == "probe"
        and score.values.tolist() == [1, 1]
        and benchmark.texts
        == [
            "a photo of a cat.",
            "a photo of a dog.",
        ]
    )


def test_words(tmp_path: Path) -> None:
    """ICDAR's byte order mark and quotes, or tabs; names may not leave their folder."""
    for name in ("word_1.png", "word_2.png", "word_3.png"):
        _image(tmp_path / "train" / name)
        _image(tmp_path / "test/words" / name)
    lines = '\ufeffword_1.png, "Tired,\\"ness"\nword_2.png, "!!"\nword_3.png, "É3"\n'
    (tmp_path / "train/gt.txt").write_text(lines, encoding="utf-8")
    (tmp_path / "test/labels.txt").write_text("words/word_1.png\tNew York\n")
    benchmark = parse_benchmark(f"ocr={tmp_path},name=x", QUICK)
    assert benchmark.settings["words"] == [("tiredness", "3"), ("newyork",)] and benchmark.sets["train"].stretched
    (tmp_path / "test/labels.txt").write_text("../train/word_1.png\ta\n")
    with pytest.raises(ValueError, match="out of its folder"):
        ocr.read_words(tmp_path / "test")


def test_benchmarks_of_a_command_line(tmp_path: Path) -> None:
    root = _folders(tmp_path / "shapes", ["a", "b"])
    given = [f"zero_shot={root}", f"zero_shot={root},name=again", f"classification={root}"]
    found = parse_benchmarks(given, "classification/shapes kNN", QUICK)[0]
    assert [one.label for one in found] == ["zero_shot/shapes", "zero_shot/again", "classification/shapes"]
    for texts, primary, word in (
        ([f"classification={root},spilt=val"], None, "spilt"),
        (given[:1] * 2, None, "two of --on"),
        (given, "classification/shapes kMN", "did you mean classification/shapes kNN"),
    ):
        with pytest.raises(ValueError, match=word):
            parse_benchmarks(texts, primary, QUICK)
