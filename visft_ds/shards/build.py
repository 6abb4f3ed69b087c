"""COCO -> shards: the same input gives the same bytes, and a build that was killed goes on with the missing
shards.

Samples are assigned to shards first, from the sizes of the image files. A shard gets its final name when it
is whole and on disk; its record in the hidden folder `.SPLIT.build` follows, the manifest comes last.

Shards hold the pixels that the labels fit: a picture that its EXIF data turns is stored upright.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import sys
import tarfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import orjson
from filelock import FileLock, Timeout
from tqdm import tqdm

from visft_ds.data.decode import decode_image
from visft_ds.data.fetch import sha256_of
from visft_ds.data.shards import (
    INDEX_DTYPE,
    SIDE_QUANTILES,
    VERSION,
    Manifest,
    ShardFile,
    fingerprint,
    manifest_path,
    tar_name,
)
from visft_ds.files import (
    image_frame,
    open_image,
    read_bytes,
    reading,
    remove_unfinished,
    write_bytes,
    writing,
    wrong_name,
)
from visft_ds.shards.coco import CocoFile, CocoSource, Findings, SourceImage, read_coco
from visft_ds.shards.yolo import Exif
from visft_ds.tasks.vocabulary import TOKENIZER, caption_words

_BLOCK = tarfile.BLOCKSIZE
_MOST_OF_A_PICTURE = 1 << 30  # bytes
#: Pillow's formats -> suffixes in a shard; of others the name is the suffix.
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")  # pathlib makes one slash of two
_LOCK = "lock"  #: file in the folder of a build's state
_NOWHERE = "class that no image has"
_COUNTED = {"annotations": "objects", "crowds": "crowds", "trainable": "trainable"}
_TURNED = "picture stored upright, as EXIF says and its annotations fit"
_ASSUMED = "picture stored upright by EXIF; its size cannot tell (--exif ignore: store it without rotation)"
_AS_STORED = "EXIF rotation not applied: the annotations fit the picture as stored"


@dataclass(frozen=True)
class Options:
    """Files and settings of a build."""

    images: Path
    instances: CocoFile | None
    captions: CocoFile | None
    out: Path
    split: str
    ids: Path | None = None  #: file of image ids or names, one a line: only these
    max_size: int = 256_000_000  #: bytes of a shard
    limit: int | None = None  #: only the first so many images of the order
    seed: int = 0  #: of the order
    exif: Exif = None
    masks_from_boxes: bool = False  #: an object without a mask gets the ellipse in its box
    maps: CocoFile | None = None  #: label maps instead of instances

    def __post_init__(self) -> None:
        if _ADDRESS.match(str(self.out)):
            address = str(self.out).replace(":/", "://", 1)
            remedy = "shards are built in a local folder; copy its files to the address afterwards"
            raise ValueError(f"--out {address}: {remedy}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")
        if not self.split or not all(sign.isalnum() or sign in "-_" for sign in self.split):
            raise ValueError(f"split name {self.split!r}: only letters, digits, '-' and '_' are allowed")
        if (self.limit is not None and self.limit < 1) or not 0 <= self.seed < 1 << 63:
            raise ValueError(
                f"limit {self.limit}, seed {self.seed}: a limit from 1 and a seed from 0 are allowed"
            )
        if self.instances is self.maps is self.captions is None:
            raise ValueError("there are no labels: give --instances, --captions or both")
        if not self.images.is_dir():
            raise ValueError(f"the images folder {self.images} does not exist")

    def content(self) -> dict[str, Any]:
        """Settings that determine the bytes beside the files, for the manifest."""
        names = ("max_size", "limit", "seed", "exif", "masks_from_boxes")
        return {name: getattr(self, name) for name in names} | {"tokenizer": TOKENIZER}


def build(options: Options, *, workers: int = 1, dry_run: bool = False, replace: bool = False) -> Manifest:
    """Make the shards, index and manifest of a split; go on with what an earlier, interrupted build has
    finished.

    The result does not depend on `workers` (threads). `dry_run` plans from the JSON files and the sizes of
    the images, and writes nothing; the manifest is a forecast. `replace` deletes a split of this name that
    was built otherwise.

    Raises:
        ValueError: unusable input, more than a tenth of the images among it; another split of this name;
        another build
            of it that is running.
        OSError: writing failed; shards that are finished are kept.
    """
    source, chosen, left_out, plan = _plan(options)
    records = list[dict[str, Any]]()
    with nullcontext() if dry_run else _alone(options):
        if not dry_run:
            _claim(
                options,
                {"version": VERSION, **options.content(), "sources": source.files},
                len(plan),
                replace,
            )
            records = _write_all(options, plan, workers)
        left_out += [(name, reason) for record in records for name, reason in record["left_out"]]
        reasons(left_out).refuse_above_a_tenth(len(chosen), options.images, "images")
        for record in records:
            for kind, name in record["odd"]:
                source.findings.add(kind, name)
        index = np.array(
            [(n, *row) for n, record in enumerate(records) for row in record["rows"]], dtype=INDEX_DTYPE
        )
        file, there = io.BytesIO(), set(index["image_id"].tolist())
        np.save(file, index, allow_pickle=False)
        images = [image for image in chosen if image.stamp != -1 and (dry_run or image.image_id in there)]
        counted = (
            _COUNTED if options.maps is None else {"regions": "trainable"}
        )  # no objects, which other tasks learn
        having = Counter(number for image in images for number in image.classes)
        for category in source.categories:
            if not having[category.coco_id]:
                source.findings.add(_NOWHERE, category.name)
        shards = [ShardFile(one["name"], len(one["rows"]), one["bytes"], one["sha256"]) for one in records]
        manifest = Manifest(
            root=options.out,
            split=options.split,
            categories=source.categories,
            counts={
                "images": len(images),
                **{kind: sum(getattr(image, name) for image in images) for kind, name in counted.items()},
                "captions": sum(len(image.captions) for image in images),
                "empty": sum(not image.objects and not image.captions for image in images),
                "left_out": len(left_out),
            },
            having_category={
                str(category.coco_id): having[category.coco_id] for category in source.categories
            },
            object_sides={} if options.maps is not None else _quantiles([image.sides for image in images]),
            shards=tuple(
                shards or [ShardFile("", len(part), sum(image.size for image in part), "") for part in plan]
            ),
            vocabulary=Counter(
                word for image in images for text in image.captions for word in caption_words(text)
            ),
            left_out=left_out,
            findings=source.findings,
            options=options.content(),
            sources=source.files,
            fingerprint=fingerprint(source.categories, index),
            index_sha256=hashlib.sha256(file.getvalue()).hexdigest(),
        )
        if not dry_run:
            manifest.save(file.getvalue())
        return manifest


def _quantiles(sides: Sequence[Sequence[float]]) -> dict[str, float]:
    """`Manifest.object_sides` of the sides of each image's objects."""
    every = np.concatenate([np.empty(0, np.float32), *sides])
    if not len(every):
        return {}
    return {str(percent): round(float(np.quantile(every, percent / 100)), 5) for percent in SIDE_QUANTILES}


def _plan(
    options: Options,
) -> tuple[CocoSource, list[SourceImage], list[tuple[str, str]], list[list[SourceImage]]]:
    """(the data set, images of the split, (name, reason) of those without a file, images of each shard)."""
    source = read_coco(
        options.instances, options.captions, options.ids, options.masks_from_boxes, options.maps
    )
    key = np.array([options.seed, 1], dtype=np.uint64)  # raw words stay the same over numpy's versions
    order = np.argsort(np.random.Philox(key=key).random_raw(len(source.images)), kind="stable")
    chosen = [source.images[place] for place in order[: options.limit].tolist()]
    left_out = list[tuple[str, str]]()
    for image in chosen:
        path = options.images / image.file_name
        if reason := wrong_name(image.file_name):
            left_out.append((image.file_name, f"name not allowed: {reason}"))
        elif not os.path.isfile(path):
            left_out.append((image.file_name, "no such file in the images folder"))
        else:
            image.size, image.stamp = path.stat().st_size, path.stat().st_mtime_ns
    reasons(left_out).refuse_above_a_tenth(len(chosen), options.images, "images")
    return source, chosen, left_out, _cut([image for image in chosen if image.stamp != -1], options)


def _work_folder(options: Options) -> Path:
    """Folder for the state of a build."""
    return options.out / f".{options.split}.build"


@contextmanager
def _alone(options: Options) -> Iterator[None]:
    """Lock a split while it is built. Raises ValueError if another build holds the lock."""
    work = _work_folder(options)
    work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        remedy = "wait until it has finished, or use another --out"
        raise ValueError(f"another build is making {options.split!r} in {options.out}: {remedy}") from error
    except NotImplementedError:
        text = f"warning: {options.out} does not support locks: run one build at a time there"
        print(text, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        lock.release()


def reasons(left_out: Sequence[Sequence[str]]) -> Findings:
    """Reasons why images are left out: reason -> how many, the first few."""
    found = Findings()
    for name, reason in left_out:
        kind, _, detail = reason.partition(": ")
        found.add(kind, name + (f" ({detail.rpartition(': ')[2]})" if detail else ""))
    return found


def _cut(images: Sequence[SourceImage], options: Options) -> list[list[SourceImage]]:
    """Fill shards in order up to the limit; a sample larger than that gets a shard of its own."""
    shards: list[list[SourceImage]] = []
    used = 0
    for image in images:
        size = sum(_BLOCK + length + -length % _BLOCK for length in (image.size, len(image.label())))
        if (
            not shards
            or -(-(used + size + 2 * _BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE > options.max_size
        ):
            shards.append([])
            used = 0
        shards[-1].append(image)
        used += size
    return shards


def _claim(options: Options, wanted: dict[str, Any], planned: int, replace: bool) -> None:
    """Bind the output to these options and files, so that two builds never mix.

    Shards of other options or files go with `replace` alone, unless they are of a build of ours that was not
    finished.
    """
    work = _work_folder(options)
    shards = sorted(options.out.glob(f"{options.split}-{'[0-9]' * 6}.tar"))
    same = _record(work / "options.json") == wanted
    unfinished = (work / "options.json").exists() and not manifest_path(options.out, options.split).exists()
    if shards and not same and not unfinished and not replace:
        there = f"{options.out} holds a split {options.split!r} of other files or options"
        raise ValueError(f"{there}: use another --out, or --replace")
    manifest_path(options.out, options.split).unlink(missing_ok=True)  # before what it describes is half gone
    if same:
        left_over = [path for path in shards if path.name >= tar_name(options.split, planned)]
    else:
        left_over = [*shards, *work.glob("*")]
    for path in left_over:
        if path.name != _LOCK:
            path.unlink()
    remove_unfinished(options.out, f"{options.split}-{'[0-9]' * 6}.tar")
    remove_unfinished(work)
    write_bytes(work / "options.json", orjson.dumps(wanted))


def _record(path: Path) -> Any:
    try:
        return orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):  # damaged: it proves nothing
        return None


def _write_all(options: Options, plan: list[list[SourceImage]], workers: int) -> list[dict[str, Any]]:
    """The records of all shards; those that an earlier build has finished from the same images are kept."""
    work, stopped = _work_folder(options), threading.Event()
    bar = tqdm(desc=options.split, total=sum(map(len, plan)), unit=" images", disable=None)

    def count(number: int) -> None:
        if stopped.is_set():
            raise RuntimeError("the build was stopped")
        bar.update(number)

    def write(number: int) -> dict[str, Any]:
        shard, record, images = (
            options.out / tar_name(options.split, number),
            work / f"{number}.json",
            plan[number],
        )
        found, key = _record(record), hashlib.sha256()
        for image in images:  # the time of change stands for the pixels
            key.update(b"%d %d %b" % (image.size, image.stamp, image.label()))
        same = found is not None and found["key"] == key.hexdigest()
        if same and shard.is_file() and sha256_of(shard) == found["sha256"]:
            count(len(images))
            return dict(found)
        made = _write(shard, images, options, count) | {"key": key.hexdigest()}
        write_bytes(record, orjson.dumps(made))
        return made

    with bar, warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # of damaged metadata; set here, as threads share it
        try:
            return list(pool.map(write, range(len(plan))))
        finally:
            stopped.set()


def _write(
    shard: Path,
    images: Sequence[SourceImage],
    options: Options,
    count: Callable[[int], None],
) -> dict[str, Any]:
    """Write a shard whole or not at all; returns its record."""
    rows, left_out, odd = list[list[int]](), list[tuple[str, str]](), list[tuple[str, str]]()
    with writing(shard) as file:
        tar = TarWriter(file)
        for image in images:
            count(1)
            try:
                suffix, data, kinds = _picture(image, options)
            except ValueError as error:
                left_out.append(
                    (image.file_name, str(error).removeprefix(f"{options.images / image.file_name}: "))
                )
            else:
                row, key = list[int](), f"{image.image_id:012d}"
                for name, part in ((f"{key}.{suffix}", data), (f"{key}.json", image.label())):
                    row += tar.add(name, part), len(part), crc32(part)
                row += image.width, image.height, image.image_id, image.trainable, len(image.captions)
                rows.append(row)  # the columns of INDEX_DTYPE behind the shard
                odd += [(kind, image.file_name) for kind in kinds]
        tar.close()
    facts = {"name": shard.name, "bytes": tar.offset, "sha256": tar.digest.hexdigest()}
    return facts | {"rows": rows, "left_out": left_out, "odd": odd}


def _picture(image: SourceImage, options: Options) -> tuple[str, bytes, list[str]]:
    """(suffix, bytes in the shard, what was odd) of an image file. Raises ValueError for one that cannot be
    used.
    """
    data = read_bytes(options.images / image.file_name, _MOST_OF_A_PICTURE)
    frame = image_frame(data, "unreadable")
    odd = list(frame.notes)
    stored, labelled = (frame.height, frame.width), (image.height, image.width)
    turn = frame.orientation > 1 and options.exif != "ignore"
    if turn and options.exif is None:
        turn = stored != labelled or labelled == frame.upright
        told = options.instances is None or (isinstance(options.instances, Path) and stored != frame.upright)
        if not turn:
            odd.append(_AS_STORED)
        else:
            odd.append(_TURNED if told else _ASSUMED)
    height, width = frame.upright if turn else stored
    if (height, width) != labelled:
        raise ValueError(
            f"another size: {width} x {height}, the annotations say {image.width} x {image.height}"
        )
    if not turn:
        with reading("unreadable", "a picture"):
            decode_image(data)  # as training will
        return _SUFFIXES.get(frame.format, frame.format.lower()), data, odd
    upright, jpeg = io.BytesIO(), frame.format in ("JPEG", "MPO")
    open_image(data, "unreadable", quiet=True).save(
        upright, "JPEG" if jpeg else "PNG", quality=95, subsampling=0
    )
    return "jpg" if jpeg else "png", upright.getvalue(), odd


class TarWriter:
    """A USTAR archive whose bytes depend on nothing but its members."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.offset, self.digest = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its payload."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._put(info.tobuf(tarfile.USTAR_FORMAT))
        place = self.offset
        self._put(data + bytes(-len(data) % _BLOCK))
        return place

    def close(self) -> None:
        """Two empty blocks end an archive, and padding as other tar programs write it."""
        self._put(bytes(2 * _BLOCK))
        self._put(bytes(-self.offset % tarfile.RECORDSIZE))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.offset += len(data)
