"""COCO -> shards: the same input gives the same bytes, and a build that was killed goes on with the missing
shards.

Samples are assigned to shards first, from the sizes of the image files. A shard gets its final name when it
is whole and on disk; its record in the hidden folder `.SPLIT.build` follows, the manifest comes last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
from filelock import FileLock, Timeout
from tqdm import tqdm

from visft_ds.data.fetch import sha256_of
from visft_ds.data.shards import (
    INDEX_DTYPE,
    SIDE_QUANTILES,
    VERSION,
    Manifest,
    ShardFile,
    manifest_path,
    tar_name,
)
from visft_ds.files import remove_unfinished, write_bytes, write_text, wrong_name
from visft_ds.shards.archive import sample_size, shard_size, write_shard
from visft_ds.shards.bands import bands_of, form_of
from visft_ds.shards.coco import CocoSource, SourceImage, name_as_here, read_coco
from visft_ds.shards.common import Findings, Json, SecondPicture
from visft_ds.shards.options import Options, state_folder
from visft_ds.tasks.vocabulary import caption_words

_LOCK = "lock"  #: file in the folder of a build's state
_HOLDER = "lock.holder"  #: file beside it that names the process


@dataclass
class _Plan:
    """Plan of what a build is going to write."""

    source: CocoSource
    images: Sequence[SourceImage]  #: of the split, in the order of their samples
    left_out: list[tuple[str, str]]  #: (name, reason) of those that are not used
    shards: Sequence[Sequence[SourceImage]]  #: images of each shard


def build(options: Options, *, workers: int = 1, dry_run: bool = False, replace: bool = False) -> Manifest:
    """Make the shards, index and manifest of a split; go on with what an earlier, interrupted build has
    finished.

    The result does not depend on `workers` (threads). `dry_run` plans from the JSON files and the sizes of
    the images, and writes nothing; the manifest is a forecast. `replace` deletes a split of this name that
    was built otherwise.

    Raises:
        ValueError: unusable input, more than a tenth of the images among it; another split of this name;
            another build of it that is running.
        OSError: writing failed; shards that are finished are kept.
    """
    plan = _plan(options)
    paths = [options.images / image.file_name for shard in plan.shards for image in shard]
    options = dataclasses.replace(options, form=form_of(paths, options.range, options.bands))
    if dry_run:
        return _manifest(options, plan, [], np.empty(0, INDEX_DTYPE))
    with alone(options.out, options.name):
        _claim(options, plan, replace)
        records = _write_all(options, plan, workers)
        for record in records:
            plan.left_out += [(name, reason) for name, reason in record["left_out"]]
            for kind, name in record["odd"]:
                plan.source.findings.add(kind, name)
        reasons(plan.left_out).refuse_above_a_tenth(len(plan.images), options.images, "images")
        index = np.array(
            [(number, *row) for number, record in enumerate(records) for row in record["rows"]], INDEX_DTYPE
        )
        manifest = _manifest(options, plan, records, index)
        manifest.save(index)
        return manifest


def _plan(options: Options) -> _Plan:
    source = read_coco(options, options.ids, options.masks_from_boxes)
    name_as_here(source, options.images)
    key = np.array([options.seed, 1], dtype=np.uint64)  # raw words stay the same over numpy's versions
    order = np.argsort(np.random.Philox(key=key).random_raw(len(source.images)), kind="stable")
    images = [source.images[position] for position in order[: options.limit].tolist()]
    usable = list[SourceImage]()
    left_out = list[tuple[str, str]]()
    for image in images:
        path = options.images / image.file_name
        problem = wrong_name(image.file_name)
        if problem is not None:
            left_out.append((image.file_name, f"name not allowed: {problem}"))
        elif not os.path.isfile(path):
            left_out.append((image.file_name, "no such file in the images folder"))
        else:
            status = path.stat()
            image.file_bytes = status.st_size
            image.modified = status.st_mtime_ns
            _find_second_pictures(image, options, source.findings)
            usable.append(image)
    reasons(left_out).refuse_above_a_tenth(len(images), options.images, "images")
    return _Plan(source, images, left_out, _cut(usable, options.max_size))


def _find_second_pictures(image: SourceImage, options: Options, findings: Findings) -> None:
    """Note the maps of an image; one without a map teaches other tasks only."""
    if options.depth is not None:
        path = options.depth.file_of(image.file_name)
        if path is None:
            findings.add("image without depth map (kept)", image.file_name)
        else:
            image.maps["depth"] = SecondPicture.at(path)
    if options.panoptic is not None:
        listed = options.panoptic.map_of(image.file_name)
        if listed is None:
            findings.add("image without panoptic map (kept)", image.file_name)
        else:
            image.maps["panoptic"] = SecondPicture.at(listed.file)
            image.segments = listed.segments


def _cut(images: Sequence[SourceImage], max_size: int) -> list[list[SourceImage]]:
    """Fill shards in order up to the limit; a sample larger than that gets a shard of its own."""
    shards = list[list[SourceImage]]()
    used = 0
    for image in images:
        label_bytes = len(image.label()) + len(orjson.dumps(image.segments))
        label_bytes += sum(picture.label_bytes() for picture in image.maps.values())
        size = sample_size(image.file_bytes, label_bytes)
        if not shards or shard_size(used + size) > max_size:
            shards.append([])
            used = 0
        shards[-1].append(image)
        used += size
    return shards


def _manifest(options: Options, plan: _Plan, records: Sequence[Json], index: npt.NDArray[Any]) -> Manifest:
    """The manifest of finished shards and their index, or a forecast without any."""
    source = plan.source
    shards = list[ShardFile]()
    for record in records:
        shards.append(ShardFile(record["name"], len(record["rows"]), record["bytes"], record["sha256"]))
    if records:
        written = set(index["image_id"].tolist())
        images = [image for image in plan.images if image.image_id in written]
    else:
        images = [image for shard in plan.shards for image in shard]
        for shard in plan.shards:
            shards.append(ShardFile("", len(shard), sum(image.file_bytes for image in shard), ""))
    having = Counter(number for image in images for number in image.classes)
    for category in source.categories:
        if not having[category.coco_id]:
            source.findings.add("class that no image has", category.name)
    panoptic = () if options.panoptic is None else options.panoptic.categories
    bands = None
    if options.form is not None and records:
        bands = bands_of(options.form, [record["bands"] for record in records])
    # Shards that an earlier release finished do not say it.
    farthest = max((record.get("farthest", 0.0) for record in records), default=0.0)
    return Manifest.made_of(
        index,
        root=options.out,
        split=options.name,
        categories=source.categories,
        counts={**_counts(images, options), "left_out": len(plan.left_out)},
        having_category={str(category.coco_id): having[category.coco_id] for category in source.categories},
        object_sides={} if options.maps is not None else quantiles([image.sides for image in images]),
        shards=tuple(shards),
        vocabulary=Counter(
            word for image in images for text in image.captions for word in caption_words(text)
        ),
        left_out=plan.left_out,
        findings=source.findings,
        options=options.content(),
        sources=source.files,
        bands=bands,
        panoptic=panoptic,
        farthest=farthest or None,
    )


def _counts(images: Sequence[SourceImage], options: Options) -> dict[str, int]:
    counts = {"images": len(images)}
    if options.division is not None and options.division.group is not None:
        counts["groups"] = len({options.division.group_of(image.file_name) for image in images})
    trainable = sum(image.trainable for image in images)
    if options.maps is not None:  # no objects, which other tasks learn
        counts["regions"] = trainable
    else:
        counts["annotations"] = sum(image.objects for image in images)
        counts["crowds"] = sum(image.crowds for image in images)
        counts["trainable"] = trainable
    counts["captions"] = sum(len(image.captions) for image in images)
    if options.depth is not None:
        counts["depth"] = sum("depth" in image.maps for image in images)
    if options.panoptic is not None:
        counts["panoptic"] = sum("panoptic" in image.maps for image in images)
        counts["segments"] = sum(len(image.segments) for image in images)
        counts["segments_at_most"] = max((len(image.segments) for image in images), default=0)
    counts["empty"] = sum(not (image.objects or image.captions or image.maps) for image in images)
    return counts


def quantiles(sides: Sequence[Sequence[float]]) -> dict[str, float]:
    """`Manifest.object_sides` of the sides of each image's objects."""
    every = np.concatenate([np.empty(0, np.float32), *sides])
    if not len(every):
        return {}
    return {str(percent): round(float(np.quantile(every, percent / 100)), 5) for percent in SIDE_QUANTILES}


@contextmanager
def alone(out: Path, split: str) -> Iterator[None]:
    """Lock a split while it is built or indexed. Raises ValueError, which names the process that holds the
    lock.
    """
    state = state_folder(out, split)
    state.mkdir(parents=True, exist_ok=True)
    lock = FileLock(state / _LOCK, timeout=0)
    holder = state / _HOLDER
    try:
        lock.acquire()
        write_text(holder, f"process {os.getpid()} on {platform.node()}")
    except Timeout as error:
        other = holder.read_text(encoding="utf-8") if holder.is_file() else "of another process"
        remedy = "wait until it has finished, or use another --out"
        raise ValueError(f"another build ({other}) is making {split!r} in {out}: {remedy}") from error
    except NotImplementedError:
        text = f"warning: {out} does not support locks: run one build at a time there"
        print(text, file=sys.stderr, flush=True)
    try:
        yield
    finally:
        # While it is held, so that nobody else's is removed.
        for file in (holder, state / _LOCK):
            file.unlink(missing_ok=True)
        lock.release()
    with suppress(OSError):  # the state of a build lies in it
        state.rmdir()


def reasons(left_out: Sequence[Sequence[str]]) -> Findings:
    """Reasons why images are left out: reason -> how many, the first few."""
    findings = Findings()
    for name, reason in left_out:
        kind, _, detail = reason.partition(": ")
        cause = detail.rpartition(": ")[2]
        findings.add(kind, f"{name} ({cause})" if cause else name)
    return findings


def _claim(options: Options, plan: _Plan, replace: bool) -> None:
    """Bind the output to these options and files, so that two builds never mix.

    Shards of other options or files go with `replace` alone, unless they are of a build of ours that was not
    finished.
    """
    identity = {"version": VERSION, **options.content(), "sources": plan.source.files}
    path = options.state / "options.json"
    manifest = manifest_path(options.out, options.name)
    pattern = f"{options.name}-{'[0-9]' * 6}.tar"
    shards = sorted(options.out.glob(pattern))
    earlier = _record(path)
    same = earlier == identity
    unfinished = path.exists() and not manifest.exists()
    if shards and not same and not unfinished and not replace:
        there = f"{options.out} holds a split {options.name!r} of other files or options"
        raise ValueError(f"{there}: use another --out, or --replace")
    _keep_divisions_apart(options, earlier, replace)
    manifest.unlink(missing_ok=True)  # before what it describes is half gone
    if same:
        obsolete = [shard for shard in shards if shard.name >= tar_name(options.name, len(plan.shards))]
    else:
        obsolete = [*shards, *options.state.glob("*.json")]
    for file in obsolete:
        file.unlink()
    remove_unfinished(options.out, pattern)
    remove_unfinished(options.state)
    write_bytes(path, orjson.dumps(identity))


def _keep_divisions_apart(options: Options, earlier: Any, replace: bool) -> None:
    """Let no `val` lie beside a `train` that it was not split off from, which would have its images.

    Raises ValueError if this split was divided in the `earlier` build and is not any more.
    """
    validation = manifest_path(options.out, "val")
    if options.name == "val" or not validation.exists():
        return
    if options.division is not None:
        if replace:
            validation.unlink()  # it is made again after this split
    elif earlier is not None and "val" in earlier:
        there = f"{options.out}: 'val' was split off from its {options.name!r}"
        raise ValueError(f"{there}: give the same --val, or another --out")


def _record(path: Path) -> Any:
    """Content of a file of a build's state; None without one, and for a damaged one, which proves nothing."""
    try:
        return orjson.loads(path.read_bytes())
    except (FileNotFoundError, orjson.JSONDecodeError):
        return None


def _write_all(options: Options, plan: _Plan, workers: int) -> list[Json]:
    """The records of all shards; those that an earlier build has finished from the same images are kept."""
    stopped = threading.Event()
    total = sum(map(len, plan.shards))
    bar = tqdm(desc=options.name, total=total, unit=" images", disable=None)

    def progress(images: int) -> None:
        if stopped.is_set():
            raise RuntimeError("the build was stopped")
        bar.update(images)

    def write(number: int) -> Json:
        images = plan.shards[number]
        path = options.out / tar_name(options.name, number)
        record_path = options.state / f"{number}.json"
        digest = hashlib.sha256()
        for image in images:  # the time of change stands for the pixels
            digest.update(b"%d %d %b" % (image.file_bytes, image.modified, image.label()))
            for picture in image.maps.values():
                digest.update(b"%d %d" % (picture.bytes, picture.modified))
            digest.update(orjson.dumps(image.segments))
        key = digest.hexdigest()
        record = _record(record_path)
        if (
            record is None
            or record["key"] != key
            or not path.is_file()
            or sha256_of(path) != record["sha256"]
        ):
            record = {**write_shard(path, images, options, progress), "key": key}
            write_bytes(record_path, orjson.dumps(record))
        else:
            progress(len(images))
        return dict(record)

    with bar, warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore")  # of damaged metadata; set here, as threads share it
        try:
            return list(pool.map(write, range(len(plan.shards))))
        finally:
            stopped.set()
