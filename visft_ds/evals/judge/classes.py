"""Images with classes: folders, ImageNet and its relatives, ObjectNet, scikit-learn's digits; and zero-shot
accuracy.

As in CLIP (https://arxiv.org/abs/2103.00020) and EVA-CLIP: a class is the mean of its sentences, each of
length 1.

| layout | found by | names of the classes | who may be chosen |
|---|---|---|---|
| ImageNet, -A, -R, -Sketch | folders of WordNet ids | open_clip's | the classes that have a folder |
| ImageNet-V2 | 1,000 folders `0` to `999` | open_clip's | all |
| ObjectNet | `mappings/*.json` | its own | those that ImageNet shares |
| any | one folder for each class | `classnames.txt`, or the folders' | all |

Each has its images in a folder of the split (`val`, `validation`, `test`, `train`), or in the given one
itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, IntArray, Number, Score
from visft_ds.evals.judge.images import (
    PARTS,
    changed,
    chosen,
    digest,
    from_files,
    image_files,
    read_json,
    read_lines,
)
from visft_ds.evals.judge.kinds import DIGITS
from visft_ds.evals.judge.ranking import PLAIN, hits, rank_by_text, sentences
from visft_ds.files import checked_name, reading

_BORDER = 2  # red pixels around every image of ObjectNet, as model-soups and CLIP_benchmark cut them off


@dataclass(frozen=True)
class ClassSet:
    """Images of known classes."""

    images: ImageSet
    labels: IntArray  #: (images,), places in `classes`
    classes: tuple[str, ...]  #: as they are called in a sentence
    templates: tuple[str, ...] = PLAIN  #: sentences with {} for a class

    def part(self, places: IntArray) -> ClassSet:
        """Some of the images, with all classes."""
        return replace(self, images=chosen(self.images, places.tolist()), labels=self.labels[places])


NUMBERS = (
    Number("top1", how="The class whose sentences are most similar to the image is the right one."),
    Number("top5", how="The right class is among the five whose sentences are most similar to the image."),
)
_BEST = {"top1": 1, "top5": 5}  # so many classes are looked at


def zero_shot(label: str, data: ClassSet) -> Benchmark:
    """Top-1 and, with more than five classes, top-5 accuracy."""
    numbers = [
        number for number in NUMBERS if number.name == "top1" or len(data.classes) > _BEST[number.name]
    ]

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        images, texts = features["test"]["clip"], features["texts"]["clip"]
        ranks = rank_by_text(images, texts, len(data.templates), data.labels)
        for number in numbers:
            yield Score(number.name, hits(ranks, _BEST[number.name]))

    return Benchmark(
        label,
        {"test": data.images},
        ("clip",),
        numbers,
        {"benchmark": "zero-shot 1", "labels": data.labels.tolist(), "templates": len(data.templates)},
        scores,
        texts=sentences(data.classes, data.templates),
    )


def read_classes(source: str, split: str | None = None) -> ClassSet:
    """Read a data set in any layout of the table above, or `digits`.

    Args:
        source: a folder, or DIGITS.
        split: folder in it; None: the first of PARTS that is there, or the folder itself.

    Raises:
        ValueError: no such folder, no class in it, a class without images, or other names than classes.
    """
    if source == DIGITS:
        from sklearn.datasets import load_digits

        loaded = load_digits()  # 8 x 8 grey levels from 0 to 16
        pixels = (loaded.images * 255 / 16).round().astype(np.uint8)
        drawn = ImageSet(
            [f"{DIGITS} {place}" for place in range(len(pixels))],
            lambda place: Image.fromarray(pixels[place]).convert("RGB"),
            digest((str(pixels.shape), pixels.tobytes())),
        )
        return ClassSet(drawn, loaded.target.astype(np.int64), tuple("0123456789"))
    root = Path(source)
    if not (root / (split or ".")).is_dir():
        raise ValueError(
            f"{root / (split or '')}: no such folder; give one with a folder for each class, or {DIGITS}"
        )
    objectnet = (root / "mappings").is_dir()
    parts = [split] if split else PARTS
    if objectnet:
        parts = ["images"]
    own = next((root / name for name in parts if (root / name).is_dir()), root)
    named, templates = (_objectnet(root, own), imagenet()[1]) if objectnet else _named(own)
    classes = _lines(root, own, "classnames.txt") or list(named.values())
    templates = tuple(_lines(root, own, "templates.txt")) or templates
    files = [image_files(folder) for folder in named]
    if not files:
        raise ValueError(f"{own} has no folders of classes: give a folder with one folder for each class")
    if loose := image_files(own):
        raise ValueError(f"{own} has {len(loose)} images outside of its folders of classes ({loose[0].name})")
    if len(classes) != len(files):
        raise ValueError(
            f"{root}: {len(classes)} names of classes for {len(files)} folders; name each, in order"
        )
    if empty := [folder.name for folder, found in zip(named, files, strict=True) if not found]:
        raise ValueError(
            f"{own}: {len(empty)} of {len(files)} classes have no images: {', '.join(empty[:5])}"
        )
    twice = [name for name in classes if classes.count(name) > 1]
    if twice and templates != imagenet()[1]:  # ImageNet has some, and is scored as it is
        raise ValueError(f"{root}: two classes are called {twice[0]!r}: no text can tell them apart")
    if wrong := [text for text in templates if "{}" not in text]:
        raise ValueError(f"{root}: a template without {{}} for the class: {wrong[0]!r}")
    images = from_files([path for found in files for path in found], own)
    if objectnet:
        images = changed(
            images, lambda _, image: ImageOps.crop(image, _BORDER), f"without {_BORDER} pixels of border"
        )
    labels = np.repeat(np.arange(len(files)), [len(found) for found in files]).astype(np.int64)
    return ClassSet(images, labels, tuple(classes), templates)


def read_train_and_test(
    source: str, train: str | None = None, test: str | None = None
) -> tuple[ClassSet, ClassSet]:
    """(train, test) of the same classes. If the source has no `train`, every second image of each class
    trains and the others test.

    Raises:
        ValueError: as `read_classes`; also if the two have other classes, or a class has one image only.
    """
    if train is None and (source == DIGITS or not (Path(source) / "train").is_dir()):
        whole = read_classes(source, test)
        tests = np.zeros(len(whole.labels), dtype=bool)
        for label, name in enumerate(whole.classes):
            of_class = np.flatnonzero(whole.labels == label)
            if len(of_class) < 2:
                raise ValueError(
                    f"{source}: {name} has {len(of_class)} image(s); a probe needs two, to train and test"
                )
            tests[of_class[1::2]] = True
        return whole.part(np.flatnonzero(~tests)), whole.part(np.flatnonzero(tests))
    if (train or "train") == test:
        raise ValueError(f"{source}: probes would learn from {test} and be judged on it: name two parts")
    learnt, held = read_classes(source, train or "train"), read_classes(source, test)
    if learnt.classes != held.classes:
        lone = sorted(set(learnt.classes) ^ set(held.classes))
        raise ValueError(
            f"{source}: train and test have other classes: {', '.join(lone[:5]) or 'in another order'}"
        )
    return learnt, held


@cache
def imagenet() -> tuple[dict[str, str], tuple[str, ...]]:
    """(ImageNet's classes in their order, WordNet id -> name as open_clip has it for texts; OpenAI's 80
    templates).
    """
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from timm.data import ImageNetInfo

    names = dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))
    return names, tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def _named(root: Path) -> tuple[dict[Path, str], tuple[str, ...]]:
    """(folders with the names of their classes, templates), of ImageNet's family or any other."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = [folder.name for folder in folders]
    if sorted(names) == sorted(map(str, range(1000))):
        folders.sort(key=lambda folder: int(folder.name))  # otherwise "10" comes before "2"
        return dict(zip(folders, imagenet()[0].values(), strict=True)), imagenet()[1]
    if {*names} <= imagenet()[0].keys():
        return {folder: imagenet()[0][folder.name] for folder in folders}, imagenet()[1]
    return {folder: folder.name.replace("_", " ") for folder in folders}, PLAIN


def _objectnet(root: Path, folder: Path) -> dict[Path, str]:
    """The folders of the classes that ImageNet has, too, with their names."""
    path = root / "mappings/folder_to_objectnet_label.json"
    with reading(path, "ObjectNet's mapping"):
        shared = set(read_json(root / "mappings/objectnet_to_imagenet_1k.json"))
        labels = {name: str(label) for name, label in sorted(read_json(path).items()) if label in shared}
        named = {folder / checked_name(name, path): label for name, label in labels.items()}
    return {inner: label for inner, label in named.items() if inner.is_dir()}


def _lines(root: Path, own: Path, name: str) -> list[str]:
    """The lines of a file in the split or above it, if there is one."""
    return next((read_lines(folder / name) for folder in (own, root) if (folder / name).is_file()), [])
