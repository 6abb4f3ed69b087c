"""Weight files that are written in pieces: safetensors in shards, and torch's own zip for programs that read no other.

Both ask for one tensor at a time, so that a file of any size needs the memory of its largest tensor.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from visft_ds.interop.files import INDEX, TensorInfo
from visft_ds.interop.writing import full_disk_told, refuse_existing, write_atomically, write_safetensors, write_text

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_ALIGNMENT = 64  # bytes, as torch.save aligns storages itself


def parse_size(text: str) -> int:
    """`5GB`, `200MB`, `1GiB`, `1000000` -> bytes. Raises ValueError for anything else and for less than one byte."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or float(match[1]) * _UNITS[match[2].upper()] < 1:
        raise ValueError(f"{text!r} is no size: write a number and B, KB, MB, GB, KiB, MiB or GiB, such as 5GB")
    return math.floor(float(match[1]) * _UNITS[match[2].upper()])


def plan_shards(infos: Mapping[str, TensorInfo], limit: int) -> list[list[str]]:
    """Names by shard, in order, so that none holds more than `limit` bytes, except for a single tensor above it."""
    shards: list[list[str]] = []
    size = 0
    for name, info in infos.items():
        if not shards or size + info.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    return shards


def write_shards(
    path: Path,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    limit: int,
) -> list[Path]:
    """Write `name-00001-of-00003.safetensors`, ... and `name.safetensors.index.json`, as transformers names them.

    A model that fits into one shard becomes `path` itself. Each file is atomic, the index comes last: without it the
    shards are no model. A failed write removes them all. Returns the files, the one to open last. Raises ValueError
    where one of them exists.
    """
    shards = plan_shards(infos, limit)
    if len(shards) == 1:
        write_safetensors(path, infos, produce, metadata)
        return [path]
    stem = path.name.removesuffix(".safetensors")
    files = [path.with_name(f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors") for i in range(1, len(shards) + 1)]
    index = path.with_name(stem + INDEX)
    for file in (*files, index):
        refuse_existing(file)
    content = {
        "metadata": {"total_size": sum(info.nbytes for info in infos.values()), **metadata},
        "weight_map": {name: file.name for file, names in zip(files, shards, strict=True) for name in names},
    }
    try:
        for file, names in zip(files, shards, strict=True):
            write_safetensors(file, {name: infos[name] for name in names}, produce, metadata)
        write_text(index, json.dumps(content, indent=2) + "\n")
    finally:
        if not index.exists():
            for file in files:
                file.unlink(missing_ok=True)
    return [*files, index]


def write_torch(path: Path, infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor]) -> None:
    """Write name -> tensor as `torch.save` does, flat. Such a file holds no metadata.

    torch.save wants all tensors at once: they are written one by one to a nameless file beside `path` and handed over
    as its mapped pages, which costs disk instead of memory. Raises ValueError where `path` exists.
    """
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = path.with_name(f".{path.name}.raw-{os.getpid()}")
    offsets: dict[str, int] = {}
    size = sum(info.nbytes for info in infos.values())
    try:
        with full_disk_told(2 * size), raw.open("w+b") as file:
            for name in infos:
                tensor = produce(name).detach().cpu().contiguous()
                assert TensorInfo.of(tensor) == infos[name], name
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                offsets[name] = file.tell()
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            # Private and writable, because torch warns about buffers that are not; nothing is written to it.
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        tensors = {
            name: torch.frombuffer(pages, dtype=info.dtype, count=info.numel, offset=offsets[name]).reshape(info.shape)
            for name, info in infos.items()
        }
        with full_disk_told(size):
            write_atomically(path, partial(_save, tensors))
    finally:
        raw.unlink(missing_ok=True)


def _save(tensors: Mapping[str, Tensor], out: BinaryIO) -> None:
    try:
        torch.save(tensors, out)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # why the file could not be written; torch went on and ended it
            raise error.__context__ from error
        raise
