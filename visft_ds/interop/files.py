"""Weight files on disk: one lazy reader for `.safetensors` and `.pt/.pth/.ckpt/.bin`, one atomic writer.

Nothing here knows what the tensors mean. A `WeightFile` knows names, shapes and dtypes without touching the data and
hands out one tensor at a time, so a 10 GB file is never in memory twice.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visft_ds import __version__
from visft_ds.data.store import file_digest

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Names under which training scripts nest the weights beside optimizer state and counters.
NESTS = ("model", "state_dict", "module")
_ZIP_MAGIC = b"PK\x03\x04"
# torch.save before 1.6 (and with _use_new_zipfile_serialization=False) starts with this pickled number.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

# https://github.com/huggingface/safetensors#format
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """The description of a tensor at hand."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.numel * self.dtype.itemsize


class WeightFile:
    """Names, shapes and dtypes of an open weight file; `get` reads one tensor (CPU, in the file's dtype).

    `metadata` holds the str -> str header of a safetensors file and is empty for pickled files.
    """

    def __init__(
        self, path: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.infos = dict(infos)
        self.metadata = dict(metadata)
        self._read = read

    def get(self, name: str) -> Tensor:
        """Read one tensor. The result may share memory with the mapped file: copy before writing into it."""
        if name not in self.infos:
            raise ValueError(f"{self.path}: there is no tensor {name!r}; the file has {examples(self.infos)}")
        return self._read(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.infos[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor in the file, without reading it."""
        return self.infos[name].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, name: object) -> bool:
        return name in self.infos


def examples(names: Mapping[str, object] | list[str] | tuple[str, ...], limit: int = 4) -> str:
    """`a, b, c, ... (840 in all)`: a readable sample of many names for messages."""
    listed = list(names)
    if not listed:
        return "nothing"
    head = ", ".join(listed[:limit])
    return head if len(listed) <= limit else f"{head}, ... ({len(listed)} in all)"


def open_weights(path: str | Path) -> WeightFile:
    """Open a weight file lazily; the layout of the names is the file's own, less nesting and a `module.` prefix.

    Raises ValueError for a missing file, an unknown suffix, a damaged or truncated file, a pickle that holds anything
    but tensors (never executed), and an ambiguous nesting.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; a weight file is needed (.safetensors, {', '.join(PICKLE_SUFFIXES)})")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickled(path)
    raise ValueError(
        f"{path}: unknown kind of weight file {path.suffix!r}; allowed: .safetensors, {', '.join(PICKLE_SUFFIXES)}"
    )


def _open_safetensors(path: Path) -> WeightFile:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        infos = {}
        for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
            view = handle.get_slice(name)
            if view.get_dtype() not in _DTYPES:
                raise ValueError(f"{path}: {name} has dtype {view.get_dtype()}; allowed: {', '.join(_DTYPES)}")
            infos[name] = TensorInfo(tuple(view.get_shape()), _DTYPES[view.get_dtype()])
        metadata = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). {_looks_like(path)}") from error
    renamed = _without_module_prefix(list(infos))
    return WeightFile(path, {new: infos[old] for new, old in renamed.items()}, _reader(handle, renamed), metadata)


def _reader(handle: Any, renamed: Mapping[str, str]) -> Callable[[str], Tensor]:
    return lambda name: handle.get_tensor(renamed[name])


def load_pickled(path: Path) -> Any:
    """The only `torch.load` of this package: tensors and plain containers only, code in the pickle is never run.

    Zip files (torch >= 1.6) are memory-mapped. Older torch files cannot be, and are read whole.
    """
    with path.open("rb") as file:
        head = file.read(len(_LEGACY_MAGIC))
    if not head.startswith((_ZIP_MAGIC, _LEGACY_MAGIC)):
        raise ValueError(f"{path} was not written by torch.save. {_looks_like(path)}")
    # torch reports a cut zip file as RuntimeError or as OSError (invalid argument), depending on where the cut is.
    if head.startswith(_ZIP_MAGIC) and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or only a part of the file (no directory). {_looks_like(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=head.startswith(_ZIP_MAGIC))
    except pickle.UnpicklingError as error:
        detail = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"{path} holds pickled objects besides tensors and plain containers ({detail}). Such a file can run code "
            f"when it is loaded, so it is refused. Where you trust it, convert it once yourself to .safetensors"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        first_line = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or only a part of the file ({first_line}). {_looks_like(path)}") from error


def _open_pickled(path: Path) -> WeightFile:
    tensors = _unwrap(load_pickled(path), path)
    foreign = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
    if foreign:
        kinds = {name: type(value).__name__ for name, value in foreign.items()}
        shown = examples([f"{name} ({kind})" for name, kind in kinds.items()])
        raise ValueError(f"{path}: expected name -> tensor, but these entries are no tensors: {shown}")
    renamed = _without_module_prefix(list(tensors))
    infos = {new: TensorInfo.of(tensors[old]) for new, old in renamed.items()}
    return WeightFile(path, infos, lambda name: tensors[renamed[name]], {})


def _unwrap(content: Any, path: Path) -> dict[str, Any]:
    """Follow `model` / `state_dict` / `module` down to the mapping that holds the tensors."""
    trail = ""
    while True:
        if not isinstance(content, Mapping):
            kind = type(content).__name__
            raise ValueError(f"{path}: expected a mapping name -> tensor{trail}, found {kind}")
        nests = [name for name in NESTS if isinstance(content.get(name), Mapping)]
        if not nests:
            break
        if len(nests) > 1:
            raise ValueError(f"{path}: several nested weight mappings{trail}: {', '.join(nests)}; keep one of them")
        content, trail = content[nests[0]], f"{trail} under {nests[0]!r}"
    names = [name for name in content if not isinstance(name, str)]
    if names:
        raise ValueError(f"{path}: names of tensors must be text, found {names[0]!r}")
    return dict(content)


def _without_module_prefix(names: list[str]) -> dict[str, str]:
    """New name -> name in the file; `module.` (DistributedDataParallel) goes only where every name has it."""
    prefix = "module."
    strip = bool(names) and all(name.startswith(prefix) for name in names)
    return {name[len(prefix) :] if strip else name: name for name in names}


def _looks_like(path: Path) -> str:
    """What a wrong file probably is, from its first bytes, and what to do about it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
    if size == 0:
        return "The file is empty: fetch it again"
    if head.startswith(b"version https://git-lfs"):
        return "It is a git-lfs pointer, not the data: run `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "It is a web page (a failed download?): fetch the file again"
    if head.startswith(_ZIP_MAGIC):
        return f"It is a torch zip file of {size:,} bytes: compare the size with the source and fetch it again"
    return f"It has {size:,} bytes and begins with {head[:16]!r}: compare size and name with the source"


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, lower-case hexadecimal."""
    with Path(path).open("rb") as file:
        return file_digest(file)


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
    # Without this the rename itself may be lost by a power failure.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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

    write_atomically(path, write, overwrite=overwrite)


def safetensors_pieces(
    path: Path, infos: Mapping[str, TensorInfo], produce: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor; `path` is named in errors only.

    Raises ValueError for a dtype that safetensors lacks, before anything is produced.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    # Largest element first: then every tensor starts at a multiple of its element size, as readers that map the file
    # need.
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    end = 0
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
