"""Image-text retrieval: which captions belong to an image, and which image to a caption.

| layout | files |
|---|---|
| COCO | `annotations/captions_<split>2017.json` and `<split>2017/` |
| Karpathy's splits of COCO and Flickr30k | `dataset_*.json`, its images anywhere below the folder by their
names |

Recall as in the papers: of an image, whether one of its captions is among the first k; of a caption, whether
its image is. At most CAPTIONS captions of an image take part, the first ones.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from visft_ds.evals.judge.benchmark import Benchmark, Features, ImageSet, IntArray, Number, Score
from visft_ds.evals.judge.images import from_files, read_json
from visft_ds.evals.judge.ranking import hits
from visft_ds.files import checked_name, reading

CAPTIONS = 5
RECALLS = (1, 5, 10)
_WAYS = ("image to text", "text to image")
_ROWS = 1024

NUMBERS = tuple(
    Number(f"{way} R@{k}", how=f"From {way}, a right answer is among the first {k}.")
    for way in _WAYS
    for k in RECALLS
)

Pairs = list[tuple[Path, list[str]]]  #: file of an image, its captions


def retrieval(label: str, images: ImageSet, captions: Sequence[str], owners: IntArray) -> Benchmark:
    """R@1, R@5 and R@10 from image to text and from text to image; `owners` are the places of the captions'
    images.
    """

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        seen, read = features["images"]["clip"], features["texts"]["clip"]
        of_seen, of_read = torch.arange(len(seen)), torch.from_numpy(owners)
        ranks = rank_of_own(seen, read, of_seen, of_read), rank_of_own(read, seen, of_read, of_seen)
        for way, places, groups in zip(_WAYS, ranks, (None, owners), strict=True):
            for k in RECALLS:
                yield Score(f"{way} R@{k}", hits(places, k), groups=groups)

    return Benchmark(
        label,
        {"images": images},
        ("clip",),
        NUMBERS,
        {"benchmark": "retrieval 1", "owners": owners.tolist(), "texts": list(captions)},
        scores,
        texts=captions,
    )


def rank_of_own(queries: Tensor, found: Tensor, of_queries: Tensor, of_found: Tensor) -> Tensor:
    """Place of the best of its own for each query, behind all others that are as similar.

    Args:
        of_queries, of_found: numbers of the images that they belong to.
    """
    ranks = []
    for part, images in zip(queries.split(_ROWS), of_queries.split(_ROWS), strict=True):
        similarity, own = part @ found.T, images[:, None] == of_found
        best = similarity.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= best) & ~own).sum(dim=1))
    return torch.cat(ranks)


def read_captions(source: str, split: str | None = None) -> tuple[ImageSet, tuple[str, ...], IntArray]:
    """(images, captions, places of the captions' images) of a data set in a layout of the table above.

    Args:
        split: None: `val` of a COCO tree, `test` of Karpathy's.

    Raises:
        ValueError: no such layout or part, an image without file, or without captions that say something.
    """
    root = Path(source)
    karpathy = sorted(root.glob("dataset_*.json"))
    pairs = _karpathy(karpathy[0], root, split or "test") if karpathy else _coco(root, split or "val")
    if not pairs:
        raise ValueError(f"{source} has no images with captions in the part to judge")
    texts = [[caption.strip() for caption in captions[:CAPTIONS]] for _, captions in pairs]
    if mute := [str(path) for (path, _), own in zip(pairs, texts, strict=True) if not own or "" in own]:
        raise ValueError(f"{source}: {len(mute)} images have no caption or an empty one, first {mute[0]}")
    owners = np.repeat(np.arange(len(pairs)), [len(own) for own in texts]).astype(np.int64)
    return (
        from_files([path for path, _ in pairs], root),
        tuple(caption for own in texts for caption in own),
        owners,
    )


def _coco(root: Path, split: str) -> Pairs:
    path, folder = root / f"annotations/captions_{split}2017.json", root / f"{split}2017"
    if not path.is_file():
        raise ValueError(f"{root} has neither {path.relative_to(root)} nor Karpathy's dataset_*.json")
    with reading(path, "a COCO caption file"):
        content = read_json(path)
        texts: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            texts[annotation["image_id"]].append(str(annotation["caption"]))
        return [
            (folder / checked_name(one["file_name"], path), texts[one["id"]]) for one in content["images"]
        ]


def _karpathy(path: Path, root: Path, split: str) -> Pairs:
    places = {
        name: Path(folder) / name for folder, _, names in os.walk(root) for name in names
    }  # follows no links
    with reading(path, "Karpathy's splits"):
        images = [image for image in read_json(path)["images"] if image["split"] == split]
        files = [places.get(one["filename"], root / checked_name(one["filename"], path)) for one in images]
        captions = [[str(text["raw"]) for text in image["sentences"]] for image in images]
    return list(zip(files, captions, strict=True))
