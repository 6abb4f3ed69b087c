"""Weight files on disk: one lazy reader for `.safetensors` (or shards) and `.pt/.pth/.ckpt/.bin`.

Nothing here knows what the tensors mean. A `WeightFile` knows names, shapes and dtypes without touching the data and
hands out one tensor at a time, so a 10 GB file is never in memory twice.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from visft_ds.config.fields import StrictModel
from visft_ds.config.records import as_record, read_record
from visft_ds.names import checked_name

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Ending of the file that says which shard holds which tensor, as transformers writes it.
INDEX = ".safetensors.index.json"
# Names under which training scripts nest the weights beside optimizer state and counters.
NESTS = ("model", "state_dict", "module")
#: Entry of the header of a file whose vision tower is that of another file, unchanged: the other's `base_identity`.
VISION_OF = "vision_of"
#: Entry of the header of random base weights: their recipe, by which heads know them that learnt while no file was
#: there; and of weights that training made of them.
DRAWN_AS, BASE_DRAWN_AS = "drawn_as", "base_drawn_as"
#: Entries of the header of weights that training changed: sha256 of the base they were made of, by merging or directly.
BASE_SHA256, TRAINED_ON = "base_sha256", "trained_on"
#: Entry of the header of a tower that trained itself: JSON, our names of what trained; the rest is as in its base.
TRAINED = "trained"
#: Entry of the header of weights that trained up to a block, whose result is what they are read for: its name.
UNTIL = "until"
_ZIP_MAGIC = b"PK\x03\x04"
# torch.save before 1.6 (and with _use_new_zipfile_serialization=False) starts with this pickled number.
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."

#: What torch and zipfile raise for files that are damaged, besides pickle.UnpicklingError.
_DAMAGED = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, AssertionError),
    *(OverflowError, struct.error, zipfile.BadZipFile),
)
#: Opcodes of pickle that push a whole number.
_WHOLE_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1")

#: Values that are looked at at once.
_PIECE = 2**20
# https://github.com/huggingface/safetensors#format
SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
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


Told = TypeVar("Told")


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

    `metadata` holds the str -> str header of a safetensors file and is empty for pickled files. `mapped` is False for
    the old pickled files that cannot be mapped into memory: all of their tensors are in memory from the start.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
        *,
        mapped: bool = True,
    ) -> None:
        self.path = path
        self.infos = dict(infos)
        self.metadata = dict(metadata)
        self.mapped = mapped
        self._read = read

    def told(self, entry: str, kind: type[Told]) -> Told:
        """An entry of the metadata that is JSON. Raises ValueError where it is of another form."""
        return as_record(self.metadata[entry], kind, f"{self.path}: entry {entry!r} of its header")

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


@dataclass(frozen=True)
class Entry:
    """A tensor of a view: what it is made of, what comes out, and how; by default the only source as it is."""

    sources: tuple[str, ...]
    info: TensorInfo
    make: Callable[..., Tensor] = lambda value: value

    @classmethod
    def same(cls, file: WeightFile, name: str) -> Entry:
        """The tensor of that name, unchanged."""
        return cls((name,), file.infos[name])


def view(file: WeightFile, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> WeightFile:
    """A weight file whose tensors are made from those of another one when they are asked for; it holds none itself.

    `metadata` replaces the file's.
    """

    def read(name: str) -> Tensor:
        entry = entries[name]
        return entry.make(*(file.get(source) for source in entry.sources))

    infos = {name: entry.info for name, entry in entries.items()}
    return WeightFile(file.path, infos, read, file.metadata if metadata is None else metadata)


def all_finite(values: Tensor) -> bool:
    """Return True if nothing in a floating-point tensor is NaN or infinite.

    A sum in fp32 is one pass; inf and NaN both survive it. On a CPU torch first makes an fp32 copy of all that it sums,
    hence in pieces.
    """
    pieces = values.detach().flatten().split(_PIECE)
    return all(bool(piece.sum(dtype=torch.float32).isfinite() or piece.isfinite().all()) for piece in pieces)


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
        raise ValueError(
            f"{path} is a folder; a weight file is needed (.safetensors, {INDEX} of one in shards, "
            f"{', '.join(PICKLE_SUFFIXES)})"
        )
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.name.endswith(INDEX):
        return _open_shards(path)
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
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise ValueError(
                    f"{path}: {name} has dtype {view.get_dtype()}; allowed: {', '.join(SAFETENSORS_DTYPES)}"
                )
            infos[name] = TensorInfo(tuple(view.get_shape()), SAFETENSORS_DTYPES[view.get_dtype()])
        metadata = handle.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}). {_looks_like(path)}") from error
    renamed = _without_module_prefix(list(infos))
    infos = {new: infos[old] for new, old in renamed.items()}
    return WeightFile(path, infos, lambda name: handle.get_tensor(renamed[name]), metadata)


class ShardIndex(StrictModel):
    """Index of weights in shards, as transformers writes it."""

    metadata: dict[str, Any] | None = None
    weight_map: dict[str, str]  #: tensor -> file


def read_index(path: Path) -> dict[str, Path]:
    """Tensor -> the shard that holds it, of an index file. Raises ValueError for anything else, and for lost shards."""
    shards = read_record(path, ShardIndex).weight_map
    for shard in sorted(set(shards.values())):
        checked_name(shard, path)
    if lost := sorted({shard for shard in shards.values() if not os.path.isfile(path.parent / shard)}):
        raise ValueError(f"{path}: {examples(lost)} is missing")
    return {name: path.parent / shard for name, shard in shards.items()}


def _open_shards(path: Path) -> WeightFile:
    places = read_index(path)
    files = {shard: _open_safetensors(shard) for shard in dict.fromkeys(places.values())}
    absent = [f"{name} ({shard.name})" for name, shard in places.items() if name not in files[shard]]
    unlisted = [f"{name} ({shard.name})" for shard, file in files.items() for name in file if places.get(name) != shard]
    if absent or unlisted:
        raise ValueError(
            f"{path} and its shards do not belong together: listed but not there: {examples(absent)}; there but not "
            f"listed: {examples(unlisted)}"
        )
    infos = {name: files[shard].infos[name] for name, shard in places.items()}
    metadata = next((file.metadata for file in files.values()), {})
    return WeightFile(path, infos, lambda name: files[places[name]].get(name), metadata)


def load_pickled(path: Path) -> Any:
    """The only `torch.load` of this package: tensors and plain containers only, code in the pickle is never run.

    Zip files (torch >= 1.6) are memory-mapped. Older torch files cannot be, and are read whole.
    """
    with path.open("rb") as file:
        head = file.read(len(_LEGACY_MAGIC))
    if not head.startswith((_ZIP_MAGIC, _LEGACY_MAGIC)):
        raise ValueError(f"{path} was not written by torch.save. {_looks_like(path)}")
    try:
        wanted = _size_of_zip(path) if head.startswith(_ZIP_MAGIC) else _size_of_legacy(path)
        if wanted > path.stat().st_size:
            raise ValueError(f"its tensors would take {wanted:,} bytes")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TypedStorage")  # of torch, about its own message on damaged pickles
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        detail = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise ValueError(
            f"{path} holds pickled objects besides tensors and plain containers ({detail}). Such a file can run code "
            f"when it is loaded, so it is refused. Where you trust it, convert it once yourself to .safetensors"
        ) from error
    except _DAMAGED as error:
        first_line = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is damaged or only a part of the file ({first_line}). {_looks_like(path)}") from error


def _size_of_zip(path: Path) -> int:
    """Bytes of all members of a zip when they are unpacked; torch.save compresses none."""
    with zipfile.ZipFile(path) as file:
        return sum(member.file_size for member in file.infolist())


def _size_of_legacy(path: Path) -> int:
    """Values of all storages that an older torch file names: torch takes memory for each before it reads it.

    Raises ValueError for storages that are named in another way than torch.save does.
    """
    names: dict[object, int] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for _ in range(5):  # magic number, protocol, system, the object, keys of its storages; then their bytes
            recent: deque[tuple[str, Any]] = deque(maxlen=8)
            for code, argument, _ in pickletools.genops(cast(BinaryIO, content)):  # it reads as a file does
                if code.name == "BINPERSID":
                    # ("storage", type, key, location, number of values, None)
                    mark, *_, (count_kind, count), (none, _), (end, _) = recent
                    if (mark[0], none, end) != ("MARK", "NONE", "TUPLE") or count_kind not in _WHOLE_NUMBERS:
                        raise ValueError("a storage is not named as torch.save names it")
                    names[recent[3]] = max(count, names.get(recent[3], 0))
                if not code.name.endswith("PUT"):
                    recent.append((code.name, argument))
    return sum(names.values())


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def _open_pickled(path: Path) -> WeightFile:
    tensors = _unwrap(load_pickled(path), path)
    foreign = {name: value for name, value in tensors.items() if not isinstance(value, Tensor)}
    if foreign:
        kinds = {name: type(value).__name__ for name, value in foreign.items()}
        shown = examples([f"{name} ({kind})" for name, kind in kinds.items()])
        raise ValueError(f"{path}: expected name -> tensor, but these entries are no tensors: {shown}")
    renamed = _without_module_prefix(list(tensors))
    infos = {new: TensorInfo.of(tensors[old]) for new, old in renamed.items()}
    # Detached, because parameters come back as what requires a gradient.
    return WeightFile(path, infos, lambda name: tensors[renamed[name]].detach(), {}, mapped=_is_zip(path))


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
    """Guess a wrong file's kind from its first bytes, and the remedy, for a message."""
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
    """sha256 of a file's bytes, lower-case hexadecimal; of an index of shards, that of all their hashes."""
    path = Path(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not path.name.endswith(INDEX):
        return digest
    shards = sorted(set(read_index(path).values()))
    return hashlib.sha256("".join([digest, *map(sha256_file, shards)]).encode()).hexdigest()


def base_identity(file: WeightFile) -> str:
    """By which sha256 adapters know the vision tower of a file: its own, or that of the file it has the tower from."""
    return file.metadata.get(VISION_OF) or sha256_file(file.path)


def recipe_of_base(file: WeightFile) -> dict[str, str]:
    """Header entries of weights made from a file about its random start; empty without one."""
    recipe = file.metadata.get(DRAWN_AS) or file.metadata.get(BASE_DRAWN_AS)
    return {BASE_DRAWN_AS: recipe} if recipe else {}


def recorded_bases(file: WeightFile) -> set[str]:
    """Identities of the base that a file holds, or that training made it of, as far as its header records them."""
    entries = (VISION_OF, DRAWN_AS, BASE_DRAWN_AS, BASE_SHA256, TRAINED_ON)
    return {file.metadata[entry] for entry in entries if entry in file.metadata}
