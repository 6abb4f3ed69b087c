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

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visft_ds.evals.judge.benchmark import (
    Benchmark,
    Features,
    ImageSet,
    IntArray,
    Names,
    Number,
    Score,
    Scores,
)
from visft_ds.evals.judge.images import from_files, read_json
from visft_ds.evals.judge.kinds import Request
from visft_ds.evals.judge.ranking import hits
from visft_ds.files import checked_name, reading

CAPTIONS = 5
RECALLS = (1, 5, 10)
_IMAGE_TO_TEXT = "image to text"
_TEXT_TO_IMAGE = "text to image"
_ROWS = 1024  # queries that are compared with everything at once

NUMBERS = tuple(
    Number(f"{way} R@{k}", how=f"From {way}, a right answer is among the first {k}.")
    for way in (_IMAGE_TO_TEXT, _TEXT_TO_IMAGE)
    for k in RECALLS
)

Pairs = list[tuple[Path, list[str]]]  #: file of an image, its captions


def benchmark(request: Request) -> Benchmark:
    """R@1, R@5 and R@10 from image to text and from text to image."""
    images, captions, owners = read_captions(request.source, request.split)

    def scores(features: Features, names: Names) -> Scores:
        pictures = features["test"]["clip"]
        texts = features["texts"]["clip"]
        own = torch.arange(len(pictures))
        image_of_text = torch.from_numpy(owners)
        ranks_of_texts = rank_of_own(pictures, texts, own, image_of_text)
        ranks_of_images = rank_of_own(texts, pictures, image_of_text, own)
        for k in RECALLS:
            yield Score(f"{_IMAGE_TO_TEXT} R@{k}", hits(ranks_of_texts, k))
            yield Score(f"{_TEXT_TO_IMAGE} R@{k}", hits(ranks_of_images, k), groups=owners)

    return Benchmark(
        request.label,
        sets={"test": request.grouped(images)},
        kinds=("clip",),
        numbers=NUMBERS,
        settings={"benchmark": "retrieval 1", "owners": owners.tolist(), "texts": captions},
        scores=scores,
        texts=captions,
    )


def rank_of_own(queries: Tensor, items: Tensor, query_owners: Tensor, item_owners: Tensor) -> Tensor:
    """Place of the best of its own items for each query, behind all others that are as similar.

    Args:
        query_owners, item_owners: numbers of the images that they belong to.
    """
    ranks = []
    for batch, owners in zip(queries.split(_ROWS), query_owners.split(_ROWS), strict=True):
        similarity = batch @ items.T
        is_own = owners[:, None] == item_owners
        best_of_own = similarity.masked_fill(~is_own, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= best_of_own) & ~is_own).sum(dim=1))
    return torch.cat(ranks)


def read_captions(source: str, split: str | None = None) -> tuple[ImageSet, tuple[str, ...], IntArray]:
    """(images, captions, numbers of the captions' images) of a data set in a layout of the table above.

    Args:
        split: None: `val` of a COCO tree, `test` of Karpathy's.

    Raises:
        ValueError: no such layout or part, an image without file, or without captions that say something.
    """
    root = Path(source)
    pairs = captioned_images(root, split)
    check_captions(source, pairs)
    texts: list[str] = []
    owners: list[int] = []
    for number, (_, captions) in enumerate(pairs):
        own = [caption.strip() for caption in captions if caption.strip()][:CAPTIONS]
        texts += own
        owners += [number] * len(own)
    files = [path for path, _ in pairs]
    return from_files(files, root), tuple(texts), np.array(owners, dtype=np.int64)


def check_captions(source: str, pairs: Pairs) -> None:
    """Raise ValueError for images without a caption that says something."""
    mute = [path for path, captions in pairs if not any(map(str.strip, captions))]
    if mute:
        raise ValueError(f"{source}: {len(mute)} images have no caption, first {mute[0]}")


def captioned_images(root: Path, split: str | None) -> Pairs:
    """The images of a part with all their captions; arguments and errors as those of `read_captions`."""
    karpathy = sorted(root.glob("dataset_*.json"))
    pairs = _karpathy(karpathy[0], root, split or "test") if karpathy else _coco(root, split or "val")
    if not pairs:
        raise ValueError(f"{root} has no images with captions in the part to judge")
    return pairs


def captions_by_image(content: Any) -> dict[int, list[str]]:
    """Id of an image -> its captions, by the content of a JSON file in COCO's form."""
    texts: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        texts[annotation["image_id"]].append(str(annotation["caption"]))
    return texts


def files_by_name(root: Path) -> dict[str, Path]:
    """Name of a file -> the file, anywhere below a folder."""
    return {path.name: path for path in root.rglob("*")}  # follows no links


def _coco(root: Path, split: str) -> Pairs:
    path = root / f"annotations/captions_{split}2017.json"
    if not path.is_file():
        raise ValueError(f"{root} has neither {path.relative_to(root)} nor Karpathy's dataset_*.json")
    with reading(path, "a COCO caption file"):
        content = read_json(path)
        texts = captions_by_image(content)
        folder = root / f"{split}2017"
        return [
            (folder / checked_name(image["file_name"], path), texts[image["id"]])
            for image in content["images"]
        ]


def _karpathy(path: Path, root: Path, split: str) -> Pairs:
    file_of_name = files_by_name(root)
    pairs = []
    with reading(path, "Karpathy's splits"):
        for image in read_json(path)["images"]:
            if image["split"] == split:
                name = image["filename"]
                file = file_of_name.get(name) or root / checked_name(name, path)
                pairs.append((file, [str(sentence["raw"]) for sentence in image["sentences"]]))
    return pairs
