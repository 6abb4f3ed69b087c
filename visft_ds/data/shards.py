"""Reading samples out of shards by their place in the index, and checking whole splits.

A tar is never extracted and never scanned while training: the index says where each payload begins. Every payload is
checked against its crc32, since a flipped byte in a JPEG goes unnoticed by all decoders.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from visft_ds.data.manifest import Manifest, ShardFile, fingerprint, read_manifest, rebuild_hint, shard_files, splits_in

Role = Literal["both", "images", "labels"]
ROLES: tuple[Role, ...] = ("both", "images", "labels")

#: Shards beyond this number are opened for each read, because many systems allow only 1024 open files.
_MAX_OPEN = 256
_BLOCK = 512
_CHUNK = 1 << 20


class ShardReader:
    """Random access to the samples of a split.

    Safe for threads and for forked processes: `pread` has no position that they could share. Use as a context manager
    or call `close`.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.manifest)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards. A later read opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def describe(self, index: int) -> str:
        """Which sample this is, for error messages."""
        row = self.row(index)
        shard = self.manifest.shards[row["shard"]].name
        return f"sample {index} (shard {self.manifest.root / shard}, key {row['image_id']:012d})"

    def row(self, index: int) -> dict[str, int]:
        """One row of the index by column name. Raises ValueError for a position that does not exist."""
        rows = self.manifest.index
        if not 0 <= index < len(rows):
            raise ValueError(f"sample {index} does not exist: {self.manifest.split!r} has 0 to {len(rows) - 1}")
        return dict(zip(rows.dtype.names or (), rows[index].tolist(), strict=True))

    def read(self, index: int, role: Role = "both") -> tuple[bytes | None, bytes | None]:
        """(image file, label JSON) of a sample; the part that `role` does not ask for is not read and None.

        Raises:
            ValueError: the bytes are not those the index describes; names shard, key and offset.
        """
        row = self.row(index)
        if role == "images":
            return self._payload(index, row, "image"), None
        if role == "labels":
            return None, self._payload(index, row, "label")
        if role != "both":
            raise ValueError(f"role {role!r} is not allowed; allowed are {', '.join(ROLES)}")
        # The two members are neighbours: one read fetches both.
        start, end = row["image_offset"], row["label_offset"] + row["label_size"]
        data = self._pread(row["shard"], end - start, start)
        image, label = data[: row["image_size"]], data[row["label_offset"] - start :]
        self._check(index, row, "image", image)
        self._check(index, row, "label", label)
        return image, label

    def _payload(self, index: int, row: dict[str, int], part: str) -> bytes:
        data = self._pread(row["shard"], row[f"{part}_size"], row[f"{part}_offset"])
        self._check(index, row, part, data)
        return data

    def _check(self, index: int, row: dict[str, int], part: str, data: bytes) -> None:
        if len(data) != row[f"{part}_size"] or zlib.crc32(data) != row[f"{part}_crc32"]:
            raise ValueError(
                f"{self.describe(index)}: the {part} at offset {row[f'{part}_offset']} is damaged "
                f"({len(data)} of {row[f'{part}_size']} bytes read, crc32 {zlib.crc32(data):08x} instead of "
                f"{row[f'{part}_crc32']:08x}). {rebuild_hint(self.manifest.split)}"
            )

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        if shard < _MAX_OPEN:
            return _pread_all(self._descriptor(shard), size, offset)
        descriptor = self._open(shard)
        try:
            return _pread_all(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        descriptor = self._descriptors.get(shard)
        if descriptor is None:
            with self._lock:
                descriptor = self._descriptors.get(shard)
                if descriptor is None:
                    descriptor = self._descriptors[shard] = self._open(shard)
        return descriptor

    def _open(self, shard: int) -> int:
        path = self.manifest.root / self.manifest.shards[shard].name
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise ValueError(f"shard {path} is missing. {rebuild_hint(self.manifest.split)}") from error


def _pread_all(descriptor: int, size: int, offset: int) -> bytes:
    """Like `os.pread`, which may return less than asked for before the end of the file."""
    data = os.pread(descriptor, size, offset)
    while len(data) < size:
        more = os.pread(descriptor, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a split."""

    file: str
    message: str


def verify(root: Path | str, split: str) -> list[Problem]:
    """Read everything of a split and list what is wrong; an empty list means every byte is as it was made.

    Raises:
        ValueError: there is no such split at all.
    """
    root = Path(root)
    if split not in splits_in(root):
        read_manifest(root, split)  # raises with the splits that do exist
    try:
        fields = read_manifest(root, split)
    except ValueError as error:
        return [Problem(f"{split}.manifest.json", str(error))]
    shards = [ShardFile(**shard) for shard in fields["shards"]]
    present = [shard for shard in shards if (root / shard.name).is_file()]
    problems = [Problem(shard.name, "missing") for shard in shards if shard not in present]
    listed = {shard.name for shard in shards}
    extra = [name for name in shard_files(root, split) if name not in listed]
    problems += [Problem(name, "not part of this split, yet named like a shard of it") for name in extra]
    manifest = _open_leniently(root, split, problems)
    for number, shard in enumerate(shards):
        if shard in present and (digest := file_sha256(root / shard.name)) != shard.sha256:
            problems.append(Problem(shard.name, f"sha256 is {digest}, not {shard.sha256} as when it was made"))
            problems += _locate(root / shard.name, number, shard, manifest)
    return problems


def _open_leniently(root: Path, split: str, problems: list[Problem]) -> Manifest | None:
    """The manifest if its index is good, whatever the state of the shards; problems of the index are noted."""
    try:
        manifest = Manifest.load(root, split, check_shards=False)
    except ValueError as error:
        problems.append(Problem(f"{split}.index.npy", str(error)))
        return None
    if fingerprint(manifest.categories, manifest.index) != manifest.fingerprint:
        problems.append(Problem(f"{split}.index.npy", "its content does not give the fingerprint in the manifest"))
    return manifest


def _locate(path: Path, number: int, shard: ShardFile, manifest: Manifest | None) -> list[Problem]:
    """Say where a shard differs: its length, the headers of its members, their payloads."""
    problems = []
    size = path.stat().st_size
    if size != shard.bytes:
        problems.append(Problem(shard.name, f"{size} bytes, not {shard.bytes}"))
    if manifest is None:
        return problems
    with open(path, "rb") as file:
        for row in manifest.index[manifest.index["shard"] == number]:
            for part in ("image", "label"):
                problems += _check_member(file, shard.name, f"{row['image_id']:012d}", part, row)
    return problems


def _check_member(file: Any, shard: str, key: str, part: str, row: Any) -> list[Problem]:
    offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
    file.seek(offset - _BLOCK)
    header, payload = file.read(_BLOCK), file.read(size)
    problems = []
    if not _header_fits(header, key, size):
        problems.append(Problem(shard, f"header of the {part} of {key} at offset {offset - _BLOCK} is damaged"))
    if len(payload) < size:
        problems.append(Problem(shard, f"{part} of {key} at offset {offset}: only {len(payload)} of {size} bytes"))
    elif zlib.crc32(payload) != row[f"{part}_crc32"]:
        problems.append(Problem(shard, f"{part} of {key} at offset {offset}: crc32 differs"))
    return problems


def _header_fits(header: bytes, key: str, size: int) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except tarfile.HeaderError:
        return False
    return info.size == size and info.name.split(".")[0] == key


def file_sha256(path: Path) -> str:
    """Digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
