"""Image-text retrieval: which captions belong to an image, and which image to a caption.

| layout | files |
|---|---|
| COCO | `annotations/captions_<split>2017.json` and `<split>2017/` |
| Karpathy's splits of COCO and Flickr30k | `dataset_*.json`, its images anywhere below the folder by their names |

Recall as in the papers: of an image, whether one of its captions is among the first k; of a caption, whether its image
is. At most CAPTIONS captions of an image take part, the first ones.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visft_ds.evals.judge.images import from_files, inside, read_json
from visft_ds.evals.judge.protocol import Benchmark, Features, ImageSet, IntArray, Score, hits, rank_of
from visft_ds.files import reading

CAPTIONS = 5
RECALLS = (1, 5, 10)
_ROWS = 1024

Pairs = list[tuple[Path, list[str]]]  #: file of an image, its captions


@dataclass(frozen=True)
class CaptionSet:
    """Images with captions."""

    images: ImageSet
    captions: tuple[str, ...]
    owners: IntArray  #: (captions,), places of their images; ascending


def retrieval(label: str, data: CaptionSet) -> Benchmark:
    """R@1, R@5 and R@10 from image to text and from text to image."""

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        images, texts = features["images"]["clip"], features["texts"]["clip"]
        owners = torch.from_numpy(data.owners)
        ranks = image_to_text(images, texts, owners)
        for k in RECALLS:
            yield Score(f"image to text R@{k}", hits(ranks, k))
        ranks = text_to_image(images, texts, owners)
        for k in RECALLS:
            yield Score(f"text to image R@{k}", hits(ranks, k), groups=data.owners)

    return Benchmark(
        label,
        {"images": data.images},
        ("clip",),
        [f"{way} R@{k}" for way in ("image to text", "text to image") for k in RECALLS],
        {"benchmark": "retrieval 1", "owners": data.owners.tolist(), "texts": list(data.captions)},
        scores,
        texts=data.captions,
        needs_text=True,
    )


def image_to_text(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Place of the best own caption of each image; captions of others that are as similar come before it."""
    ranks = []
    for start in range(0, len(images), _ROWS):
        similarity = images[start : start + _ROWS] @ texts.T
        matching = owners == torch.arange(start, start + len(similarity))[:, None]
        top = similarity.masked_fill(~matching, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= top) & ~matching).sum(dim=1))
    return torch.cat(ranks)


def text_to_image(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Place of the right image of each caption, behind all that are as similar."""
    parts = zip(texts.split(_ROWS), owners.split(_ROWS), strict=True)
    return torch.cat([rank_of(part @ images.T, right) for part, right in parts])


def read_captions(source: str, split: str | None = None) -> CaptionSet:
    """Read a data set in a layout of the table above.

    Args:
        split: None: `val` of a COCO tree, `test` of Karpathy's.

    Raises:
        ValueError: no such layout, an image without captions or without file, or an empty caption.
    """
    root = Path(source)
    karpathy = sorted(root.glob("dataset_*.json"))
    pairs = _karpathy(karpathy[0], root, split or "test") if karpathy else _coco(root, split or "val")
    if not pairs:
        raise ValueError(f"{source} has no image with captions")
    if bare := [str(path) for path, captions in pairs if not captions]:
        raise ValueError(f"{source}: {len(bare)} images have no captions, first {bare[0]}: nothing could find them")
    kept = [(path, captions[:CAPTIONS]) for path, captions in pairs]
    captions = [caption.strip() for _, texts in kept for caption in texts]
    owners = np.repeat(np.arange(len(kept)), [len(texts) for _, texts in kept]).astype(np.int64)
    if "" in captions:
        raise ValueError(f"{source}: a caption of {kept[int(owners[captions.index('')])][0]} is empty")
    return CaptionSet(from_files([path for path, _ in kept], root), tuple(captions), owners)


def _coco(root: Path, split: str) -> Pairs:
    path, folder = root / f"annotations/captions_{split}2017.json", root / f"{split}2017"
    if not path.is_file():
        raise ValueError(f"{root} has neither {path.relative_to(root)} nor Karpathy's dataset_*.json")
    with reading(path, "a COCO caption file"):
        content = read_json(path)
        files = {image["id"]: inside(folder, image["file_name"], path) for image in content["images"]}
        texts: dict[int, list[str]] = {number: [] for number in files}
        for annotation in content["annotations"]:
            if annotation["image_id"] not in texts:
                raise ValueError(f"a caption of image {annotation['image_id']}, which is not among its images")
            texts[annotation["image_id"]].append(str(annotation["caption"]))
    return [(file, texts[number]) for number, file in files.items()]


def _karpathy(path: Path, root: Path, split: str) -> Pairs:
    with reading(path, "Karpathy's splits"):
        images = [image for image in read_json(path)["images"] if image["split"] == split]
        texts = {str(image["filename"]): [str(text["raw"]) for text in image["sentences"]] for image in images}
    if not texts:
        raise ValueError(f"{path} has no image of the split {split}")
    places = {name: Path(folder) / name for folder, _, names in os.walk(root) for name in names}  # follows no links
    if missing := [name for name in texts if name not in places]:
        raise ValueError(f"{root}: {len(missing)} of {len(texts)} images are not there, first {missing[0]}")
    return [(places[name], captions) for name, captions in texts.items()]
