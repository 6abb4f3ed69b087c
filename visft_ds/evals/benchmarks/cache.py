"""Results on disk, named by a hash of all that they depend on: nothing is computed twice, and a killed run goes on.

Work is cut into chunks of fixed content, whoever computes them: so numbers do not depend on how many processes there
are, and are complete or absent. All processes need the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from visft_ds.interop.files import open_weights
from visft_ds.interop.writing import save_tensors, write_atomically
from visft_ds.parallel import distributed

CHUNK = 256  #: items of a chunk
_DESCRIPTION = "what.json"

Chunk = Mapping[str, Tensor]  #: name -> (items, ...)


def key_of(what: Mapping[str, Any]) -> str:
    """A name for the result of something that is described in JSON's types."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Stored:
    """Features in the cache."""

    folder: Path
    what: Mapping[str, Any]  #: all that they depend on
    count: int  #: of items

    @property
    def chunks(self) -> dict[range, Path]:
        """Chunks of item numbers -> their files."""
        chunks = [range(start, min(start + CHUNK, self.count)) for start in range(0, self.count, CHUNK)]
        folder = self.folder / key_of(self.what)
        return {chunk: folder / f"{number:06d}.safetensors" for number, chunk in enumerate(chunks)}

    def read(self) -> dict[str, Tensor]:
        """Name -> (count, ...). Raises ValueError for a damaged file of the cache."""
        parts = [_read(path, len(chunk)) for chunk, path in self.chunks.items()]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def fill(several: Sequence[Stored], compute: Callable[[Iterable[range]], Iterator[Sequence[Chunk]]]) -> None:
    """Compute what is missing of features of the same items. Collective: every rank computes its share.

    Args:
        compute: chunks of item numbers -> their features for each of several, in order.
    """
    files = [stored.chunks for stored in several]
    if distributed.is_main():
        for stored in several:
            text = json.dumps(stored.what, indent=1, sort_keys=True).encode()
            place = stored.folder / key_of(stored.what) / _DESCRIPTION
            write_atomically(place, partial(_write, text), overwrite=True)
    missing = [chunk for chunk in files[0] if not all(paths[chunk].exists() for paths in files)]
    missing = distributed.broadcast_object(missing)
    share = missing[distributed.rank() :: distributed.world_size()]
    for chunk, features in zip(share, compute(share), strict=True):
        for paths, part in zip(files, features, strict=True):
            save_tensors(paths[chunk], part, {}, overwrite=True)
    distributed.barrier()


def _write(text: bytes, file: BinaryIO) -> None:
    file.write(text)


def _read(path: Path, count: int) -> dict[str, Tensor]:
    file = open_weights(path)
    found = {name: file.get(name) for name in file}
    if not found or any(value.shape[0] != count for value in found.values()):
        raise ValueError(f"{path} does not hold {count} items: remove it, and it is made again")
    return found


def load_record(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """(tensors, texts) of a small result; None where there is no such file."""
    if not path.exists():
        return None
    file = open_weights(path)
    return {name: file.get(name).clone() for name in file}, file.metadata
