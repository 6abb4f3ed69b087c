"""Weight files on disk: one lazy reader for `.safetensors` and `.pt/.pth/.ckpt/.bin`.

Nothing here knows what the tensors mean. A `WeightFile` knows names, shapes and dtypes without touching the data and
hands out one tensor at a time, so a 10 GB file is never in memory twice.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from visft_ds.config.records import as_record
from visft_ds.files import reading

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
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
LAYERS = "layers"
_ZIP_MAGIC = b"PK\x03\x04"
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

    `metadata` holds the str -> str header of a safetensors file and is empty for pickled files.
    """

    def __init__(
        self,
        path: Path,
        infos: Mapping[str, TensorInfo],
        read: Callable[[str], Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self.infos = dict(infos)
        self.metadata = dict(metadata)
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
    if not path.is_file():
        raise ValueError(f"{path}: {'a folder, not a weight file' if path.is_dir() else 'no such file'}")
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _open_pickled(path)
    raise ValueError(
        f"{path}: unknown kind of weight file {path.suffix!r}; allowed: .safetensors, {', '.join(PICKLE_SUFFIXES)}"
    )


def _open_safetensors(path: Path) -> WeightFile:
    with reading(path, "a safetensors file"):
        handle = safe_open(path, framework="pt", device="cpu")
        infos = {}
        for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
            view = handle.get_slice(name)
            if view.get_dtype() not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name} has dtype {view.get_dtype()}; allowed: {', '.join(SAFETENSORS_DTYPES)}")
            infos[name] = TensorInfo(tuple(view.get_shape()), SAFETENSORS_DTYPES[view.get_dtype()])
        metadata = handle.metadata() or {}
    renamed = _without_module_prefix(list(infos))
    infos = {new: infos[old] for new, old in renamed.items()}
    return WeightFile(path, infos, lambda name: handle.get_tensor(renamed[name]), metadata)


def load_pickled(path: Path) -> Any:
    """The only `torch.load` of this package: tensors and plain containers only, code in the pickle is never run.

    Zip files (torch >= 1.6) are memory-mapped. Older torch files cannot be, and are read whole.
    """
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    with reading(path, "a file that torch.save wrote"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage")  # of torch, about its own message on damaged pickles
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except OSError as error:  # of a zip that is cut, too: it names no file
            raise ValueError(str(error)) from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                "damaged, or pickled objects besides tensors, which could run code when they are loaded: convert a "
                "file that you trust to .safetensors"
            ) from error


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
    return WeightFile(path, infos, lambda name: tensors[renamed[name]].detach(), {})


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


def sha256_file(path: str | Path) -> str:
    """sha256 of a file's bytes, lower-case hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
