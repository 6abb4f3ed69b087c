"""What a split consists of: `NAME.manifest.json` and `NAME.index.npy` beside the tars `NAME-000000.tar`, ...

The manifest lists the shards, the categories, counts and everything that was found wrong at conversion. The index has
one fixed-size row per sample and is memory-mapped, so that a loader starts in milliseconds and needs neither a scan of
the tars nor any COCO JSON file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

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
        ("dhash", "<u8"),  # difference hash of the decoded picture, for duplicates; 0 where it was not decoded
    ]
)
#: What identifies the content of a sample; the rest of a row says where it lies.
_CONTENT_COLUMNS = ("image_id", "image_size", "image_crc32", "label_size", "label_crc32", "width", "height")
_SELECTIONS = {"any": None, "annotations": "num_annotations", "captions": "num_captions"}


@dataclass(frozen=True)
class Category:
    """One object class: `id` counts from 0 without gaps in the order of `coco_id`, the id in the source."""

    id: int
    coco_id: int
    name: str


@dataclass(frozen=True)
class ShardFile:
    """One tar of the split."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A split that is ready to be read. `len(manifest)` is its number of samples."""

    root: Path
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
    index: npt.NDArray[Any]  #: (samples,) INDEX_DTYPE, memory-mapped

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def load(cls, root: Path | str, split: str, *, check_shards: bool = True) -> Manifest:
        """Open a split and check that it is whole: digests of manifest and index, presence and size of all shards.

        `check_shards=False` leaves out the latter, for programs that say themselves what is wrong with a shard.

        Raises:
            ValueError: there is no such split, or a file of it is missing, changed, cut or of another version.
        """
        root = Path(root)
        fields = read_manifest(root, split)
        index_bytes = _read(root / fields["index"]["name"], split)
        if hashlib.sha256(index_bytes).hexdigest() != fields["index"]["sha256"]:
            raise ValueError(f"{root / fields['index']['name']} does not belong to the manifest. {rebuild_hint(split)}")
        index = np.load(root / fields["index"]["name"], mmap_mode="r", allow_pickle=False)
        if index.dtype != INDEX_DTYPE:
            raise ValueError(f"{root / fields['index']['name']} has columns of another version. {rebuild_hint(split)}")
        shards = tuple(ShardFile(**shard) for shard in fields["shards"])
        for shard in shards if check_shards else ():
            _check_size(root / shard.name, shard.bytes, split)
        return cls(
            root=root,
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
        )

    def select(self, having: str = "any") -> npt.NDArray[np.int64]:
        """Positions of all samples ("any"), or of those with at least one of "annotations" or "captions"."""
        if having not in _SELECTIONS:
            raise ValueError(f"cannot select samples having {having!r}; allowed are {', '.join(_SELECTIONS)}")
        column = _SELECTIONS[having]
        if column is None:
            return np.arange(len(self.index), dtype=np.int64)
        return np.flatnonzero(self.index[column] > 0).astype(np.int64)


def manifest_path(root: Path, split: str) -> Path:
    """Where the manifest of a split is."""
    return root / f"{split}.manifest.json"


def index_path(root: Path, split: str) -> Path:
    """Where the index of a split is."""
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
    return sorted(path.name.removesuffix(".manifest.json") for path in root.glob("*.manifest.json"))


def rebuild_hint(split: str) -> str:
    """How to get a whole split again."""
    return (
        f"Run the same `python tools/make_shards.py build ... --split {split}` again: "
        "it keeps every shard that is whole and makes the others anew."
    )


def read_manifest(root: Path, split: str) -> dict[str, Any]:
    """The manifest's fields after checking its format, version and own digest. Raises ValueError."""
    path = manifest_path(root, split)
    if not path.is_file():
        found = ", ".join(splits_in(root)) if root.is_dir() else ""
        raise ValueError(
            f"{path} does not exist; finished splits in {root}: {found or 'none'}. Make it by `python "
            f"tools/make_shards.py build --images DIR --instances FILE --out {root} --split {split}`."
        )
    try:
        fields = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). {rebuild_hint(split)}") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ValueError(f"{path} is no manifest of {FORMAT}.")
    if fields.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {fields.get('version')!r}; this program reads version {VERSION}. Build the split "
            "again by the same `python tools/make_shards.py build` with --replace."
        )
    if fields.get("sha256") != manifest_digest(fields):
        raise ValueError(f"{path} was changed after it was written (its digest differs). {rebuild_hint(split)}")
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


def _read(path: Path, split: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing. {rebuild_hint(split)}") from error


def _check_size(path: Path, expected: int, split: str) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"shard {path} is missing. {rebuild_hint(split)}") from error
    if size != expected:
        raise ValueError(f"shard {path} has {size} bytes, not {expected} as when it was made. {rebuild_hint(split)}")
