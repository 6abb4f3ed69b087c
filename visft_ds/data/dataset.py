"""Samples as training reads them.

The label of a sample is the JSON file beside each image in a shard:
{"image_id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426,
 "annotations": [{"id": 1, "bbox": [x, y, width, height], "category_id": 64, "iscrowd": 0, "area": 531.8,
                  "segmentation": [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": ...}}, ...],
 "captions": ["A room with a table.", ...]}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import orjson

from visft_ds.data.decode import decode_image
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import DamagedSample, Role, ShardReader
from visft_ds.data.transforms import Op


class _Transform(Protocol):
    def __call__(self, raw: RawSample, generator: np.random.Generator, ops: Sequence[Op] | None = None) -> Sample: ...


@dataclass(frozen=True)
class SamplePipeline:
    """Transform and collate function of a task: raw samples to a batch."""

    transform: _Transform
    collate: Callable[[list[Sample]], Batch]


def read_raw(reader: ShardReader, index: int, role: Role = "both") -> RawSample:
    """Read and decode one sample; `role` "images" leaves annotations and captions empty, "labels" the image None.

    Raises:
        DamagedSample: bytes that are not those of the index, or no image; names shard, key and offset.
    """
    row = reader.manifest.index[index]
    image_file, label_file = reader.read(index, role)
    image, size = None, (int(row["height"]), int(row["width"]))
    if image_file is not None:
        try:
            image = decode_image(image_file)
        except ValueError as error:
            raise DamagedSample(f"{reader.describe(index)} cannot be decoded: {error}") from error
        if image.shape[:2] != size:
            raise DamagedSample(f"{reader.describe(index)} has {image.shape[:2]} pixels, not {size} as in the index")
    label: Mapping[str, Any] = orjson.loads(label_file) if label_file is not None else {}
    return RawSample(
        index=index,
        image_id=int(row["image_id"]),
        size=size,
        image=image,
        annotations=label.get("annotations", ()),
        captions=label.get("captions", ()),
    )


def coco_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored annotations (crowds included) as an ordinary COCO dictionary, for evaluators."""
    images, annotations = [], []
    for label in labels_of_split(reader, indices):
        images.append({name: label[name] for name in ("file_name", "width", "height")} | {"id": label["image_id"]})
        annotations += [{**annotation, "image_id": label["image_id"]} for annotation in label["annotations"]]
    categories = [{"id": category.coco_id, "name": category.name} for category in reader.manifest.categories]
    return {"images": images, "annotations": annotations, "categories": categories}


def caption_dataset(reader: ShardReader, indices: Sequence[int] | None = None) -> dict[str, Any]:
    """The stored captions in the form of COCO's captions_*.json, for evaluators."""
    annotations = []
    for label in labels_of_split(reader, indices):
        annotations += [{"image_id": label["image_id"], "caption": caption} for caption in label["captions"]]
    return {"annotations": annotations}


def labels_of_split(reader: ShardReader, indices: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """The labels of all samples, or of some."""
    for index in range(len(reader)) if indices is None else indices:
        yield orjson.loads(reader.read(index, "labels")[1] or b"")
