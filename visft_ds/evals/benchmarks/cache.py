"""Results on disk, named by a hash of all that they depend on: nothing is computed twice, and a killed run goes on.

Work is cut into chunks of fixed content, whoever computes them: so numbers do not depend on how many processes there
are, and are complete or absent. All processes need the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    def _chunks(self) -> dict[range, Path]:
        chunks = [range(start, min(start + CHUNK, self.count)) for start in range(0, self.count, CHUNK)]
        folder = self.folder / key_of(self.what)
        return {chunk: folder / f"{number:06d}.safetensors" for number, chunk in enumerate(chunks)}

    def fill(self, compute: Callable[[Iterable[range]], Iterator[Chunk]]) -> None:
        """Compute what is missing. Collective: every rank computes its share.

        Args:
            compute: chunks of item numbers -> their features, in order.
        """
        chunks = self._chunks
        if distributed.is_main():
            text = json.dumps(self.what, indent=1, sort_keys=True).encode()
            place = self.folder / key_of(self.what) / _DESCRIPTION
            write_atomically(place, lambda file: file.write(text), overwrite=True)
        missing = distributed.broadcast_object([chunk for chunk, path in chunks.items() if not path.exists()])
        share = missing[distributed.rank() :: distributed.world_size()]
        for chunk, features in zip(share, compute(share), strict=True):
            save_tensors(chunks[chunk], features, {}, overwrite=True)
        distributed.barrier()

    def read(self) -> dict[str, Tensor]:
        """Name -> (count, ...). Raises ValueError for a damaged file of the cache."""
        parts = [_read(path, len(chunk)) for chunk, path in self._chunks.items()]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


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
