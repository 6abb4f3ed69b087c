"""Permuted labels: a data set whose images have the labels of one another, to train a control with.

Whatever a training gains from such labels it does not owe to what they say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

from visft_ds.data.dataset import caption_dataset, coco_dataset
from visft_ds.data.shards import Manifest, ShardReader, splits_in
from visft_ds.files import image_frame, open_image

_QUALITY = 95  # of images that take the size of another


def permute(folder: Path, out: Path, seed: int) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Write a COCO tree in which the labels of each image lie beside another one, which takes the size of the
    image that they are of; yields each split of the shards with its counts.
    """
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten: name a new folder")
    if not (splits := splits_in(folder)):
        raise ValueError(f"{folder} holds no finished shards")
    (out / "annotations").mkdir(parents=True)
    for split in splits:
        reader, images, resized = ShardReader(Manifest.load(folder, split)), out / f"{split}2017", 0
        objects, captions = coco_dataset(reader), caption_dataset(reader)["annotations"]
        images.mkdir()
        for image, place in zip(objects["images"], others(len(reader), seed).tolist(), strict=True):
            data = reader.read(place, "images")[0] or b""
            image["file_name"] = f"{image['id']:012d}.jpg"
            frame, size = image_frame(data), (image["width"], image["height"])
            if frame.format == "JPEG" and (frame.width, frame.height) == size:
                (images / image["file_name"]).write_bytes(data)
            else:
                resized += 1
                picture = open_image(data, upright=False, quiet=True).resize(size, Image.Resampling.BICUBIC)
                picture.save(images / image["file_name"], "JPEG", quality=_QUALITY)
        first = "maps" if "maps" in reader.manifest.labels else "instances"
        for kind, listed in {first: objects["annotations"], "captions": captions}.items():
            content = {
                **objects,
                "annotations": [{**one, "id": number} for number, one in enumerate(listed, 1)],
            }
            (out / "annotations" / f"{kind}_{split}2017.json").write_bytes(orjson.dumps(content))
        yield split, {"images": len(reader), "objects": len(objects["annotations"]), "resized": resized}


def others(count: int, seed: int) -> npt.NDArray[np.int64]:
    """(count,) places, each another one's: one random round through all, in which none is followed by
    itself.
    """
    if count < 2:
        raise ValueError(f"{count} image with labels: permuting needs at least 2")
    order = np.random.default_rng(seed).permutation(count)
    return np.roll(order, 1)[np.argsort(order)]
