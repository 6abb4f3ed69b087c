"""Comparison of the content of a shard with manifest and index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from visft_ds.data.manifest import ShardFile
from visft_ds.shards.shard_content import Problem, ShardContent, some

_LABEL_COLUMNS = ("width", "height", "num_annotations", "num_captions")


def compare_shard(
    content: ShardContent, shard: ShardFile, rows: npt.NDArray[Any] | None, by_digest: Mapping[str, str]
) -> list[Problem]:
    """List the problems of a shard, by itself and in comparison with manifest and index.

    Args:
        content: of the tar.
        shard: its entry in the manifest.
        rows: its rows of the index; None without a valid index.
        by_digest: sha256 of every shard of the split -> its name.
    """
    problems = list(content.problems)
    if content.sha256 == shard.sha256:
        return problems + _compare_rows(content, shard, rows)
    if content.sha256 in by_digest:
        other = by_digest[content.sha256]
        message = f"its content is that of {other}: swapped or copied over"
        return [
            Problem(shard.name, message, fix=f"Exchange the names of {shard.name} and {other}, or run the build again.")
        ]
    head = [Problem(shard.name, f"sha256 is {content.sha256}, not {shard.sha256} as when it was made")]
    if content.bytes != shard.bytes:
        head.append(Problem(shard.name, f"{content.bytes} bytes, not {shard.bytes}"))
    return head + problems + _compare_rows(content, shard, rows)


def _compare_rows(content: ShardContent, shard: ShardFile, rows: npt.NDArray[Any] | None) -> list[Problem]:
    if rows is None:
        return []
    found = {row["image_id"]: row for row in content.rows}
    problems, elsewhere, cut = [], [], []
    for row in (dict(zip(rows.dtype.names or (), values, strict=True)) for values in rows.tolist()):
        key = f"{row['image_id']:012d}"
        if row["label_offset"] + row["label_size"] > content.bytes:
            cut.append(key)
        elif _is_elsewhere(row, key, content):
            elsewhere.append(key)
        else:
            problems += _compare_row(row, key, content, found.get(row["image_id"]))
    if cut:
        last = int(rows["label_offset"][-1] + rows["label_size"][-1])
        message = f"only {content.bytes} bytes of at least {last} are there; {len(cut)} samples are lost: {some(cut)}"
        problems.append(Problem(shard.name, message, tuple(cut), content.bytes))
    known = set(rows["image_id"].tolist())
    strange = [f"{image_id:012d}" for image_id in found if image_id not in known]
    lost = tuple(key for key in elsewhere if key not in content.blamed)
    if (lost or strange) and not content.damaged and not cut:
        same = len(rows) - len(elsewhere)
        message = (
            f"a whole shard, but not the one that index and manifest describe ({same} of their {len(rows)} samples are "
            "where they should be): it was made again, or they are older and belong to another build"
        )
        problems.append(Problem(shard.name, message, tuple(dict.fromkeys([*lost, *strange]))))
    elif lost:
        problems.append(Problem(shard.name, f"{len(lost)} samples are not where they should be: {some(lost)}", lost))
    return problems


def _is_elsewhere(row: Mapping[str, int], key: str, content: ShardContent) -> bool:
    members = (content.members.get(row[f"{part}_offset"]) for part in ("image", "label"))
    sizes = (row["image_size"], row["label_size"])
    return any(
        member is None or _names_other(member[0], key) or member[1] != size
        for member, size in zip(members, sizes, strict=True)
    )


def _names_other(name: str, key: str) -> bool:
    """Keys of other programs may be anything that is no number."""
    return name.isdecimal() and name != key and int(name) != int(key)


def _compare_row(
    row: Mapping[str, int], key: str, content: ShardContent, found: Mapping[str, int] | None
) -> list[Problem]:
    problems = []
    for part in ("image", "label"):
        offset = row[f"{part}_offset"]
        crc32 = content.members[offset][2]
        if crc32 != row[f"{part}_crc32"]:
            message = f"{part} of {key} at offset {offset}: crc32 differs ({crc32:08x}, not {row[f'{part}_crc32']:08x})"
            problems.append(Problem(content.name, message, (key,), offset))
    columns = [] if found is None or problems else [name for name in _LABEL_COLUMNS if found[name] != row[name]]
    problems += [
        Problem(content.name, f"{name} of {key} is {found[name] if found else ''}, the index says {row[name]}", (key,))
        for name in columns
    ]
    return problems
