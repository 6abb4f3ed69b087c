"""Writing one shard: every image is decoded as a check, then stored with its labels in a tar with reproducible bytes.

A shard is written under a temporary name in a work folder, brought to the disk and only then renamed. A record says
what it was made from, so that a later build can tell whether it still fits.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from PIL import Image

from visft_ds.conversion.source import SourceImage
from visft_ds.conversion.verify import file_sha256
from visft_ds.data.decode import decode_image, image_format
from visft_ds.data.manifest import INDEX_DTYPE, VERSION

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar archives are padded to a multiple of this
_ORIENTATION = 0x0112  # the EXIF tag
_COLUMNS = [name for name in INDEX_DTYPE.names or () if name != "shard"]


@dataclass(frozen=True)
class Planned:
    """One sample of a shard to be: where its image is, and how large and how old the file is."""

    image: SourceImage
    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Checked:
    """The verdict on an image file."""

    extension: str = "jpg"
    reason: str | None = None  #: why it is quarantined
    detail: str = ""
    findings: tuple[str, ...] = ()


def write_shard(
    target: Path,
    work: Path,
    samples: Sequence[Planned],
    labels: Sequence[bytes],
    *,
    after_image: Callable[[int, dict[str, Any] | None], None],
) -> dict[str, Any]:
    """Write a shard and its record.

    Args:
        target: the final name.
        work: folder on the same file system for temporary files and records.
        samples, labels: what belongs into it, in order.
        after_image: called with the bytes of each image and, if it is unusable, why; may raise to stop.

    Returns:
        The record: key, name, count, bytes, sha256, index rows, quarantined images, findings as (kind, example).
    """
    temporary = work / f"{target.name}.tmp"
    rows: list[list[int]] = []
    quarantine: list[dict[str, Any]] = []
    findings: list[tuple[str, str]] = []
    try:
        with open(temporary, "wb") as file:
            tar = TarWriter(file)
            for sample, label in zip(samples, labels, strict=True):
                data = _read_image(sample)
                checked = check_image(data, sample.image)
                findings += [(kind, f"image {sample.image.image_id}") for kind in checked.findings]
                bad = None
                if checked.reason is None:
                    rows.append(_add_sample(tar, sample.image, checked.extension, data, label))
                else:
                    bad = quarantined(sample.image, checked.reason, checked.detail)
                    quarantine.append(bad)
                after_image(len(data), bad)
            tar.close()
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    record = {
        "key": _shard_key(samples, labels),
        "name": target.name,
        "count": len(rows),
        "bytes": tar.offset,
        "sha256": tar.digest.hexdigest(),
        "rows": rows,
        "quarantine": quarantine,
        "findings": findings,
    }
    write_atomically(_record_path(target, work), orjson.dumps(record), work)
    return record


def finished_shard(
    target: Path, work: Path, samples: Sequence[Planned], labels: Sequence[bytes]
) -> dict[str, Any] | None:
    """The record of a shard that is complete and made from the same input, else None."""
    path = _record_path(target, work)
    if not path.is_file() or not target.is_file():
        return None
    record: dict[str, Any] = orjson.loads(path.read_bytes())
    if record["key"] != _shard_key(samples, labels) or target.stat().st_size != record["bytes"]:
        return None
    return record if file_sha256(target) == record["sha256"] else None


def sample_bytes(image_size: int, label_size: int) -> int:
    """How much room a sample takes in a tar."""
    return sum(_BLOCK + length + -length % _BLOCK for length in (image_size, label_size))


def tar_bytes(samples: int) -> int:
    """Size of a tar whose samples take this much room."""
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
        """Two empty blocks end an archive; padding as other tar programs write it."""
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self.offset % _RECORD))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)


def check_image(data: bytes, image: SourceImage) -> Checked:
    """Judge an image file by decoding all of it, with the decoder that training uses."""
    try:
        extension = image_format(data)
        pixels = decode_image(data)
    except ValueError as error:
        return Checked(reason="unreadable", detail=str(error))
    height, width = pixels.shape[:2]
    mode, orientation = _header(data)
    if (height, width) != (image.height, image.width):
        rotated = orientation >= 5 and (width, height) == (image.height, image.width)
        hint = "; it fits after EXIF rotation: store the picture upright" if rotated else ""
        detail = f"the file has {width} x {height} pixels, the JSON says {image.width} x {image.height}{hint}"
        return Checked(extension, "size differs", detail)
    found = []
    if orientation != 1:
        found.append("EXIF rotation")
    if mode in ("1", "L", "LA"):
        found.append("grey image")
    if mode == "CMYK":
        found.append("CMYK image")
    if extension == "png" and not image.file_name.lower().endswith(".png"):
        found.append("PNG named otherwise")
    return Checked(extension, findings=tuple(found))


def _header(data: bytes) -> tuple[str, int]:
    """(Pillow's mode, EXIF orientation or 1) of a file that could be decoded."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        try:
            return image.mode, int(image.getexif().get(_ORIENTATION, 1))
        except (OSError, SyntaxError, ValueError, TypeError, struct.error):
            return image.mode, 1  # damaged EXIF data says nothing about the orientation


def _read_image(sample: Planned) -> bytes:
    data = sample.path.read_bytes()
    if len(data) != sample.size:
        raise RuntimeError(f"{sample.path} changed while the shards were built; run the build again")
    return data


def _add_sample(tar: TarWriter, image: SourceImage, extension: str, data: bytes, label: bytes) -> list[int]:
    """Append both members; returns the index row without its shard."""
    key = f"{image.image_id:012d}"
    row = {
        "image_offset": tar.add(f"{key}.{extension}", data),
        "image_size": len(data),
        "image_crc32": zlib.crc32(data),
        "label_offset": tar.add(f"{key}.json", label),
        "label_size": len(label),
        "label_crc32": zlib.crc32(label),
        "width": image.width,
        "height": image.height,
        "image_id": image.image_id,
        "num_annotations": image.trainable(),
        "num_captions": len(image.captions),
    }
    return [row[column] for column in _COLUMNS]


def quarantined(image: SourceImage, reason: str, detail: str) -> dict[str, Any]:
    """An entry of the quarantine list."""
    return {"image_id": image.image_id, "file_name": image.file_name, "reason": reason, "detail": detail}


def _shard_key(samples: Sequence[Planned], labels: Sequence[bytes]) -> str:
    """Identity of everything that goes into a shard; the modification time stands for the pixels."""
    files = [(sample.image.image_id, sample.image.file_name, sample.size, sample.mtime_ns) for sample in samples]
    digest = hashlib.sha256(orjson.dumps([VERSION, files]))
    for label in labels:
        digest.update(hashlib.sha256(label).digest())
    return digest.hexdigest()


def _record_path(target: Path, work: Path) -> Path:
    return work / f"{target.name}.json"


def write_atomically(path: Path, data: bytes, work: Path) -> None:
    """Write a file so that, whenever the process dies, `path` holds either all of it or what it held before."""
    temporary = work / f"{path.name}.tmp"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
