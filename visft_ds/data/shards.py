"""A split on disk: NAME.manifest.json, NAME.index.npy and the tars, and reading of its samples.

The manifest lists shards, categories, counts and what was odd; the index has a row of fixed size for each
sample, so that any sample is one read. Every read is checked by crc32, as decoders do not notice a flipped
byte in a JPEG.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from zlib import crc32

import numpy as np
import numpy.typing as npt
import orjson

from visft_ds.data.fetch import Cache, RemoteFolder, sha256_of
from visft_ds.files import read_bytes, reading, write_bytes

FORMAT, VERSION = "visft_ds shards", 4
INDEX = ".index.npy"  #: ends the name of an index, behind that of its split
#: Offsets and sizes are those of the payloads inside the shard, headers excluded.
INDEX_DTYPE = np.dtype(
    [
        ("shard", "<i4"),
        ("image_offset", "<i8"),
        ("image_size", "<i8"),
        ("image_crc32", "<u4"),
        ("label_offset", "<i8"),
        ("label_size", "<i8"),
        ("label_crc32", "<u4"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("image_id", "<i8"),
        (
            "num_annotations",
            "<i4",
        ),  # that training uses: neither crowd nor without area; of label maps, the classes
        ("num_captions", "<i4"),
    ]
)
#: What identifies the content of a sample; the rest of a row says where it lies.
_CONTENT = ("image_id", "image_size", "image_crc32", "label_size", "label_crc32", "width", "height")
#: Percentages in `Manifest.object_sides`.
SIDE_QUANTILES = (5, 10, 25, 50, 75, 90, 95)
_MOST_MANIFEST = 1 << 30  # bytes
_MOST_OPEN = 32  # shards; one that was removed from the cache takes its place on the disk while it is open
Role = Literal["both", "images", "labels"]


@dataclass(frozen=True)
class Category:
    """Object class: `id` counts from 0 in the order of `coco_id`, the id in the source."""

    id: int
    coco_id: int
    name: str


@dataclass(frozen=True)
class ShardFile:
    """Tar of a split."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A split that is ready to be read; `len` is its number of samples."""

    root: Path | str  #: folder, or its URL
    split: str
    categories: tuple[Category, ...]
    counts: Mapping[str, int]
    having_category: Mapping[
        str, int
    ]  #: id of a category in the source, as text -> images with a usable object of it
    #: Quantiles of the objects' sides, the side being the square root of the share of the picture that a box
    #: covers: percentage, as text -> side; empty without boxes.
    object_sides: Mapping[str, float]
    shards: tuple[ShardFile, ...]
    vocabulary: Mapping[str, int]  #: word -> how often it occurs in the captions
    left_out: Sequence[Sequence[str]]  #: (file name, reason) of each image that is not among the samples
    findings: Mapping[str, Sequence[Any]]  #: kind -> count, examples
    options: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]  #: role -> name, bytes, sha256
    fingerprint: str  #: of the content, however it is cut into shards; checkpoints remember it
    index_sha256: str
    remote: RemoteFolder | None = None

    def __len__(self) -> int:
        return self.counts["images"]

    @classmethod
    def load(cls, root: Path | str, split: str, cache: Cache | None = None) -> Manifest:
        """Open a split in a folder or behind a URL; of remote shards, `cache` keeps copies.

        Raises:
            ValueError: there is none of this name, it is of another version, or a file was cut or changed.
            OSError: a server failed repeatedly.
        """
        remote, path = None, str(manifest_path(Path(root), split))
        if isinstance(root, str) and "://" in root:
            remote, name = RemoteFolder(root.rstrip("/"), cache or Cache()), Path(path).name
            root, path = remote.url, f"{remote.url}/{name}"
            content = remote.read(name, _MOST_MANIFEST)
        elif Path(path).is_file():
            root, content = Path(root), read_bytes(path, _MOST_MANIFEST)
        else:
            found = ", ".join(splits_in(Path(root))) or "none"
            raise ValueError(f"{path} does not exist; finished splits there: {found}")
        with reading(path, "a manifest of shards"):
            values = orjson.loads(content)
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not of version {VERSION}: build the split again, with --replace")
            if values["split"] != split:
                raise ValueError(f"it is of the split {values['split']}")
            for name in ("having_category", "object_sides", "vocabulary", "findings", "options", "sources"):
                if not isinstance(values[name], dict):
                    raise ValueError(f"its {name} must be an object")
            values["vocabulary"] = {word: int(count) for word, count in values["vocabulary"].items()}
            values["findings"] = {
                kind: (int(count), shown) for kind, (count, shown) in values["findings"].items()
            }
            for name in ("counts", "having_category"):
                values[name] = {key: int(count) for key, count in values[name].items()}
            values["object_sides"] = {key: float(side) for key, side in values["object_sides"].items()}
            values["categories"] = _categories(values["categories"])
            values["shards"] = tuple(ShardFile(**each) for each in values["shards"])
            manifest = cls(root=root, remote=remote, **values)
            if [shard.name for shard in manifest.shards] != [
                tar_name(split, n) for n in range(len(manifest.shards))
            ]:
                raise ValueError(f"its shards are not {tar_name(split, 0)} and so on")
            digests = [*(shard.sha256 for shard in manifest.shards), manifest.index_sha256]
            if not all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests):
                raise ValueError("a digest is not a sha256")
            counts = np.array([shard.count for shard in manifest.shards], dtype=np.int64)
            if counts.sum() != len(manifest):
                raise ValueError("its shards do not have as many images as it says")
        for shard in manifest.shards if remote is None else ():
            file = Path(root, shard.name)
            if not file.is_file() or file.stat().st_size != shard.bytes:
                raise ValueError(f"{file} is missing or truncated: run the same `visft shards build` again")
        of, numbers = manifest.index["shard"], np.arange(len(counts))
        same = len(of) == len(manifest) and np.array_equal(of, np.repeat(numbers, counts))
        if not same or (remote is None and sha256_of(Path(root, split + INDEX)) != manifest.index_sha256):
            raise ValueError(
                f"the index of {path} does not belong to it: run the same `visft shards build` again"
            )
        return manifest

    def save(self, index: bytes) -> None:
        """Write the index and then the manifest into `root`, when all shards are there."""
        write_bytes(Path(self.root, self.split + INDEX), index)
        values = {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if each.name not in ("root", "remote")
        }
        values |= {"format": FORMAT, "version": VERSION}
        content = orjson.dumps(
            values, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
        )
        write_bytes(manifest_path(Path(self.root), self.split), content)

    @cached_property
    def index(self) -> npt.NDArray[Any]:
        """(samples,) INDEX_DTYPE, memory-mapped."""
        path = Path(self.root, self.split + INDEX)
        if self.remote is not None:
            path = self.remote.copy(path.name, 0, self.index_sha256)
        with reading(path, "the index of a split"):
            if not path.is_file():
                raise ValueError("it is missing: run the same `visft shards build` again")
            rows = np.lib.format.open_memmap(path, mode="r")  # np.load's message advises to allow pickles
            if rows.dtype != INDEX_DTYPE or rows.ndim != 1:
                raise ValueError("it has different columns: build the split again, with --replace")
        return rows.view(np.ndarray)  # reading a row of a memmap costs several times as much

    @cached_property
    def category_ids(self) -> frozenset[int]:
        """The ids of the categories in the source."""
        return frozenset(category.coco_id for category in self.categories)

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name != "index"
        }  # it is opened there again

    @property
    def labels(self) -> frozenset[str]:
        """Kinds of labels that the split was made with: "annotations" (of objects) or "maps", "captions", or
        both.
        """
        made_with = {"annotations": "instances", "maps": "maps", "captions": "captions"}
        return frozenset(
            kind for kind, role in made_with.items() if role in self.sources or self.counts.get(kind)
        )

    def having(self, labels: str) -> npt.NDArray[np.int64]:
        """Positions of the samples with "annotations" or "captions", or of "any"."""
        column = {"any": None, "annotations": "num_annotations", "captions": "num_captions"}[labels]
        return np.arange(len(self)) if column is None else np.flatnonzero(self.index[column])

    def fetch(self, shard: int) -> None:
        """Make this machine's copy of a remote shard, if there is none."""
        if self.remote is not None:
            file = self.shards[shard]
            self.remote.copy(file.name, file.bytes, file.sha256)


class DamagedSample(ValueError):
    """A sample whose bytes are not those that the index describes, or that are no image."""


@dataclass(eq=False)
class ShardReader:
    """Random access to the samples of a split; safe for threads, and opened anew in another process."""

    manifest: Manifest
    _files: dict[int, int] = field(
        default_factory=dict
    )  # shard -> descriptor, the last one read from at the end
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.manifest,)

    def describe(self, index: int) -> str:
        """Name of a sample in messages."""
        row = self.manifest.index[index]
        return (
            f"sample {row['image_id']:012d} of {self.manifest.root}/{self.manifest.shards[row['shard']].name}"
        )

    def read(self, index: int, role: Role = "both") -> tuple[bytes | None, bytes | None]:
        """(image file, label) of a sample; what `role` does not ask for is not read, and None.

        Raises:
            DamagedSample: naming the shard, the key and the offset.
            ValueError, OSError: a remote shard cannot be fetched.
        """
        row = self.manifest.index[index]
        shard = int(row["shard"])
        asked = {"both": ("image", "label"), "images": ("image",), "labels": ("label",)}[role]
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                remote, about = self.manifest.remote, self.manifest.shards[shard]
                if remote is None:
                    file = os.open(Path(self.manifest.root, about.name), os.O_RDONLY | os.O_CLOEXEC)
                else:  # fetched first
                    file = remote.open(about.name, about.bytes, about.sha256)
                if len(self._files) >= _MOST_OPEN:
                    os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = file
            found = {part: os.pread(file, row[f"{part}_size"], row[f"{part}_offset"]) for part in asked}
        for part, data in found.items():
            if crc32(data) != row[f"{part}_crc32"]:
                raise DamagedSample(
                    f"{self.describe(index)}: the {part} at offset {row[f'{part}_offset']} is damaged: "
                    "run the same `visft shards build` again, which keeps what is whole"
                )
        return found.get("image"), found.get("label")

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])

    __del__ = close

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _categories(listed: Sequence[Mapping[str, Any]]) -> tuple[Category, ...]:
    """Categories as a manifest lists them. Raises ValueError unless numbered from 0 and with unique ids."""
    categories = tuple(Category(**each) for each in listed)
    for number, category in enumerate(categories):
        if type(category.id) is not int or category.id != number:
            raise ValueError(f"its categories are not numbered from 0: {category.id!r:.20}")
        if type(category.coco_id) is not int or type(category.name) is not str:
            raise ValueError(f"category {number} needs a whole number as coco_id, and a name")
    if len({category.coco_id for category in categories}) < len(categories):
        raise ValueError("two of its categories have the same coco_id")
    return categories


def fingerprint(categories: Sequence[Category], index: npt.NDArray[Any]) -> str:
    """Identity of a split's content and order."""
    digest = hashlib.sha256(
        orjson.dumps([asdict(category) for category in categories], option=orjson.OPT_SORT_KEYS)
    )
    for column in _CONTENT:
        digest.update(np.ascontiguousarray(index[column]).tobytes())
    return digest.hexdigest()


def verify(manifest: Manifest) -> list[str]:
    """Read every byte. Returns the names of the files that are damaged."""
    digests = {shard.name: shard.sha256 for shard in manifest.shards}
    digests[manifest.split + INDEX] = manifest.index_sha256
    return [name for name, digest in digests.items() if sha256_of(Path(manifest.root, name)) != digest]


def manifest_path(root: Path, split: str) -> Path:
    return root / f"{split}.manifest.json"


def tar_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def splits_in(root: Path) -> list[str]:
    """Names of the finished splits in a folder."""
    return sorted(path.name.removesuffix(".manifest.json") for path in root.glob("*.manifest.json"))
