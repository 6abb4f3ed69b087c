"""Writing weight files: safetensors, and torch's own zip for programs that read no other.

safetensors files are written tensor by tensor, so that one of any size needs the memory of its largest. All stand
whole under their name or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visft_ds import __version__
from visft_ds.files import sync_folder
from visft_ds.interop.files import SAFETENSORS_DTYPES, TensorInfo

_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
#: Numbers of the errors of a disk, or of a user's share of it, that is full.
FULL = (errno.ENOSPC, errno.EDQUOT)


def refuse_existing(path: Path) -> None:
    """Raise ValueError where something already stands at `path`."""
    if path.exists():
        raise ValueError(f"{path} exists and is not overwritten: remove it or choose another name")


def write_atomically(path: Path, write: Callable[[Any], None], *, overwrite: bool = False) -> None:
    """Call `write(binary file)` on a temporary neighbour, fsync it and rename it to `path`.

    `path` either keeps what it had or holds the whole new content, whatever happens in between; a failed write leaves
    nothing behind. The folder is made. Raises ValueError where `path` exists and `overwrite` is off.
    """
    path = Path(path)
    if not overwrite:
        refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)  # or the rename itself may be lost by a power failure


@contextmanager
def full_disk_explained(size: int) -> Iterator[None]:
    """Have the OSError of a full disk say how many bytes were to be written; it names none by itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = f"{error.strerror}, {size / 1e6:,.1f} MB are to be written"
        raise OSError(error.errno, message, error.filename) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what `write_atomically` left anywhere below `folder` in a process that was killed meanwhile."""
    for path in folder.rglob(".*.tmp-*"):
        path.unlink()


def write_text(path: Path, text: str, *, overwrite: bool = False) -> None:
    """Write UTF-8 text atomically (see `write_atomically`)."""
    write_atomically(path, lambda file: file.write(text.encode("utf-8")), overwrite=overwrite)


def write_safetensors(
    path: str | Path,
    infos: Mapping[str, TensorInfo],
    produce: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Stream a safetensors file: `produce(name)` is called once per tensor, in file order, and the result is dropped.

    The library's own writer needs all tensors at once; this one peaks at one tensor. `metadata` gains `format` ("pt",
    which transformers and PEFT ask for) and `visft_ds` (our version). Atomic. Raises ValueError for a dtype that
    safetensors lacks, and where `path` exists and `overwrite` is off.
    """
    path = Path(path)
    pieces = safetensors_pieces(path, infos, produce, {"visft_ds": __version__, **metadata})

    def write(file: Any) -> None:
        for piece in pieces:
            file.write(piece)

    with full_disk_explained(sum(info.nbytes for info in infos.values())):
        write_atomically(path, write, overwrite=overwrite)


def safetensors_pieces(
    path: Path, infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor; `path` is named in errors only.

    Raises ValueError for a dtype that safetensors lacks, before anything is produced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    order, end = file_order(infos), 0
    for name in order:
        info = infos[name]
        if info.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{path}: {name} has dtype {info.dtype}, which safetensors cannot hold")
        start, end = end, end + info.nbytes
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    assert sys.byteorder == "little", "safetensors is little-endian"
    return _pieces(text, order, infos, produce)


def file_order(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Names in the order in which `write_safetensors` asks for them."""
    # Largest element first: then every tensor starts at a multiple of its element size, as readers that map the file
    # need.
    return sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))


def _pieces(
    header: bytes, order: list[str], infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor]
) -> Iterator[bytes | memoryview]:
    yield struct.pack("<Q", len(header)) + header
    for name in order:
        tensor = produce(name).detach().cpu().contiguous()
        assert TensorInfo.of(tensor) == infos[name], f"{name}: {TensorInfo.of(tensor)} is not {infos[name]}"
        # One element that was expanded counts as contiguous with any stride; a view as bytes wants 1.
        yield tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def save_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """`write_safetensors` for tensors that are in memory already."""
    infos = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    write_safetensors(path, infos, lambda name: tensors[name], metadata, overwrite=overwrite)


def write_torch(path: Path, infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor]) -> None:
    """Write name -> tensor as `torch.save` does, flat: without metadata, and with all tensors in memory at once.

    Atomic. Raises ValueError where `path` exists.
    """
    refuse_existing(path)
    # Copies: a view would take the whole storage that it is a part of into the file.
    tensors = {name: produce(name).detach().cpu().clone().contiguous() for name in infos}

    def write(file: Any) -> None:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # why the file could not be written; torch went on and ended it
                raise error.__context__ from error
            raise

    with full_disk_explained(sum(info.nbytes for info in infos.values())):
        write_atomically(path, write)
