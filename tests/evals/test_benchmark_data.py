"""Layouts of data sets for benchmarks: each is read as its makers meant it; what is damaged or hostile is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evals.conftest import World
from tests.map_folder import write_own
from visft_ds.evals.judge import classes, dense_sets, objects, ocr, retrieval
from visft_ds.evals.judge.benchmark import Benchmark, Number, fifth, resamples
from visft_ds.evals.judge.classes import read_classes
from visft_ds.evals.judge.crops import NO_CLASS, label_of
from visft_ds.evals.judge.images import PARTS, chosen, from_files, grouped
from visft_ds.evals.judge.in_domain import trained_on
from visft_ds.evals.judge.kinds import Request, parse_benchmark, parse_benchmarks
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.protocol import QUICK
from visft_ds.evals.judge.rows import held_out
from visft_ds.run.record import write_run


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
    """Names by WordNet id; only classes with a folder may be chosen (-A, -R have 200); OpenAI's 80
    templates.
    """
    names = classes.imagenet_names()
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
    assert (
        len(train.images) + len(test.images) == 1797 and train.images.fingerprint != test.images.fingerprint
    )
    assert not set(train.images.names) & set(test.images.names)
    pixels = np.asarray(train.images.read(0))
    assert pixels.max() > 200 and (pixels[..., 0] == pixels[..., 2]).all()


def test_trees_with_splits(tmp_path: Path) -> None:
    _folders(tmp_path / "train", ["hot_dog", "cat"], each=3)
    _folders(tmp_path / "val", ["hot_dog", "cat"])
    train, test = classes.read_train_and_test(str(tmp_path))
    assert (len(train.images), len(test.images)) == (6, 4) and test.classes == ("cat", "hot dog")
    _folders(tmp_path / "val", ["bird"])
    with pytest.raises(ValueError, match="other classes: bird"):
        classes.read_train_and_test(str(tmp_path))


def test_captions_of_coco(tmp_path: Path) -> None:
    """In the order of the images, five of each at most."""
    texts = [{"image_id": 3, "caption": f"why {n}"} for n in range(7)] + [
        {"image_id": 7, "caption": " an x \n"}
    ]
    content = {
        "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 3, "file_name": "y.jpg"}],
        "annotations": texts,
    }
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
    assert (
        (seen[4:44, 14:34] == (0, 200, 0)).all() and (seen[:, :4] == 128).all() and (seen[0, 10] == 0).all()
    )
    assert np.asarray(objects.crop(image, (200, 200, 20, 20))).min() == 128  # a box outside of its image


def test_boxes_are_drawn_into_whole_images() -> None:
    """Around the box, in the middle of a square; at a border of it the line is inside."""
    image = Image.new("RGB", (200, 120), (0, 0, 0))
    seen = np.asarray(objects.marked(image, (30, 20, 40, 50)))
    red = (seen == (255, 0, 0)).all(axis=2)
    assert seen.shape == (200, 200, 3) and (seen[:40] == 128).all()
    assert (seen[60:110, 30:70] == 0).all() and red[60:110, [28, 29, 70, 71]].all()
    assert red.sum() == 54 * 44 - 50 * 40
    whole = (np.asarray(objects.marked(image, (0, 0, 200, 120))) == (255, 0, 0)).all(axis=2)
    assert whole[38:162, [0, 1, 198, 199]].all() and whole[[38, 39, 160, 161]].all()


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
    assert [images.read(index).size for index in range(len(images))] == [
        (48, 48),
        (36, 36),
    ] and not images.stretched
    features = {part: {"pooled": torch.tensor([[1.0, 0], [0, 1]])} for part in ("train", "test")}
    (score,) = benchmark.scores(features, benchmark.names)
    assert score.groups is not None and score.groups.tolist() == [0, 0]  # both of one image
    for split in ("train", "val"):
        _image(tmp_path / f"{split}2017/b.jpg", size=(90, 60))
        second = {"id": 2, "file_name": "b.jpg", "height": 60, "width": 90}
        content["images"] = [content["images"][0], second]
        content["annotations"][3]["image_id"] = 2
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    (by_image,) = parse_benchmark(f"objects={tmp_path}", QUICK).scores(features, ["probe"])
    (of_one_video,) = parse_benchmark(rf"objects={tmp_path},groups=jpg", QUICK).scores(features, ["probe"])
    assert by_image.groups is not None and by_image.groups.tolist() == [0, 1]
    assert of_one_video.groups is not None and of_one_video.groups.tolist() == [0, 0]
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
    assert (
        benchmark.settings["words"] == [("tiredness", "3"), ("newyork",)]
        and benchmark.sets["train"].stretched
    )
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


def _coco(masks: Sequence[bool]) -> dict[str, Any]:
    """An image of 90 x 60 pixels with objects of two classes side by side, with a mask or without."""
    found: list[dict[str, Any]] = []
    for number, drawn in enumerate(masks):
        box = [30 * number, 10, 20, 40]
        mask = {"segmentation": [[box[0], 10, box[0] + 20, 10, box[0] + 20, 50, box[0], 50]]} if drawn else {}
        entry = {"id": number, "image_id": 1, "category_id": number % 2, "iscrowd": 0, "bbox": box}
        found.append({**entry, **mask})
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    image = {"id": 1, "file_name": "a.jpg", "height": 60, "width": 90}
    return {"images": [image], "annotations": found, "categories": categories}


@pytest.mark.parametrize(
    ("images", "annotations"),
    [
        ("train/a.jpg", "annotations/instances_train.json"),
        ("images/train/a.jpg", "train.json"),
        ("train/a.jpg", "train/_annotations.coco.json"),
    ],
)
def test_folders_are_read_as_visft_shards_does(tmp_path: Path, images: str, annotations: str) -> None:
    """Plain COCO folders of any names, and Roboflow's."""
    for split in ("train", "val"):
        _image(tmp_path / images.replace("train", split), size=(90, 60))
        path = tmp_path / annotations.replace("train", split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(_coco([True, True])))
    learnt, held = dense_sets.read_train_and_test(Request(QUICK, "x", str(tmp_path)))
    assert held.classes == ("", "cat", "dog") and len(learnt.things) == 2 and not held.notes
    label = held.label(0)
    assert np.unique(label[20]).tolist() == [0, 1, 2] and (label[10:50, :20] == 1).all()


def test_a_box_without_a_mask_is_the_truth_of_no_miou(tmp_path: Path) -> None:
    """Nobody knows its pixels: they count nowhere, and the page says so; without any mask there is no
    mIoU.
    """
    for split, masks in (("train", [True, True]), ("val", [True, False, True])):
        _image(tmp_path / split / "a.jpg", size=(90, 60))
        (tmp_path / f"{split}.json").write_text(json.dumps(_coco(masks)))
    benchmark = parse_benchmark(f"segmentation={tmp_path}", QUICK)
    assert len(benchmark.notes) == 1 and "1 of 3 objects have a box and no mask" in benchmark.notes[0]
    _, held = dense_sets.read_train_and_test(Request(QUICK, "x", str(tmp_path)))
    label = held.label(0)
    assert (
        (label[10:50, 30:50] == dense_sets.NOTHING).all()
        and (label[10:50, :20] == 1).all()
        and len(held.things) == 2
    )
    (tmp_path / "val.json").write_text(json.dumps(_coco([False, False])))
    with pytest.raises(ValueError, match="--on objects="):
        parse_benchmark(f"segmentation={tmp_path}", QUICK)
    assert len(parse_benchmark(f"objects={tmp_path}", QUICK).sets["test"]) == 2


def test_named_label_maps_are_read_as_visft_shards_does(tmp_path: Path) -> None:
    """CamVid has "Unlabelled", its number 11, among 12 names, or 11 names and a number that none has."""
    write_own(tmp_path, 2, 1)
    source = f"segmentation={tmp_path}"
    names = ["sky", "meadow", "house"]
    for path in tmp_path.glob("labels/*/*.png"):
        numbers = np.asarray(Image.open(path)).copy()
        numbers[numbers == 255] = 3
        Image.fromarray(numbers).save(path)
    with pytest.raises(
        ValueError, match=r"train\.png: the number 3 has no name: classes are numbered 0 to 2"
    ):
        parse_benchmark(source, QUICK)
    fingerprints = set()
    for listed, void, expected in (
        (names, 3, names),
        ([*names, "Unlabelled"], 3, names),
        ([*names, "Unlabelled"], 1, ["sky", "house", "Unlabelled"]),
    ):
        (tmp_path / "classes.txt").write_text("\n".join(listed))
        _, held = dense_sets.read_train_and_test(Request(QUICK, "x", str(tmp_path), void=str(void)))
        assert held.classes == tuple(expected)
        stored = np.asarray(Image.open(tmp_path / "labels/val/0val.png"))
        label = label_of(held, 0).numpy()
        assert (label[stored == void] == NO_CLASS).all()
        for number, name in enumerate(listed):
            if name in expected:
                assert (label[stored == number] == expected.index(name)).all()
        fingerprints.add(held.images.fingerprint)
    assert len(fingerprints) == 2, "scores are kept by what the labels are"
    assert parse_benchmark(f"{source},void=3", QUICK).settings["classes"] == tuple(names)
    for wrong, word in (("256", "0 to 255"), ("x", "void=x")):
        with pytest.raises(ValueError, match=word):
            parse_benchmark(f"{source},void={wrong}", QUICK)
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"void=3 is for label maps with classes\.txt"):
        parse_benchmark(f"{source},void=3", QUICK)


def test_one_part_of_a_data_set_is_judged_by_all_kinds(tmp_path: Path) -> None:
    _folders(tmp_path / "train", ["a", "b"])
    _folders(tmp_path / "test", ["a", "b"], each=3)
    _folders(tmp_path / "val", ["a", "b"], each=4)
    assert len(read_classes(str(tmp_path)).images) == 8
    assert dense_sets.PARTS is classes.PARTS and PARTS[0] == "val"


def test_groups_of_images(tmp_path: Path) -> None:
    """By a column or a pattern; a fifth of the groups is held out, and whole."""
    root = _folders(tmp_path / "x", ["a", "b"], each=10)
    images = read_classes(str(root)).images
    by_pattern = grouped(images, r"(\d)\.png")
    (tmp_path / "p.csv").write_text("image,patient\n" + "".join(f"{n}.png,{n % 5}\n" for n in range(10)))
    by_column = grouped(images, f"{tmp_path}/p.csv:patient")
    assert by_pattern.groups is not None and by_column.groups is not None
    assert by_pattern.groups.tolist() == [*range(10)] * 2 and by_column.groups.tolist() == [0, 1, 2, 3, 4] * 4
    assert by_pattern.fingerprint != by_column.fingerprint != images.fingerprint
    assert chosen(by_column, [3, 8]).groups.tolist() == [3, 3]  # type: ignore[union-attr]
    rest, held = fifth(20, by_column.groups)
    assert held == [4, 9, 14, 19] and sorted(rest + held) == [*range(20)]
    for by, word in (
        ("(", "regular expression"),
        ("z", "no group for a/0.png"),
        (f"{tmp_path}/p.csv:age", "'age'"),
    ):
        with pytest.raises(ValueError, match=word):
            grouped(images, by)


def test_a_model_is_known_to_have_seen_images(tmp_path: Path, world: World) -> None:
    """By the shards of its run, whatever the files are called; stage 1 trains no backbone."""
    config = world.configs[2].visft
    found = []
    for stage in (1, 2):
        data = config.data.model_copy(update={"train": "val"})
        changed = replace(
            world.configs[stage], visft=world.configs[stage].visft.model_copy(update={"data": data})
        )
        write_run(tmp_path / f"run{stage}", changed.to_dict(), 1, ["train.py"])
        found.append(ModelSpec("tuned", "base.pt", adapter=tmp_path / f"run{stage}/export/adapter"))
    copies = []
    for number, path in enumerate(sorted(world.tree.images.iterdir())):
        copies.append(tmp_path / "renamed" / f"{number}.jpg")
        copies[-1].parent.mkdir(exist_ok=True)
        copies[-1].write_bytes(path.read_bytes())
    other = _image(tmp_path / "renamed/other.png")
    sets = {"train": from_files([other], tmp_path), "test": from_files([*copies, other], tmp_path)}
    benchmark = Benchmark("segmentation/x", sets, ("patches",), (Number("n", ""),), {}, lambda *_: iter(()))
    assert trained_on([ModelSpec("file", "base.pt"), found[1]], [benchmark]) == [
        "segmentation/x (0 of 1 of train, 7 of 8 of test)"
    ]
    assert trained_on([found[0]], [benchmark]) == []


def test_more_classes_than_a_byte_has(tmp_path: Path) -> None:
    """Objects365 has 365, LVIS 1,203: no number of a class is that of a pixel without one."""
    content = _coco([True, True])
    content["categories"] = [{"id": number, "name": f"thing {number}"} for number in range(365)]
    for entry, category in zip(content["annotations"], (254, 300), strict=True):  # the classes 255 and 301
        entry["category_id"] = category
    for split in ("train", "val"):
        _image(tmp_path / split / "a.jpg", size=(90, 60))
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    _, held = dense_sets.read_train_and_test(Request(QUICK, "x", str(tmp_path)))
    numbers = label_of(held, 0)
    assert numbers.unique().tolist() == [0, 255, 301] and NO_CLASS not in numbers


def test_groups_are_drawn_and_held_out_together(tmp_path: Path) -> None:
    """As test items, as training images of probes, and in the fifth that chooses layers."""
    groups = np.array([0, 0, 1, 1, 1, 2])
    drawn = resamples(6, 20, groups)
    assert (drawn[:, 0] == drawn[:, 1]).all() and (drawn[:, 2] == drawn[:, 4]).all() and (drawn[0] == 1).all()
    assert len(np.unique(drawn[1:, 5])) > 1
    for part in ("train", "val"):
        _folders(tmp_path / part, ["a", "b"], each=10)
    benchmark = parse_benchmark(rf"classification={tmp_path},groups=(\d{{1,2}})\.png", QUICK)
    test = benchmark.sets["test"]
    assert test.groups is not None and test.groups.tolist() == [*range(10)] * 2
    features = {"pooled": torch.randn(20, 10, generator=torch.Generator().manual_seed(0))}
    (score,) = benchmark.scores({"train": features, "test": features}, ["kNN"])
    assert score.retrained is not None and len(score.retrained) == 10
    two = parse_benchmark(rf"classification={tmp_path},groups=(\w)/", QUICK)
    assert two.layer_choice is not None
    with pytest.raises(ValueError, match="fewer than five training groups"):
        two.layer_choice.held_out(features, "kNN")
    # The classifier's strength is chosen on whole groups, too; without groups on every fifth image of a class.
    held = held_out(torch.tensor([0, 1] * 10), torch.tensor([7, 7, 1, 1, 2, 2, 3, 3, 4, 4] * 2))
    assert held.nonzero()[:, 0].tolist() == [0, 1, 10, 11]
    held = held_out(torch.tensor([0, 1] * 5), torch.arange(10))
    assert held.nonzero()[:, 0].tolist() == [8, 9]
