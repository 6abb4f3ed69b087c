"""Cache of a frozen backbone's features in tar files, so that later epochs need neither pixels nor the backbone.

Every entry is a member `<key>.safetensors` of a plain tar: the features of an image under one geometry (flip, crop and
size). Its key is the sample's random key, which decides the geometry. Files are only appended to; a member that a
killed process left incomplete is skipped. Any number of processes may use a folder, each writes files of its own.

Shape letters: h w patch grid, D width.
"""

from __future__ import annotations

import json
import os
import tarfile
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from isal import isal_zlib
from torch import Tensor

from visft_ds.config.records import read_record
from visft_ds.ops.copies import to_device

Storage = Literal["fp32", "bf16", "int8"]

_FILE_BYTES = 1 << 30
_BLOCK = tarfile.BLOCKSIZE
_CRC = "crc32:"
#: Changes when the same image, geometry and weights would give other features.
VERSION = "1"


@dataclass(frozen=True)
class StoredFeatures:
    """Features of an image as they are stored."""

    values: Tensor  #: (h, w, D) float32, bfloat16 or int8
    scales: Tensor | None = None  #: (h, w) float32 of int8 values: one token's largest value is 127 times it

    @classmethod
    def pack(cls, features: Tensor, storage: Storage) -> StoredFeatures:
        """Round (h, w, D) float32. Values that are not finite stay so."""
        if storage != "int8":
            return cls(features.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage]).contiguous())
        scales = features.abs().amax(-1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return cls((features / scales[..., None]).round().to(torch.int8), scales)

    def unpack(self) -> Tensor:
        """(h, w, D) float32."""
        values = self.values.float()
        return values if self.scales is None else values * self.scales[..., None]

    def to(self, device: torch.device) -> StoredFeatures:
        """The same on `device`."""
        scales = None if self.scales is None else to_device(self.scales, device)
        return StoredFeatures(to_device(self.values, device), scales)


@dataclass(frozen=True)
class View:
    """An image under a geometry (flip, crop and size) that repeats after some epochs (`visft.features.views`)."""

    frame: tuple[int, int]  #: height and width in pixels, padding included
    features: StoredFeatures | None = None  #: None: not in the cache yet

    def to(self, device: torch.device) -> View:
        """The same with its features on `device`."""
        return self if self.features is None else View(self.frame, self.features.to(device))


@dataclass(frozen=True)
class _Place:
    """Location of an entry."""

    path: Path
    offset: int
    size: int
    crc32: int


class FeatureCache:
    """Features by random key. Threads may share it; a copy sent to another process opens the files anew.

    Args:
        root: folder for the caches of any number of models and data sets; None stores nothing.
        identity: everything the features depend on besides the key, by name. Each identity has a folder of its own.
        storage: how they are rounded. All features are, cached or not, so that the cache changes no result.

    Raises:
        ValueError: the folder of this identity holds something else, or a damaged file.
    """

    def __init__(self, root: Path | None, identity: Mapping[str, str], storage: Storage) -> None:
        self.storage: Storage = storage
        self._identity = {"version": VERSION, "storage": storage, **identity}
        self._root = root
        self.folder = None if root is None else root / sha256(_json(self._identity).encode()).hexdigest()[:16]
        self._places: dict[int, _Place] = {}
        self._scanned: dict[Path, int] = {}  # file -> offset up to which its members are known
        self._open: dict[Path, int] = {}
        self._writing: tuple[Path, int] | None = None  # file, and its length
        self._lock = threading.Lock()
        if self.folder is not None:
            self._describe()
            self._look()

    def __reduce__(self) -> tuple[Callable[..., FeatureCache], tuple[Any, ...]]:
        identity = {name: value for name, value in self._identity.items() if name not in ("version", "storage")}
        return FeatureCache, (self._root, identity, self.storage)

    def __len__(self) -> int:
        """Entries known so far."""
        return len(self._places)

    def others(self) -> list[str]:
        """Differences of the other caches below the root from this one, a line each."""
        if self._root is None or self.folder is None:
            return []
        lines = []
        for path in sorted(self._root.glob("*/identity.json")):
            if path.parent != self.folder:
                theirs = read_record(path, dict[str, str], f" Delete {path.parent}")
                names = [name for name in self._identity if theirs.get(name) != self._identity[name]]
                lines.append(f"{path.parent}: of other {', '.join(names)}")
        return lines

    def get(self, key: int, index: int) -> View | None:
        """The view of sample `index` with this key; None where its features are not in the cache.

        Raises:
            ValueError: a damaged entry, or one of another sample.
        """
        place = self._places.get(key)
        if place is None:
            self._look()
            place = self._places.get(key)
        if place is None:
            return None
        data = os.pread(self._descriptor(place.path), place.size, place.offset)
        found = isal_zlib.crc32(data)
        if found != place.crc32:
            raise ValueError(
                f"{place.path}: the features at offset {place.offset} are damaged (crc32 {found:08x} instead of "
                f"{place.crc32:08x}): delete that file, they are computed again"
            )
        about = _metadata(data)
        if about["index"] != str(index):
            raise ValueError(
                f"{place.path}: features of sample {about['index']} under the key of sample {index}: delete "
                f"{self.folder}, they are computed again"
            )
        tensors = safetensors.torch.load(data)
        frame = (int(about["height"]), int(about["width"]))
        return View(frame, StoredFeatures(tensors["values"], tensors.get("scales")))

    def put(self, key: int, index: int, frame: tuple[int, int], features: StoredFeatures) -> None:
        """Store the features of a view; known ones are not written again.

        Raises:
            OSError: they cannot be written (the disk is full, say). The files stay whole.
        """
        if self.folder is None or key in self._places:
            return
        tensors = {"values": features.values.cpu()}
        if features.scales is not None:
            tensors["scales"] = features.scales.cpu()
        about = {"index": str(index), "height": str(frame[0]), "width": str(frame[1])}
        data = safetensors.torch.save(tensors, about)
        info = tarfile.TarInfo(f"{key:016x}.safetensors")
        info.size, info.uname = len(data), f"{_CRC}{isal_zlib.crc32(data):08x}"
        member = info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % _BLOCK)
        with self._lock:
            path, length = self._file_for(len(member))
            _append(path, member, length)
            self._writing = (path, length + len(member))
            self._places[key] = _Place(path, length + _BLOCK, len(data), isal_zlib.crc32(data))

    def close(self) -> None:
        """Close the files. A later call opens them again."""
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _describe(self) -> None:
        """Write down, for people and for `others`, what this cache is of."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path, text = self.folder / "identity.json", _json(self._identity)
        if not path.exists():
            temporary = path.with_name(f".{uuid.uuid4().hex}")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        if path.read_text(encoding="utf-8") != text:
            raise ValueError(f"{path} is not what this cache is of: {text}; delete {self.folder}")

    def _look(self) -> None:
        """Learn of entries that this or another process has written since the last look."""
        if self.folder is None:
            return
        with self._lock:
            for path in sorted(self.folder.glob("*.tar")):
                size, offset = path.stat().st_size, self._scanned.get(path, 0)
                while offset + _BLOCK <= size:
                    info, key, crc = self._header(path, offset)
                    end = offset + _BLOCK + -(-info.size // _BLOCK) * _BLOCK
                    if end > size:  # still being written, or never finished
                        break
                    self._places.setdefault(key, _Place(path, offset + _BLOCK, info.size, crc))
                    offset = end
                self._scanned[path] = offset

    def _header(self, path: Path, offset: int) -> tuple[tarfile.TarInfo, int, int]:
        """(header, key, crc32) of the member at an offset."""
        data = os.pread(self._descriptor(path), _BLOCK, offset)
        try:
            info = tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
            return info, int(info.name.partition(".")[0], 16), int(info.uname.removeprefix(_CRC), 16)
        except (tarfile.HeaderError, ValueError) as error:
            raise ValueError(
                f"{path}: no entry begins at offset {offset} ({error}): delete that file, they are computed again"
            ) from error

    def _descriptor(self, path: Path) -> int:
        descriptor = self._open.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            other = self._open.setdefault(path, descriptor)  # two threads may come here at once
            if other != descriptor:
                os.close(descriptor)
            descriptor = other
        return descriptor

    def _file_for(self, size: int) -> tuple[Path, int]:
        """The file that the next entry of `size` bytes goes into, and its length."""
        if self._writing is None or self._writing[1] + size > _FILE_BYTES:
            assert self.folder is not None
            self._writing = (self.folder / f"{uuid.uuid4().hex}.tar", 0)
        return self._writing


def _append(path: Path, member: bytes, length: int) -> None:
    """Add a member to a tar of `length` bytes, whole or not at all."""
    left = memoryview(member)
    with path.open("ab", buffering=0) as file:
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.truncate(path, length)
            raise


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file (its header is JSON, preceded by its length in 8 bytes)."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])


def _json(identity: Mapping[str, str]) -> str:
    return json.dumps(identity, indent=2, sort_keys=True)
