"""Writing one shard: every image is checked, then stored with its labels in a tar with reproducible bytes.

A shard is written under a temporary name in a work folder, flushed to disk and only then renamed. A record identifies
its input, so that a later build can tell whether it is still valid.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import orjson
from isal import isal_zlib
from pydantic import Field

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import Number, Whole, as_record
from visft_ds.data.decode import MAX_PIXELS
from visft_ds.data.shards import INDEX_DTYPE, VERSION
from visft_ds.shards.images import Checked, CheckLevel, check_image
from visft_ds.shards.inputs import ImageFolder
from visft_ds.shards.outputs import Output
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.source import SourceImage

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar archives are padded to a multiple of this
Refusal = Callable[[dict[str, Any]], None]
_COLUMNS = [name for name in INDEX_DTYPE.names or () if name != "shard"]


class LeftOut(StrictModel):
    """Image that is not among the samples."""

    image_id: Number
    file_name: str
    reason: str
    detail: str


class ShardRecord(StrictModel):
    """Record of a finished shard."""

    key: str
    name: str
    count: Whole
    bytes: Whole
    sha256: str
    rows: list[
        Annotated[
            list[Annotated[int, Field(ge=0, lt=1 << 64)]], Field(min_length=len(_COLUMNS), max_length=len(_COLUMNS))
        ]
    ]
    quarantine: list[LeftOut]
    findings: list[tuple[str, str]]  #: kind, example


@dataclass(frozen=True, slots=True)
class Planned:
    """A sample planned for a shard, with the size in bytes and the version stamp of its image file."""

    image: SourceImage
    size: int
    stamp: str


@dataclass(frozen=True)
class Treatment:
    """Processing of an image file between the folder and the shard: check, and re-encoding if it is asked for."""

    images: ImageFolder
    level: CheckLevel = "decode"
    reencoding: Reencoding | None = None
    max_pixels: int = MAX_PIXELS

    def prepare(self, sample: Planned) -> Prepared:
        """Read, check and, if it is asked for, re-encode an image.

        Raises RuntimeError if it cannot be read or is no longer what was planned.
        """
        data = self.images.read(sample.image.file_name)
        if len(data) != sample.size:
            raise RuntimeError(f"{sample.image.file_name} changed while the shards were built; run the build again")
        convert = self.reencoding is not None
        checked = check_image(data, sample.image, self.level, convert=convert, max_pixels=self.max_pixels)
        if checked.reason is not None:
            return Prepared(sample, checked, b"")
        if self.reencoding is None:
            return Prepared(sample, checked, data)
        return Prepared(sample, replace(checked, extension="jpg"), self.reencoding.encode(data))


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that is ready for its shard."""

    sample: Planned
    checked: Checked
    stored: bytes  #: the file that goes into the shard; empty if it is unusable


def write_shard(
    name: str, output: Output, samples: Sequence[Planned], prepared: Iterable[Prepared], refuse: Refusal
) -> dict[str, Any]:
    """Write a shard and its record.

    Args:
        name: the final name.
        output: where it goes.
        samples: its samples, in order.
        prepared: the same, made ready.
        refuse: called with the quarantine entry of an unusable image; may raise to stop.

    Returns:
        The record: key, name, count, bytes, sha256, index rows, quarantined images, findings as (kind, example).
    """
    temporary = output.scratch / f"{name}.tmp"
    rows: list[list[int]] = []
    quarantine: list[dict[str, Any]] = []
    findings: list[tuple[str, str]] = []
    try:
        with open(temporary, "wb") as file:
            tar = TarWriter(file)
            for sample in prepared:
                image, checked = sample.sample.image, sample.checked
                findings += [(kind, f"image {image.image_id}") for kind in checked.findings]
                if checked.reason is None:
                    rows.append(_add_sample(tar, image, checked, sample.stored))
                else:
                    quarantine.append(quarantined(image, checked.reason, checked.detail))
                    refuse(quarantine[-1])
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        output.finish(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)
    record = {
        "key": _shard_key(samples),
        "name": name,
        "count": len(rows),
        "bytes": tar.offset,
        "sha256": tar.digest.hexdigest(),
        "rows": rows,
        "quarantine": quarantine,
        "findings": findings,
    }
    output.write(_record_name(name, output), orjson.dumps(record))
    return record


def finished_shard(name: str, output: Output, samples: Sequence[Planned]) -> dict[str, Any] | None:
    """The record of a shard that is complete and made from the same input, else None."""
    data = output.read(_record_name(name, output))
    if data is None:
        return None
    try:
        record = as_record(data, ShardRecord, name)
    except ValueError:  # damaged: it proves nothing
        return None
    fits = record.key == _shard_key(samples) and output.holds(name, record.bytes, record.sha256)
    return record.model_dump() if fits else None


def sample_bytes(image_size: int, label_size: int) -> int:
    """Bytes of a sample in a tar, from the bytes of its image and label: headers and padding are added."""
    return sum(_BLOCK + length + -length % _BLOCK for length in (image_size, label_size))


def tar_bytes(samples: int) -> int:
    """Bytes of a tar whose samples take this many, see `sample_bytes`: end of the archive and padding are added."""
    return -(-(samples + 2 * _BLOCK) // _RECORD) * _RECORD


class TarWriter:
    """A USTAR archive whose bytes depend on nothing but its members."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file
        self.offset = 0
        self.digest = hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its payload."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        place = self.offset
        self._put(data)
        self._put(bytes(-len(data) % _BLOCK))
        return place

    def close(self) -> None:
        """Write the two empty blocks that end an archive, and padding as other tar programs do."""
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self.offset % _RECORD))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def _add_sample(tar: TarWriter, image: SourceImage, checked: Checked, data: bytes) -> list[int]:
    """Append both members; returns the index row without its shard."""
    key = f"{image.image_id:012d}"
    row = {
        "image_offset": tar.add(f"{key}.{checked.extension}", data),
        "image_size": len(data),
        "image_crc32": isal_zlib.crc32(data),
        "label_offset": tar.add(f"{key}.json", image.label),
        "label_size": len(image.label),
        "label_crc32": isal_zlib.crc32(image.label),
        "width": image.width,
        "height": image.height,
        "image_id": image.image_id,
        "num_annotations": image.trainable,
        "num_captions": len(image.captions),
    }
    return [row[column] for column in _COLUMNS]


def quarantined(image: SourceImage, reason: str, detail: str) -> dict[str, Any]:
    """An entry of the quarantine list."""
    return {"image_id": image.image_id, "file_name": image.file_name, "reason": reason, "detail": detail}


def _shard_key(samples: Sequence[Planned]) -> str:
    """Identity of everything that goes into a shard; the modification time stands for the pixels."""
    files = [(sample.image.image_id, sample.image.file_name, sample.size, sample.stamp) for sample in samples]
    digest = hashlib.sha256(orjson.dumps([VERSION, files]))
    for sample in samples:
        digest.update(hashlib.sha256(sample.image.label).digest())
    return digest.hexdigest()


def _record_name(name: str, output: Output) -> str:
    return f"{output.work}/{name}.json"
