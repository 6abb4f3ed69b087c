"""COCO -> shards: deterministic, checked, atomic, resumable.

Which sample goes into which shard is settled first, from the sizes of the files. Shards are then independent of each
other: any number of workers writes the same bytes, and a build that was killed goes on with the missing ones. A shard
gets its final name only when it is complete and on disk; the manifest is written last.

Beside the shards, the hidden folder `.NAME.build` keeps one record per finished shard. Threads suffice as workers,
because reading, decoding and hashing release the interpreter lock, and they share the annotations.
"""

from __future__ import annotations

import fcntl
import io
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from visft_ds.conversion.shard_writer import (
    Planned,
    finished_shard,
    quarantined,
    sample_bytes,
    tar_bytes,
    write_atomically,
    write_shard,
)
from visft_ds.conversion.source import Source, SourceImage, read_source
from visft_ds.data.manifest import (
    INDEX_DTYPE,
    VERSION,
    ShardFile,
    index_path,
    manifest_bytes,
    manifest_path,
    shard_files,
    shard_name,
)
from visft_ds.data.vocabulary import TOKENIZER, caption_words


@dataclass(frozen=True)
class Options:
    """What a build depends on. `seed` None keeps the order of image ids, else the order is a random permutation."""

    images: Path
    instances: Path
    captions: Path | None
    out: Path
    split: str
    max_size: int = 256_000_000
    max_count: int | None = None
    seed: int | None = 0
    fail_on_bad: bool = False
    keep_crowd: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.split or not all(c.isalnum() or c in "-_" for c in self.split):
            raise ValueError(f"split name {self.split!r} is not allowed: use letters, digits, '-' and '_'")
        for name, value in (("max size", self.max_size), ("max count", self.max_count), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not allowed: give at least 1")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed} is not allowed: give an integer from 0 to 2**63 - 1, or none")
        if not self.images.is_dir():
            raise ValueError(f"the images folder {self.images} does not exist")

    def content(self) -> dict[str, Any]:
        """What decides about the bytes, apart from the input files; it is stored in the manifest."""
        names = ("max_size", "max_count", "seed", "keep_crowd", "limit")
        return {**{name: getattr(self, name) for name in names}, "tokenizer": TOKENIZER}


@dataclass
class Progress:
    """How far a build is; updated by the workers."""

    images: int = 0
    bytes: int = 0
    shards: int = 0
    kept: int = 0  #: shards that were there already
    total_images: int = 0
    total_shards: int = 0


@dataclass(frozen=True)
class Report:
    """What a build did, or what it would do (`dry_run`)."""

    split: str
    out: str
    dry_run: bool
    shards: int
    shards_kept: int
    bytes: int
    counts: Mapping[str, int]
    findings: Sequence[Mapping[str, Any]]
    quarantine: Sequence[Mapping[str, Any]]
    fingerprint: str | None


def build(
    options: Options,
    *,
    workers: int = 1,
    dry_run: bool = False,
    replace: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Report:
    """Make the shards, index and manifest of a split; go on with what an earlier, interrupted build has finished.

    Args:
        options: input, output and what the samples look like.
        workers: threads; the result does not depend on it.
        dry_run: read the JSON files, look at file sizes, plan, and write nothing.
        replace: throw away a split of this name that was built with other options or from other JSON files.
        on_progress: called a few times a second in the calling thread.

    Raises:
        ValueError: unusable input; another build of this split with other options; another build running.
        KeyboardInterrupt: passed on after the workers have stopped; what is finished is kept.
        OSError: reading or writing failed; what is finished is kept.
    """
    source = read_source(options.instances, options.captions, keep_crowd=options.keep_crowd)
    quarantine: list[dict[str, Any]] = []
    samples = _locate(_ordered(source.images, options), options, quarantine)
    plan = _cut(samples, options)
    if not plan:
        raise ValueError(f"no image of {options.instances} is usable in {options.images}; {len(quarantine)} left out")
    if dry_run:
        return _dry_report(options, source, plan, quarantine)
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.out / f".{options.split}.build"
    work.mkdir(exist_ok=True)
    with _exclusive(work):
        _claim(options, source, work, replace=replace)
        _refuse_strangers(options, len(plan))
        progress = Progress(total_images=len(samples), total_shards=len(plan))
        records = _Builder(options, plan, work, progress).run(workers, on_progress)
        return _finish(options, source, records, quarantine, progress.kept)


class _Builder:
    """Writes the planned shards with a number of threads."""

    def __init__(self, options: Options, plan: Sequence[Sequence[Planned]], work: Path, progress: Progress) -> None:
        self._options, self._plan, self._work, self._progress = options, plan, work, progress
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, workers: int, on_progress: Callable[[Progress], None]) -> list[dict[str, Any]]:
        """The records of all shards in order."""
        pool = ThreadPoolExecutor(workers, "shards")
        try:
            futures = [pool.submit(self._shard, number) for number in range(len(self._plan))]
            pending: set[Future[dict[str, Any]]] = set(futures)
            while pending:
                done, pending = wait(pending, timeout=0.25, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                on_progress(self._progress)
            return [future.result() for future in futures]
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _shard(self, number: int) -> dict[str, Any]:
        target = self._options.out / shard_name(self._options.split, number)
        samples = self._plan[number]
        labels = [sample.image.label() for sample in samples]
        record = finished_shard(target, self._work, samples, labels)
        kept = record is not None
        if record is None:
            # From here on the old manifest would describe other shards.
            manifest_path(self._options.out, self._options.split).unlink(missing_ok=True)
            record = write_shard(target, self._work, samples, labels, after_image=self._after_image)
        with self._lock:
            self._progress.shards += 1
            self._progress.kept += kept
            self._progress.images += len(samples) if kept else 0
        return record

    def _after_image(self, size: int, bad: dict[str, Any] | None) -> None:
        if self._stop.is_set():
            raise RuntimeError("stopped because another shard failed or the build was interrupted")
        _refuse_bad(self._options, [] if bad is None else [bad])
        with self._lock:
            self._progress.images += 1
            self._progress.bytes += size


def _ordered(images: Sequence[SourceImage], options: Options) -> list[SourceImage]:
    order = np.arange(len(images))
    if options.seed is not None:
        # Raw words of a bit generator stay the same over numpy's versions; `permutation` may not.
        key = np.array([options.seed, VERSION], dtype=np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(images)), kind="stable")
    return [images[place] for place in order[: options.limit].tolist()]


def _locate(images: Sequence[SourceImage], options: Options, quarantine: list[dict[str, Any]]) -> list[Planned]:
    """Find the files; those that are not there are quarantined."""
    samples = []
    for image in images:
        path = options.images / image.file_name
        if Path(image.file_name).is_absolute() or ".." in Path(image.file_name).parts:
            quarantine.append(quarantined(image, "unsafe name", "it points outside of the images folder"))
        elif not path.is_file():
            quarantine.append(quarantined(image, "missing", "no such file in the images folder"))
        else:
            stat = path.stat()
            samples.append(Planned(image, path, stat.st_size, stat.st_mtime_ns))
    _refuse_bad(options, quarantine)
    return samples


def _refuse_bad(options: Options, quarantine: Sequence[Mapping[str, Any]]) -> None:
    if quarantine and options.fail_on_bad:
        shown = "; ".join(f"{bad['file_name']}: {bad['reason']} ({bad['detail']})" for bad in quarantine[:3])
        raise ValueError(f"{len(quarantine)} unusable images: {shown}. Repair them, or use --bad quarantine.")


def _cut(samples: Sequence[Planned], options: Options) -> list[list[Planned]]:
    """Fill shards in order up to the limits; a sample larger than the limit gets a shard of its own."""
    shards: list[list[Planned]] = []
    used = 0
    for sample in samples:
        size = sample_bytes(sample.size, len(sample.image.label()))
        full = bool(shards) and len(shards[-1]) == options.max_count
        if not shards or full or tar_bytes(used + size) > options.max_size:
            shards.append([])
            used = 0
        shards[-1].append(sample)
        used += size
    return shards


def _claim(options: Options, source: Source, work: Path, *, replace: bool) -> None:
    """Bind the output to these options and JSON files, so that two different builds never mix."""
    wanted = {"version": VERSION, **options.content(), "sources": source.files}
    path = work / "options.json"
    if not path.is_file() and shard_files(options.out, options.split) and not replace:
        # Copied without their hidden records: nothing tells whether this build would make the same ones.
        raise ValueError(
            f"{options.out} holds shards of {options.split!r} without the records of their build ({work.name}/). "
            "Use another --out or --split, or --replace to throw them away."
        )
    known = orjson.loads(path.read_bytes()) if path.is_file() else {}
    differing = sorted(name for name in known.keys() | wanted.keys() if known.get(name) != wanted.get(name))
    if known and differing and not replace:
        shown = "; ".join(f"{name}: {known.get(name)!r} there, {wanted.get(name)!r} asked" for name in differing)
        raise ValueError(
            f"{options.out} holds a split {options.split!r} that was built otherwise ({shown}). "
            "Use another --out or --split, the same options, or --replace to throw it away."
        )
    if differing:
        shards = [options.out / name for name in shard_files(options.out, options.split)]
        for old in [*shards, *work.glob("*.json")]:
            old.unlink()
        manifest_path(options.out, options.split).unlink(missing_ok=True)
        index_path(options.out, options.split).unlink(missing_ok=True)
    for left_over in work.glob("*.tmp"):
        left_over.unlink()
    write_atomically(path, orjson.dumps(wanted, option=orjson.OPT_INDENT_2), work)


def _refuse_strangers(options: Options, shards: int) -> None:
    ours = {shard_name(options.split, number) for number in range(shards)}
    others = [name for name in shard_files(options.out, options.split) if name not in ours]
    if others:
        raise ValueError(
            f"{options.out} has {len(others)} shards that this build would not make: {', '.join(others[:3])}. "
            "Move them away; they would be taken for a part of the split."
        )


def _finish(
    options: Options,
    source: Source,
    records: Sequence[Mapping[str, Any]],
    quarantine: list[dict[str, Any]],
    kept: int,
) -> Report:
    """Write index and manifest."""
    rows = [(number, *row) for number, record in enumerate(records) for row in record["rows"]]
    quarantine = quarantine + [bad for record in records for bad in record["quarantine"]]
    _refuse_bad(options, quarantine)  # shards kept from an earlier build may have some
    if not rows:
        raise ValueError(f"none of the images is usable; for instance {quarantine[0]}")
    index = np.array(rows, dtype=INDEX_DTYPE)
    for record in records:
        source.findings.extend(record["findings"])
    source.findings.extend(("quarantined", f"{bad['file_name']}: {bad['reason']}") for bad in quarantine)
    chosen = set(index["image_id"].tolist())
    images = [image for image in source.images if image.image_id in chosen]
    counts = {**_counts(images), "quarantined": len(quarantine)}
    shards = [ShardFile(r["name"], r["count"], r["bytes"], r["sha256"]) for r in records]
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    manifest = manifest_bytes(
        split=options.split,
        categories=source.categories,
        counts=counts,
        shards=shards,
        index=index,
        index_file=buffer.getvalue(),
        vocabulary=_vocabulary(images),
        quarantine=quarantine,
        findings=source.findings.listed(),
        options=options.content(),
        sources=source.files,
    )
    work = options.out / f".{options.split}.build"
    write_atomically(index_path(options.out, options.split), buffer.getvalue(), work)
    write_atomically(manifest_path(options.out, options.split), manifest, work)
    return Report(
        split=options.split,
        out=str(options.out),
        dry_run=False,
        shards=len(shards),
        shards_kept=kept,
        bytes=sum(shard.bytes for shard in shards),
        counts=counts,
        findings=source.findings.listed(),
        quarantine=quarantine,
        fingerprint=orjson.loads(manifest)["fingerprint"],
    )


def _dry_report(
    options: Options, source: Source, plan: Sequence[Sequence[Planned]], quarantine: list[dict[str, Any]]
) -> Report:
    source.findings.extend(("quarantined", f"{bad['file_name']}: {bad['reason']}") for bad in quarantine)
    return Report(
        split=options.split,
        out=str(options.out),
        dry_run=True,
        shards=len(plan),
        shards_kept=0,
        bytes=sum(sample.size + len(sample.image.label()) for shard in plan for sample in shard),
        counts={**_counts([s.image for shard in plan for s in shard]), "quarantined": len(quarantine)},
        findings=source.findings.listed(),
        quarantine=quarantine,
        fingerprint=None,
    )


def _counts(images: Sequence[SourceImage]) -> dict[str, int]:
    annotations = [annotation for image in images for annotation in image.annotations]
    return {
        "images": len(images),
        "annotations": len(annotations),
        "crowds": sum(annotation["iscrowd"] for annotation in annotations),
        "trainable": sum(image.trainable() for image in images),
        "captions": sum(len(image.captions) for image in images),
        "images_without_trainable": sum(image.trainable() == 0 for image in images),
        "images_without_captions": sum(not image.captions for image in images),
    }


def _vocabulary(images: Sequence[SourceImage]) -> dict[str, int]:
    return dict(Counter(word for image in images for caption in image.captions for word in caption_words(caption)))


@contextmanager
def _exclusive(work: Path) -> Iterator[None]:
    """Only one build at a time; the lock ends with the process, however it ends."""
    with open(work / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another build of this split is running (it holds {work / 'lock'})") from error
        yield


def report_dict(report: Report) -> dict[str, Any]:
    """The report as plain data, for JSON."""
    return asdict(report)
