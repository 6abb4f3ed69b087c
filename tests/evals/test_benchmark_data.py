"""Layouts of data sets for benchmarks: each is read as its makers meant it, and damage is named."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.coco_tree import NO_PHOTOS, PHOTOS
from visft_ds.evals.benchmarks import class_sets, objects, retrieval, word_sets
from visft_ds.evals.benchmarks.class_sets import read_classes
from visft_ds.evals.benchmarks.kinds import averages, parse_benchmark, parse_benchmarks


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
    synsets = class_sets.imagenet_synsets()
    assert (synsets[0], class_sets.imagenet_names()[0], len(synsets)) == ("n01440764", "tench", 1000)
    root = _folders(tmp_path / "imagenet-r", [synsets[402], synsets[1], synsets[999]])
    (root / "README.txt").write_text("beside the folders")
    found = read_classes(str(root))
    assert found.classes == ("goldfish", "acoustic guitar", "toilet paper") and found.family == "imagenet"
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and len(found.templates) == 80
    assert found.truths()[2] == "acoustic guitar"


def test_imagenet_v2_is_in_the_order_of_numbers(tmp_path: Path) -> None:
    """As texts, "10" comes before "2": every class would get another's name."""
    _folders(tmp_path / "v2", [str(number) for number in range(1000)], each=1)
    found = read_classes(str(tmp_path / "v2"))
    assert found.classes == class_sets.imagenet_names()
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
    assert found.classes == ("Backpack", "Ballpoint pen") and found.family == "imagenet"
    assert found.images.read(0).size == (6, 6) and np.asarray(found.images.read(1))[..., 0].max() == 0


def _shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def test_shards_of_clip_benchmark(tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    _shard(tmp_path / "test/0.tar", {"s0.png": _png(5), "s0.cls": b"1", "s1.cls": b"0", "s1.png": _png(7)})
    for number in range(1, 11):
        _shard(tmp_path / f"test/{number}.tar", {"s0.png": _png(100 + number), "s0.cls": b"0"})
    found = read_classes(str(tmp_path))
    assert found.classes == ("cat", "dog") and found.templates == ("a photo of a {}.", "the {}")
    levels = [np.asarray(found.images.read(place))[0, 0, 0] for place in range(12)]
    assert levels == [5, 7, *range(101, 111)] and found.labels.tolist() == [1, *[0] * 11]
    (tmp_path / "test/nshards.txt").write_text("12\n")
    with pytest.raises(ValueError, match=r"has 11 tars, but nshards.txt says 12"):
        read_classes(str(tmp_path))
    (tmp_path / "test/nshards.txt").unlink()
    _shard(tmp_path / "test/0.tar", {"s0.png": _png(5), "s0.cls": b"2"})
    with pytest.raises(ValueError, match=r"says class 2, but classnames.txt names 2"):
        read_classes(str(tmp_path))
    _shard(tmp_path / "test/0.tar", {"s0.png": _png(5)})
    with pytest.raises(ValueError, match=r"0.tar: s0 has no label"):
        read_classes(str(tmp_path))
    data = (tmp_path / "test/1.tar").read_bytes()
    (tmp_path / "test/0.tar").write_bytes(b"x" * 512 + data[512:])
    with pytest.raises(ValueError, match=r"0.tar is no whole tar"):
        read_classes(str(tmp_path))
    (tmp_path / "classnames.txt").unlink()
    with pytest.raises(ValueError, match=r"has shards but no classnames.txt"):
        read_classes(str(tmp_path))


def test_files_of_mnist(tmp_path: Path) -> None:
    def write(kind: str, values: np.ndarray[Any, Any], pack: bool) -> Path:
        head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        path = tmp_path / f"{kind}-ubyte{'.gz' if pack else ''}"
        path.write_bytes(gzip.compress(head + values.tobytes()) if pack else head + values.tobytes())
        return path

    pixels = np.arange(3 * 4 * 2, dtype=np.uint8).reshape(3, 4, 2)
    images = write("t10k-images-idx3", pixels, True)
    write("t10k-labels-idx1", np.array([1, 0, 2], dtype=np.uint8), False)
    found = read_classes(str(tmp_path))
    assert found.labels.tolist() == [1, 0, 2] and found.classes == ("0", "1", "2")
    assert (np.asarray(found.images.read(2))[..., 1] == pixels[2]).all()
    images.write_bytes(images.read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        read_classes(str(tmp_path))
    images.write_bytes(gzip.compress(b"\0\0\x08\x03" + bytes(20)))
    with pytest.raises(ValueError, match="not a whole file"):
        read_classes(str(tmp_path))


def test_built_in_digits_are_real() -> None:
    found = read_classes("digits")
    assert len(found.images) == 1797 and np.bincount(found.labels).min() > 170
    pixels = np.asarray(found.images.read(0))
    assert pixels.max() > 200 and (pixels[..., 0] == pixels[..., 2]).all()
    train, test = class_sets.read_train_and_test("digits")
    assert abs(len(train.images) - len(test.images)) <= 10 and train.images.fingerprint != test.images.fingerprint
    assert not set(train.images.names) & set(test.images.names)


def test_trees_with_splits(tmp_path: Path) -> None:
    _folders(tmp_path / "train", ["hot_dog", "cat"], each=3)
    _folders(tmp_path / "val", ["hot_dog", "cat"])
    (tmp_path / "templates.txt").write_text("a {} on a plate\n")
    train, test = class_sets.read_train_and_test(str(tmp_path))
    assert (len(train.images), len(test.images)) == (6, 4) and test.classes == ("cat", "hot dog")
    assert test.templates == ("a {} on a plate",)
    (tmp_path / "classnames.txt").write_text("feline\nfrankfurter\n")
    assert read_classes(str(tmp_path), "train").classes == ("feline", "frankfurter")
    (tmp_path / "classnames.txt").write_text("feline\n")
    with pytest.raises(ValueError, match="1 names of classes for 2 folders"):
        read_classes(str(tmp_path))
    (tmp_path / "classnames.txt").unlink()
    _folders(tmp_path / "val", ["bird"])
    with pytest.raises(ValueError, match="other classes: bird"):
        class_sets.read_train_and_test(str(tmp_path))


def test_what_is_wrong_with_folders_of_classes_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no folders of classes: nothing"):
        read_classes(str(empty))
    with pytest.raises(ValueError, match="no such folder; give one, or digits"):
        read_classes(str(tmp_path / "nowhere"))
    root = _folders(tmp_path / "few", ["a", "b"])
    (root / "c").mkdir()
    with pytest.raises(ValueError, match=r"1 of 3 classes have no images: c\."):
        read_classes(str(root))
    with pytest.raises(ValueError, match="has no folder other; it has a, b, c"):
        read_classes(str(root), "other")
    (root / "c").rmdir()
    _image(root / "lost.png")
    with pytest.raises(ValueError, match=r"1 images outside of its folders of classes \(lost.png\)"):
        read_classes(str(root))
    (root / "lost.png").unlink()
    (root / "templates.txt").write_text("a photo\n")
    with pytest.raises(ValueError, match=r"template without \{\}"):
        read_classes(str(root))
    (root / "templates.txt").unlink()
    (root / "classnames.txt").write_text("same\nsame\n")
    with pytest.raises(ValueError, match="two classes are called 'same'"):
        read_classes(str(root))
    (root / "classnames.txt").unlink()
    (root / "a/0.png").write_bytes((root / "a/0.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"few/a/0.png cannot be read as an image"):
        read_classes(str(root)).images.read(0)
    _folders(tmp_path / "one", ["a", "b"], each=1)
    with pytest.raises(ValueError, match=r"a has 1 image\(s\), a probe needs"):
        class_sets.read_train_and_test(str(tmp_path / "one"))


def test_another_image_is_another_fingerprint(tmp_path: Path) -> None:
    root = _folders(tmp_path, ["a", "b"])
    before = read_classes(str(root)).images.fingerprint
    assert read_classes(str(root)).images.fingerprint == before
    _image(root / "a/0.png", (200, 0, 0))
    assert read_classes(str(root)).images.fingerprint != before


def _caption_tree(root: Path) -> dict[str, Any]:
    content = {
        "images": [{"id": 7, "file_name": "x.jpg"}, {"id": 3, "file_name": "y.jpg"}],
        "annotations": [{"image_id": 3, "caption": f"why {n}"} for n in range(7)]
        + [{"image_id": 7, "caption": " an x \n"}],
    }
    for name in ("x.jpg", "y.jpg"):
        _image(root / "val2017" / name)
    (root / "annotations").mkdir()
    (root / "annotations/captions_val2017.json").write_text(json.dumps(content))
    return content


def test_captions_of_coco(tmp_path: Path) -> None:
    """In the order of the images, five of each at most."""
    content = _caption_tree(tmp_path)
    found = retrieval.read_captions(str(tmp_path))
    assert found.captions == ("an x", *(f"why {n}" for n in range(5))) and found.owners.tolist() == [0, 1, 1, 1, 1, 1]
    benchmark = retrieval.Retrieval("retrieval/x", found)
    assert benchmark.truths["images"] == ["an x", "why 0"]

    def changed(**parts: Any) -> str:
        (tmp_path / "annotations/captions_val2017.json").write_text(json.dumps({**content, **parts}))
        return str(tmp_path)

    with pytest.raises(ValueError, match=r"1 images have no captions, first .*x.jpg"):
        retrieval.read_captions(changed(annotations=content["annotations"][:7]))
    with pytest.raises(ValueError, match=r"a caption of .*x.jpg is empty"):
        retrieval.read_captions(changed(annotations=[*content["annotations"][:7], {"image_id": 7, "caption": " "}]))
    with pytest.raises(ValueError, match="a caption of image 9, which is not among"):
        retrieval.read_captions(changed(annotations=[{"image_id": 9, "caption": "a"}]))
    with pytest.raises(ValueError, match="has no image with captions"):
        retrieval.read_captions(changed(images=[], annotations=[]))
    changed()
    (tmp_path / "val2017/y.jpg").unlink()
    with pytest.raises(ValueError, match=r"named but not there: .*y.jpg"):
        retrieval.read_captions(str(tmp_path))
    with pytest.raises(ValueError, match=r"has neither annotations/captions_train2017.json, nor Karpathy's"):
        retrieval.read_captions(str(tmp_path), "train")


def test_captions_of_karpathy_and_flickr(tmp_path: Path) -> None:
    karpathy, flickr = tmp_path / "k", tmp_path / "f"
    for name in ("a.jpg", "b.jpg"):
        _image(karpathy / "images/deep" / name)
    content = {
        "images": [
            {"filename": name, "split": split, "sentences": [{"raw": f"{name} {n}"} for n in range(2)]}
            for name, split in (("b.jpg", "test"), ("a.jpg", "train"))
        ]
    }
    (karpathy / "dataset_flickr30k.json").write_text(json.dumps(content))
    assert retrieval.read_captions(str(karpathy)).captions == ("b.jpg 0", "b.jpg 1")
    assert retrieval.read_captions(str(karpathy), "train").captions == ("a.jpg 0", "a.jpg 1")
    with pytest.raises(ValueError, match="no image of the split val"):
        retrieval.read_captions(str(karpathy), "val")
    _image(flickr / "flickr30k-images/1.jpg")
    tokens = flickr / "results_20130124.token"
    tokens.write_text("1.jpg#0\tA dog .\n1.jpg#1\tIt runs , fast .\n")
    found = retrieval.read_captions(str(flickr))
    assert found.captions == ("A dog .", "It runs , fast .") and found.images.names == ["flickr30k-images/1.jpg"]
    tokens.write_text("1.jpg#0 A dog .\n")
    with pytest.raises(ValueError, match="line 1: needed is"):
        retrieval.read_captions(str(flickr))


def test_boxes_are_seen_as_crop_and_as_mark() -> None:
    image = Image.new("RGB", (100, 60), (0, 0, 0))
    image.paste((0, 200, 0), (10, 10, 30, 50))
    seen = np.asarray(objects.crop(image, (10, 10, 20, 40)))
    assert seen.shape == (48, 48, 3)  # 1.2 times the longer side
    assert (seen[4:44, 14:34] == (0, 200, 0)).all() and (seen[:, :4] == 128).all() and (seen[0, 10] == 0).all()
    marked = np.asarray(objects.mark(image, (10, 10, 20, 40)))
    assert marked.shape == (100, 100, 3) and (marked[:20] == 128).all()
    assert (marked[30:70, 10:30] == (0, 200, 0)).all()  # the frame lies outside of the box
    assert (marked[50, 8:10] == (255, 0, 0)).all() and (marked[50, 31] == (255, 0, 0)).all()
    assert np.asarray(objects.crop(image, (200, 200, 20, 20))).min() == 128  # a box outside of its image


def _instances(root: Path, split: str, categories: list[tuple[int, str]]) -> dict[str, Any]:
    box = {"iscrowd": 0, "image_id": 1}
    content = {
        "images": [{"id": 2, "file_name": "none.jpg"}, {"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": number, "name": name} for number, name in categories],
        "annotations": [
            {**box, "id": 1, "category_id": 5, "bbox": [0, 0, 20, 30]},
            {**box, "id": 2, "category_id": 9, "bbox": [10, 10, 20, 15]},
            {**box, "id": 3, "category_id": 9, "bbox": [10, 10, 20, 20], "iscrowd": 1},
            {**box, "id": 4, "category_id": 9, "bbox": [30, 10, 40, 20]},
        ],
    }
    _image(root / f"{split}2017/a.jpg", size=(90, 60))
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return content


def test_boxes_of_a_coco_tree(tmp_path: Path) -> None:
    """Small ones and crowds are left out; images without boxes need not be there; categories may be in any order."""
    content = _instances(tmp_path, "val", [(5, "cat"), (9, "dog")])
    train, test = objects.read_train_and_test(str(tmp_path), None, None)
    assert train is None and test.classes == ("cat", "dog") and test.labels.tolist() == [0, 1]
    assert objects.Objects("objects/x", test, None).needs_text
    assert test.owners.tolist() == [0, 0] and test.views["marked"].names == [
        "a.jpg [0, 0, 20, 30]",
        "a.jpg [30, 10, 40, 20]",
    ]
    _instances(tmp_path, "train", [(9, "dog"), (5, "cat")])
    train, test = objects.read_train_and_test(str(tmp_path), None, None)
    assert train is not None and train.labels.tolist() == [0, 1] and train.classes == test.classes
    assert not objects.Objects("objects/x", test, train).needs_text
    single = f"{tmp_path}/annotations/instances_val2017.json:{tmp_path}/val2017"
    assert objects.read_train_and_test(single, None, None)[1].views["crop"].read(1).size == (48, 48)

    def broken(**parts: Any) -> Path:
        path = tmp_path / "broken.json"
        path.write_text(json.dumps({**content, **parts}))
        return path

    images = tmp_path / "val2017"
    for parts, message in (
        ({"categories": None}, "categories is None, must be a list"),
        ({"annotations": content["annotations"][1:3]}, "no box of at least 16 x 16"),
        ({"categories": [{"id": 5, "name": "cat"}, {"id": 9, "name": "cat"}]}, "the same name"),
        ({"images": []}, "annotation 1 has image 1"),
        ({"images": [{"id": 1, "file_name": "gone.jpg"}]}, "not there: .*gone.jpg"),
    ):
        with pytest.raises(ValueError, match=message):
            objects.read_objects(broken(**parts), images)
    _instances(tmp_path, "train", [(9, "bird"), (5, "cat")])
    with pytest.raises(ValueError, match="other categories: bird, dog"):
        objects.read_train_and_test(str(tmp_path), None, None)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=NO_PHOTOS)
def test_photographs_of_coco() -> None:
    """Real annotations: crowds, small boxes, captions that end in line breaks; every box lies on its picture."""
    found = retrieval.read_captions(str(PHOTOS))
    assert len(found.captions) == 5 * len(found.images) and len(set(found.owners.tolist())) == len(found.images)
    train, test = objects.read_train_and_test(str(PHOTOS), None, None)
    assert train is not None and len(test.classes) == 80 and train.classes == test.classes
    assert (
        0
        < len(test.labels)
        < len(json.loads((PHOTOS / "annotations/instances_val2017.json").read_text())["annotations"])
    )
    # Each box reads its own picture, though decoded pictures are kept; names have the corners rounded.
    for place in (0, len(test.labels) - 1, 0):
        name, _, corners = test.views["marked"].names[place].partition(" ")
        with Image.open(PHOTOS / "val2017" / name) as picture:
            wanted = np.asarray(objects.mark(picture.convert("RGB"), tuple(json.loads(corners))))
        assert (np.asarray(test.views["marked"].read(place)) == wanted).mean() > 0.97


def test_words_in_three_layouts(tmp_path: Path) -> None:
    """ICDAR's byte order mark and quotes, tabs, and MJSynth's names that are labels."""
    for name in ("word_1.png", "word_2.png", "word_3.png"):
        _image(tmp_path / "icdar/test" / name)
    lines = '\ufeffword_1.png, "Tired,\\"ness"\nword_2.png, "!!"\nword_3.png, "É3"\n'
    (tmp_path / "icdar/test/gt.txt").write_text(lines, encoding="utf-8")
    train, test = word_sets.read_train_and_test(str(tmp_path / "icdar"), None, None, "alphanumeric")
    assert (train.words, test.words) == (("tiredness",), ("3",)) and test.images.stretched
    train, test = word_sets.read_train_and_test(str(tmp_path / "icdar"), None, None, "all")
    assert (train.words, test.words) == (('Tired,"ness', "É3"), ("!!",))
    _image(tmp_path / "mm/words/1.png")
    (tmp_path / "mm/train_label.txt").write_text("words/1.png\tnew york\n")
    (tmp_path / "mm/test_label.txt").write_text("words/1.png York\n")
    train, test = word_sets.read_train_and_test(str(tmp_path / "mm"), None, None, "alphanumeric")
    assert (train.words, test.words) == (("newyork",), ("york",))
    _image(tmp_path / "mj/2425/1/115_Lube_45484.png")
    (tmp_path / "mj/annotation_test.txt").write_text("./2425/1/115_Lube_45484.png 45484\n" * 2)
    assert word_sets.read_train_and_test(str(tmp_path / "mj"), None, None, "all")[1].words == ("Lube",)
    for name, text, message in (
        ("gt.txt", "1.png\n", "line 1: no text after the name"),
        ("gt.txt", '1.png, ""\n', "line 1: no text"),
        ("gt.txt", "1.png ...\n", "has no word with alphanumeric characters"),
        ("gt.txt", "1.png a\n2.png b\n", "named but not there"),
        ("other.txt", "1.png a\n", "has no words: looked for gt.txt"),
    ):
        root = tmp_path / f"bad {len(message)}"
        root.mkdir()
        (root / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            word_sets.read_train_and_test(str(root), None, None, "alphanumeric")
    with pytest.raises(ValueError, match=r"characters=some is not allowed"):
        word_sets.read_train_and_test(str(tmp_path / "mm"), None, None, "some")


def test_benchmarks_of_a_command_line(tmp_path: Path) -> None:
    root = _folders(tmp_path / "imagenet-a", [class_sets.imagenet_synsets()[0], class_sets.imagenet_synsets()[1]])
    given = [f"zero_shot={root}", f"zero_shot={root},name=again", f"probe={root}"]
    found = parse_benchmarks(given)
    assert [one.label for one in found] == ["zero_shot/imagenet-a", "zero_shot/again", "probe/imagenet-a"]
    assert averages(found) == {"zero_shot/mean of 2 top1": ["zero_shot/imagenet-a top1", "zero_shot/again top1"]}
    assert averages(found[1:]) == {}
    for text, message in (
        ("zeroshot=x", "Did you mean zero_shot"),
        ("digit", "Did you mean digits"),
        ("probe=", "give KIND=SOURCE"),
        (f"probe={root},spilt=val", "'spilt' is no setting of probe; allowed: split, train, name. Did you mean split"),
        (f"probe={root},split=", "'split' is no setting"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_benchmark(text)
    with pytest.raises(ValueError, match="two benchmarks are called zero_shot/imagenet-a"):
        parse_benchmarks(given[:1] * 2)
