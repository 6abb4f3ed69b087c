"""A GPU that is not there: its tensors lie in memory of the host and have values, and say that they are on
"cuda:0".

Two modes of torch do it: `Pretended` answers what code in Python asks of a device, `Watch` follows the memory of
each tensor through every operator, backward passes too. As all is computed on the host, neither a driver nor a
compiler is needed, and losses are those of a CPU. Kernels, streams and NCCL are not seen, nor CUDA's own lists of
autocast (`tests/tasks/test_heads_in_bf16.py` has them).
"""

from __future__ import annotations

import linecache
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.attention.varlen
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[2]
WORLD = 2
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
#: Operators whose result has a size that only the values tell, or that are a value on the host.
DATA_DEPENDENT = {"nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "unique_consecutive"}
DATA_DEPENDENT |= {"_unique", "_unique2", "bincount", "histc", "equal", "is_nonzero", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
MIXED = "tensors of two devices"  #: an error of a GPU; of all else it makes the host wait


class Finding(NamedTuple):
    """Something that a GPU has to wait for or cannot do, and the line that does it."""

    kind: str
    file: str  #: from the root of the repository, or "deepspeed/..."
    code: str  #: the line
    operator: str


def place_of(tensor: Tensor) -> str:
    """Where a tensor pretends to lie: "gpu", "host", or "anywhere" if torch itself made it for an operator."""
    return getattr(tensor.untyped_storage(), "place", "host")


def put(values: Any, place: str) -> Any:
    """The same tensors, which now pretend to lie there."""
    for tensor in tree_leaves(values):
        if isinstance(tensor, Tensor):
            tensor.untyped_storage().place = place  # type: ignore[attr-defined]
    return values


class Watch(TorchDispatchMode):
    """Every operator: its results lie where its tensors do. Counts in `findings` what happens while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.findings: Counter[Finding] = Counter()
        self.on = False
        self.new = "anywhere"  #: where an operator without tensors puts its result

    def note(self, kind: str, operator: str) -> None:
        """Count what the innermost line of this project, else of DeepSpeed, does."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not source_of(frame.f_code.co_filename):
            frame = frame.f_back
        if self.on and frame is not None:
            path = frame.f_code.co_filename
            code = linecache.getline(path, frame.f_lineno).strip()
            self.findings[Finding(kind, source_of(path), code, operator)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            places = [place_of(tensor) for tensor in tensors]
            place = "host" if "host" in places else "anywhere"
            if not tensors:
                place = self.new
            elif "gpu" in places:
                place = "gpu"
                self.examine(func, args, kwargs, tensors)
            result = func(*args, **kwargs)
            if func._schema.name == "c10d::allreduce_":
                for tensor in tensors:  # the other ranks have the same values
                    tensor.mul_(WORLD)
            if not (func.is_view or func._schema.is_mutable):
                known = {tensor.untyped_storage()._cdata for tensor in tensors}
                for tensor in tree_leaves(result):
                    if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known:
                        put(tensor, place)
            return result

    def examine(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> None:
        """Note what an operator on a GPU's tensors waits for or cannot do; what torch made becomes the GPU's."""
        name = func._schema.name.partition("::")[2]
        if name == "copy_":
            waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
            self.note_copy(args[1], place_of(args[0]), waits, name)
            return
        if name == "_local_scalar_dense":
            self.note("value read on the host", name)
        if name in DATA_DEPENDENT and kwargs.get("output_size") is None:
            self.note("size that depends on values", name)
        indices: Sequence[Tensor] = []
        if name in INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.note("index by booleans", name)
        if any(place_of(index) == "host" for index in indices):
            self.note("index on the host", name)
        for tensor in tensors:
            if place_of(tensor) == "anywhere":
                put(tensor, "gpu")
                continue
            is_index = any(tensor is index for index in indices)
            may_differ = is_index or (tensor.ndim == 0 and name not in ("cat", "stack"))
            if place_of(tensor) == "host" and not may_differ:
                self.note(MIXED, f"{name} {tuple(tensor.shape)}")

    def note_copy(self, source: Tensor, target: str, waits: bool, name: str) -> None:
        """Note a copy between host and GPU for which the host waits."""
        origin = place_of(source)
        if {origin, target} != {"host", "gpu"}:
            return
        pinned = hasattr(source.untyped_storage(), "pinned")
        if waits or (target == "gpu" and not pinned):
            self.note(f"copy to the {target}", f"{name} {tuple(source.shape)}")


def source_of(path: str) -> str:
    """A file of this project from the root of the repository, or one of DeepSpeed; empty for all others."""
    if path.startswith(f"{ROOT}/visft_ds/"):
        return path.removeprefix(f"{ROOT}/")
    return "deepspeed/" + path.rpartition("/deepspeed/")[2] if "/deepspeed/" in path else ""


class Pretended(TorchFunctionMode):
    """What code in Python asks of a tensor's device, or of torch for a device, answered as with a GPU."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        asked = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
        if asked in ("device", "is_cuda", "is_cpu"):
            on_gpu = place_of(args[0]) == "gpu"
            return {"device": GPU if on_gpu else CPU, "is_cuda": on_gpu, "is_cpu": not on_gpu}[asked]
        if name in ("to", "cpu", "cuda"):
            return self.moved(name, *args, **kwargs)
        if name == "get_device":
            return 0 if place_of(args[0]) == "gpu" else -1
        if name == "is_pinned":
            return hasattr(args[0].untyped_storage(), "pinned")
        if name == "pin_memory":
            return pinned(args[0].clone())
        if name in ("numpy", "__array__") and place_of(args[0]) == "gpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and place_of(args[0]) == "gpu":
            self.watch.note("value read on the host", name)
        pin = kwargs.pop("pin_memory", False)
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = CPU
        has_tensors = any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        place = "host" if device is None else placed(device)
        self.watch.new = "anywhere" if has_tensors and device is None else place
        try:
            result = func(*args, **kwargs)
        finally:
            self.watch.new = "anywhere"
        if device is not None:
            put(result, place)
        return pinned(result) if pin else result

    def moved(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Tensor.to, .cpu and .cuda."""
        other = args[0] if args else kwargs.get("other")
        if name != "to":
            target = {"cpu": "host", "cuda": "gpu"}[name]
            options: dict[str, Any] = {"non_blocking": bool(kwargs.get("non_blocking"))}
        elif isinstance(other, Tensor):
            target = place_of(other)
            options = {"dtype": other.dtype, **kwargs, "copy": kwargs.get("copy", False)}
        else:
            copy = kwargs.pop("copy", False) or args[3:4] == (True,)
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args[:3], **kwargs)
            target = place_of(tensor) if device is None else placed(device)
            options = {"dtype": dtype or tensor.dtype, "non_blocking": non_blocking, "copy": copy}
            if memory_format is not None:
                options["memory_format"] = memory_format
        if target == place_of(tensor):
            return tensor.to(**{"dtype": tensor.dtype, **options})
        self.watch.note_copy(tensor, target, not options.get("non_blocking"), name)
        return put(tensor.to(**{"dtype": tensor.dtype, **options, "copy": True}), target)


def placed(device: Any) -> str:
    """What a device is to `place_of`."""
    return "host" if torch.device(device).type == "cpu" else "gpu"


def pinned(tensor: Tensor) -> Tensor:
    """The same tensor of the host, from which a copy to a GPU need not be waited for."""
    tensor.untyped_storage().pinned = True  # type: ignore[attr-defined]
    return tensor


def packed_kernel(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *_: Any) -> Tensor:
    """`varlen_attn`, which reads the offsets on the GPU."""
    from visft_ds.ops.attention import _one_by_one

    with torch._C.DisableTorchFunction():
        assert {place_of(tensor) for tensor in (q, k, v, offsets)} == {"gpu"}
        lengths = torch.diff(offsets.detach().clone()).numpy().tolist()
    return _one_by_one(q, k, v, lengths)


def accelerator() -> Any:
    """DeepSpeed's view of the GPU."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    class Accelerator(CPU_Accelerator):  # type: ignore[misc]
        """Device names of a GPU, and no streams."""

        def device_name(self, device_index: int | None = None) -> str:
            return "cuda" if device_index is None else f"cuda:{device_index}"

        def current_device_name(self) -> str:
            return "cuda:0"

        def current_device(self) -> int:
            return 0

    return Accelerator()


@contextmanager
def pretending() -> Iterator[Watch]:
    """A process whose device is a GPU."""
    from deepspeed.accelerator import real_accelerator

    from visft_ds import distributed

    watch = Watch()
    pretended = Pretended(watch)
    run_backward = torch.autograd._engine_run_backward
    autocast = torch.autocast.__init__
    enabled = torch.is_autocast_enabled
    dtype_of = torch.get_autocast_dtype

    def backward(*args: Any, **kwargs: Any) -> Any:
        """A backward pass; torch turns the modes off in functions that they have answered."""
        if torch._C._len_torch_function_stack():
            return run_backward(*args, **kwargs)
        with pretended:
            return run_backward(*args, **kwargs)

    def synchronize(*_: Any) -> None:
        watch.note("synchronize", "synchronize")

    real_accelerator.set_accelerator(accelerator())
    with ExitStack() as stack:
        for owner, name, value in (
            (torch.autograd, "_engine_run_backward", backward),
            (
                torch.autocast,
                "__init__",
                lambda self, device_type, *rest, **more: autocast(self, "cpu", *rest, **more),
            ),
            (torch, "is_autocast_enabled", lambda *_: enabled("cpu")),
            (torch, "get_autocast_dtype", lambda *_: dtype_of("cpu")),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "synchronize", synchronize),
            (torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            (torch.nn.attention.varlen, "varlen_attn", packed_kernel),
            (distributed, "local_device", lambda: GPU),
        ):
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(patch.dict(sys.modules, {"flash_attn_2_cuda": None}))
        # Of hooks on saved tensors torch calls some with, some without the mode.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        stack.enter_context(patch.dict(checks, default=lambda tensor: tensor.shape))
        stack.enter_context(watch)
        stack.enter_context(pretended)
        yield watch
