"""A split: NAME.manifest.json, NAME.index.npy and the tars, which may lie elsewhere; reading of its samples.

The manifest lists shards, categories, counts and what was odd; the index has a row of fixed size for each
sample, so that any sample is one read. Every read is checked by crc32, as decoders do not notice a flipped
byte in a JPEG.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from zlib import crc32

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import Field, NonNegativeInt, TypeAdapter

from visft_ds.data.depth import RELATIVE
from visft_ds.data.fetch import Cache, check_protocol, is_url, opened, sha256_of
from visft_ds.files import read_bytes, reading, write_bytes, wrong_name
from visft_ds.settings.bands import Bands

FORMAT = "visft_ds shards"
VERSION = 5
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
        # those that training uses: neither crowd nor without area; of label maps, the classes
        ("num_annotations", "<i4"),
        ("num_captions", "<i4"),
        ("label_kind", "u1"),  # position in LABEL_KINDS
    ]
)
#: What the label of a sample is: written by `visft shards build`; a caption as text; JSON of others.
LABEL_KINDS = ("visft", "text", "json")
#: What identifies the content of a sample; the rest of a row says where it lies.
_CONTENT = ("image_id", "image_size", "image_crc32", "label_size", "label_crc32", "width", "height")
#: Percentages in `Manifest.object_sides`.
SIDE_QUANTILES = (5, 10, 25, 50, 75, 90, 95)
_MAX_MANIFEST_BYTES = 1 << 30
_MAX_OPEN = 32  # shards; one that was removed from the cache takes its place on the disk while it is open
Role = Literal["both", "images", "labels"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class Category:
    """Object class: `id` counts from 0 in the order of `coco_id`, the id in the source."""

    id: int
    coco_id: int
    name: str


@dataclass(frozen=True)
class PanopticCategory(Category):
    """Class of panoptic labels."""

    thing: bool  #: it is counted; of stuff an image has one segment at most


def categories_for(labels: str, categories: Sequence[Category]) -> list[Category]:
    """Those categories that labels of this kind name, see `Manifest.labels`."""
    is_panoptic = labels == "panoptic"
    return [category for category in categories if isinstance(category, PanopticCategory) == is_panoptic]


@dataclass(frozen=True)
class ShardFile:
    """Tar of a split."""

    name: str  #: relative to the folder of the manifest, or a whole path or URL
    count: NonNegativeInt  #: samples
    bytes: int
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """A split that is ready to be read; `len` is its number of samples."""

    root: Path | str  #: folder, or its URL
    split: str
    categories: tuple[Category, ...]
    counts: Mapping[str, int]
    #: id of a category in the source, as text -> images with a usable object of it
    having_category: Mapping[str, int]
    #: Quantiles of the objects' sides, the side being the square root of the share of the picture that a box
    #: covers: percentage, as text -> side; empty without boxes.
    object_sides: Mapping[str, float]
    shards: tuple[ShardFile, ...]
    #: word -> how often it occurs in the captions, if at least `options["word_min_count"]` times
    vocabulary: Mapping[str, int]
    left_out: Sequence[Sequence[str]]  #: (file name, reason) of each image that is not among the samples
    findings: Mapping[str, tuple[int, Sequence[str]]]  #: kind -> count, examples
    options: Mapping[str, Any]
    sources: Mapping[str, Mapping[str, Any]]  #: role -> name, bytes, sha256
    fingerprint: str  #: of the content, however it is cut into shards; checkpoints remember it
    index_sha256: Sha256
    bands: Bands | None = None  #: of the pictures; None: three colours of 8 bits
    panoptic: tuple[PanopticCategory, ...] = ()  #: categories of panoptic labels, beside those of the others
    #: Depth in metres that all but one of a thousand known pixels of each map stay within; None: no depth in
    #: metres, or shards of an earlier release.
    farthest: float | None = None
    cache: Cache = field(default_factory=Cache)  #: for copies of what lies behind URLs

    def __len__(self) -> int:
        return self.counts["images"]

    def __str__(self) -> str:
        return f"{self.root}/{self.split}"

    @classmethod
    def load(cls, root: Path | str, split: str, cache: Cache | None = None) -> Manifest:
        """Open a split in a folder or behind a URL; `cache` keeps copies of what is remote.

        Raises:
            ValueError: there is none of this name, it is of another version, or a file was cut or changed.
            OSError: a server failed repeatedly.
        """
        path = manifest_path(Path(root), split)
        if isinstance(root, str) and "://" in root:
            root = root.rstrip("/")
            address = f"{root}/{path.name}"
        elif path.is_file():
            root = Path(root)
            address = str(path)
        else:
            finished = splits_in(Path(root))
            if not finished:
                raise ValueError(
                    f"{root} holds no shards ({path.name}), which `visft shards FOLDER` makes of a data set"
                )
            raise ValueError(f"{path} does not exist; finished splits there: {', '.join(finished)}")
        with opened(address) as copy:
            content = read_bytes(copy, _MAX_MANIFEST_BYTES)
        with reading(address, "a manifest of shards"):
            values = orjson.loads(content)
            if (values.pop("format"), values.pop("version")) != (FORMAT, VERSION):
                raise ValueError(f"it is not of version {VERSION}: build the split again, with --replace")
            if values["split"] != split:
                raise ValueError(f"it is of the split {values['split']}")
            values["bands"] = Bands.of(values.get("bands"))
            manifest = _SCHEMA.validate_python({**values, "root": root, "cache": cache or Cache()})
            _check_manifest(manifest)
        _check_files(manifest, address)
        return manifest

    @classmethod
    def made_of(cls, index: npt.NDArray[Any], **values: Any) -> Manifest:
        """The manifest of a new split with these rows of INDEX_DTYPE and other values."""
        made = cls(**values, fingerprint="", index_sha256=hashlib.sha256(_file_of(index)).hexdigest())
        return replace(made, fingerprint=fingerprint(made.every_category, index, made.bands))

    def save(self, index: npt.NDArray[Any]) -> None:
        """Write the index and then the manifest into `root`, when all shards are there."""
        write_bytes(Path(self.root, self.split + INDEX), _file_of(index))
        values: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        names = {field.name for field in fields(self)} - {"root", "cache"}
        for name in names:
            value = getattr(self, name)
            if value is not None:
                values[name] = value
        if self.bands is not None:
            values["bands"] = self.bands.model_dump(mode="json")
        options = orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS | orjson.OPT_APPEND_NEWLINE
        write_bytes(manifest_path(Path(self.root), self.split), orjson.dumps(values, option=options))

    @cached_property
    def index(self) -> npt.NDArray[Any]:
        """(samples,) INDEX_DTYPE, memory-mapped."""
        address = self.address(self.split + INDEX)
        path = Path(address)
        if is_url(address):
            path = self.cache.copy(address, 0, self.index_sha256)
        with reading(path, "the index of a split"):
            if not path.is_file():
                raise ValueError(f"it is missing: {self.remedy}")
            rows = np.lib.format.open_memmap(path, mode="r")  # np.load's message advises to allow pickles
            if rows.dtype != INDEX_DTYPE or rows.ndim != 1:
                raise ValueError("it has different columns: build the split again, with --replace")
        return rows.view(np.ndarray)  # reading a row of a memmap costs several times as much

    def address(self, name: str) -> str:
        """Path or URL of a file of the split."""
        return name if is_url(name) else os.path.join(self.root, name)

    @property
    def is_remote(self) -> bool:
        """Return True if a tar lies behind a URL."""
        return any(is_url(self.address(shard.name)) for shard in self.shards)

    @property
    def remedy(self) -> str:
        """Advice about damaged files."""
        if "tars" in self.options:
            return "run the same `visft shards index` again, with --replace"
        return "run the same `visft shards build` again, which keeps what is whole"

    @cached_property
    def category_ids(self) -> frozenset[int]:
        """The ids of the categories in the source."""
        return frozenset(category.coco_id for category in self.categories)

    @property
    def has_relative_depth(self) -> bool:
        """Return True if its depth maps have no unit."""
        return self.options.get("depth") == RELATIVE

    @cached_property
    def panoptic_ids(self) -> frozenset[int]:
        """The ids of the panoptic categories."""
        return frozenset(category.coco_id for category in self.panoptic)

    @property
    def every_category(self) -> tuple[Category, ...]:
        """The categories of all kinds of labels, see `categories_for`."""
        return (*self.categories, *self.panoptic)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("index", None)  # it is opened there again
        return state

    @property
    def labels(self) -> frozenset[str]:
        """Kinds of labels that the split was made with: "annotations" (of objects) or "maps", "captions",
        "depth", "panoptic".
        """
        kinds = set[str]()
        for kind in ("annotations", "maps", "captions", "depth", "panoptic"):
            role = "instances" if kind == "annotations" else kind
            if role in self.sources or self.counts.get(kind):
                kinds.add(kind)
        return frozenset(kinds)

    def having(self, labels: str) -> npt.NDArray[np.int64]:
        """Positions of the samples with "annotations" or "captions", or of "any"."""
        if labels == "any":
            return np.arange(len(self))
        return np.flatnonzero(self.index[f"num_{labels}"])

    def fetch(self, shard: int) -> None:
        """Make this machine's copy of a remote shard, if there is none."""
        file = self.shards[shard]
        address = self.address(file.name)
        if is_url(address):
            self.cache.copy(address, file.bytes, file.sha256)


_SCHEMA = TypeAdapter(Manifest)


def _file_of(index: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, index, allow_pickle=False)
    return file.getvalue()


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError for names, numbers or digests that no build writes."""
    for number, category in enumerate(manifest.categories):
        if category.id != number:
            raise ValueError(f"its categories are not numbered from 0: {category.id}")
    if len(manifest.category_ids) < len(manifest.categories):
        raise ValueError("two of its categories have the same coco_id")
    for shard in manifest.shards:
        if is_url(shard.name):
            check_protocol(shard.name)
            continue
        problem = wrong_name(shard.name)
        if problem is not None and (is_url(manifest.root) or not os.path.isabs(shard.name)):
            raise ValueError(f"its shard {shard.name!r:.80} is not allowed: {problem}")
    if sum(shard.count for shard in manifest.shards) != len(manifest):
        raise ValueError("its shards do not have as many images as it says")


def _check_files(manifest: Manifest, address: str) -> None:
    """Raise ValueError unless the index fits the manifest at `address`, and shards of a folder are there."""
    for shard in manifest.shards:
        file = manifest.address(shard.name)
        if is_url(file):
            continue
        if not os.path.isfile(file) or os.path.getsize(file) != shard.bytes:
            raise ValueError(f"{file} is missing or truncated: {manifest.remedy}")
    counts = [shard.count for shard in manifest.shards]
    belongs = np.array_equal(manifest.index["shard"], np.repeat(np.arange(len(counts)), counts))
    index = manifest.address(manifest.split + INDEX)
    if not is_url(index):
        belongs = belongs and sha256_of(Path(index)) == manifest.index_sha256
    if not belongs:
        raise ValueError(f"the index of {address} does not belong to it: {manifest.remedy}")


class DamagedSample(ValueError):
    """A sample whose bytes are not those that the index describes, or that are no image."""


@dataclass(eq=False)
class ShardReader:
    """Random access to the samples of a split; safe for threads, and opened anew in another process."""

    manifest: Manifest
    #: shard -> descriptor, the last one read from at the end
    _files: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.manifest,)

    def describe(self, index: int) -> str:
        """Name of a sample in messages."""
        row = self.manifest.index[index]
        shard = self.manifest.shards[row["shard"]]
        return f"sample {row['image_id']:012d} of {self.manifest.address(shard.name)}"

    def read(self, index: int, role: Role = "both") -> tuple[bytes | None, bytes | None]:
        """(image file, label) of a sample; what `role` does not ask for is not read, and None.

        Raises:
            DamagedSample: naming the shard, the key and the offset.
            ValueError, OSError: a remote shard cannot be fetched.
        """
        row = self.manifest.index[index]
        image = None
        label = None
        with self._lock:
            file = self._open(int(row["shard"]))
            if role != "labels":
                image = os.pread(file, row["image_size"], row["image_offset"])
            if role != "images":
                label = os.pread(file, row["label_size"], row["label_offset"])
        if image is not None and crc32(image) != row["image_crc32"]:
            self._refuse(index, "image", row["image_offset"])
        if label is not None and crc32(label) != row["label_crc32"]:
            self._refuse(index, "label", row["label_offset"])
        return image, label

    def _open(self, shard: int) -> int:
        """Descriptor of a shard, which is fetched first if it is remote."""
        file = self._files.pop(shard, None)
        if file is None:
            shard_file = self.manifest.shards[shard]
            address = self.manifest.address(shard_file.name)
            if is_url(address):
                file = self.manifest.cache.open(address, shard_file.bytes, shard_file.sha256)
            else:
                file = os.open(address, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) >= _MAX_OPEN:
                least_recent = next(iter(self._files))
                os.close(self._files.pop(least_recent))
        self._files[shard] = file
        return file

    def _refuse(self, index: int, part: str, offset: int) -> NoReturn:
        where = f"{self.describe(index)}: the {part} at offset {offset}"
        raise DamagedSample(f"{where} is damaged: {self.manifest.remedy}")

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


def fingerprint(categories: Sequence[Category], index: npt.NDArray[Any], bands: Bands | None) -> str:
    """Identity of a split's content and order, and of what its values mean."""
    listed = [asdict(category) for category in categories]
    digest = hashlib.sha256(orjson.dumps(listed, option=orjson.OPT_SORT_KEYS))
    for column in _CONTENT:
        digest.update(np.ascontiguousarray(index[column]).tobytes())
    if bands is not None:
        digest.update(bands.model_dump_json().encode())
    return digest.hexdigest()


def verify(manifest: Manifest) -> list[str]:
    """Read every byte. Returns the names of the files that are damaged."""
    digests = {shard.name: shard.sha256 for shard in manifest.shards}
    digests[manifest.split + INDEX] = manifest.index_sha256
    damaged = []
    for name, digest in digests.items():
        with opened(manifest.address(name)) as path:
            if sha256_of(path) != digest:
                damaged.append(name)
    return damaged


def manifest_path(root: Path, split: str) -> Path:
    return root / f"{split}.manifest.json"


def tar_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


def splits_in(root: Path) -> list[str]:
    """Names of the finished splits in a folder."""
    return sorted(path.name.removesuffix(".manifest.json") for path in root.glob("*.manifest.json"))
