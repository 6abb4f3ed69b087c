"""Reading samples out of shards by their place in the index.

A tar is never extracted and never scanned while training: the index says where each payload begins. Every payload is
checked against its crc32, since a flipped byte in a JPEG goes unnoticed by all decoders.
"""

from __future__ import annotations

import os
import threading
import zlib
from types import TracebackType
from typing import Literal

from visft_ds.data.manifest import Manifest, rebuild_hint

Role = Literal["both", "images", "labels"]
ROLES: tuple[Role, ...] = ("both", "images", "labels")

#: Shards beyond this number are opened for each read, because many systems allow only 1024 open files.
_MAX_OPEN = 256


class DamagedSample(ValueError):
    """A sample whose bytes are not those that the index describes, or that are no picture."""


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

    def prefetch(self, indices: object, role: Role) -> None:
        pass

    def _payload(self, index: int, row: dict[str, int], part: str) -> bytes:
        data = self._pread(row["shard"], row[f"{part}_size"], row[f"{part}_offset"])
        self._check(index, row, part, data)
        return data

    def _check(self, index: int, row: dict[str, int], part: str, data: bytes) -> None:
        if len(data) != row[f"{part}_size"] or zlib.crc32(data) != row[f"{part}_crc32"]:
            raise DamagedSample(
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
