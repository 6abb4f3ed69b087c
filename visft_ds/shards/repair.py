"""Index and manifest of a split made anew from its shards alone.

Everything that the tars say is read from them: places, checksums, sizes, counts, words. What they cannot say (names of
categories, what was left out and why, options, source files) is taken from what is left of the old manifest and of the
records of the build. An old manifest whose own digest fits the new one is the original, to the last byte.

Tars that other programs wrote get an index and a manifest in the same way: shards named NAME-000000.tar, -000001, ...,
in them `KEY.jpg` (or .jpeg, .png) directly followed by `KEY.json` of the form that `visft_ds.data.labels` describes.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from visft_ds.data.labels import stored_size
from visft_ds.data.manifest import (
    INDEX_DTYPE,
    ShardFile,
    index_path,
    manifest_bytes,
    manifest_path,
    rebuild_hint,
    shard_files,
    shard_name,
)
from visft_ds.shards.images import check_image
from visft_ds.shards.outputs import LocalOutput, exclusive
from visft_ds.shards.problem import Problem, some
from visft_ds.shards.shard_content import ShardContent
from visft_ds.shards.source import SourceImage
from visft_ds.shards.verify import OnProgress, left_overs, read_shards, repeated
from visft_ds.shards.witnesses import Rest, Witnesses

_COUNTS = (
    "images",
    "annotations",
    "crowds",
    "trainable",
    "captions",
    "images_without_trainable",
    "images_without_captions",
    "empty",
)
_COLUMNS = [name for name in INDEX_DTYPE.names or () if name != "shard"]


@dataclass(frozen=True)
class Repair:
    """What was done, or would be (`dry_run`)."""

    split: str
    images: int
    shards: int
    written: tuple[str, ...]  #: files that were (would be) written; none if there was nothing to repair
    original: bool  #: whether the manifest is proved to be the one that the build wrote
    notes: tuple[str, ...]  #: where that comes from which the shards do not say
    problems: tuple[Problem, ...]  #: why nothing was written


@dataclass(frozen=True)
class _Shard:
    """What is kept of a shard once it was read."""

    file: ShardFile
    rows: npt.NDArray[Any]
    counts: Counter[str]
    words: Counter[str]
    categories: set[int]
    problems: list[Problem]
    doubts: list[Problem]  #: what the index that is there says otherwise


def repair(
    root: Path | str,
    split: str,
    *,
    categories: Sequence[Mapping[str, Any]] = (),
    dry_run: bool = False,
    replace_good: bool = False,
    workers: int = 1,
    on_progress: OnProgress = lambda progress: None,
) -> Repair:
    """Read all shards of a split and write its index and manifest, if every shard is whole.

    Args:
        categories: entries {"id", "name"} of a COCO file, for names that nothing else tells.
        dry_run: write nothing.
        replace_good: write even where a good manifest, the records of the build or the index speak against the shards.
        workers: threads.
        on_progress: called after each sample, from any thread, one at a time.

    Raises:
        ValueError: there are no shards of this name, or a build of the split is running.
    """
    root = Path(root)
    names = shard_files(root, split) if root.is_dir() else []
    if not names:
        others = sorted(path.name for path in root.glob("*.tar")) if root.is_dir() else []
        raise ValueError(
            f"{root} holds no shards {shard_name(split, 0)}, ...; tars there: {some(others) or 'none'}. "
            f"Shards of another program must be named so."
        )
    known = Witnesses.gather(root, split, names)
    plain = not known.ours
    hashed = known.decoded and (replace_good or not all(map(_has_rows, known.shard_records)))
    shards = list(
        read_shards(
            list(zip((root / name for name in names), known.rows, strict=True)),
            lambda content, rows: _finish(content, rows, split),
            plain=plain,
            look=_dhash if hashed else None,
            workers=workers,
            on_progress=on_progress,
        )
    )
    problems = _gaps(names, split) + ([] if known.good else left_overs(root, split))
    problems += [problem for shard in shards for problem in shard.problems]
    problems += repeated({shard.file.name: shard.rows["image_id"] for shard in shards})
    outcome = Repair(split, sum(shard.file.count for shard in shards), len(shards), (), False, (), ())
    if problems:
        # Then all that is lost, also what the old index alone knows of.
        said = known.digests
        more = [one for shard in shards if said.get(shard.file.name) != shard.file.sha256 for one in shard.doubts]
        problems += [replace(one, fix=rebuild_hint(split)) for one in more]
        return replace(outcome, problems=tuple(problems))
    for shard, recorded in zip(shards, known.shard_records, strict=True):
        _take_hashes(shard, recorded)
    index = np.concatenate([shard.rows for shard in shards])
    index["shard"] = np.repeat(np.arange(len(shards)), [shard.file.count for shard in shards])
    if not len(index):
        raise ValueError(f"the shards of {split!r} in {root} are empty")
    same = b"" if known.manifest is None else _assemble(split, shards, index, known.rest())
    proved = known.manifest is not None and orjson.loads(same)["sha256"] == known.manifest["sha256"]
    if not proved and not replace_good and (doubts := _doubts(known, shards, root, split)):
        return replace(outcome, problems=tuple(doubts))
    notes: list[str] = []
    manifest = same
    if not proved or (categories and "categories" in known.unknown):
        used = set().union(*(shard.categories for shard in shards))
        rest, notes = known.recover(used, categories)
        if known.good and not replace_good and not proved:
            notes.append("the index is not the lost one: the build hashed the pictures before it re-encoded them")
        manifest = _assemble(split, shards, index, rest)
    files = {index_path(root, split): _index_bytes(index), manifest_path(root, split): manifest}
    changed = {path.name: data for path, data in files.items() if not path.is_file() or path.read_bytes() != data}
    if changed and not dry_run:
        _write(root, split, changed)
    return replace(outcome, written=tuple(changed), original=proved and not known.unknown, notes=tuple(notes))


def _write(root: Path, split: str, files: Mapping[str, bytes]) -> None:
    """Each file at once or not at all, the index first, and never while a build of the split runs."""
    output = LocalOutput(root, split)
    output.open()
    with exclusive(output.scratch):
        for name, data in files.items():
            output.write(name, data)


def _finish(content: ShardContent, old: npt.NDArray[Any] | None, split: str) -> _Shard:
    rows = np.zeros(len(content.rows), dtype=INDEX_DTYPE)
    for column in (name for name in INDEX_DTYPE.names or () if name != "shard"):
        rows[column] = [row[column] for row in content.rows]
    file = ShardFile(content.name, len(rows), content.bytes, content.sha256)
    problems = [replace(problem, fix=problem.fix or rebuild_hint(split)) for problem in content.problems]
    doubts = [] if old is None else _against_index(content, rows, old, split)
    return _Shard(file, rows, content.counts, content.words, content.categories, problems, doubts)


def _against_index(content: ShardContent, rows: npt.NDArray[Any], old: npt.NDArray[Any], split: str) -> list[Problem]:
    """What the index that is there says otherwise than a shard: one of the two is damaged, or they do not belong."""
    doubts: list[Problem] = []
    _, ours, theirs = np.intersect1d(rows["image_id"], old["image_id"], return_indices=True)
    for part in ("image", "label"):
        for mine, row in zip(rows[ours], old[theirs], strict=True):
            if mine[f"{part}_size"] == row[f"{part}_size"] and mine[f"{part}_crc32"] != row[f"{part}_crc32"]:
                key, offset = f"{row['image_id']:012d}", int(mine[f"{part}_offset"])
                message = f"{part} of {key} at offset {offset}: its crc32 is not the one in the index"
                doubts.append(Problem(content.name, message, (key,), offset, _either(split)))
    keys = [f"{image_id:012d}" for image_id in np.setdiff1d(old["image_id"], rows["image_id"]).tolist()]
    lost = tuple(key for key in keys if key not in content.blamed)
    if lost:
        message = f"{len(lost)} samples of the index are not there: {some(lost)}"
        doubts.append(Problem(content.name, message, lost, fix=_either(split)))
    return doubts


def _either(split: str) -> str:
    return f"{rebuild_hint(split)} If the shards are right as they are: the same command with --replace."


def _doubts(known: Witnesses, shards: Sequence[_Shard], root: Path, split: str) -> list[Problem]:
    """What a good manifest, or else the records of the build and the old index, say against whole shards."""
    if known.good:
        found = {shard.file.name: shard for shard in shards}
        names = sorted(known.digests.keys() | found.keys())
        differing = [name for name in names if name not in found or found[name].file.sha256 != known.digests.get(name)]
        if not differing:
            return []
        message = f"it is good, but describes other shards: {some(differing)}; nothing was written"
        members = [problem for name in differing if name in found for problem in found[name].doubts]
        return [Problem(manifest_path(root, split).name, message, fix=_either(split)), *members]
    problems = []
    for shard in shards:
        recorded = known.digests.get(shard.file.name)
        if recorded is None:
            problems += shard.doubts
        elif recorded != shard.file.sha256:
            message = f"sha256 is {shard.file.sha256}, the build recorded {recorded}"
            problems += [Problem(shard.file.name, message, fix=_either(split)), *shard.doubts]
    return problems


def _has_rows(recorded: Mapping[str, Any]) -> bool:
    """Whether the record of a shard has index rows of this version."""
    rows = recorded.get("rows")
    return isinstance(rows, list) and all(isinstance(row, list) and len(row) == len(_COLUMNS) for row in rows)


def _take_hashes(shard: _Shard, recorded: Mapping[str, Any]) -> None:
    """The build hashed the pictures as they were given; of pictures that it re-encoded nothing else tells that."""
    if recorded.get("sha256") == shard.file.sha256 and _has_rows(recorded) and len(recorded["rows"]) == len(shard.rows):
        place = _COLUMNS.index("dhash")
        shard.rows["dhash"] = [row[place] for row in recorded["rows"]]


def _dhash(data: bytes, label: Mapping[str, Any]) -> int:
    """Decode an image as the build does. Raises ValueError where it would be quarantined."""
    height, width = stored_size(label)
    image = SourceImage(label["image_id"], label["file_name"], width, height, b"", (), 0, 0, 0)
    checked = check_image(data, image)
    if checked.reason is not None:
        raise ValueError(f"{checked.reason}: {checked.detail}")
    return checked.dhash


def _gaps(names: Sequence[str], split: str) -> list[Problem]:
    expected = [shard_name(split, number) for number in range(int(names[-1][:-4].rpartition("-")[2]) + 1)]
    missing = [name for name in expected if name not in set(names)]
    strange = [name for name in names if name not in set(expected)]
    fix = rebuild_hint(split)
    problems = [Problem(name, "missing", fix=fix) for name in missing]
    return problems + [Problem(name, "its number has zeros too many", fix=f"Move {name} away.") for name in strange]


def _assemble(split: str, shards: Sequence[_Shard], index: npt.NDArray[Any], rest: Rest) -> bytes:
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
    words: Counter[str] = Counter()
    for shard in shards:
        counts.update(shard.counts)
        words.update(shard.words)
    return manifest_bytes(
        split=split,
        categories=rest.categories,
        counts={**counts, "quarantined": len(rest.quarantine)},
        shards=[shard.file for shard in shards],
        index=index,
        index_file=_index_bytes(index),
        vocabulary=words,
        quarantine=rest.quarantine,
        findings=rest.findings,
        options=rest.options,
        sources=rest.sources,
    )


def _index_bytes(index: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, index, allow_pickle=False)
    return buffer.getvalue()
