"""Data set as training reads it: shards, and the map from its categories to the heads' classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from visft_ds.data.decode import MOST_PIXELS, decode_image
from visft_ds.data.labels import parse_label
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import DamagedSample, Role, ShardReader
from visft_ds.data.spans import span
from visft_ds.data.transforms import Geometry, Op


@dataclass(frozen=True)
class DataSet:
    """A split to train on.

    `categories` maps the raw ids of the shards to those of the heads; an object whose id is mapped to None is left out.
    None keeps all ids.
    """

    reader: ShardReader
    categories: Mapping[int, int | None] | None = None


class Transform(Protocol):
    """Transform from a raw sample to one with targets."""

    @property
    def geometry(self) -> Geometry: ...

    def __call__(self, raw: RawSample, generator: np.random.Generator) -> Sample: ...

    def targets(
        self, raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
    ) -> Mapping[str, Mapping[str, npt.NDArray[Any]]]:
        """Labels of each task for the image after `ops`."""
        ...

    def modules(self) -> set[str]:
        """Modules that it works with, for processes that load them before they are given it."""
        ...


@dataclass(frozen=True)
class SamplePipeline:
    """Transform and collate function of a task: raw samples to a batch."""

    transform: Transform
    collate: Callable[[list[Sample]], Batch]


def read_raw(
    reader: ShardReader, index: int, role: Role = "both", categories: Mapping[int, int | None] | None = None
) -> RawSample:
    """Read and decode one sample; `role` "images" leaves annotations and captions empty, "labels" the image None.

    Args:
        categories: see `DataSet`.

    Raises:
        DamagedSample: bytes that are not those of the index, or no image; names shard, key and offset.
    """
    row = reader.row(index)
    image_file, label_file = reader.read(index, role)
    image = None
    if image_file is not None:
        try:
            with span("decode"):
                image = decode_image(image_file, max_pixels=MOST_PIXELS)
        except ValueError as error:
            raise DamagedSample(f"{_place(reader, index)} cannot be decoded: {error}") from error
        if not _fits(image, row, reencoded=reader.manifest.options.get("reencode") is not None):
            raise DamagedSample(
                f"{_place(reader, index)} has {image.shape[1]} x {image.shape[0]} pixels, not {row['width']} x "
                f"{row['height']} as in the index"
            )
    label: Mapping[str, Any] = {}
    if label_file is not None:
        with span("labels"):
            label = _checked(reader, index, label_file)
    annotations = label.get("annotations", ())
    return RawSample(
        index=index,
        image_id=row["image_id"],
        size=(row["height"], row["width"]),
        image=image,
        annotations=annotations if categories is None else translated(annotations, categories),
        captions=label.get("captions", ()),
    )


def _place(reader: ShardReader, index: int) -> str:
    return f"{reader.describe(index)}: the image at offset {reader.row(index)['image_offset']}"


def _fits(image: npt.NDArray[np.uint8], row: Mapping[str, int], *, reencoded: bool) -> bool:
    """Return True if an image has the size of the index, or was scaled down when the shards were made.

    Annotations and index keep the size of the original. Every transform scales, so that a smaller image only has to
    have the same aspect ratio, but for the rounding of its sides.
    """
    (height, width), original = image.shape[:2], (row["height"], row["width"])
    if (height, width) == original or not reencoded:
        return (height, width) == original
    return height <= original[0] and abs(height * original[1] - width * original[0]) <= max(original)


def translated(
    annotations: Sequence[Mapping[str, Any]], categories: Mapping[int, int | None]
) -> list[Mapping[str, Any]]:
    """Annotations with the ids that heads know; those without one are left out.

    Raises ValueError for a category that is not in `categories`.
    """
    if unknown := sorted({annotation["category_id"] for annotation in annotations} - categories.keys()):
        raise ValueError(f"an object has category {unknown[0]}, which its manifest does not list")
    pairs = ((annotation, categories[annotation["category_id"]]) for annotation in annotations)
    return [{**one, "category_id": category} for one, category in pairs if category is not None]


def coco_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored annotations (crowds included) as an ordinary COCO dictionary, for evaluators."""
    images, annotations = [], []
    for label in _labels(reader, indices):
        images.append({name: label[name] for name in ("file_name", "width", "height")} | {"id": label["image_id"]})
        annotations += [{**annotation, "image_id": label["image_id"]} for annotation in label["annotations"]]
    categories = [{"id": category.coco_id, "name": category.name} for category in reader.manifest.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def caption_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored captions in the form of COCO's captions_*.json, for evaluators."""
    annotations = []
    for label in _labels(reader, indices):
        annotations += [{"image_id": label["image_id"], "caption": caption} for caption in label["captions"]]
    return {"annotations": annotations}


def _labels(reader: ShardReader, indices: Sequence[int] | None) -> Iterator[Mapping[str, Any]]:
    wanted = range(len(reader)) if indices is None else indices
    for index in wanted:
        yield _checked(reader, index, reader.read(index, "labels")[1] or b"")


def _checked(reader: ShardReader, index: int, label: bytes) -> dict[str, Any]:
    try:
        return parse_label(label)
    except ValueError as error:
        raise DamagedSample(f"{reader.describe(index)}: its label cannot be used: {error}") from error
