"""COCO -> shards: deterministic, checked, atomic, resumable.

The assignment of samples to shards is fixed first, from the sizes of the files. Shards are then independent of each
other: any number of workers writes the same bytes, and a build that was killed goes on with the missing ones. A shard
gets its final name only when it is complete and on disk; the manifest is written last.

Beside the shards, the hidden folder `.NAME.build` keeps one record per finished shard.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import orjson

from visft_ds.data.decode import MAX_PIXELS, MOST_PIXELS
from visft_ds.data.shards import VERSION, index_path, manifest_path, shard_name
from visft_ds.names import shown_name, wrong_name
from visft_ds.redaction import redacted
from visft_ds.shards.finish import BuildReport, dry_report, left_out, write_manifest
from visft_ds.shards.images import CHECK_LEVELS, CheckLevel
from visft_ds.shards.inputs import MadeJson, open_images
from visft_ds.shards.outputs import Output, exclusive
from visft_ds.shards.reencode import Reencoding
from visft_ds.shards.shard_writer import (
    Planned,
    Prepared,
    Treatment,
    finished_shard,
    quarantined,
    sample_bytes,
    tar_bytes,
    write_shard,
)
from visft_ds.shards.source import CATEGORY_RULES, CocoFile, CocoSource, SourceImage, SourceSelection, read_source
from visft_ds.shards.workers import BuildProgress, BuildWorkers
from visft_ds.tasks.vocabulary import TOKENIZER

#: Of the order of samples. It is part of the random key and independent of the manifest's version.
_ORDER_VERSION = 1
_NOT_WRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
#: Version 0.1 could look for duplicates. A manifest keeps the keys, with the values of a build that left none out.
_DUPLICATES = {"dedup": "report", "against": []}


@dataclass(frozen=True)
class Options:
    """Inputs, output and settings of a build; every place but `out` is a local path or a URL that fsspec knows.

    Raises ValueError for values out of range and for combinations that exclude each other.
    """

    images: Path | str
    instances: CocoFile | None
    captions: CocoFile | None
    out: Path | str
    split: str
    max_size: int = 256_000_000  #: bytes of a shard; of the files as they are, where they are re-encoded
    max_count: int | None = None
    seed: int | None = 0  #: None keeps the order of image ids, else the order is a random permutation
    fail_on_bad: bool = False
    keep_crowd: bool = True
    limit: int | None = None  #: only the first so many images of the order
    categories: str = "keep"  #: "keep", "coco80" or a file, see `SourceSelection`
    keep_empty: bool = True
    ids: Path | str | None = None
    licenses: tuple[int, ...] | None = None
    check: CheckLevel = "decode"
    reencode: Reencoding | None = None
    max_pixels: int = MAX_PIXELS
    allow_drops: bool = (
        False  #: go on where more than a tenth of the annotations is lost; the shards do not depend on it
    )

    def __post_init__(self) -> None:
        if not self.split or not all(c.isalnum() or c in "-_" for c in self.split):
            raise ValueError(f"split name {self.split!r} is not allowed: use letters, digits, '-' and '_'")
        for name, value in (("max size", self.max_size), ("max count", self.max_count), ("limit", self.limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not allowed: give at least 1")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise ValueError(f"--max-pixels {self.max_pixels} is not allowed: give 1 to {MOST_PIXELS}")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed} is not allowed: give an integer from 0 to 2**63 - 1, or none")
        if self.instances is None and self.captions is None:
            raise ValueError("there is nothing to learn: give --instances, --captions or both")
        if self.check not in CHECK_LEVELS:
            raise ValueError(f"--check {self.check} is not allowed; allowed are {', '.join(CHECK_LEVELS)}")
        if self.reencode is not None and self.check != "decode":
            raise ValueError(f"--reencode decodes every image anyway: leave out --check {self.check}")
        if self.categories != "keep" and self.instances is None:
            raise ValueError(f"--categories {self.categories} needs --instances, where categories come from")
        made = isinstance(self.instances, MadeJson) or isinstance(self.captions, MadeJson)
        if made and self.check == "none":
            raise ValueError(
                "--check none believes the sizes that COCO files state; this data states none: leave it out"
            )

    def selection(self) -> SourceSelection:
        """Selection of annotations and images, for `read_source`."""
        return SourceSelection(
            categories=self.categories,
            keep_crowd=self.keep_crowd,
            keep_empty=self.keep_empty,
            ids=self.ids,
            licenses=self.licenses,
            reencoding=self.reencode,
            allow_drops=self.allow_drops,
        )

    def content(self) -> dict[str, Any]:
        """Settings that determine the shards, apart from the input files; the manifest records them."""
        return {
            "max_size": self.max_size,
            "max_count": self.max_count,
            "seed": self.seed,
            "keep_crowd": self.keep_crowd,
            "keep_empty": self.keep_empty,
            "limit": self.limit,
            # of a file, the digest among the sources tells more than its name
            "categories": self.categories if self.categories in CATEGORY_RULES else "file",
            "licenses": None if self.licenses is None else sorted(self.licenses),
            "check": self.check,
            "reencode": None if self.reencode is None else self.reencode.described(),
            "drop_duplicates": False,  # splits that version 0.1 built so hold other images
            "tokenizer": TOKENIZER,
            # only where it is another: splits of earlier releases stay the same
            **({} if self.max_pixels == MAX_PIXELS else {"max_pixels": self.max_pixels}),
        }


def build(
    options: Options,
    *,
    workers: int = 1,
    dry_run: bool = False,
    replace: bool = False,
    on_progress: Callable[[BuildProgress], None] = lambda progress: None,
) -> BuildReport:
    """Make the shards, index and manifest of a split; go on with what an earlier, interrupted build has finished.

    Args:
        options: inputs, output and settings of the samples.
        workers: threads; the result does not depend on it.
        dry_run: read the JSON files, look at file sizes, plan, and write nothing.
        replace: delete a split of this name that was built with other options, from other JSON files or of more images.
        on_progress: called a few times a second in the calling thread.

    Raises:
        ValueError: unusable input; another split of this name, see `replace`; another build running.
        TooManyDropsError: one of these; more than a tenth of the annotations would be lost. Nothing is written.
        KeyboardInterrupt: passed on after the workers have stopped; what is finished is kept.
        OSError: writing failed; what is finished is kept.
        RuntimeError: reading an image failed, or it changed meanwhile; what is finished is kept.
    """
    on_progress(BuildProgress())
    images, output = open_images(options.images), Output(options.out, options.split)
    source = read_source(options.instances, options.captions, options.selection())
    treatment = Treatment(images, options.check, options.reencode, options.max_pixels)
    missing: list[dict[str, Any]] = []
    samples = _locate(_ordered(source.images, options), options, treatment, missing)
    if not samples:
        raise ValueError(
            f"no image of the data set is usable in {redacted(options.images)}: {'; '.join(left_out(missing))}. "
            "File names are relative to --images."
        )
    if dry_run:
        return dry_report(options.split, str(options.out), source, _cut(samples, options), missing)
    with _clear_errors(options):
        output.open()
        with exclusive(output.scratch), BuildWorkers(workers, on_progress) as threads:
            plan = _cut(samples, options)
            _claim(options, source, output, len(plan), replace=replace)
            threads.progress.total_images, threads.progress.total_shards = len(samples), len(plan)
            records = _Builder(options, plan, treatment, output, threads).run()
            quarantine = missing + [bad for record in records for bad in record["quarantine"]]
            _refuse_bad(options, quarantine)  # shards kept from an earlier build may have some
            if not any(record["rows"] for record in records):  # an error, which leaves nothing behind
                for record in records:
                    output.remove(record["name"])
                shutil.rmtree(output.scratch)
            return write_manifest(
                output,
                options.split,
                {**options.content(), **_DUPLICATES},
                source,
                records,
                quarantine,
                out=str(options.out),
                kept=threads.progress.kept,
            )


class _Builder:
    """Writes the planned shards with a number of threads."""

    def __init__(
        self,
        options: Options,
        plan: Sequence[Sequence[Planned]],
        treatment: Treatment,
        output: Output,
        threads: BuildWorkers,
    ) -> None:
        self._options, self._plan, self._treatment = options, plan, treatment
        self._output, self._threads = output, threads

    def run(self) -> list[dict[str, Any]]:
        """The records of all shards in order."""
        self._threads.progress.phase = "writing shards"
        return self._threads.run(self._shard, range(len(self._plan)))

    def _shard(self, number: int) -> dict[str, Any]:
        name, samples = shard_name(self._options.split, number), self._plan[number]
        record = finished_shard(name, self._output, samples)
        kept = record is not None
        if record is None:
            # From here on the old manifest would describe other shards.
            with self._threads.lock:
                self._output.remove(_manifest_name(self._options))
            prepared = self._threads.ahead(self._prepare, samples)
            record = write_shard(name, self._output, samples, prepared, lambda bad: _refuse_bad(self._options, [bad]))
        with self._threads.lock:
            progress = self._threads.progress
            progress.shards += 1
            progress.kept += kept
            progress.images += len(samples) if kept else 0
        return record

    def _prepare(self, sample: Planned) -> Prepared:
        prepared = self._treatment.prepare(sample)
        self._threads.count()
        return prepared


def _manifest_name(options: Options) -> str:
    return manifest_path(Path(), options.split).name


def _ordered(images: Sequence[SourceImage], options: Options) -> list[SourceImage]:
    order = np.arange(len(images))
    if options.seed is not None:
        # Raw words of a bit generator stay the same over numpy's versions; `permutation` may not.
        key = np.array([options.seed, _ORDER_VERSION], dtype=np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(images)), kind="stable")
    return [images[place] for place in order[: options.limit].tolist()]


def _locate(
    images: Sequence[SourceImage], options: Options, treatment: Treatment, quarantine: list[dict[str, Any]]
) -> list[Planned]:
    """Find the files; those that are not there are quarantined."""
    safe = []
    for image in images:
        path = PurePath(image.file_name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in image.file_name:
            quarantine.append(quarantined(image, "unsafe name", "it points outside of the images folder"))
        elif reason := wrong_name(image.file_name, folders=True):
            quarantine.append(quarantined(image, "unsafe name", reason))
        else:
            safe.append(image)
    samples = []
    for image, found in zip(safe, treatment.images.find([image.file_name for image in safe]), strict=True):
        if found is None:
            quarantine.append(quarantined(image, "missing", "no such file in the images folder"))
        else:
            samples.append(Planned(image, found.size, found.stamp))
    _refuse_bad(options, quarantine)
    return samples


def _refuse_bad(options: Options, quarantine: Sequence[Mapping[str, Any]]) -> None:
    if quarantine and options.fail_on_bad:
        shown = "; ".join(
            f"{shown_name(bad['file_name'])}: {bad['reason']} ({bad['detail']})" for bad in quarantine[:3]
        )
        raise ValueError(f"{len(quarantine)} unusable images: {shown}. Repair them, or use --bad quarantine.")


def _cut(samples: Sequence[Planned], options: Options) -> list[list[Planned]]:
    """Fill shards in order up to the limits; a sample larger than the limit gets a shard of its own."""
    shards: list[list[Planned]] = []
    used = 0
    for sample in samples:
        size = sample_bytes(sample.size, len(sample.image.label))
        full = bool(shards) and len(shards[-1]) == options.max_count
        if not shards or full or tar_bytes(used + size) > options.max_size:
            shards.append([])
            used = 0
        shards[-1].append(sample)
        used += size
    return shards


def _claim(options: Options, source: CocoSource, output: Output, planned: int, *, replace: bool) -> None:
    """Bind the output to these options, JSON files and so many shards, so that two different builds never mix."""
    wanted = {"version": VERSION, **options.content(), "sources": source.files}
    name = f"{output.work}/options.json"
    pattern = re.compile(re.escape(options.split) + r"-\d{6,}\.tar")
    shards = sorted(filter(pattern.fullmatch, output.names()))
    data = output.read(name)
    if data is None and shards and not replace:
        # Copied without their hidden records: nothing tells whether this build would make the same ones.
        raise ValueError(
            f"{options.out} holds shards of {options.split!r} without the records of their build ({output.work}/). "
            "Use another --out or --split, or --replace to throw them away."
        )
    known = _known_options(data)
    if data is not None and not known and not replace:
        raise ValueError(f"{options.out}/{name} is damaged: give --replace to throw the split away and make it anew")
    differing = sorted(key for key in known.keys() | wanted.keys() if known.get(key) != wanted.get(key))
    if known and differing and not replace:
        shown = "; ".join(_difference(name, known.get(name), wanted.get(name)) for name in differing)
        raise ValueError(
            f"{options.out} holds a split {options.split!r} that was built otherwise ({shown}). "
            "Use another --out or --split, the same options, or --replace to throw it away."
        )
    ours = {shard_name(options.split, number) for number in range(planned)}
    strangers = [name for name in shards if name not in ours]
    if strangers and not replace:
        raise ValueError(
            f"{options.out} has {len(strangers)} shards that this build would not make: {', '.join(strangers[:3])}. "
            "Move them away, or give --replace to make the split anew; they would be taken for a part of it."
        )
    if differing or strangers:
        # The manifest first: what it describes must never be half gone.
        for old in (_manifest_name(options), index_path(Path(), options.split).name, *shards, *output.work_names()):
            output.remove(old)
    for left_over in output.scratch.glob("*.tmp"):
        left_over.unlink()
    output.write(name, orjson.dumps(wanted, option=orjson.OPT_INDENT_2))


def _known_options(data: bytes | None) -> dict[str, Any]:
    """The options of an earlier build; empty if there was none or its record is damaged."""
    try:
        content = orjson.loads(data or b"{}")
    except orjson.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) else {}


def _difference(name: str, there: Any, asked: Any) -> str:
    if name != "sources" or not isinstance(there, dict):
        return f"{name}: {there!r} there, {asked!r} asked"
    roles = [role for role in sorted(there.keys() | asked.keys()) if there.get(role) != asked.get(role)]
    return "; ".join(f"{role}: {_file(there.get(role))} there, {_file(asked.get(role))} asked" for role in roles)


def _file(source: Any) -> str:
    """A file among the sources, in words."""
    if not isinstance(source, dict):
        return "none"
    return f"{source.get('name')} (sha256 {source.get('sha256')!s:.12}...)"


@contextmanager
def _clear_errors(options: Options) -> Iterator[None]:
    """Say what a full or protected disk means for the build."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise OSError(
            error.errno,
            f"{error.strerror}: cannot write to {options.out}{where}. Nothing that is finished is lost: mend it and "
            "run the same command again",
        ) from error
