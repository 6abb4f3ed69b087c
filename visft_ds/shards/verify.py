"""Checking whole splits, byte by byte.

Content alone is compared. Times of files prove nothing: copying, unpacking and synchronising change them at will,
and an index that is older than a shard but describes each of its bytes is right. An index that does not, whatever its
time, is found by the digests and by comparing it with what the shard holds.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from visft_ds.data.manifest import (
    Manifest,
    ShardFile,
    fingerprint,
    index_path,
    manifest_path,
    read_manifest,
    rebuild_hint,
    shard_files,
)
from visft_ds.shards.shard_compare import compare_shard
from visft_ds.shards.shard_content import Places, Problem, ShardContent, read_shard, some

#: Option of manifests that version 0.1 made from tars alone: a list; WRITER where another program wrote them.
UNKNOWN, WRITER = "unknown", "writer"


@dataclass
class VerifyProgress:
    """Bytes read so far and in all; updated by the workers."""

    bytes: int = 0
    total_bytes: int = 0


OnProgress = Callable[[VerifyProgress], None]
_Result = TypeVar("_Result")


def traces_of_splits(root: Path) -> list[str]:
    """Names of all splits of which a folder holds anything: manifest, index, shards or records of a build.

    Raises ValueError if there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"the folder {root} does not exist")
    found = (
        re.fullmatch(r"(.+)(?:\.manifest\.json|\.index\.npy|-\d{6,}\.tar)|\.(.+)\.build", path.name)
        for path in root.iterdir()
    )
    return sorted({match[1] or match[2] for match in found if match})


def verify(
    root: Path | str,
    split: str,
    *,
    decode: bool = False,
    workers: int = 1,
    on_progress: OnProgress = lambda progress: None,
) -> list[Problem]:
    """Read everything of a split and list what is wrong; an empty list means every byte is as it was made.

    Args:
        decode: also decode every image and compare its size with the index.
        workers: threads; hashing and decoding release the interpreter lock. The result does not depend on it.
        on_progress: called after each sample, from any thread, one at a time.

    Raises:
        ValueError: there is nothing of such a split at all.
        OSError: a file is there but cannot be read.
    """
    root = Path(root)
    if not root.is_dir() or split not in traces_of_splits(root):
        read_manifest(root, split)  # raises with the splits that do exist
    problems = left_overs(root, split)
    try:
        fields = read_manifest(root, split)
    except ValueError as error:
        problems.append(Problem(manifest_path(root, split).name, str(error), fix=rebuild_hint(split)))
        return problems + _without_manifest(root, split, decode, workers, on_progress)
    shards = [ShardFile(**shard) for shard in fields["shards"]]
    listed = {shard.name for shard in shards}
    present = {shard.name for shard in shards if (root / shard.name).is_file()}
    hint = rebuild_hint(split)
    problems += [Problem(shard.name, "missing", fix=hint) for shard in shards if shard.name not in present]
    problems += [
        Problem(name, "not part of this split, yet named like a shard of it", fix=f"Move {name} away.")
        for name in shard_files(root, split)
        if name not in listed
    ]
    manifest = _open_leniently(root, split, problems)
    rows = [_rows_of(manifest, number) for number in range(len(shards))]
    plain = WRITER in fields["options"].get(UNKNOWN, ())
    jobs = [(root / shard.name, rows[place]) for place, shard in enumerate(shards) if shard.name in present]
    by_name = {shard.name: shard for shard in shards}
    by_digest = {shard.sha256: shard.name for shard in shards}

    def check(content: ShardContent, expected: npt.NDArray[Any] | None) -> _Checked:
        found = compare_shard(content, by_name[content.name], expected, by_digest)
        return _Checked(content, [problem if problem.fix else replace(problem, fix=hint) for problem in found])

    reading = read_shards(jobs, check, plain=plain, decode=decode, workers=workers, on_progress=on_progress)
    totals = _Totals()
    for checked in reading:
        problems += checked.problems
        totals.add(checked)
    problems += repeated(totals.image_ids)
    if not problems:
        messages = totals.compare(fields)
        problems = [Problem(manifest_path(root, split).name, message, fix=rebuild_hint(split)) for message in messages]
    return problems


def _without_manifest(root: Path, split: str, decode: bool, workers: int, on_progress: OnProgress) -> list[Problem]:
    """Check shards by themselves, where no manifest states their content and the program that wrote them."""

    def check(content: ShardContent, _: npt.NDArray[Any] | None) -> _Checked:
        return _Checked(content, [replace(problem, fix=rebuild_hint(split)) for problem in content.problems])

    jobs = [(root / name, None) for name in shard_files(root, split)]
    checked = list(read_shards(jobs, check, plain=True, decode=decode, workers=workers, on_progress=on_progress))
    problems = [problem for shard in checked for problem in shard.problems]
    return problems + repeated({shard.name: shard.image_ids for shard in checked})


class _Checked:
    """Summary of a shard after the comparison: its problems, image ids, counts, words and categories."""

    def __init__(self, content: ShardContent, problems: list[Problem]) -> None:
        self.name, self.problems = content.name, problems
        self.image_ids = np.array([row["image_id"] for row in content.rows], dtype=np.int64)
        self.counts, self.words, self.categories = content.counts, content.words, content.categories


def left_overs(root: Path, split: str) -> list[Problem]:
    """Incomplete files of a build that was interrupted and not resumed."""
    pattern = re.compile(rf"{re.escape(split)}(-\d{{6,}}\.tar|\.index\.npy|\.manifest\.json)\.(tmp|temp|part).*")
    work = root / f".{split}.build"
    found = [path for path in root.iterdir() if pattern.fullmatch(path.name)]
    found += [path for path in (work.iterdir() if work.is_dir() else ()) if ".tmp" in path.name]
    return [
        Problem(
            str(path.relative_to(root)),
            f"left over from an interrupted build ({path.stat().st_size} bytes)",
            fix=f"If no build is running, delete {path}; a build of this split deletes it too.",
        )
        for path in sorted(found)
    ]


def _open_leniently(root: Path, split: str, problems: list[Problem]) -> Manifest | None:
    """The manifest if its index is good, whatever the state of the shards; problems of the index are noted."""
    name, hint = index_path(root, split).name, rebuild_hint(split)
    try:
        manifest = Manifest.load(root, split, check_shards=False)
    except ValueError as error:
        problems.append(Problem(name, str(error), fix=hint))
        return None
    if fingerprint(manifest.categories, manifest.index) != manifest.fingerprint:
        problems.append(Problem(name, "its content does not give the fingerprint in the manifest", fix=hint))
    stored = manifest.index["shard"]
    counts = [shard.count for shard in manifest.shards]
    if not np.array_equal(stored, np.repeat(np.arange(len(counts)), counts)):
        problems.append(Problem(name, "its rows are not those of the shards in the manifest, in order", fix=hint))
        return None
    return manifest


def _rows_of(manifest: Manifest | None, number: int) -> npt.NDArray[Any] | None:
    """The index rows of a shard; None without a valid index."""
    if manifest is None:
        return None
    first, last = np.searchsorted(manifest.index["shard"], [number, number + 1])
    rows: npt.NDArray[Any] = manifest.index[first:last]
    return rows


def read_shards(
    jobs: Sequence[tuple[Path, npt.NDArray[Any] | None]],
    finish: Callable[[ShardContent, npt.NDArray[Any] | None], _Result],
    *,
    plain: bool,
    decode: bool = False,
    workers: int,
    on_progress: OnProgress,
) -> Iterator[_Result]:
    """`read_shard` on several shards at once: (path, index rows where they are known) -> what `finish` makes of each.

    Results come in order; contents are dropped as soon as they are finished.
    """
    progress = VerifyProgress(total_bytes=sum(path.stat().st_size for path, _ in jobs))
    lock, stop = threading.Lock(), threading.Event()

    def on_bytes(count: int) -> None:
        if stop.is_set():
            raise RuntimeError("stopped because another shard could not be read or the user interrupted")
        with lock:
            progress.bytes += count
            on_progress(progress)

    def read(job: tuple[Path, npt.NDArray[Any] | None]) -> _Result:
        path, rows = job
        places = {} if rows is None else _places(rows)
        content = read_shard(path, plain=plain, decode=decode, places=places, on_bytes=on_bytes)
        return finish(content, rows)

    pool = ThreadPoolExecutor(workers, "verify")
    try:
        yield from pool.map(read, jobs)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def _places(rows: npt.NDArray[Any]) -> Places:
    keys = [f"{image_id:012d}" for image_id in rows["image_id"].tolist()]
    return {
        offset: (part, key)
        for part in ("image", "label")
        for key, offset in zip(keys, rows[f"{part}_offset"].tolist(), strict=True)
    }


def repeated(image_ids: Mapping[str, npt.NDArray[np.int64]]) -> list[Problem]:
    """Images that are in more than one shard; `image_ids` are those of each shard by its name."""
    every = np.concatenate([np.empty(0, dtype=np.int64), *image_ids.values()])
    ids, counts = np.unique(every, return_counts=True)
    twice = ids[counts > 1]
    problems = []
    for name, ids_of_set in image_ids.items() if len(twice) else ():
        keys = tuple(f"{image_id:012d}" for image_id in ids_of_set[np.isin(ids_of_set, twice)].tolist())
        if keys:
            message = f"{len(keys)} of its samples are twice in the split: {some(keys)}"
            problems.append(Problem(name, message, keys, fix="Take one of the shards away, or pack them again."))
    return problems


class _Totals:
    """Image ids by shard, and counts, words and categories of all shards together."""

    def __init__(self) -> None:
        self.image_ids: dict[str, npt.NDArray[np.int64]] = {}
        self._counts: Counter[str] = Counter()
        self._words: Counter[str] = Counter()
        self._categories: set[int] = set()

    def add(self, checked: _Checked) -> None:
        """Add a shard."""
        self.image_ids[checked.name] = checked.image_ids
        self._counts.update(checked.counts)
        self._words.update(checked.words)
        self._categories |= checked.categories

    def compare(self, fields: Mapping[str, Any]) -> list[str]:
        """List the differences of a manifest's counts, vocabulary and categories from those of the shards."""
        counts = {**self._counts, "quarantined": len(fields["quarantine"])}
        messages = [
            f"it counts {fields['counts'][kind]} {kind.replace('_', ' ')}, the shards hold {counts[kind]}"
            for kind in sorted(fields["counts"].keys() & counts.keys())
            if fields["counts"][kind] != counts[kind]
        ]
        stored, words = fields["vocabulary"], self._words
        differing = sorted(word for word in words.keys() | stored.keys() if stored.get(word) != words.get(word))
        if differing:
            messages.append(f"{len(differing)} words are counted otherwise in the captions: {some(differing)}")
        unlisted = sorted(self._categories - {category["coco_id"] for category in fields["categories"]})
        if unlisted:
            messages.append(f"annotations use categories that it does not list: {some([str(id_) for id_ in unlisted])}")
        return messages
