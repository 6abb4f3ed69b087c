"""Weight files, read lazily and written one tensor at a time: any file needs the memory of its largest
tensor.

Nothing here knows what the tensors mean. Pickled files are read as tensors and plain containers alone, never
run.
"""

from __future__ import annotations

import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from visft_ds import __version__
from visft_ds.files import reading, shown_name, writing

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
#: Names under which training scripts keep the weights beside an optimizer's state and counters.
_NESTS = ("model", "state_dict", "module")
#: Bytes of a pickle without its tensors, some 200 for each of them; its objects take fifty times as much
#: memory.
_MOST_PICKLED = 1 << 26
# https://github.com/huggingface/safetensors#format
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Lazy:
    """A tensor that has not been read; what `read` gives may share memory with the mapped file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Lazy:
        """A tensor at hand."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)


AnyPath = str | Path
Tensors = Mapping[str, Lazy]  #: by name, none of them read yet


def derived(change: Callable[..., Tensor], *sources: Lazy) -> Lazy:
    """The tensor that `change` makes of others when it is read; the meta device tells its shape and dtype."""
    shown = change(*(torch.empty(source.shape, dtype=source.dtype, device="meta") for source in sources))
    return Lazy(tuple(shown.shape), shown.dtype, lambda: change(*(source.read() for source in sources)))


class Weights(dict[str, Lazy]):
    """Name -> tensor, with the path of the file and the header (str -> str) that a safetensors file has."""

    def __init__(self, tensors: Tensors, path: Path, metadata: Mapping[str, str] = {}) -> None:
        super().__init__(tensors)
        self.path = path
        self.metadata = dict(metadata)

    def under(self, prefix: str) -> Weights:
        """The tensors whose names begin so, without that beginning."""
        names = [name for name in self if name.startswith(prefix)]
        return Weights({name.removeprefix(prefix): self[name] for name in names}, self.path, self.metadata)

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in memory of its own, cast. Raises ValueError for values that are not finite then."""
        value = self[name].read()
        result = value.to(dtype or value.dtype, copy=True, memory_format=torch.contiguous_format)
        return finite(result, f"{self.path}: {name}")


def finite(value: Tensor, what: str) -> Tensor:
    """The tensor itself. Raises ValueError for NaN and infinity in it, which are found without a copy."""
    may_be_wrong = value.is_floating_point() and value.numel()
    if may_be_wrong and not torch.stack(value.detach().aminmax()).isfinite().all():
        raise ValueError(f"{what} holds NaN or infinity, or does not fit into {value.dtype}")
    return value


def examples(names: Iterable[str], limit: int = 4) -> str:
    """`a, b, c, ... (840 in all)`: a sample of many names for messages."""
    listed = [shown_name(name) for name in names]
    if not listed:
        return "nothing"
    text = ", ".join(listed[:limit])
    return f"{text}, ... ({len(listed)} in all)" if len(listed) > limit else text


def open_weights(path: AnyPath) -> Weights:
    """Open a weight file; names are the file's own, without a nest and without a `module.` that all of them
    have.

    Raises ValueError for a missing or damaged file, another suffix, and a pickle of anything but tensors.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES) or not path.is_file():
        raise ValueError(f"{path}: no such weight file (.safetensors, {', '.join(PICKLE_SUFFIXES)})")
    with reading(path, "a weight file"):
        weights = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    if all(name.startswith("module.") for name in weights):  # of DistributedDataParallel
        return weights.under("module.")
    return weights


def _safetensors(path: Path) -> Weights:
    file = safe_open(path, framework="pt", device="cpu")
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (it is no mapping)
        entry = file.get_slice(name)
        dtype = _DTYPES[entry.get_dtype()]
        tensors[name] = Lazy(tuple(entry.get_shape()), dtype, partial(file.get_tensor, name))
    return Weights(tensors, path, file.metadata() or {})


def _pickled(path: Path) -> Weights:
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _refuse_unpacking(path)
    try:  # the only `torch.load` of this package: no code is run; files since torch 1.6 are mapped
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:  # of a zip that is cut, too: it names no file
        raise ValueError(str(error)) from error
    except (pickle.UnpicklingError, KeyError, EOFError) as error:  # torch advises to run the code in it
        raise ValueError("it is no file of torch, or holds more than tensors") from error
    for _ in _NESTS:  # not for ever: a pickle can contain itself
        parts = content if isinstance(content, Mapping) else {}
        inner = [parts[name] for name in _NESTS if isinstance(parts.get(name), Mapping)]
        content = inner[0] if inner else content
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not tensors by their names")
    foreign = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise ValueError(f"it holds more than tensors: {examples(foreign)}")
    return Weights({name: Lazy.of(value.detach()) for name, value in content.items()}, path)


def _refuse_unpacking(path: Path) -> None:
    """Raise ValueError for a zip whose content is larger than itself, which torch would unpack into
    memory.
    """
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(
                    f"{member.filename} in it is compressed, {member.file_size:,} bytes unpacked, which "
                    "torch.save never does: load and save it with torch where you trust it"
                )
            if member.filename.endswith("/data.pkl") and member.file_size > _MOST_PICKLED:
                raise ValueError(
                    f"{member.filename} in it has {member.file_size:,} bytes beside the tensors; at most "
                    f"{_MOST_PICKLED:,} are read: save the weights alone"
                )


def write_safetensors(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Write a file whole or not at all; each tensor is read once and dropped.

    The header gains `format`, which transformers and PEFT ask for, and our version.
    """
    with writing(path) as file:
        file.writelines(safetensors_pieces(tensors, {"visft_ds": __version__, **metadata}))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`write_safetensors` for tensors at hand."""
    write_safetensors(path, {name: Lazy.of(value) for name, value in tensors.items()}, metadata)


def safetensors_pieces(tensors: Tensors, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor: the largest elements first, so that all are
    aligned.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        tensor = tensors[name]
        offsets = [end, end + math.prod(tensor.shape) * tensor.dtype.itemsize]
        end = offsets[1]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    yield struct.pack("<Q", len(text))
    yield text
    for name in order:
        value = tensors[name].read().detach().cpu().contiguous()
        assert (tuple(value.shape), value.dtype) == (tensors[name].shape, tensors[name].dtype), name
        # One element that was expanded counts as contiguous with any stride; a view as bytes needs 1.
        yield value.as_strided((value.numel(),), (1,)).view(torch.uint8).numpy().data
