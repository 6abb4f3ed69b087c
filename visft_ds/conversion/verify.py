"""Checking whole splits, byte by byte."""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visft_ds.data.manifest import Manifest, ShardFile, fingerprint, read_manifest, shard_files, splits_in

_BLOCK = 512
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a split."""

    file: str
    message: str


def verify(root: Path | str, split: str) -> list[Problem]:
    """Read everything of a split and list what is wrong; an empty list means every byte is as it was made.

    Raises:
        ValueError: there is no such split at all.
    """
    root = Path(root)
    if split not in splits_in(root):
        read_manifest(root, split)  # raises with the splits that do exist
    try:
        fields = read_manifest(root, split)
    except ValueError as error:
        return [Problem(f"{split}.manifest.json", str(error))]
    shards = [ShardFile(**shard) for shard in fields["shards"]]
    present = [shard for shard in shards if (root / shard.name).is_file()]
    problems = [Problem(shard.name, "missing") for shard in shards if shard not in present]
    listed = {shard.name for shard in shards}
    extra = [name for name in shard_files(root, split) if name not in listed]
    problems += [Problem(name, "not part of this split, yet named like a shard of it") for name in extra]
    manifest = _open_leniently(root, split, problems)
    for number, shard in enumerate(shards):
        if shard in present and (digest := file_sha256(root / shard.name)) != shard.sha256:
            problems.append(Problem(shard.name, f"sha256 is {digest}, not {shard.sha256} as when it was made"))
            problems += _locate(root / shard.name, number, shard, manifest)
    return problems


def _open_leniently(root: Path, split: str, problems: list[Problem]) -> Manifest | None:
    """The manifest if its index is good, whatever the state of the shards; problems of the index are noted."""
    try:
        manifest = Manifest.load(root, split, check_shards=False)
    except ValueError as error:
        problems.append(Problem(f"{split}.index.npy", str(error)))
        return None
    if fingerprint(manifest.categories, manifest.index) != manifest.fingerprint:
        problems.append(Problem(f"{split}.index.npy", "its content does not give the fingerprint in the manifest"))
    return manifest


def _locate(path: Path, number: int, shard: ShardFile, manifest: Manifest | None) -> list[Problem]:
    """Say where a shard differs: its length, the headers of its members, their payloads."""
    problems = []
    size = path.stat().st_size
    if size != shard.bytes:
        problems.append(Problem(shard.name, f"{size} bytes, not {shard.bytes}"))
    if manifest is None:
        return problems
    with open(path, "rb") as file:
        for row in manifest.index[manifest.index["shard"] == number]:
            for part in ("image", "label"):
                problems += _check_member(file, shard.name, f"{row['image_id']:012d}", part, row)
    return problems


def _check_member(file: Any, shard: str, key: str, part: str, row: Any) -> list[Problem]:
    offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
    file.seek(offset - _BLOCK)
    header, payload = file.read(_BLOCK), file.read(size)
    problems = []
    if not _header_fits(header, key, size):
        problems.append(Problem(shard, f"header of the {part} of {key} at offset {offset - _BLOCK} is damaged"))
    if len(payload) < size:
        problems.append(Problem(shard, f"{part} of {key} at offset {offset}: only {len(payload)} of {size} bytes"))
    elif zlib.crc32(payload) != row[f"{part}_crc32"]:
        problems.append(Problem(shard, f"{part} of {key} at offset {offset}: crc32 differs"))
    return problems


def _header_fits(header: bytes, key: str, size: int) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except tarfile.HeaderError:
        return False
    return info.size == size and info.name.split(".")[0] == key


def file_sha256(path: Path) -> str:
    """Digest of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
