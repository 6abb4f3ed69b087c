"""Images with a label for each place in them, and where there are such, the outlines of their objects.

| layout | found by | void |
|---|---|---|
| COCO tree | `annotations/instances_<split>2017.json` beside `<split>2017/` | crowds |
| shards of ours | a manifest of the split | crowds |
| ADE20k | `images/{training,validation}`, `annotations/{training,validation}` | 0 |
| Pascal VOC | `JPEGImages`, `SegmentationClass`, `ImageSets/Segmentation/<split>.txt` | 255 |
| CamVid, as SegNet has it | `<split>`, `<split>annot` | 11 |
| any | `images/<split>`, `labels/<split>` | 255 |

Label maps are PNG files that hold class numbers (indexed or grey), called as their images. Images are stretched to
squares and labels to CELLS x CELLS cells (stride 4 at 224 pixels), the same for every model: a cell has the label of
most of its pixels. Of COCO's objects, each lies on top of the larger ones; what no object covers is class 0.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2
from PIL import Image
from pydantic import Field

from visft_ds.config.records import read_record
from visft_ds.data.decode import MAX_PIXELS
from visft_ds.data.labels import parse_label
from visft_ds.data.shards import Manifest, ShardReader, manifest_path
from visft_ds.evals.benchmarks.images import SUFFIXES, chosen, decode, digest, from_files, image_files
from visft_ds.evals.benchmarks.objects import ListedBox, ListedCategory
from visft_ds.evals.benchmarks.protocol import ImageSet, IntArray, check_apart
from visft_ds.evals.benchmarks.retrieval import ForeignRecord, ListedImage
from visft_ds.monitor.console import gauged
from visft_ds.names import checked_name
from visft_ds.shards.coco import stored_segmentation

CELLS, VOID = 56, -1
#: Images of a part; a larger one gives every k-th.
MOST = {"train": 1000, "test": 2000}
_FINE = 4  # pixels of a cell's side
_SIDE = CELLS * _FINE
_SMALLEST = 1.0  # cells below which nobody could recognise an object
_SPLITS = ("val", "test", "validation")

Cells = npt.NDArray[np.int16]
Shares = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DenseSet:
    """Images, what is where in them, and their objects."""

    images: ImageSet
    cells: Cells  #: (images, CELLS, CELLS), class or VOID
    masks: Shares  #: (objects, CELLS, CELLS), how many 16ths of a cell an object covers
    labels: IntArray  #: (objects,), places in `names`
    owners: IntArray  #: (objects,), numbers of their images
    names: tuple[str, ...]  #: of the categories of objects; empty where no objects are known

    @property
    def classes(self) -> int:
        """Number of classes of cells."""
        return int(self.cells.max()) + 1

    @property
    def truth(self) -> str:
        """Hash of all labels."""
        return digest(
            np.ascontiguousarray(part).tobytes() for part in (self.cells, self.masks, self.labels, self.owners)
        )


class OutlinedBox(ListedBox):
    """Annotation of a COCO file, with its mask."""

    segmentation: list[Any] | dict[str, Any] | None = None


class SizedImage(ListedImage):
    """Image of a COCO file, with its size in pixels."""

    height: int = Field(ge=1, le=1 << 31)
    width: int = Field(ge=1, le=1 << 31)


class OutlinesFile(ForeignRecord):
    """COCO's instances_*.json."""

    images: list[SizedImage]
    annotations: list[OutlinedBox]
    categories: list[ListedCategory]


@dataclass(frozen=True)
class _Listed:
    """Files of an image and of its labels."""

    image: Path
    truth: Path


def read_train_and_test(source: str, train: str | None, test: str | None) -> tuple[DenseSet, DenseSet]:
    """(images to train probes on, images to judge them on), in any layout of the table above.

    Raises:
        ValueError: no such folder or layout, a part that is not there or is not labelled, other categories in both.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder; give one with images and labels")
    reader, parts = _layout(root)
    held = test or next((name for name in _SPLITS if name in parts), None)
    learnt = train or "train"
    for part in (learnt, held):
        if part not in parts:
            raise ValueError(f"{source} has no part {part or ' or '.join(_SPLITS)}; it has {', '.join(parts)}")
    assert held is not None
    check_apart(source, learnt, held)
    found = reader(learnt, MOST["train"]), reader(held, MOST["test"])
    if found[0].names != found[1].names:
        lone = sorted(set(found[0].names) ^ set(found[1].names))
        raise ValueError(
            f"{source}: {learnt} and {held} have other categories, or another order: {', '.join(lone[:5])}"
        )
    for part, one in zip((learnt, held), found, strict=True):
        if len(np.unique(one.cells[one.cells != VOID])) < 2:
            raise ValueError(f"{source}: {part} has labels of one class only; a probe needs two")
    return found


def only_objects(of: DenseSet, names: Sequence[str]) -> DenseSet:
    """The same with the objects of some categories alone. Raises ValueError for others, and where none is left."""
    if unknown := [name for name in names if name not in of.names]:
        raise ValueError(f"only={unknown[0]}: no such category; there are {', '.join(of.names) or 'none'}")
    kept = np.isin(of.labels, [of.names.index(name) for name in names])
    if not kept.any():
        raise ValueError(f"only={'+'.join(names)}: no object of these to judge")
    return replace(of, masks=of.masks[kept], labels=of.labels[kept], owners=of.owners[kept])


Reader = Callable[[str, int], DenseSet]


def _layout(root: Path) -> tuple[Reader, Sequence[str]]:
    """(what reads a part, names of the parts) of a folder."""
    trees = [
        path.stem.removeprefix("instances_").removesuffix("2017") for path in root.glob("annotations/*_*2017.json")
    ]
    trees = sorted({name for name in trees if (root / f"annotations/instances_{name}2017.json").is_file()})
    if trees:
        return partial(_of_coco, root), trees
    suffix = manifest_path(root, "").name
    shards = sorted(path.name.removesuffix(suffix) for path in root.glob(f"*{suffix}"))
    if shards:
        return partial(_of_shards, root), shards
    if (root / "JPEGImages").is_dir() and (root / "SegmentationClass").is_dir():
        lists = sorted(path.stem for path in (root / "ImageSets/Segmentation").glob("*.txt"))
        return partial(_of_voc, root), lists
    if (root / "annotations/training").is_dir():
        known = {"train": "training", "val": "validation"}
        return partial(_of_folders, root, lambda s: (f"images/{known[s]}", f"annotations/{known[s]}"), 0), list(known)
    camvid = sorted(path.name for path in root.iterdir() if (root / f"{path.name}annot").is_dir())
    if camvid:
        return partial(_of_folders, root, lambda split: (split, f"{split}annot"), 11), camvid
    if (root / "labels").is_dir():
        parts = sorted(path.name for path in (root / "labels").iterdir() if path.is_dir())
        return partial(_of_folders, root, lambda split: (f"images/{split}", f"labels/{split}"), 255), parts
    raise ValueError(
        f"{root} is no layout of dense labels: a COCO tree, shards of visft, ADE20k, Pascal VOC, CamVid, or "
        f"images/SPLIT beside labels/SPLIT"
    )


def _places(count: int, most: int) -> list[int]:
    """Every k-th place, so that there are `most` of them or fewer."""
    return list(range(0, count, max(1, -(-count // most))))


def _of_folders(root: Path, folders: Callable[[str], tuple[str, str]], void: int, split: str, most: int) -> DenseSet:
    images, labels = (root / name for name in folders(split))
    if not images.is_dir():
        raise ValueError(f"{images} is not there: it should hold the images of {labels}")
    return _of_maps([_Listed(path, labels / f"{path.stem}.png") for path in image_files(images)], root, void, most)


def _of_voc(root: Path, split: str, most: int) -> DenseSet:
    names = (root / f"ImageSets/Segmentation/{split}.txt").read_text(encoding="utf-8").split()
    listed = [checked_name(name, root / f"ImageSets/Segmentation/{split}.txt") for name in names]
    pairs = [_Listed(root / f"JPEGImages/{name}.jpg", root / f"SegmentationClass/{name}.png") for name in listed]
    return _of_maps(pairs, root, 255, most)


def _of_maps(listed: Sequence[_Listed], root: Path, void: int, most: int) -> DenseSet:
    """Images beside their label maps."""
    if not listed:
        raise ValueError(f"{root} has no images ({', '.join(SUFFIXES)}) where its labels point to")
    kept = [listed[place] for place in _places(len(listed), most)]
    images = from_files([one.image for one in kept], root)
    if missing := [str(one.truth) for one in kept if not one.truth.is_file()]:
        raise ValueError(f"label maps that are not there: {', '.join(missing[:3])} ({len(missing)} in all)")
    cells = np.stack([_cells_of_map(one.truth, void) for one in gauged(kept, "label maps", len(kept), "images")])
    if (cells == VOID).all():
        raise ValueError(f"{kept[0].truth} and the other label maps hold nothing but {void}, which is void")
    images = replace(images, stretched=True)
    none = np.zeros(0, dtype=np.int64)
    return DenseSet(images, cells, np.zeros((0, CELLS, CELLS), np.uint8), none, none, ())


def _cells_of_map(path: Path, void: int) -> Cells:
    """(CELLS, CELLS) of a PNG of class numbers."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L", "I", "I;16"):
                raise ValueError(f"{path} is a picture of mode {image.mode}, no label map: give class numbers as PNG")
            numbers = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)).astype(np.int64)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's word for broken PNG
        raise ValueError(f"{path} cannot be read as a label map: {error}") from error
    numbers[numbers == void] = VOID
    if numbers.max() >= 1 << 12:
        raise ValueError(f"{path} holds class {numbers.max()}: class numbers are below {1 << 12}, and {void} is void")
    return _most_of(numbers)


def _most_of(numbers: IntArray) -> Cells:
    """(CELLS, CELLS), the most frequent number of each cell of (_SIDE, _SIDE); of equally frequent ones the least."""
    kinds, places = np.unique(numbers, return_inverse=True)
    blocks = places.reshape(CELLS, _FINE, CELLS, _FINE).transpose(0, 2, 1, 3).reshape(CELLS * CELLS, _FINE**2)
    counts = np.zeros((len(blocks), len(kinds)), dtype=np.int64)
    np.add.at(counts, (np.arange(len(blocks))[:, None], blocks), 1)
    most: Cells = kinds[counts.argmax(axis=1)].astype(np.int16).reshape(CELLS, CELLS)
    return most


def _of_coco(root: Path, split: str, most: int) -> DenseSet:
    file, folder = root / f"annotations/instances_{split}2017.json", root / f"{split}2017"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: it should hold the images of {file}")
    content = read_record(file, OutlinesFile, " It is not in COCO's instances format")
    kept = [content.images[place] for place in _places(len(content.images), most)]
    of_image: dict[int, list[dict[str, Any]]] = {image.id: [] for image in kept}
    for annotation in content.annotations:
        if annotation.image_id in of_image:
            of_image[annotation.image_id].append(annotation.model_dump())
    images = from_files([folder / checked_name(image.file_name, file, folders=True) for image in kept], folder)
    categories = {category.id: category.name for category in content.categories}
    labels = [((image.height, image.width), of_image[image.id]) for image in kept]
    return _of_outlines(images, labels, categories, str(file))


def _of_shards(root: Path, split: str, most: int) -> DenseSet:
    manifest = Manifest.load(str(root), split)
    reader = ShardReader(manifest)
    places = _places(len(reader), most)
    labels = []
    for place in places:
        try:
            label = parse_label(reader.read(place, "labels")[1] or b"")
        except ValueError as error:
            raise ValueError(f"{reader.describe(place)}: {error}") from error
        labels.append(((label["height"], label["width"]), label["annotations"]))
    names = [f"{split} {reader.row(place)['image_id']}" for place in range(len(reader))]

    def read(place: int) -> Image.Image:
        data, _ = reader.read(place, "images")
        return decode(io.BytesIO(data or b""), reader.describe(place))

    images = chosen(ImageSet(names, read, digest((manifest.fingerprint,))), places)
    categories = {category.coco_id: category.name for category in manifest.categories}
    return _of_outlines(images, labels, categories, f"{root}/{split}")


def _of_outlines(
    images: ImageSet,
    labels: Sequence[tuple[tuple[int, int], Sequence[Mapping[str, Any]]]],
    categories: Mapping[int, str],
    where: str,
) -> DenseSet:
    """Images with the annotations of each, in COCO's terms."""
    numbers = {category: number for number, category in enumerate(sorted(categories))}
    cells, masks, objects = [], [], []
    for number, (size, found) in enumerate(gauged(labels, "outlines", len(labels), "images")):
        drawn = np.zeros((_SIDE, _SIDE), dtype=np.int64)
        outlined = [(annotation, _outline(annotation, size, where)) for annotation in found]
        for annotation, inside in sorted(outlined, key=lambda one: -int(one[1].sum())):
            if annotation["category_id"] not in numbers:
                raise ValueError(f"{where}: an annotation has category {annotation['category_id']} of no list")
            label = numbers[annotation["category_id"]]
            drawn[inside] = VOID if annotation["iscrowd"] else label + 1
            share = inside.reshape(CELLS, _FINE, CELLS, _FINE).sum(axis=(1, 3)).astype(np.uint8)
            if not annotation["iscrowd"] and share.sum() >= _SMALLEST * _FINE**2:
                masks.append(share)
                objects.append((label, number))
        cells.append(_most_of(drawn))
    if not objects:
        raise ValueError(f"{where} has no object of at least {_SMALLEST:g} of {CELLS} x {CELLS} cells that is no crowd")
    owned = np.array(objects, dtype=np.int64)
    names = tuple(categories[category] for category in sorted(categories))
    return DenseSet(replace(images, stretched=True), np.stack(cells), np.stack(masks), owned[:, 0], owned[:, 1], names)


def _outline(annotation: Mapping[str, Any], size: tuple[int, int], where: str) -> npt.NDArray[np.bool_]:
    """(_SIDE, _SIDE) of a mask, or of the box where there is none; polygons are drawn at this size, not the image's."""
    height, width = size
    stretch = np.array([_SIDE / width, _SIDE / height])
    given = annotation.get("segmentation") or None
    if isinstance(given, Mapping) and height * width > MAX_PIXELS:
        raise ValueError(f"{where}: a mask of {width} x {height} pixels; allowed are {MAX_PIXELS} in all")
    shape = stored_segmentation(given, height, width)
    if shape is None and given is not None:
        raise ValueError(f"{where}: a mask of image {annotation.get('image_id')} is no segmentation")
    if isinstance(shape, Mapping):
        mask = Image.fromarray(coco_mask.decode(dict(shape)))
        return np.asarray(mask.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)).astype(bool)
    if not shape:
        x, y, wide, high = annotation["bbox"]
        shape = [[x, y, x + wide, y, x + wide, y + high, x, y + high]]
    polygons = [(np.reshape(polygon, (-1, 2)) * stretch).clip(0, _SIDE).ravel().tolist() for polygon in shape]
    drawn = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, _SIDE, _SIDE)))
    return np.asarray(drawn).astype(bool)
