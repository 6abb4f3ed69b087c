"""A shard: pictures of images and their labels in a tar.

A shard holds the pixels that the labels fit: a picture that its EXIF data turns is stored upright.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from visft_ds.data.decode import decode_image
from visft_ds.data.fetch import sha256_of
from visft_ds.files import image_frame, open_image, read_bands, read_bytes, reading, writing
from visft_ds.shards.bands import Statistics, tiff_of
from visft_ds.shards.coco import SourceImage
from visft_ds.shards.common import Json
from visft_ds.shards.depth import depth_of
from visft_ds.shards.options import Options
from visft_ds.shards.panoptic import panoptic_of

MAX_IMAGE_BYTES = 1 << 30  #: of a picture file
#: Pillow's formats -> suffixes in a shard; of others the name is the suffix.
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
_TURNED = "picture stored upright, as EXIF says and its annotations fit"
_ASSUMED = "picture stored upright by EXIF; its size cannot tell (--exif ignore: store it without rotation)"
_TRANSPARENT = "picture with transparency, which is dropped: the colours under it are seen"
_AS_STORED = "EXIF rotation not applied: the annotations fit the picture as stored"


def sample_size(*files: int) -> int:
    """Bytes in a shard of files of so many: each has a header, and whole blocks."""
    return sum(tarfile.BLOCKSIZE + _rounded_up(size, tarfile.BLOCKSIZE) for size in files)


def shard_size(samples: int) -> int:
    """Bytes of a shard whose samples have so many."""
    return _rounded_up(samples + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE)  # two empty blocks end it


def _rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def write_shard(
    path: Path,
    images: Sequence[SourceImage],
    options: Options,
    progress: Callable[[int], None],
) -> Json:
    """Write a shard whole or not at all; returns its record."""
    rows = list[list[int]]()
    left_out = list[tuple[str, str]]()
    odd = list[tuple[str, str]]()
    farthest = 0.0
    statistics = None if options.form is None else Statistics(options.form)
    with writing(path) as file:
        for image in images:
            progress(1)
            try:
                maps, depth = _maps_of(image, options)
                label = image.label(**maps)
                if statistics is None:
                    suffix, data, kinds = _picture(image, options)
                else:
                    suffix, data, kinds = _bands(image, options, statistics)
            except ValueError as error:
                reason = str(error).removeprefix(f"{options.images / image.file_name}: ")
                left_out.append((image.file_name, reason))
                continue
            farthest = max(farthest, depth)
            odd += [(kind, image.file_name) for kind in kinds]
            key = f"{image.image_id:012d}"
            row = _add_member(file, f"{key}.{suffix}", data)
            row += _add_member(file, f"{key}.json", label)
            row += [image.width, image.height, image.image_id, image.trainable, len(image.captions), 0]
            rows.append(row)  # the columns of INDEX_DTYPE behind the shard
        # two empty blocks end an archive, and padding as other tar programs write it
        file.write(bytes(2 * tarfile.BLOCKSIZE))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))
    return {
        "name": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "rows": rows,
        "left_out": left_out,
        "odd": odd,
        "farthest": farthest,
        "bands": None if statistics is None else statistics.record(),
    }


def _maps_of(image: SourceImage, options: Options) -> tuple[Json, float]:
    """The maps of an image as its label has them, and how far its depths reach, 0 if it has none in metres.

    Raises ValueError for a map that cannot be used.
    """
    maps = Json()
    farthest = 0.0
    if options.depth is not None and "depth" in image.maps:
        maps["depth"], farthest = depth_of(image, options.depth)
    if "panoptic" in image.maps:
        maps["panoptic"] = panoptic_of(image)
    return maps, farthest


def _add_member(tar: BinaryIO, name: str, data: bytes) -> list[int]:
    """Append a file to a tar; returns offset, size and crc32 of its content.

    `tarfile.TarFile.addfile` writes the same bytes more slowly, and copies them.
    """
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.write(member.tobuf(tarfile.USTAR_FORMAT))
    offset = tar.tell()
    tar.write(data)
    tar.write(bytes(-len(data) % tarfile.BLOCKSIZE))
    return [offset, len(data), crc32(data)]


def _picture(image: SourceImage, options: Options) -> tuple[str, bytes, list[str]]:
    """(suffix, bytes in the shard, what was odd) of an image file. Raises ValueError for one that cannot be
    used.
    """
    data = read_bytes(options.images / image.file_name, MAX_IMAGE_BYTES)
    frame = image_frame(data, "unreadable")
    if frame.beyond:
        raise ValueError(f"more than the three colours of 8 bits of most pictures: {frame.beyond}")
    odd = [_TRANSPARENT] if frame.transparent else []
    stored = (frame.height, frame.width)
    labelled = (image.height, image.width)
    turn = frame.orientation > 1 and options.exif != "ignore"
    if turn and options.exif is None:
        # the sizes in a COCO file tell, unless both fit; those of other layouts were read from the pictures
        from_file = isinstance(options.instances, Path)
        tells = options.instances is None or (from_file and stored != frame.upright)
        turn = stored != labelled or labelled == frame.upright
        if not turn:
            odd.append(_AS_STORED)
        elif tells:
            odd.append(_TURNED)
        else:
            odd.append(_ASSUMED)
    height, width = frame.upright if turn else stored
    _check_size(image, height, width)
    if turn:
        return *_upright(data, frame.format), odd
    with reading("unreadable", "a picture"):
        decode_image(data)  # as training will
    return _SUFFIXES.get(frame.format, frame.format.lower()), data, odd


def _check_size(image: SourceImage, height: int, width: int) -> None:
    """Raise ValueError for a picture of another size than its annotations say."""
    if (height, width) != (image.height, image.width):
        raise ValueError(
            f"another size: {width} x {height}, the annotations say {image.width} x {image.height}"
        )


def _bands(image: SourceImage, options: Options, statistics: Statistics) -> tuple[str, bytes, list[str]]:
    """The same of a picture of bands, whose values are counted."""
    data = read_bytes(options.images / image.file_name, MAX_IMAGE_BYTES)
    with reading("unreadable", "a picture of bands"):
        values = read_bands(data)
    _check_size(image, *values.shape[:2])
    values = statistics.form.chosen(values)
    return "tif", tiff_of(values), statistics.add(values)


def _upright(data: bytes, kind: str) -> tuple[str, bytes]:
    """(suffix, bytes) of a picture turned as its EXIF data says: JPEG stays JPEG, others become PNG."""
    file = io.BytesIO()
    picture = open_image(data, "unreadable")
    if kind in ("JPEG", "MPO"):
        picture.save(file, "JPEG", quality=95, subsampling=0)
        return "jpg", file.getvalue()
    picture.save(file, "PNG")
    return "png", file.getvalue()
