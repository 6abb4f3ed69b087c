"""Images with captions to learn from, and which pairs a step learns from: a function of the seed and the step alone.

Letters: n images, B pairs of a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from visft_ds.config.preflight import is_url
from visft_ds.data.decode import MOST_PIXELS, decode_image
from visft_ds.data.labels import parse_label
from visft_ds.data.permutation import hash_ints, hash_words, shuffled
from visft_ds.data.shards import DamagedSample, Manifest, ShardReader, splits_in
from visft_ds.evals.benchmarks.images import digest
from visft_ds.evals.benchmarks.protocol import ImageSet, IntArray
from visft_ds.evals.benchmarks.retrieval import CaptionSet, read_captions


def read_pairs(source: str, split: str) -> CaptionSet:
    """Images with their captions, out of shards of ours or any layout that `evals.benchmarks.retrieval` reads.

    In shards, images without captions are left out, as in training; elsewhere they are an error.

    Args:
        source: a folder of shards (or its URL), of a COCO tree, of Karpathy's splits, of Flickr30k.
        split: `train`, `val`, ...

    Raises:
        ValueError: no such folder or split, no captions at all, images that are named but not there.
    """
    if is_url(source) or (Path(source).is_dir() and splits_in(Path(source))):
        return _in_shards(Manifest.load(source, split))
    return read_captions(source, split)


def _in_shards(manifest: Manifest) -> CaptionSet:
    chosen = manifest.having("captions").tolist()
    where = f"{manifest.root}/{manifest.split}"
    if not chosen:
        raise ValueError(f"{where} has no captions: build it with visft shards build --captions FILE, or give others")
    reader = ShardReader(manifest)
    found = [parse_label(label)["captions"] for label in (reader.read(place, "labels")[1] or b"" for place in chosen)]
    captions = [[text.strip() for text in texts if text.strip()] for texts in found]
    if empty := [number for number, texts in zip(chosen, captions, strict=True) if not texts]:
        raise ValueError(f"{where}: {reader.describe(empty[0])} has nothing but empty captions")

    def read(place: int) -> Image.Image:
        data, _ = reader.read(chosen[place], "images")
        assert data is not None
        try:
            return Image.fromarray(decode_image(data, max_pixels=MOST_PIXELS))
        except ValueError as error:
            raise DamagedSample(f"{reader.describe(chosen[place])} cannot be decoded: {error}") from error

    names = [f"{reader.row(number)['image_id']:012d}" for number in chosen]
    fingerprint = digest((manifest.fingerprint, np.asarray(chosen, dtype=np.int64).tobytes()))
    owners = np.repeat(np.arange(len(chosen)), [len(texts) for texts in captions]).astype(np.int64)
    return CaptionSet(ImageSet(names, read, fingerprint), tuple(text for texts in captions for text in texts), owners)


@dataclass(frozen=True)
class PairOrder:
    """The pairs of every step.

    Each epoch has every image once, in another order, with one of its captions drawn anew. The images that do not fill
    a batch at the end of an epoch wait for another one: no image is its own negative.

    Raises ValueError where there are fewer images than a batch has.
    """

    owners: IntArray  #: (captions,), place of the image of each; ascending
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not 2 <= self.batch_size <= self.images:
            raise ValueError(
                f"a batch of {self.batch_size} is not allowed: a pair is told from the others of its batch, so give 2 "
                f"to {self.images}, as many as there are images with captions"
            )

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.owners[-1]) + 1 if len(self.owners) else 0

    @property
    def steps_in_epoch(self) -> int:
        """Steps in which every image comes at most once."""
        return self.images // self.batch_size

    def step(self, step: int) -> tuple[IntArray, IntArray]:
        """((B,) places of images, (B,) places of captions) of a step; steps count from 0."""
        epoch, number = divmod(step, self.steps_in_epoch)
        places = np.arange(number * self.batch_size, (number + 1) * self.batch_size, dtype=np.int64)
        images = shuffled(places, self.images, hash_ints(self.seed, epoch))
        first = np.searchsorted(self.owners, images)
        counts = np.searchsorted(self.owners, images, side="right") - first
        drawn = hash_words(images.astype(np.uint64) + np.uint64(hash_ints(self.seed, epoch, 1)))
        return images, first + (drawn % counts.astype(np.uint64)).astype(np.int64)
