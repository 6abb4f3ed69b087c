"""Images with classes: folders, ImageNet and its relatives, ObjectNet, scikit-learn's digits; and zero-shot accuracy.

As in CLIP (https://arxiv.org/abs/2103.00020) and EVA-CLIP: a class is the mean of its sentences, each of length 1.

| layout | found by | names of the classes | who may be chosen |
|---|---|---|---|
| ImageNet, -A, -R, -Sketch | folders of WordNet ids | open_clip's | the classes that have a folder |
| ImageNet-V2 | 1,000 folders `0` to `999` | open_clip's | all |
| ObjectNet | `mappings/*.json` | its own | those that ImageNet shares |
| any | one folder for each class | `classnames.txt`, or the folders' | all |

Each has its images in a folder of the split (`test`, `val`, `validation`, `train`), or in the given one itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from visft_ds.evals.judge.images import (
    changed,
    chosen,
    from_arrays,
    from_files,
    image_files,
    inside,
    read_json,
    read_lines,
)
from visft_ds.evals.judge.protocol import (
    PLAIN,
    Benchmark,
    Features,
    ImageSet,
    IntArray,
    Score,
    hits,
    rank_by_text,
    sentences,
)
from visft_ds.files import reading

TESTS = ("test", "val", "validation")
DIGITS = "digits"  #: in place of a folder
_SYNSET = re.compile(r"n\d{8}")
_BORDER = 2  # red pixels around every image of ObjectNet, as model-soups and CLIP_benchmark cut them off


@dataclass(frozen=True)
class ClassSet:
    """Images of known classes."""

    images: ImageSet
    labels: IntArray  #: (images,), places in `classes`
    classes: tuple[str, ...]  #: as they are called in a sentence
    templates: tuple[str, ...] = PLAIN  #: sentences with {} for a class

    def part(self, places: Sequence[int]) -> ClassSet:
        """Some of the images, with all classes."""
        numbers = np.asarray(places, dtype=np.int64)
        return replace(self, images=chosen(self.images, numbers.tolist()), labels=self.labels[numbers])


def zero_shot(label: str, data: ClassSet) -> Benchmark:
    """Top-1 and, with more than five classes, top-5 accuracy."""
    numbers = ("top1", "top5") if len(data.classes) > 5 else ("top1",)

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        images, texts = features["test"]["clip"], features["texts"]["clip"]
        ranks = rank_by_text(images, texts, len(data.templates), data.labels)
        for name in numbers:
            yield Score(name, hits(ranks, int(name.removeprefix("top"))))

    return Benchmark(
        label,
        {"test": data.images},
        ("clip",),
        numbers,
        {"benchmark": "zero-shot 1", "labels": data.labels.tolist(), "templates": len(data.templates)},
        scores,
        texts=sentences(data.classes, data.templates),
        needs_text=True,
    )


def read_classes(source: str, split: str | None = None) -> ClassSet:
    """Read a data set in any layout of the table above, or `digits`.

    Args:
        source: a folder, or DIGITS.
        split: folder in it; None: the first of TESTS that is there, or the folder itself.

    Raises:
        ValueError: no such folder, no class in it, a class without images, or other names than classes.
    """
    if source == DIGITS:
        from sklearn.datasets import load_digits

        loaded = load_digits()  # 8 x 8 grey levels from 0 to 16
        pixels = (loaded.images * 255 / 16).round().astype(np.uint8)
        return ClassSet(from_arrays(pixels, DIGITS), loaded.target.astype(np.int64), tuple("0123456789"))
    root = Path(source)
    if not (root / (split or ".")).is_dir():
        raise ValueError(f"{root / (split or '')}: no such folder; give one with a folder for each class, or {DIGITS}")
    if (root / "mappings").is_dir():
        return _read_objectnet(root)
    own = root / split if split else next((root / name for name in TESTS if (root / name).is_dir()), root)
    folders = sorted(path for path in own.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(f"{own} has no folders of classes: give a folder with one folder for each class")
    if loose := image_files(own):
        raise ValueError(f"{own} has {len(loose)} images outside of its folders of classes ({loose[0].name})")
    classes, templates = _named(folders)
    if names := _lines(root, own, "classnames.txt"):
        classes = names
    if len(classes) != len(folders):
        raise ValueError(f"{root}: {len(classes)} names of classes for {len(folders)} folders; name each, in order")
    return _of_folders(folders, classes, tuple(_lines(root, own, "templates.txt")) or templates, own)


def read_train_and_test(source: str, train: str | None = None, test: str | None = None) -> tuple[ClassSet, ClassSet]:
    """(train, test) of the same classes. If the source has no `train`, every second image of each class trains and the
    others test.

    Raises:
        ValueError: as `read_classes`; also if the two have other classes, or a class has one image only.
    """
    if train is None and not (source != DIGITS and (Path(source) / "train").is_dir()):
        classes = read_classes(source, test)
        halves: tuple[list[int], list[int]] = ([], [])
        for label, name in enumerate(classes.classes):
            of_class = np.flatnonzero(classes.labels == label).tolist()
            if len(of_class) < 2:
                raise ValueError(f"{source}: {name} has {len(of_class)} image(s); a probe needs two, to train and test")
            for place, number in enumerate(of_class):
                halves[place % 2].append(number)
        return classes.part(sorted(halves[0])), classes.part(sorted(halves[1]))
    split = train or "train"
    if split == test:
        raise ValueError(f"{source}: probes would learn from {split} and be judged on it: name two parts")
    parts = read_classes(source, split), read_classes(source, test)
    if parts[0].classes != parts[1].classes:
        lone = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(f"{source}: train and test have other classes: {', '.join(lone[:5]) or 'in another order'}")
    return parts


def _named(folders: list[Path]) -> tuple[list[str], tuple[str, ...]]:
    """(names of the classes, templates) of ImageNet's family, else those of the folders; puts the folders in order."""
    names = [folder.name for folder in folders]
    if all(map(_SYNSET.fullmatch, names)):
        known = {synset: place for place, synset in enumerate(imagenet_synsets())}
        if all(name in known for name in names):
            return [imagenet_names()[known[name]] for name in names], imagenet_templates()
    if sorted(names) == sorted(map(str, range(1000))):
        folders.sort(key=lambda folder: int(folder.name))  # otherwise "10" comes before "2"
        return list(imagenet_names()), imagenet_templates()
    return [name.replace("_", " ") for name in names], PLAIN


def _of_folders(folders: Sequence[Path], classes: Sequence[str], templates: tuple[str, ...], root: Path) -> ClassSet:
    files = [image_files(folder) for folder in folders]
    if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
        raise ValueError(f"{root}: {len(empty)} of {len(folders)} classes have no images: {', '.join(empty[:5])}")
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice and templates != imagenet_templates():  # ImageNet has some, and is scored as it is
        raise ValueError(f"{root}: two classes are called {twice[0]!r}: no text can tell them apart")
    if wrong := [text for text in templates if "{}" not in text]:
        raise ValueError(f"{root}: a template without {{}} for the class: {wrong[0]!r}")
    labels = np.repeat(np.arange(len(folders)), [len(found) for found in files])
    images = from_files([path for found in files for path in found], root)
    return ClassSet(images, labels.astype(np.int64), tuple(classes), templates)


def imagenet_synsets() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes of ImageNet, in their order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


def imagenet_names() -> tuple[str, ...]:
    """Names of these classes as open_clip gives them to text towers."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 sentences about an image of a class, `{}` for its name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def _read_objectnet(root: Path) -> ClassSet:
    own = root / "images" if (root / "images").is_dir() else root
    path = root / "mappings/folder_to_objectnet_label.json"
    with reading(path, "ObjectNet's mapping"):
        shared = set(read_json(root / "mappings/objectnet_to_imagenet_1k.json"))
        labels = {str(folder): str(label) for folder, label in read_json(path).items() if label in shared}
        found = {inside(own, folder, path): label for folder, label in sorted(labels.items())}
    folders = [folder for folder in found if folder.is_dir()]
    if not folders:
        raise ValueError(f"{own} has none of the {len(labels)} folders that ObjectNet shares with ImageNet")
    labelled = _of_folders(folders, [found[folder] for folder in folders], imagenet_templates(), own)

    def cut(place: int, image: Image.Image) -> Image.Image:
        return image.crop((_BORDER, _BORDER, image.width - _BORDER, image.height - _BORDER))

    return replace(labelled, images=changed(labelled.images, cut, f"without {_BORDER} pixels of border"))


def _lines(root: Path, own: Path, name: str) -> list[str]:
    """The lines of a file in the split or above it, if there is one."""
    return next((read_lines(folder / name) for folder in (own, root) if (folder / name).is_file()), [])
