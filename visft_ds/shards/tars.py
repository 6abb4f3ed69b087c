"""Tars that others wrote for WebDataset -> index and manifest, by which they are read where they lie.

Files of one name up to its first dot, one after another, are a sample, as `webdataset` groups them. Every
picture is decoded once, as training will.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import orjson
from tqdm import tqdm

from visft_ds.data.decode import decode_image
from visft_ds.data.fetch import check_protocol, is_url, opened
from visft_ds.data.labels import parse_label
from visft_ds.data.open_webdataset import webdataset
from visft_ds.data.shards import (
    INDEX_DTYPE,
    LABEL_KINDS,
    Manifest,
    ShardFile,
    manifest_path,
)
from visft_ds.data.workers import fork_server, kill_pool, start_worker
from visft_ds.files import image_frame, read_bytes, reading, shown_name
from visft_ds.redaction import refuse_secrets
from visft_ds.settings.task_schema import WITHOUT_MASK
from visft_ds.shards.archive import MAX_IMAGE_BYTES
from visft_ds.shards.build import alone, quantiles, reasons
from visft_ds.shards.coco import SourceImage, add_categories, listed_categories, share_inside
from visft_ds.shards.common import Findings, Json, is_split_name, source_of
from visft_ds.tasks.vocabulary import TOKENIZER, caption_words

PICTURES = ("jpg", "jpeg", "png", "webp")  #: suffixes in lower case
_READ = (*PICTURES, "txt", "json")  #: ends of the names of files that are read; others may be large
_TURNED = "picture that EXIF data turns (read as it is stored)"
_TWICE = "second file of a name in a sample (not read)"
_METADATA = re.compile("__[^/]*__($|/)")  # names that webdataset passes over
_PLAIN_JPEG = b"\xff\xd8\xff"
_EXIF = b"Exif"
_EXIF_WITHIN = 4096  # bytes from the start of a JPEG
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_BLOCK = 1 << 20
_BUFFER = 1 << 16  #: of tarfile, which copies the rest of it at every read
#: Distinct words that a manifest lists at most; of more, the rarest are left out.
_MOST_WORDS = 100_000


def index_tars(
    patterns: Sequence[str],
    out: Path,
    split: str,
    *,
    categories: Path | None = None,
    workers: int = 1,
    replace: bool = False,
) -> Manifest:
    """Read tars once, and write the index and manifest of a split that has their samples; nothing else.

    Args:
        patterns: paths or URLs of tars, with {00000..00331} in them; paths also with `*`.
        categories: COCO file, or JSON list of its categories, of the annotations in the samples' JSON;
            without it captions are read: from .txt, else from the JSON.
        workers: processes; the result does not depend on them.
        replace: overwrite a split of this name.

    Raises:
        ValueError: unusable input, more than a tenth of the tars or of the samples among it; no captions and
            no objects; another split of this name; another process that is making it.
        OSError: a tar is not there, or a server failed repeatedly.
    """
    if not is_split_name(split):
        raise ValueError(f"split name {split!r}: only letters, digits, '-' and '_' are allowed")
    addresses = _expanded(patterns)
    names = dict[int, str]()
    sources = dict[str, Json]()
    if categories is not None:
        names, sources = _read_categories(categories)
    with alone(out, split):
        if manifest_path(out, split).exists() and not replace:
            raise ValueError(f"{out} holds a split {split!r}: use another --out or --split, or --replace")
        # The folder is this process's: workers that Ctrl-C ends leave nothing of a download behind.
        with TemporaryDirectory(prefix=".index-", dir=out) as folder:
            tars = _read_all(addresses, names, Path(folder), workers)
            return _write(tars, out, split, names, sources, list(patterns))


def _expanded(patterns: Iterable[str]) -> list[str]:
    """The paths and URLs that patterns stand for, in order. Raises ValueError where there are none."""
    addresses = list[str]()
    for pattern in patterns:
        for address in webdataset.shardlists.expand_urls(pattern):
            if is_url(address):
                check_protocol(refuse_secrets(address))
                if "*" in address:
                    raise ValueError(f"{address}: of URLs write the numbers, such as {{00000..00331}}")
                addresses.append(address)
            else:
                paths = [address] if Path(address).exists() else sorted(glob(address))
                if not paths:
                    raise ValueError(f"no such tar: {address}")
                addresses += paths
    repeated = [address for address, count in Counter(addresses).items() if count > 1]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice")
    return addresses


def _read_categories(path: Path) -> tuple[dict[int, str], dict[str, Json]]:
    """(id -> name, what the manifest says of the file)."""
    data = read_bytes(path)
    names = dict[int, str]()
    with reading(path, "a COCO file, or a list of its categories"):
        content = orjson.loads(data)
        add_categories(content["categories"] if isinstance(content, dict) else content, names)
    return names, {"categories": source_of(path.name, data)}


class _Member(NamedTuple):
    """File in a tar."""

    offset: int
    data: bytes

    @property
    def columns(self) -> tuple[int, int, int]:
        """Offset, size and crc32, as the index has them."""
        return self.offset, len(self.data), crc32(self.data)


@dataclass
class _Tar:
    """Content of a tar, after one reading."""

    address: str
    categories: Mapping[int, str]
    size: int = 0  #: bytes
    sha256: str = ""
    rows: list[tuple[int, ...]] = field(default_factory=list)  #: as INDEX_DTYPE; the shard is 0
    index: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, INDEX_DTYPE))  #: the same, in the end
    left_out: list[tuple[str, str]] = field(default_factory=list)  #: (sample, reason)
    findings: Findings = field(default_factory=Findings)
    counts: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    having: Counter[int] = field(default_factory=Counter)  #: category -> images with a usable object of it
    sides: array[float] = field(default_factory=lambda: array("f"))
    is_whole: bool = True

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    def read(self, folder: Path) -> None:
        """Read the tar from its beginning to its end; of a remote one, a copy lies in `folder` meanwhile."""
        with opened(self.address, folder) as path, path.open("rb") as file:
            start = file.read(8)
            if start.startswith(_COMPRESSED):
                remedy = "decompress it (gunzip), as samples are read one by one"
                raise ValueError(f"{self.address} is compressed: {remedy}")
            file.seek(0)
            stream: Any = _Hashing(file)  # as much of a file as tarfile needs
            end = 0
            try:
                with tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER) as archive:
                    for sample in webdataset.tariterators.group_by_keys(
                        _members(archive), handler=self._note_repeated
                    ):
                        self._add(sample)
                    end = archive.offset
                stream.read_rest()
                file.seek(end)
                self.is_whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
            except tarfile.TarError:
                stream.read_rest()
                self.is_whole = False
        self.size = stream.size
        self.sha256 = stream.digest.hexdigest()
        self.index = np.array(self.rows, INDEX_DTYPE)
        self.rows.clear()  # ten times as large

    def _note_repeated(self, error: Exception) -> bool:
        """Note what `group_by_keys` complains of, and let it go on."""
        name = str(error.args[0]).partition(": ")[0]
        self.findings.add(_TWICE, f"{self.name}/{name}")
        return True

    def _add(self, sample: Mapping[str, Any]) -> None:
        """Note a sample, or the reason why it is left out."""
        key = sample["__key__"]
        name = shown_name(f"{self.name}/{key}")  # of any bytes
        suffix = next((suffix for suffix in PICTURES if suffix in sample), None)
        label_suffix = "json"
        if "txt" in sample and not self.categories:
            label_suffix = "txt"
        if suffix is None:
            self.left_out.append((name, f"no picture ({', '.join(PICTURES)})"))
            return
        if label_suffix not in sample:
            self.left_out.append((name, "no json" if self.categories else "no txt or json"))
            return
        picture = sample[suffix]
        label = sample[label_suffix]
        kind = "text" if label_suffix == "txt" else "json"
        try:
            height, width = self._size(picture.data, name)
            with reading("unusable label", "a label"):
                content = parse_label(label.data, 0, (height, width), self.categories, kind)
        except ValueError as error:
            self.left_out.append((name, str(error)))
            return
        image = SourceImage(0, name, width, height, {}, captions=content["captions"])
        self._count(image, content["annotations"])
        digits = key.rpartition("/")[2]
        number = int(digits) if digits.isdecimal() and len(digits) < 19 else -1
        row = (0, *picture.columns, *label.columns, width, height, number, image.trainable)
        self.rows.append((*row, len(image.captions), LABEL_KINDS.index(kind)))

    def _size(self, data: bytes, name: str) -> tuple[int, int]:
        """(height, width) of a picture, which is decoded; what is odd about it is noted."""
        with reading("unreadable", "a picture"):
            height, width, _ = decode_image(data).shape
            if not data.startswith(_PLAIN_JPEG) or _EXIF in data[:_EXIF_WITHIN]:
                frame = image_frame(data)
                if frame.orientation > 1:
                    self.findings.add(_TURNED, name)
        return height, width

    def _count(self, image: SourceImage, annotations: Sequence[Json]) -> None:
        """Count a usable image and what it is labelled with."""
        for annotation in annotations:
            x, y, width, height = annotation["bbox"]
            share = share_inside((x, y, x + width, y + height), image)
            crowd = bool(annotation["iscrowd"])
            image.add(b"", annotation["category_id"], crowd, share)
            if not annotation.get("segmentation") and not crowd:
                self.findings.add(WITHOUT_MASK, image.file_name)
        self.counts["images"] += 1
        self.counts["captions"] += len(image.captions)
        self.counts["empty"] += not annotations and not image.captions
        if self.categories:
            self.counts["annotations"] += image.objects
            self.counts["crowds"] += image.crowds
            self.counts["trainable"] += image.trainable
        self.having.update(image.classes)
        self.sides.extend(image.sides)
        for text in image.captions:
            self.words.update(caption_words(text))


class _Hashing:
    """A file that is read once, whose bytes are hashed and counted."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def read_rest(self) -> None:
        while self.read(_BLOCK):
            pass


def _members(archive: tarfile.TarFile) -> Iterator[dict[str, Any]]:
    """The files of a tar as `group_by_keys` takes them, with their places in it."""
    for entry in archive:
        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
        if not entry.isreg() or entry.issparse() or _METADATA.match(entry.name):
            continue
        data = b""
        if entry.name.lower().endswith(_READ) and entry.size <= MAX_IMAGE_BYTES:
            content = archive.extractfile(entry)
            assert content is not None
            data = content.read()
        yield {"fname": entry.name, "data": _Member(entry.offset_data, data), "__url__": ""}


def _read_one(address: str, categories: Mapping[int, str], folder: Path) -> _Tar:
    tar = _Tar(address, categories)
    tar.read(folder)
    return tar


def _read_all(
    addresses: Sequence[str], categories: Mapping[int, str], folder: Path, workers: int
) -> Iterator[_Tar]:
    """Read every tar, in order."""
    read = partial(_read_one, categories=categories, folder=folder)
    with tqdm(total=len(addresses), unit=" tars", disable=None) as bar:
        if workers == 1 or len(addresses) == 1:
            for address in addresses:
                yield read(address)
                bar.update()
            return
        processes = min(workers, len(addresses))
        pool = ProcessPoolExecutor(processes, mp_context=fork_server(), initializer=start_worker)
        try:
            for tar in pool.map(read, addresses):
                yield tar
                bar.update()
        finally:
            kill_pool(pool)


def _write(
    tars: Iterable[_Tar],
    out: Path,
    split: str,
    names: Mapping[int, str],
    sources: Mapping[str, Json],
    patterns: Sequence[str],
) -> Manifest:
    """Write the index and manifest of tars, which are read meanwhile."""
    damaged = list[tuple[str, str]]()
    left_out = list[tuple[str, str]]()
    findings = Findings()
    shards = list[ShardFile]()
    parts = list[npt.NDArray[Any]]()
    counts = Counter[str]()
    words = Counter[str]()
    having = Counter[int]()
    sides: list[array[float]] = []
    for tar in tars:
        sides.append(tar.sides)
        if not tar.is_whole:
            damaged.append((tar.address, "cut or damaged tar, of which the samples before that are used"))
        left_out += tar.left_out
        findings.merge(tar.findings)
        if len(tar.index):
            tar.index["shard"] = len(shards)
            parts.append(tar.index)
            name = _stored_name(tar.address, out)
            shards.append(ShardFile(name, len(tar.index), tar.size, tar.sha256))
        counts.update(tar.counts)
        words.update(tar.words)
        having.update(tar.having)
    reasons(damaged).refuse_above_a_tenth(len(sides), out, "tars")
    reasons(left_out).refuse_above_a_tenth(counts["images"] + len(left_out), out, "samples")
    if not counts["captions"] and not counts["trainable"]:
        raise ValueError(
            f"none of {counts['images']} samples has a caption (.txt, or caption in .json), nor objects to "
            "learn (annotations in .json, with --categories)"
        )
    left_out += damaged
    index = np.concatenate(parts)
    numbers = index["image_id"]
    if numbers.min() < 0 or len(np.unique(numbers)) < len(numbers):
        index["image_id"] = np.arange(len(index))
    vocabulary, least = _frequent(words)
    manifest = Manifest.made_of(
        index,
        root=out,
        split=split,
        categories=listed_categories(names),
        counts={**counts, "left_out": len(left_out)},
        having_category={str(number): having[number] for number in sorted(names)},
        object_sides=quantiles(sides),
        shards=tuple(shards),
        vocabulary=vocabulary,
        left_out=left_out,
        findings=findings,
        options={"tars": patterns, "tokenizer": TOKENIZER, "word_min_count": least},
        sources=sources,
    )
    manifest.save(index)
    return manifest


def _stored_name(address: str, out: Path) -> str:
    """Name of a tar in the manifest: relative if it lies in the folder of the manifest, or below it."""
    if is_url(address):
        return address
    path = os.path.abspath(address)
    folder = os.path.abspath(out)
    if os.path.commonpath([path, folder]) == folder:
        return os.path.relpath(path, folder)
    return path


def _frequent(words: Counter[str]) -> tuple[dict[str, int], int]:
    """(at most `_MOST_WORDS` words with their counts, the least count of a word that is among them)."""
    if len(words) <= _MOST_WORDS:
        return dict(words), 1
    ordered = words.most_common(_MOST_WORDS + 1)
    least = ordered[-1][1] + 1  # words of equal counts are all in or all out
    return {word: count for word, count in words.items() if count >= least}, least
