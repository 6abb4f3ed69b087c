"""Description of a split: `NAME.manifest.json` and `NAME.index.npy` beside the tars `NAME-000000.tar`, ...

The manifest lists the shards, the categories, counts and everything that was found wrong at conversion. The index has
one fixed-size row per sample and is memory-mapped, so that a loader starts in milliseconds and needs neither a scan of
the tars nor any COCO JSON file.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from pydantic import ConfigDict, Field

from visft_ds.config.fields import STRICT, StrictModel
from visft_ds.config.records import Number, Whole, as_record, parse_json
from visft_ds.data.decode import MAX_PIXELS, MOST_PIXELS
from visft_ds.data.selection import Selection
from visft_ds.data.store import CacheOptions, Expected, LocalStore, Store, file_digest, open_store

FORMAT = "visft_ds shards"
VERSION = 2

#: One row per sample. Offsets and sizes are those of the payloads inside the shard, headers excluded.
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
        ("num_annotations", "<i4"),  # that training uses: neither crowd nor without area
        ("num_captions", "<i4"),
        ("dhash", "<u8"),  # difference hash of the decoded picture, to find duplicates by; 0 where it was not decoded
    ]
)
#: What identifies the content of a sample; the rest of a row says where it lies.
_CONTENT_COLUMNS = ("image_id", "image_size", "image_crc32", "label_size", "label_crc32", "width", "height")
_MANIFEST = ".manifest.json"
_HEADER = 1 << 12  #: bytes of an index that hold its header
_SELECTIONS = {"any": None, "annotations": "num_annotations", "captions": "num_captions"}


@dataclass(frozen=True)
class Category:
    """Object class: `id` counts from 0 without gaps in the order of `coco_id`, the id in the source."""

    __pydantic_config__ = STRICT

    id: Whole
    coco_id: Number
    name: str


@dataclass(frozen=True)
class ShardFile:
    """Tar of the split."""

    __pydantic_config__ = STRICT

    name: str
    count: Whole
    bytes: Whole
    sha256: str


class DescribedFile(StrictModel):
    """Index of a split, or a file that it was made of."""

    name: str
    bytes: Whole
    sha256: str


class LeftOut(StrictModel):
    """Image that is not among the samples."""

    image_id: Number
    file_name: str
    reason: str
    detail: str


class ReportedFinding(StrictModel):
    """Irregularity of the COCO files."""

    kind: str
    count: Whole
    examples: list[str]
    action: str


class SplitOptions(StrictModel):
    """Settings of the build that readers depend on, and others."""

    model_config = ConfigDict(extra="allow")

    tokenizer: str | None = None
    unknown: list[str] = Field(default_factory=list)
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=MOST_PIXELS)


class ManifestFile(StrictModel):
    """Content of NAME.manifest.json."""

    format: str
    version: int
    split: str
    categories: list[Category]
    counts: dict[str, Whole]
    shards: list[ShardFile]
    index: DescribedFile
    vocabulary: dict[str, Whole]
    quarantine: list[LeftOut]
    findings: list[ReportedFinding]
    options: SplitOptions
    sources: dict[str, DescribedFile]
    fingerprint: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A split that is ready to be read. `len(manifest)` is its number of samples.

    A pickled manifest holds no index: it is opened again where it is unpickled, from the disk or the cache.
    """

    root: Path | str  #: the folder; text where it is a URL
    split: str
    categories: tuple[Category, ...]
    counts: Mapping[str, int]
    shards: tuple[ShardFile, ...]
    fingerprint: str  #: of the content: the same however the samples are cut into shards; checkpoints remember it
    vocabulary: Mapping[str, int]  #: word -> how often it occurs in the captions; cut by `options["tokenizer"]`
    quarantine: tuple[Mapping[str, Any], ...]  #: images left out, with `image_id`, `file_name`, `reason`, `detail`
    findings: tuple[Mapping[str, Any], ...]  #: the report of the conversion: `kind`, `count`, `examples`, `action`
    options: Mapping[str, Any]
    sources: Mapping[str, Any]
    index: npt.NDArray[Any]  #: (samples,) INDEX_DTYPE, memory-mapped (in memory if it is remote and there is no cache)
    store: Store  #: where the shards are read from
    cache: CacheOptions | None = None  #: as given to `load`

    def __len__(self) -> int:
        return len(self.index)

    @property
    def labels(self) -> frozenset[str]:
        """Kinds of labels that the split was made with: "annotations" (of objects), "captions", or both."""
        made_with = {"annotations": "instances", "captions": "captions"}
        return frozenset(name for name, source in made_with.items() if source in self.sources or self.counts[name])

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (self.root, self.split, self.cache, self.fingerprint)

    @classmethod
    def load(
        cls, root: Path | str, split: str, *, check_shards: bool = True, cache: CacheOptions | None = None
    ) -> Manifest:
        """Open a split and check that it is whole: digests of manifest and index, presence and size of all shards.

        Args:
            root: the folder, or the URL of one; see `visft_ds.data.store.open_store`.
            split: its name.
            check_shards: False leaves out the shards, for programs that say themselves what is wrong with one.
            cache: where copies of remote files are kept.

        Raises:
            ValueError: there is no such split, or a file of it is missing, changed, cut or of another version.
            RuntimeError: a server failed, again and again.
        """
        store = open_store(root, cache)
        try:
            fields = read_manifest(root, split, store)
            shards = tuple(ShardFile(**shard) for shard in fields["shards"])
            name, described = fields["index"]["name"], Expected(fields["index"]["bytes"], fields["index"]["sha256"])
            store.expect({name: described, **{shard.name: Expected(shard.bytes, shard.sha256) for shard in shards}})
            index = _open_index(store, name, described, split)
            if check_shards:
                _check_sizes(store, shards, split)
        finally:
            store.close()  # reading opens what it needs again
        manifest = cls(
            root=store.root if isinstance(store, LocalStore) else store.where,
            split=split,
            categories=tuple(Category(**category) for category in fields["categories"]),
            counts=fields["counts"],
            shards=shards,
            fingerprint=fields["fingerprint"],
            vocabulary=fields["vocabulary"],
            quarantine=tuple(fields["quarantine"]),
            findings=tuple(fields["findings"]),
            options=fields["options"],
            sources=fields["sources"],
            index=index,
            store=store,
            cache=cache,
        )
        manifest._check_rows(f"{store.where}/{name}")
        return manifest

    def _check_rows(self, where: str) -> None:
        """Refuse an index whose rows name what its shards cannot hold, before anything is read by them."""
        ends = np.array([shard.bytes for shard in self.shards] or [0], dtype=np.int64)
        done = 0
        for rows in self.parts():
            shard, image, label = rows["shard"], rows["image_offset"], rows["label_offset"]
            inside = (shard >= 0) & (shard < len(self.shards))
            end = ends[np.where(inside, shard, 0)]
            sound = (
                inside & (image >= 0) & (image <= label) & (label <= end)
            )  # what follows cannot overflow where it is
            sound &= (rows["image_size"] >= 0) & (rows["image_size"] <= label - image)
            sound &= (rows["label_size"] >= 0) & (rows["label_size"] <= end - label)
            pixels = rows["width"].astype(np.int64) * rows["height"]
            sound &= (rows["width"] > 0) & (pixels > 0) & (pixels <= MOST_PIXELS)
            if not sound.all():
                place = int(np.argmin(sound))
                row = dict(zip(INDEX_DTYPE.names or (), rows[place].item(), strict=True))
                raise ValueError(
                    f"{where}: row {done + place} is {row}: "
                    f"a sample lies in a shard, its image before its label, and has 1 to {MOST_PIXELS} pixels. "
                    f"{rebuild_hint(self.split)}"
                )
            done += len(rows)

    @property
    def max_pixels(self) -> int:
        """Limit of an image, as the split was built with."""
        limit: int = self.options.get("max_pixels", MAX_PIXELS)
        return limit

    def select(self, having: str = "any") -> npt.NDArray[np.int64]:
        """Positions of all samples ("any"), or of those with at least one of "annotations" or "captions"."""
        column = _selection_column(having)
        if column is None:
            return np.arange(len(self.index), dtype=np.int64)
        return np.flatnonzero(self.index[column] > 0).astype(np.int64)

    def parts(self, rows: int = 1 << 20) -> Iterator[npt.NDArray[Any]]:
        """The index, some rows at a time. What was looked at no longer counts as memory of this process."""
        mapped = self.index.base
        for first in range(0, len(self.index), rows):
            yield self.index[first : first + rows]
            if isinstance(mapped, mmap.mmap):
                mapped.madvise(mmap.MADV_DONTNEED)

    def selection(self, having: str = "any") -> Selection:
        """The same samples as `select` in a bit for each of the split, or in nothing for "any"."""
        column = _selection_column(having)
        if column is None:
            return Selection.all(len(self.index))
        mapped = self.index.base
        if not isinstance(mapped, mmap.mmap):
            return Selection.positive(self.index[column])
        # One column touches every page of the file, and all that was touched counts as memory of this process.
        return Selection.positive(self.index[column], lambda: mapped.madvise(mmap.MADV_DONTNEED))


def _selection_column(having: str) -> str | None:
    if having not in _SELECTIONS:
        raise ValueError(f"cannot select samples having {having!r}; allowed are {', '.join(_SELECTIONS)}")
    return _SELECTIONS[having]


def _load_again(root: Path | str, split: str, cache: CacheOptions | None, fingerprint: str) -> Manifest:
    """A manifest in another process, which must not have been changed on the way there."""
    manifest = Manifest.load(root, split, check_shards=False, cache=cache)
    if manifest.fingerprint != fingerprint:
        raise ValueError(f"{root}/{split} was made anew while it was in use: start this program again")
    return manifest


def manifest_path(root: Path, split: str) -> Path:
    """Path of a split's manifest."""
    return root / f"{split}{_MANIFEST}"


def index_path(root: Path, split: str) -> Path:
    """Path of a split's index."""
    return root / f"{split}.index.npy"


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:06d}.tar"


def shards_among(names: Iterable[str], split: str) -> list[str]:
    """The names that look like shards of a split ("val-000000.tar" is one of "val", not of "val-000000")."""
    pattern = re.compile(re.escape(split) + r"-\d{6,}\.tar")
    return sorted(name for name in names if pattern.fullmatch(name))


def shard_files(root: Path, split: str) -> list[str]:
    """Names of all files of a folder that look like shards of a split."""
    return shards_among((path.name for path in root.iterdir()), split)


def splits_in(root: Path) -> list[str]:
    """Names of the finished splits in a folder."""
    return sorted(path.name.removesuffix(_MANIFEST) for path in root.glob(f"*{_MANIFEST}"))


def rebuild_hint(split: str) -> str:
    """Advice for error messages: how to repair a split."""
    return (
        f"Run the same `visft shards build ... --split {split}` again: "
        "it keeps every shard that is whole and makes the others anew."
    )


def read_manifest(root: Path | str, split: str, store: Store | None = None) -> dict[str, Any]:
    """The manifest's fields after checking its format, version and own digest; from `store` if it is open already.

    Raises ValueError.
    """
    if store is None:
        store = open_store(root)
        try:
            return read_manifest(root, split, store)
        finally:
            store.close()
    name = manifest_path(Path(), split).name
    path = f"{store.where}/{name}"
    if name not in store.sizes([name]):
        raise ValueError(
            f"{path} does not exist; finished splits in {store.where}: {_splits_told(store)}. Make it by "
            f"`visft shards build --images DIR --instances FILE --out {store.where} --split {split}`."
        )
    data, hint = store.load(name), f" {rebuild_hint(split)}"
    fields = parse_json(data, path, hint)
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of {FORMAT}.")
    if fields.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {fields.get('version')!r}; this program reads version {VERSION}. Build the split "
            "again by the same `visft shards build` with --replace."
        )
    if fields.get("sha256") != manifest_digest(fields):
        raise ValueError(f"{path} was changed after it was written (its digest differs).{hint}")
    found = as_record(data, ManifestFile, path, hint)
    wrong = [(place, one.name) for place, one in enumerate(found.shards) if one.name != shard_name(split, place)]
    if wrong:
        number, given = wrong[0]
        raise ValueError(
            f"{path}: its shard {number} is named {given!r} instead of {shard_name(split, number)!r}.{hint}"
        )
    if found.split != split or found.index.name != index_path(Path(), split).name:
        raise ValueError(
            f"{path}: it is the manifest of {found.split!r} with the index {found.index.name!r}, not of {split!r}."
            f"{hint}"
        )
    return fields


def manifest_digest(fields: Mapping[str, Any]) -> str:
    """sha256 over all fields but the digest itself."""
    rest = {name: value for name, value in fields.items() if name != "sha256"}
    return hashlib.sha256(orjson.dumps(rest, option=orjson.OPT_SORT_KEYS)).hexdigest()


def manifest_bytes(
    *,
    split: str,
    categories: Sequence[Category],
    counts: Mapping[str, int],
    shards: Sequence[ShardFile],
    index: npt.NDArray[Any],
    index_file: bytes,
    vocabulary: Mapping[str, int],
    quarantine: Sequence[Mapping[str, Any]],
    findings: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    sources: Mapping[str, Any],
) -> bytes:
    """The manifest file of a split: equal bytes for equal arguments."""
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "categories": [asdict(category) for category in categories],
        "counts": dict(counts),
        "shards": [asdict(shard) for shard in shards],
        "index": {
            "name": index_path(Path(), split).name,
            "bytes": len(index_file),
            "sha256": hashlib.sha256(index_file).hexdigest(),
        },
        "vocabulary": dict(vocabulary),
        "quarantine": list(quarantine),
        "findings": list(findings),
        "options": dict(options),
        "sources": dict(sources),
        "fingerprint": fingerprint(categories, index),
    }
    fields["sha256"] = manifest_digest(fields)
    return orjson.dumps(fields, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS) + b"\n"


def fingerprint(categories: Sequence[Category], index: npt.NDArray[Any]) -> str:
    """Identity of a split's content and order; where the samples lie in which shard does not matter."""
    digest = hashlib.sha256(orjson.dumps([asdict(category) for category in categories], option=orjson.OPT_SORT_KEYS))
    for column in _CONTENT_COLUMNS:
        digest.update(np.ascontiguousarray(index[column]).tobytes())
    return digest.hexdigest()


def _open_index(store: Store, name: str, described: Expected, split: str) -> npt.NDArray[Any]:
    """The index after checking its digest, memory-mapped wherever it lies on a disk."""
    index = _find_index(store, name, described, split)
    if index is None and store.forget(name, 0, described.bytes):  # a copy in a cache may be damaged
        index = _find_index(store, name, described, split)
    if index is None:
        raise ValueError(f"{store.where}/{name} does not belong to the manifest. {rebuild_hint(split)}")
    return index


def _find_index(store: Store, name: str, described: Expected, split: str) -> npt.NDArray[Any] | None:
    """The index; None if it is not the one described."""
    try:
        file = store.open(name)
    except ValueError as error:
        raise ValueError(f"{error} {rebuild_hint(split)}") from error
    where = f"{store.where}/{name}"
    if file is None:
        data = store.load(name)
        if hashlib.sha256(data).hexdigest() != described.sha256:
            return None
        start, rows = _index_header(data[:_HEADER], len(data), where, split)
        return np.frombuffer(data, INDEX_DTYPE, rows, start)
    with file:
        if file_digest(file) != described.sha256:
            return None
        size = os.fstat(file.fileno()).st_size
        start, rows = _index_header(os.pread(file.fileno(), _HEADER, 0), size, where, split)
        return np.memmap(file, INDEX_DTYPE, "r", start, (rows,))


def _index_header(head: bytes, size: int, where: str, split: str) -> tuple[int, int]:
    """Byte offset of an index's rows, and their number; `head` are the first bytes of a file of `size`.

    Raises ValueError for other columns. The text is compared and not parsed, which would mean to evaluate Python.
    """
    # https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    start = 10 + int.from_bytes(head[8:10], "little")
    columns = repr(np.lib.format.dtype_to_descr(INDEX_DTYPE))
    text = rf"{{'descr': {re.escape(columns)}, 'fortran_order': False, 'shape': \((\d{{1,18}}),\), }} *\n"
    found = re.fullmatch(text, head[10:start].decode("latin-1")) if head.startswith(b"\x93NUMPY\x01\x00") else None
    if found is None or size - start != int(found[1]) * INDEX_DTYPE.itemsize:
        raise ValueError(f"{where} has columns of another version, or was cut. {rebuild_hint(split)}")
    return start, int(found[1])


def _check_sizes(store: Store, shards: Iterable[ShardFile], split: str) -> None:
    sizes = store.sizes({shard.name for shard in shards})
    for shard in shards:
        where, size = f"{store.where}/{shard.name}", sizes.get(shard.name)
        if size is None:
            raise ValueError(f"shard {where} is missing. {rebuild_hint(split)}")
        if size != shard.bytes:
            raise ValueError(
                f"shard {where} has {size} bytes, not {shard.bytes} as when it was made. {rebuild_hint(split)}"
            )


def _splits_told(store: Store) -> str:
    """The finished splits in a folder for a message."""
    if store.where.startswith("http"):
        return "unknown, a web server does not list its files"
    names = sorted(name.removesuffix(_MANIFEST) for name in store.sizes() if name.endswith(_MANIFEST))
    return ", ".join(names) or "none"
