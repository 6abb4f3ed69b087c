"""Reading samples out of shards by their place in the index.

A tar is never extracted and never scanned while training: the index says where each payload begins. Every payload is
checked against its crc32, since a flipped byte in a JPEG goes unnoticed by all decoders.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from types import TracebackType
from typing import Any, Literal

import numpy as np
from isal import isal_zlib

from visft_ds.data.manifest import Manifest, rebuild_hint
from visft_ds.data.spans import span
from visft_ds.data.store import Part, Store

Role = Literal["both", "images", "labels"]
ROLES: tuple[Role, ...] = ("both", "images", "labels")

#: (what it is, offset, size, crc32) of an image or label file in its shard.
_Payload = tuple[str, int, int, int]


class DamagedSample(ValueError):
    """A sample whose bytes are not those that the index describes, or that are no image."""


class ShardReader:
    """Random access to the samples of a split, wherever its shards are.

    Safe for threads and for forked processes; a pickled reader opens the split again. Use as a context manager or call
    `close`.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        # Of its own: closing one reader must not take the files from another one.
        self._store: Store = manifest.store.another()
        self._rows = manifest.index.view(np.ndarray)  # indexing a memmap costs several times as much
        self._names = [shard.name for shard in manifest.shards]
        columns = list(manifest.index.dtype.names or ())
        self._columns = columns
        self._shard = columns.index("shard")
        self._image = itemgetter(*(columns.index(f"image_{column}") for column in ("offset", "size", "crc32")))
        self._label = itemgetter(*(columns.index(f"label_{column}") for column in ("offset", "size", "crc32")))

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardReader, (self.manifest,)

    def __len__(self) -> int:
        return len(self._rows)

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards and stop reading ahead. A later read opens them again."""
        self._store.close()

    def describe(self, index: int) -> str:
        """Identify a sample, for error messages."""
        row = self.row(index)
        return f"sample {index} (shard {self._store.where}/{self._names[row['shard']]}, key {row['image_id']:012d})"

    def row(self, index: int) -> dict[str, int]:
        """Row of the index by column name. Raises ValueError for a position that does not exist."""
        return dict(zip(self._columns, self._row(index), strict=True))

    def read(self, index: int, role: Role = "both") -> tuple[bytes | None, bytes | None]:
        """(image file, label JSON) of a sample; the part that `role` does not ask for is not read and None.

        Raises:
            DamagedSample: the bytes are not those the index describes; names shard, key and offset.
            RuntimeError: a server failed, again and again.
        """
        row = self._row(index)
        name = self._names[row[self._shard]]
        if role == "images":
            return self._payloads(index, name, ("image", *self._image(row)))[0], None
        if role == "labels":
            return None, self._payloads(index, name, ("label", *self._label(row)))[0]
        image, label = self._payloads(index, name, ("image", *self._image(row)), ("label", *self._label(row)))
        return image, label

    def read_labels(self, indices: Sequence[int]) -> list[bytes]:
        """The label JSON of many samples, in half the time that `read` takes for each.

        Raises as `read`.
        """
        places = np.asarray(indices, dtype=np.int64)
        if places.size and not 0 <= places.min() <= places.max() < len(self._rows):
            self._row(int(places.min() if places.min() < 0 else places.max()))  # says what there is
        rows = self._rows[places]
        columns = (rows[name].tolist() for name in ("shard", "label_offset", "label_size", "label_crc32"))
        shards, offsets, sizes, expected = columns
        read, names = self._store.read, self._names
        with span("read"):
            parts = zip(shards, offsets, sizes, strict=True)
            found = [read(names[shard], offset, size) for shard, offset, size in parts]
        with span("crc"):
            wrong = [place for place, data in enumerate(found) if isal_zlib.crc32(data) != expected[place]]
        for place in wrong:
            found[place] = self.read(int(places[place]), "labels")[1] or b""  # once more, or says what is wrong
        return found

    def prefetch(self, indices: Sequence[int], role: Role = "both") -> None:
        """Hint that these samples are about to be read, in this order. Returns at once; local files need no hint.

        The more samples a hint has, the more of them are neighbours that one request can fetch. It is no promise: any
        sample may be read without.

        Raises ValueError for a position that does not exist.
        """
        self._store.will_need(self._parts(indices, role))

    def _parts(self, indices: Sequence[int], role: Role) -> list[Part]:
        parts: list[Part] = []
        for index in indices:
            row = self._row(index)
            name = self._names[row[self._shard]]
            image, label = self._image(row), self._label(row)
            if role == "both":
                parts.append((name, image[0], label[0] + label[1] - image[0]))
            else:
                offset, size, _ = image if role == "images" else label
                parts.append((name, offset, size))
        return parts

    def _row(self, index: int) -> tuple[int, ...]:
        if not 0 <= index < len(self._rows):
            last = len(self._rows) - 1
            raise ValueError(f"sample {index} does not exist: {self.manifest.split!r} has 0 to {last}")
        row: tuple[int, ...] = self._rows.item(index)
        return row

    def _payloads(self, index: int, name: str, *payloads: _Payload) -> list[bytes]:
        """Neighbouring payloads of a shard, read at once; read again if they are damaged and a copy may be to blame."""
        start = payloads[0][1]
        size = payloads[-1][1] + payloads[-1][2] - start
        for attempt in range(2):
            with span("read"):
                data = self._store.read(name, start, size)
            found = [data] if len(payloads) == 1 else [data[p[1] - start : p[1] - start + p[2]] for p in payloads]
            damaged = None
            with span("crc"):
                for payload, part in zip(payloads, found):  # noqa: B905  # of equal length; the check costs a tenth
                    if len(part) != payload[2] or isal_zlib.crc32(part) != payload[3]:
                        damaged = _problem(payload, part)
                        break
            if damaged is None:
                return found
            if attempt or not self._store.forget(name, start, size):
                break
        raise DamagedSample(f"{self.describe(index)}: {damaged} {rebuild_hint(self.manifest.split)}")


def _problem(payload: _Payload, data: bytes) -> str:
    part, offset, size, expected = payload
    found = isal_zlib.crc32(data)
    return (
        f"the {part} at offset {offset} is damaged ({len(data)} of {size} bytes read, crc32 {found:08x} "
        f"instead of {expected:08x})."
    )
