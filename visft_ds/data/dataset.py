"""Samples as training reads them; `data/labels.py` says what their labels are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from visft_ds.data.decode import levels, stored_pixels
from visft_ds.data.labels import parse_label
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import LABEL_KINDS, DamagedSample, Role, ShardReader
from visft_ds.data.transforms import Op
from visft_ds.files import reading
from visft_ds.settings.tiles import Tiles


class _Transform(Protocol):
    def __call__(
        self, raw: RawSample, generator: np.random.Generator, ops: Sequence[Op] | None = None
    ) -> Sample: ...


@dataclass(frozen=True)
class SamplePipeline:
    """Transform and collate function of a task: raw samples to a batch."""

    transform: _Transform
    collate: Callable[[list[Sample]], Batch]
    tiles: Tiles | None = None  #: samples are numbers of tiles; None: whole pictures
    #: (sample, donor, random numbers) -> the sample with objects of the donor; None: nothing is pasted
    paste: Callable[[RawSample, RawSample, np.random.Generator], RawSample] | None = None


def read_tile(reader: ShardReader, number: int, tiles: Tiles, role: Role = "both") -> RawSample:
    """Read the picture that a tile is part of, as `read_raw` does; tiles in a row decode it once."""
    tile, picture = divmod(number, len(reader))
    raw = _last_picture(reader, picture, role)
    window = tiles.windows(*raw.size)[tile]
    return replace(raw, index=number, image_id=number, window=window)


@lru_cache(maxsize=1)
def _last_picture(reader: ShardReader, index: int, role: Role) -> RawSample:
    return read_raw(reader, index, role)


def read_donor(
    reader: ShardReader, index: int, role: Role, generator: np.random.Generator
) -> RawSample | None:
    """Read another picture with objects of the shard of picture `index`, so that no other shard is needed;
    None: there is none. Its labels are always read.
    """
    rows = reader.manifest.index
    is_donor = (rows["shard"] == rows["shard"][index]) & (rows["num_annotations"] > 0)
    is_donor[index] = False
    donors = np.flatnonzero(is_donor)
    if not len(donors):
        return None
    donor = donors[generator.integers(len(donors))]
    return read_raw(reader, int(donor), "labels" if role == "labels" else "both")


def read_raw(reader: ShardReader, index: int, role: Role = "both") -> RawSample:
    """Read and decode one sample; `role` "images" leaves annotations and captions empty, "labels" the image
    None.

    Raises:
        DamagedSample: bytes that are not those of the index, or no image; names shard, key and offset.
        ValueError: a label of the wrong form, by its shard and sample.
    """
    row = reader.manifest.index[index]
    size = (int(row["height"]), int(row["width"]))
    image_file, label_file = reader.read(index, role)
    image = None if image_file is None else _decode(reader, index, image_file, size)
    label: dict[str, Any] = {}
    if label_file is not None:
        label = _label(reader, index, label_file)
    return RawSample(
        index=index,
        image_id=int(row["image_id"]),
        size=size,
        image=image,
        annotations=label.get("annotations", ()),
        captions=label.get("captions", ()),
        depth=label.get("depth"),
        panoptic=label.get("panoptic"),
    )


def _decode(reader: ShardReader, index: int, data: bytes, size: tuple[int, int]) -> npt.NDArray[Any]:
    """Pixels of a sample, which have this (height, width), or levels of its bands."""
    bands = reader.manifest.bands
    try:
        image = stored_pixels(data, bands)
    except ValueError as error:
        raise DamagedSample(f"{reader.describe(index)} cannot be decoded: {error}") from error
    if image.shape[:2] != size:
        name = reader.describe(index)
        raise DamagedSample(f"{name} has {image.shape[:2]} pixels, not {size} as in the index")
    return image if bands is None else levels(image, bands)


def coco_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored annotations (crowds included) as an ordinary COCO dictionary, for evaluators."""
    images = []
    annotations = []
    for label in labels_of_split(reader, indices):
        image_id = label["image_id"]
        image = {name: label[name] for name in ("file_name", "width", "height")}
        images.append({**image, "id": image_id})
        annotations += [{**annotation, "image_id": image_id} for annotation in label["annotations"]]
    categories = [{"id": category.coco_id, "name": category.name} for category in reader.manifest.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def caption_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored captions in the form of COCO's captions_*.json, for evaluators."""
    annotations = []
    for label in labels_of_split(reader, indices):
        image_id = label["image_id"]
        annotations += [{"image_id": image_id, "caption": caption} for caption in label["captions"]]
    return {"annotations": annotations}


def labels_of_split(reader: ShardReader, indices: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The labels of all samples, or of some. Raises as `read_raw`."""
    if indices is None:
        indices = range(len(reader))
    for index in indices:
        _, data = reader.read(index, "labels")
        yield _label(reader, index, data or b"")


def _label(reader: ShardReader, index: int, data: bytes) -> dict[str, Any]:
    row = reader.manifest.index[index]
    with reading(reader.describe(index), "a label"):
        size = int(row["height"]), int(row["width"])
        kind = LABEL_KINDS[row["label_kind"]]
        manifest = reader.manifest
        image_id = int(row["image_id"])
        return parse_label(data, image_id, size, manifest.category_ids, kind, manifest.panoptic_ids)
