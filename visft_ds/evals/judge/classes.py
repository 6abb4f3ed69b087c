"""Images with classes: folders, ImageNet and its relatives, ObjectNet, scikit-learn's digits.

| layout | found by | names of the classes | who may be chosen |
|---|---|---|---|
| ImageNet, -A, -R, -Sketch | folders of WordNet ids | open_clip's | the classes that have a folder |
| ImageNet-V2 | 1,000 folders `0` to `999` | open_clip's | all |
| ObjectNet | `mappings/*.json` | its own | those that ImageNet shares |
| any | one folder for each class | the folders' | all |

Each has its images in a folder of the split (`val`, `validation`, `test`, `train`), or in the given one
itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from visft_ds.evals.judge.benchmark import BoolArray, ImageSet, IntArray
from visft_ds.evals.judge.images import (
    PARTS,
    changed,
    chosen,
    digest,
    from_files,
    image_files,
    read_json,
)
from visft_ds.evals.judge.kinds import DIGITS
from visft_ds.evals.judge.ranking import PLAIN
from visft_ds.files import checked_name, reading

_BORDER = 2  # red pixels around every image of ObjectNet, as model-soups and CLIP_benchmark cut them off


@dataclass(frozen=True)
class ClassSet:
    """Images of known classes."""

    images: ImageSet
    labels: IntArray  #: (images,), places in `classes`
    classes: tuple[str, ...]  #: as they are called in a sentence
    templates: tuple[str, ...] = PLAIN  #: sentences with {} for a class

    def subset(self, rows: Sequence[int] | BoolArray) -> ClassSet:
        """Some of the images, by number or by a mask, with all classes."""
        numbers = np.arange(len(self.labels))[rows]
        return replace(self, images=chosen(self.images, numbers.tolist()), labels=self.labels[rows])


def read_classes(source: str, split: str | None = None) -> ClassSet:
    """Read a data set in any layout of the table above, or `digits`.

    Args:
        source: a folder, or DIGITS.
        split: folder in it; None: the first of PARTS that is there, or the folder itself.

    Raises:
        ValueError: no such folder, no class in it, images beside the classes, or a class without images.
    """
    if source == DIGITS:
        return _digits()
    root = Path(source)
    folder = root / (split or "")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give one with a folder for each class, or {DIGITS}")
    is_objectnet = (root / "mappings").is_dir()
    if is_objectnet:
        folder = root / "images"
        names = _objectnet_names(root, folder)
        templates = imagenet_templates()
    else:
        if not split:
            folder = next((root / part for part in PARTS if (root / part).is_dir()), root)
        names, templates = _names(folder)
    files = {class_folder.name: image_files(class_folder) for class_folder in names}
    if not files:
        raise ValueError(f"{folder} has no folders of classes: give a folder with one folder for each class")
    loose = image_files(folder)
    if loose:
        raise ValueError(
            f"{folder} has {len(loose)} images outside of its folders of classes ({loose[0].name})"
        )
    empty = [name for name in files if not files[name]]
    if empty:
        raise ValueError(
            f"{folder}: {len(empty)} of {len(files)} classes have no images: {', '.join(empty[:5])}"
        )
    labels = np.repeat(np.arange(len(files)), [len(of_class) for of_class in files.values()])
    images = from_files(list(chain.from_iterable(files.values())), folder)
    if is_objectnet:
        how = f"without {_BORDER} pixels of border"
        images = changed(images, lambda _, image: ImageOps.crop(image, _BORDER), how)
    return ClassSet(images, labels, tuple(names.values()), templates)


def _digits() -> ClassSet:
    from sklearn.datasets import load_digits

    loaded = load_digits()  # 8 x 8 grey levels from 0 to 16
    pixels = (loaded.images * 255 / 16).round().astype(np.uint8)
    images = ImageSet(
        [f"{DIGITS} {index}" for index in range(len(pixels))],
        lambda index: Image.fromarray(pixels[index]).convert("RGB"),
        digest((str(pixels.shape), pixels.tobytes())),
    )
    return ClassSet(images, loaded.target.astype(np.int64), tuple("0123456789"))


def read_train_and_test(
    source: str, train: str | None = None, test: str | None = None
) -> tuple[ClassSet, ClassSet]:
    """(train, test) of the same classes. If the source has no `train`, every second image of each class
    trains and the others test.

    Raises:
        ValueError: as `read_classes`; also if the two have other classes, or a class has one image only.
    """
    if train is None and not Path(source, "train").is_dir():
        return _halves(read_classes(source, test), source)
    if (train or "train") == test:
        raise ValueError(f"{source}: probes would learn from {test} and be judged on it: name two parts")
    taught = read_classes(source, train or "train")
    judged = read_classes(source, test)
    if taught.classes != judged.classes:
        lone = sorted(set(taught.classes) ^ set(judged.classes))
        raise ValueError(f"{source}: train and test have other classes: {', '.join(lone[:5])}")
    return taught, judged


def _halves(data: ClassSet, source: str) -> tuple[ClassSet, ClassSet]:
    """Every second image of each class, and the others."""
    is_second = np.zeros(len(data.labels), dtype=bool)
    for label, name in enumerate(data.classes):
        rows = np.flatnonzero(data.labels == label)
        if len(rows) < 2:
            raise ValueError(f"{source}: {name} has one image; a probe needs two, to train and test")
        is_second[rows[1::2]] = True
    return data.subset(~is_second), data.subset(is_second)


@cache
def imagenet_names() -> dict[str, str]:
    """ImageNet's classes in their order: WordNet id -> name as open_clip has it for texts."""
    from open_clip import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


@cache
def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 sentences for ImageNet."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def _names(root: Path) -> tuple[dict[Path, str], tuple[str, ...]]:
    """(folders with the names of their classes, templates), of ImageNet's family or any other."""
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = {folder.name for folder in folders}
    if names == set(map(str, range(1000))):
        folders.sort(key=lambda folder: int(folder.name))  # otherwise "10" comes before "2"
        return dict(zip(folders, imagenet_names().values(), strict=True)), imagenet_templates()
    if names <= imagenet_names().keys():
        return {folder: imagenet_names()[folder.name] for folder in folders}, imagenet_templates()
    return {folder: folder.name.replace("_", " ") for folder in folders}, PLAIN


def _objectnet_names(root: Path, folder: Path) -> dict[Path, str]:
    """The folders of the classes that ImageNet has, too, with their names."""
    path = root / "mappings/folder_to_objectnet_label.json"
    names = {}
    with reading(path, "ObjectNet's mapping"):
        shared = read_json(root / "mappings/objectnet_to_imagenet_1k.json")
        for name, label in sorted(read_json(path).items()):
            class_folder = folder / checked_name(name, path)
            if label in shared and class_folder.is_dir():
                names[class_folder] = str(label)
    return names
