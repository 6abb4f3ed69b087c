"""Permuted labels: a data set whose images have the labels of one another, to train a control with.

Whatever a training gains from such labels it does not owe to what they say.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

from visft_ds.data.dataset import caption_dataset, coco_dataset, labels_of_split
from visft_ds.data.depth import UNIT_FILE
from visft_ds.data.masks import png_of
from visft_ds.data.shards import Manifest, ShardReader, splits_in
from visft_ds.files import image_frame, open_image, read_bands, write_text
from visft_ds.shards.bands import tiff_of
from visft_ds.shards.common import Json
from visft_ds.shards.depth import FOLDER

_QUALITY = 95  # of images that take the size of another


def permute(folder: Path, out: Path, seed: int) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Write a COCO tree in which the labels of each image lie beside another one, which takes the size of the
    image that they are of; yields each split of the shards with its counts.
    """
    if out.exists():
        raise ValueError(f"{out} exists and is not overwritten: name a new folder")
    splits = splits_in(folder)
    if not splits:
        raise ValueError(f"{folder} holds no finished shards")
    unfinished = out.with_name(f".{out.name}.unfinished")  # of a run that was killed, too
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "annotations").mkdir(parents=True)
    for split in splits:
        manifest = Manifest.load(folder, split)
        reader = ShardReader(manifest)
        content = coco_dataset(reader)
        objects = content["annotations"]
        captions = caption_dataset(reader)["annotations"]
        count = len(reader)
        positions = others(count, seed).tolist()
        resized = 0
        for image, position in zip(content["images"], positions, strict=True):
            suffix = "jpg" if manifest.bands is None else "tif"
            image["file_name"] = f"{image['id']:012d}.{suffix}"
            path = unfinished / f"{split}2017" / image["file_name"]
            data, _ = reader.read(position, "images")
            resized += _write_image(path, data or b"", image["width"], image["height"])
        if "depth" in manifest.labels:
            _write_depth(unfinished / FOLDER, split, reader)
        if "panoptic" in manifest.labels:
            _write_panoptic(unfinished / f"annotations/panoptic_{split}2017.json", content["images"], reader)
        kind = "maps" if "maps" in manifest.labels else "instances"
        if not manifest.labels <= {"depth", "panoptic"}:
            _write_annotations(unfinished / f"annotations/{kind}_{split}2017.json", content, objects)
            _write_annotations(unfinished / f"annotations/captions_{split}2017.json", content, captions)
        yield split, {"images": count, "objects": len(objects), "resized": resized}
    unfinished.rename(out)


def _write_image(path: Path, data: bytes, width: int, height: int) -> bool:
    """Write a picture as JPEG, or one of bands as TIFF, of this size. Returns True if it had another size or
    format.
    """
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".tif":
        return _write_bands(path, data, width, height)
    frame = image_frame(data)
    if frame.format == "JPEG" and (frame.width, frame.height) == (width, height):
        path.write_bytes(data)
        return False
    picture = open_image(data, upright=False)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    resized.save(path, "JPEG", quality=_QUALITY)
    return True


def _write_bands(path: Path, data: bytes, width: int, height: int) -> bool:
    """The same of a picture of bands."""
    values = read_bands(data)
    if values.shape[:2] == (height, width):
        path.write_bytes(data)
        return False
    resized = []
    for number in range(values.shape[2]):
        band = Image.fromarray(values[..., number].astype(np.float32))
        resized.append(np.asarray(band.resize((width, height), Image.Resampling.BILINEAR)))
    whole = np.stack(resized, axis=-1)
    if values.dtype != np.float32:
        whole = whole.round()
    path.write_bytes(tiff_of(whole.astype(values.dtype)))
    return True


def _write_depth(folder: Path, split: str, reader: ShardReader) -> None:
    """Write the depth maps of a split byte for byte, and their unit. Raises ValueError if two splits have
    different ones.
    """
    unit = str(reader.manifest.options["depth"])
    unit_file = folder / UNIT_FILE
    if unit_file.is_file() and unit_file.read_text(encoding="utf-8") != unit:
        raise ValueError(f"depth maps of {split} are of another unit than those before: {unit}")
    (folder / f"{split}2017").mkdir(parents=True)
    write_text(unit_file, unit)
    for label in labels_of_split(reader):
        if "depth" in label:
            name = f"{label['image_id']:012d}.png"
            (folder / f"{split}2017" / name).write_bytes(png_of(label["depth"]))


def _write_panoptic(path: Path, images: Sequence[Json], reader: ShardReader) -> None:
    """Write the panoptic maps of a split byte for byte, and their JSON file."""
    folder = path.with_suffix("")
    folder.mkdir()
    annotations = list[Json]()
    for label in labels_of_split(reader):
        if "panoptic" in label:
            name = f"{label['image_id']:012d}.png"
            (folder / name).write_bytes(png_of(label["panoptic"]))
            segments = label["panoptic"]["segments"]
            annotations.append({"image_id": label["image_id"], "file_name": name, "segments_info": segments})
    categories = []
    for category in reader.manifest.panoptic:
        isthing = int(category.thing)
        categories.append({"id": category.coco_id, "name": category.name, "isthing": isthing})
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_bytes(orjson.dumps(content))


def _write_annotations(path: Path, content: Json, annotations: Sequence[Any]) -> None:
    """Write `content` with these annotations, numbered from 1."""
    numbered = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
    path.write_bytes(orjson.dumps({**content, "annotations": numbered}))


def others(count: int, seed: int) -> npt.NDArray[np.int64]:
    """(count,) positions, each another one's: one random round through all, so that none stays."""
    if count < 2:
        raise ValueError(f"{count} image with labels: permuting needs at least 2")
    order = np.random.default_rng(seed).permutation(count)
    return np.roll(order, 1)[np.argsort(order)]
