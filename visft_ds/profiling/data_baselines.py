"""Plain webdataset pipelines that the loader is measured against, on the very same shards.

`naive` is what people write first; `tuned` has this project's decoder, transforms and collate, and differs in how
samples are read, shuffled and handed to the consumer alone. `labels` and `raw` are the reading by itself.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

os.environ["WDS_SECURE"] = "1"  # before the import: no shell commands as shard names, no pickles as samples

import numpy as np
import numpy.typing as npt
import orjson
import torch
import webdataset
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.decode import decode_image
from visft_ds.data.open_webdataset import check_secure
from visft_ds.data.plan import generator
from visft_ds.data.samples import RawSample
from visft_ds.profiling.data_source import SIDE, MeasuredSet
from visft_ds.tasks.vocabulary import Vocabulary

check_secure()  # the program may have imported the library before
#: CLIP's mean and standard deviation of the channels.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VERSION = str(webdataset.__version__)
#: What people write: shards in shuffled order, and a buffer of that many samples.
_SHARD_BUFFER = 100
NAIVE_BUFFER = 1000

WdsSample = dict[str, Any]  # "__key__", "jpg", "json"


def naive(urls: Sequence[str], vocabulary: Vocabulary, batch: int, *, workers: int) -> Iterator[Any]:
    """Pillow, all masks at full size, torchvision v2 on PIL images, float32: one pass over the shards.

    Yields:
        (images (B, 3, 224, 224) float32, normalised; a list of B targets).
    """
    dataset = (
        _shards(urls, NAIVE_BUFFER)
        .decode("pil")
        .map(partial(_naive_sample, transform=_naive_transform(), vocabulary=vocabulary))
        .batched(batch, collation_fn=_naive_collate)
    )
    return _loaded(dataset, workers)


def tuned(
    urls: Sequence[str],
    pipeline: SamplePipeline,
    batch: int,
    *,
    workers: int,
    buffer: int,
    key_of: Callable[[int], int] = int,
) -> Iterator[Any]:
    """This project's decoder, transforms and collate in a webdataset pipeline: one pass over the shards.

    Args:
        buffer: samples of the shuffle buffer; as many as the set has for a global order.
        key_of: image id -> key of the sample's random numbers.
    """
    dataset = (
        _shards(urls, buffer)
        .map(partial(_tuned_sample, pipeline=pipeline, key_of=key_of))
        .batched(batch, collation_fn=pipeline.collate)
    )
    return _loaded(dataset, workers)


def labels(urls: Sequence[str], *, parse: bool) -> Iterator[Any]:
    """The labels alone, as bytes or parsed, in the order of the shards; the images lie between them in the stream."""
    dataset = _shards(urls, 0, select_files=_is_label)
    return iter(dataset.map(_parse) if parse else dataset)


def label_batches(urls: Sequence[str], pipeline: SamplePipeline, batch: int, *, buffer: int) -> Iterator[Any]:
    """Batches of targets without pixels, shuffled."""
    dataset = (
        _shards(urls, buffer, select_files=_is_label)
        .map(partial(_tuned_sample, pipeline=pipeline, key_of=int))
        .batched(batch, collation_fn=pipeline.collate)
    )
    return iter(dataset)


def raw(urls: Sequence[str], buffer: int) -> Iterator[WdsSample]:
    """The bytes of all samples, nothing decoded; `buffer` 0 keeps the order of the shards."""
    return iter(_shards(urls, buffer))


def shuffled(count: int) -> list[int]:
    """The positions of a set in a random order, the same in every run."""
    order: list[int] = np.random.default_rng(0).permutation(count).tolist()
    return order


def pread(data: MeasuredSet) -> int:
    """Every sample in random order by its place in the index: one read for both members, no check of their bytes."""
    files = [os.open(url, os.O_RDONLY) for url in data.urls]
    rows = data.rows
    start, end = rows["image_offset"], rows["label_offset"] + rows["label_size"]
    places = list(zip(rows["shard"].tolist(), (end - start).tolist(), start.tolist(), strict=True))
    try:
        for index in shuffled(len(rows)):
            shard, size, offset = places[index]
            os.pread(files[shard], size, offset)
    finally:
        for file in files:
            os.close(file)
    return len(rows)


def _shards(urls: Sequence[str], buffer: int, **options: Any) -> Any:
    """Samples of the shards, shuffled by shard and through a buffer of that many samples; 0 for none."""
    dataset = webdataset.WebDataset(list(urls), shardshuffle=_SHARD_BUFFER if buffer else False, seed=0, **options)
    # A full buffer before the first sample leaves it: with the default of 100, early ones would come from few shards.
    return dataset.shuffle(buffer, initial=buffer, seed=0) if buffer else dataset


def _loaded(dataset: Any, workers: int) -> Iterator[Any]:
    """Batches, made in worker processes unless there are none."""
    if not workers:
        return iter(dataset)
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of webdataset: it leaves closing its files to the collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def _is_label(name: str) -> bool:
    return name.endswith(".json")


def _parse(sample: WdsSample) -> Any:
    return orjson.loads(sample["json"])


# ------------------------------------------------------------------------------------------------------- tuned


def _tuned_sample(sample: WdsSample, *, pipeline: SamplePipeline, key_of: Callable[[int], int]) -> Any:
    label = orjson.loads(sample["json"])
    raw_sample = RawSample(
        index=0,  # a stream does not know
        image_id=label["image_id"],
        size=(label["height"], label["width"]),
        image=decode_image(sample["jpg"]) if "jpg" in sample else None,
        annotations=label["annotations"],
        captions=label["captions"],
    )
    key = key_of(label["image_id"])
    return replace(pipeline.transform(raw_sample, generator(key)), random_key=key)


# ------------------------------------------------------------------------------------------------------- naive


def _naive_transform() -> Any:
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.Resize((SIDE, SIDE), antialias=True),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(_MEAN, _STD),
            v2.SanitizeBoundingBoxes(),
        ]
    )


def _naive_sample(sample: WdsSample, *, transform: Any, vocabulary: Vocabulary) -> tuple[Tensor, dict[str, Any]]:
    image: Image.Image = sample["jpg"]
    label: Mapping[str, Any] = sample["json"]
    size = (label["height"], label["width"])  # of the annotations; --reencode may have made the image smaller
    objects = [annotation for annotation in label["annotations"] if not annotation["iscrowd"]]
    boxes = torch.tensor([annotation["bbox"] for annotation in objects], dtype=torch.float32).reshape(-1, 4)
    masks = [torch.from_numpy(full_mask(annotation["segmentation"], size)) for annotation in objects]
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format=tv_tensors.BoundingBoxFormat.XYWH, canvas_size=size),
        "labels": torch.tensor([annotation["category_id"] for annotation in objects], dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.stack(masks) if masks else torch.zeros((0, *size), dtype=torch.uint8)),
    }
    pixels, target = transform(image, target)
    captions = label["captions"]
    chosen = captions[int(torch.randint(len(captions), ()))] if captions else ""
    target["tokens"] = torch.tensor(vocabulary.encode(chosen))
    return pixels, target


def full_mask(segmentation: Any, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """(H, W) uint8 0 or 1 of the stored image: polygons or run lengths -> run-length code -> pixels."""
    if isinstance(segmentation, list):
        code = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        code = coco_mask.frPyObjects(segmentation, *size)
    else:
        code = segmentation
    mask: npt.NDArray[np.uint8] = coco_mask.decode(code)
    return mask


def _naive_collate(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, list[dict[str, Any]]]:
    return torch.stack([pixels for pixels, _ in samples]), [target for _, target in samples]
