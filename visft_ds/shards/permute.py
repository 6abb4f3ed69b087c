"""Permuted labels: a data set whose images have the labels of one another, to train a control with.

Whatever a training gains from such labels it does not owe to what they say.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from PIL import Image

from visft_ds.data.dataset import caption_dataset, coco_dataset
from visft_ds.data.shards import Manifest, ShardReader, splits_in

_QUALITY = 95  # of images that take the size of another


def add_permute_parser(commands: Any, summary: str) -> None:
    """Add the sub-command that permutes labels."""
    parser = commands.add_parser("permute", help=summary)
    parser.add_argument("folder", type=Path, metavar="DIR", help="finished shards")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder: a COCO tree")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation (default %(default)s)")
    parser.set_defaults(run=run_permute)


def run_permute(given: argparse.Namespace) -> int:
    """Write the tree; returns the exit status."""
    if given.out.exists():
        raise ValueError(f"{given.out} is there already and nothing is overwritten; name a new folder")
    if not (splits := splits_in(given.folder)):
        raise ValueError(f"{given.folder} holds no finished shards")
    for split in splits:
        counts = write_permuted(ShardReader(Manifest.load(given.folder, split)), given.out, split, given.seed)
        print(f"{given.out}: {split}, " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0


def others(count: int, seed: int) -> npt.NDArray[np.int64]:
    """(count,) places, each another one's: one random round through all, in which none is followed by itself."""
    if count < 2:
        raise ValueError(f"{count} image has no other one's labels to take; permuting needs at least 2")
    order = np.random.default_rng(seed).permutation(count)
    found = np.empty(count, dtype=np.int64)
    found[order] = np.roll(order, 1)
    return found


def write_permuted(reader: ShardReader, out: Path, split: str, seed: int) -> Mapping[str, int]:
    """Write a split as a COCO tree in which the labels of each image lie beside another one, which takes the size of
    the image that they are of. Returns counts.
    """
    objects, captions = coco_dataset(reader), caption_dataset(reader)["annotations"]
    folder = out / f"{split}2017"
    folder.mkdir(parents=True)
    (out / "annotations").mkdir(exist_ok=True)
    resized = 0
    for image, place in zip(objects["images"], others(len(reader), seed).tolist(), strict=True):
        data, _ = reader.read(place, "images")
        assert data is not None
        image["file_name"] = f"{image['id']:012d}.jpg"
        size = image["width"], image["height"]
        with Image.open(io.BytesIO(data)) as picture:
            if picture.format == "JPEG" and picture.size == size:
                (folder / image["file_name"]).write_bytes(data)
                continue
            resized += 1
            picture.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(
                folder / image["file_name"], "JPEG", quality=_QUALITY
            )
    for kind, listed in {"instances": objects["annotations"], "captions": captions}.items():
        content = {**objects, "annotations": [{**one, "id": number} for number, one in enumerate(listed, 1)]}
        (out / "annotations" / f"{kind}_{split}2017.json").write_bytes(orjson.dumps(content))
    return {"images": len(reader), "objects": len(objects["annotations"]), "resized": resized}
