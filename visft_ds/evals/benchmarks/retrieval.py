"""Image-text retrieval: which captions belong to an image, and which image to a caption.

| layout | files |
|---|---|
| COCO | `annotations/captions_<split>2017.json` and `<split>2017/` |
| Karpathy's splits of COCO and Flickr30k | `dataset_*.json`, its images anywhere below the folder by their names |
| Flickr30k | `*.token` (`NAME.jpg#0<TAB>caption`), images in `flickr30k-images/`, `images/` or beside it |

Recall as in the papers: of an image, whether one of its captions is among the first k; of a caption, whether its image
is. At most CAPTIONS captions of an image take part, the first ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict
from torch import Tensor

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Number, read_record
from visft_ds.evals.benchmarks.images import from_files
from visft_ds.evals.benchmarks.protocol import Features, ImageSet, IntArray, Score, hits, rank_of
from visft_ds.names import checked_name

CAPTIONS = 5
RECALLS = (1, 5, 10)
_ROWS = 1024


class ForeignRecord(StrictModel):
    """Part of a file of others, with the fields that are read here."""

    model_config = ConfigDict(extra="ignore")


class ListedImage(ForeignRecord):
    """Image of a COCO file."""

    id: Number
    file_name: str


class ListedCaption(ForeignRecord):
    """Caption of a COCO file."""

    image_id: Number
    caption: str


class CaptionFile(ForeignRecord):
    """COCO's captions_*.json."""

    images: list[ListedImage]
    annotations: list[ListedCaption]


class Sentence(ForeignRecord):
    """Caption in Karpathy's splits."""

    raw: str


class KarpathyImage(ForeignRecord):
    """Image in Karpathy's splits."""

    split: str
    filename: str
    sentences: list[Sentence]


class KarpathyFile(ForeignRecord):
    """Karpathy's dataset_*.json."""

    images: list[KarpathyImage]


@dataclass(frozen=True)
class CaptionSet:
    """Images with captions."""

    images: ImageSet
    captions: tuple[str, ...]
    owners: IntArray  #: (captions,), places of their images; ascending


@dataclass(frozen=True)
class Retrieval:
    """R@1, R@5 and R@10 from image to text and from text to image."""

    label: str
    data: CaptionSet
    needs_text: bool = True
    kinds: Sequence[str] = ("clip",)

    @property
    def sets(self) -> Mapping[str, ImageSet]:
        return {"images": self.data.images}

    @property
    def texts(self) -> Sequence[str]:
        return self.data.captions

    @property
    def truths(self) -> Mapping[str, Sequence[str]]:
        first = np.searchsorted(self.data.owners, np.arange(len(self.data.images)))
        return {"images": [self.data.captions[place] for place in first]}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"benchmark": "retrieval 1", "owners": self.data.owners.tolist()}

    def scores(self, features: Features) -> Iterator[Score]:
        assert features.texts is not None
        images, texts = features.images["images"]["clip"], features.texts
        owners = torch.from_numpy(self.data.owners)
        ranks, best = image_to_text(images, texts, owners)
        captions = [self.data.captions[place] for place in best.tolist()]
        yield Score("image to text R@1", hits(ranks, 1), said=captions, shows="images")
        for k in RECALLS[1:]:
            yield Score(f"image to text R@{k}", hits(ranks, k))
        ranks = text_to_image(images, texts, owners)
        for k in RECALLS:
            yield Score(f"text to image R@{k}", hits(ranks, k), groups=self.data.owners)


def image_to_text(images: Tensor, texts: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
    """(place of the best own caption, most similar caption) of each image.

    Captions of others that are as similar as the best own one come before it.
    """
    ranks, best = [], []
    for start in range(0, len(images), _ROWS):
        similarity = images[start : start + _ROWS] @ texts.T
        matching = owners == torch.arange(start, start + len(similarity))[:, None]
        top = similarity.masked_fill(~matching, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((similarity >= top) & ~matching).sum(dim=1))
        best.append(similarity.argmax(dim=1))
    return torch.cat(ranks), torch.cat(best)


def text_to_image(images: Tensor, texts: Tensor, owners: Tensor) -> Tensor:
    """Place of the right image of each caption, behind all that are as similar."""
    ranks = []
    for start in range(0, len(texts), _ROWS):
        ranks.append(rank_of(texts[start : start + _ROWS] @ images.T, owners[start : start + _ROWS]))
    return torch.cat(ranks)


def read_captions(source: str, split: str | None = None) -> CaptionSet:
    """Read a data set in any layout of the table above.

    Args:
        split: None: `val` of a COCO tree, `test` of Karpathy's; a `.token` file has none.

    Raises:
        ValueError: no such layout, an image without captions or without file, or an empty caption.
    """
    root = Path(source)
    if not root.is_dir():
        raise ValueError(f"{source}: no such folder")
    if karpathy := sorted(root.glob("dataset_*.json")):
        pairs = _karpathy(karpathy[0], root, split or "test")
    elif tokens := sorted(root.glob("*.token")):
        if split is not None:
            raise ValueError(f"{tokens[0]} has no splits: leave split={split} out")
        pairs = _token_file(tokens[0], root)
    else:
        pairs = _coco(root, split or "val")
    if not pairs:
        raise ValueError(f"{source} has no image with captions")
    bare = [str(path) for path, captions in pairs if not captions]
    if bare:
        raise ValueError(f"{source}: {len(bare)} images have no captions, first {bare[0]}: nothing could find them")
    kept = [(path, captions[:CAPTIONS]) for path, captions in pairs]
    captions = [caption.strip() for _, texts in kept for caption in texts]
    owners = np.repeat(np.arange(len(kept)), [len(texts) for _, texts in kept]).astype(np.int64)
    if "" in captions:
        empty = kept[int(owners[captions.index("")])][0]
        raise ValueError(f"{source}: a caption of {empty} is empty")
    return CaptionSet(from_files([path for path, _ in kept], root), tuple(captions), owners)


Pairs = list[tuple[Path, list[str]]]


def _coco(root: Path, split: str) -> Pairs:
    path = root / f"annotations/captions_{split}2017.json"
    if not path.is_file():
        raise ValueError(
            f"{root} has neither {path.relative_to(root)}, nor Karpathy's dataset_*.json, nor Flickr30k's *.token"
        )
    content = read_record(path, CaptionFile)
    texts: dict[int, list[str]] = {image.id: [] for image in content.images}
    for annotation in content.annotations:
        if annotation.image_id not in texts:
            raise ValueError(f"{path}: a caption of image {annotation.image_id}, which is not among its images")
        texts[annotation.image_id].append(annotation.caption)
    folder = root / f"{split}2017"
    return [(folder / checked_name(image.file_name, path, folders=True), texts[image.id]) for image in content.images]


def _karpathy(path: Path, root: Path, split: str) -> Pairs:
    images = [image for image in read_record(path, KarpathyFile).images if image.split == split]
    if not images:
        raise ValueError(f"{path} has no image of the split {split}")
    places = {file.name: file for file in root.rglob("*.jpg")}
    missing = [image.filename for image in images if image.filename not in places]
    if missing:
        raise ValueError(f"{root}: {len(missing)} of {len(images)} images are not there, first {missing[0]}")
    return [(places[image.filename], [text.raw for text in image.sentences]) for image in images]


def _token_file(path: Path, root: Path) -> Pairs:
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, tab, caption = line.partition("\t")
        if not tab or "#" not in name:
            raise ValueError(f"{path}, line {number}: needed is NAME.jpg#NUMBER, a tab, and the caption; got {line!r}")
        found.setdefault(name.rpartition("#")[0], []).append(caption)
    folders = (root / "flickr30k-images", root / "images")
    folder = next((folder for folder in folders if folder.is_dir()), root)
    return [(folder / checked_name(name, path, folders=True), captions) for name, captions in found.items()]
