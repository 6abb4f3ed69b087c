"""CUDA without a GPU: tensors on "cuda:0" that have a shape and no values, and a watch over what runs on them.

    LD_PRELOAD=fake_cuda.so DS_ACCELERATOR=cuda RANK=0 ... python -m tests.parallel.fake_cuda

runs a step of each task under ZeRO-1 with the tiny model and prints what it finds, as a line of JSON a task.
`FakeTensorMode` of torch computes shapes, dtypes and devices alone and raises where they do not fit. For a backward
pass and DeepSpeed's CUDA accelerator to run on such tensors, a torch without CUDA gets a device guard that does nothing
(`SOURCE`, compiled in a second or two) and stand-ins of `torch.cuda`. What lives on the host stays real.

`Watch` notes what a GPU would have to wait for. A copy to the GPU waits unless it comes from pinned memory and does not
block. A number that is asked of a device is that of the host tensor from which the device's was copied, else 1 (no, 0,
where it is none of floats); other tensors come as zeros. Not seen are kernels, streams, NCCL and Triton.
"""

from __future__ import annotations

import importlib.util
import json
import linecache
import os
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

ROOT, WORLD, DEVICE = Path(__file__).parents[2], 8, torch.device("cuda", 0)
SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace at {
struct CUDAHooks : public CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  bool isPinnedPtr(const void*) const override { return false; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
using namespace c10;
const Device fake(DeviceType::CUDA, 0);
struct Guard : public impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  DeviceIndex deviceCount() const noexcept override { return 1; }
  Device getDevice() const override { return fake; }
  Device exchangeDevice(Device) const override { return fake; }
  Stream getStream(Device where) const noexcept override { return Stream(Stream::DEFAULT, where); }
};
impl::DeviceGuardImplRegistrar registered(DeviceType::CUDA, new Guard());
"""
#: Operators whose result has a size that only the values tell, or that are a value on the host.
DATA_DEPENDENT = {"nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "unique_consecutive"}
DATA_DEPENDENT |= {"_unique", "_unique2", "bincount", "histc", "equal", "is_nonzero", "repeat_interleave"}
#: Memory of the host that was pinned in this case, by its address.
_PINNED: dict[int, torch.UntypedStorage] = {}
MIXED = "tensors of two devices"  #: the one kind of finding for which the host does not wait


class Found(NamedTuple):
    """Something that a GPU has to wait for or should not see, and the line that does it."""

    kind: str
    file: str  #: from the root of the repository, or "deepspeed/..."
    code: str  #: the line; empty in a backward pass that torch runs
    what: str  #: operator, shape and dtype


def why_not() -> str | None:
    """The reason why CUDA cannot be faked here, or None."""
    if torch.version.cuda or torch.version.hip or not sys.platform.startswith("linux"):
        return "CUDA is faked in a torch for CPUs, on Linux"
    return None if shutil.which("g++") else "no g++ on this machine, which compiles the device guard of fake CUDA"


def environment(folder: Path) -> dict[str, str]:
    """What the process is started with: rank 0 of WORLD, and the device guard, compiled into a folder."""
    found = importlib.util.find_spec("torch")
    assert found is not None and found.origin is not None
    torch_folder, library = Path(found.origin).parent, folder / "fake_cuda.so"
    command = ["g++", "-w", "-shared", "-fPIC", "-std=c++20", f"-I{torch_folder}/include", "-x", "c++", "-"]
    command += ["-o", str(library), f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-Wl,--no-as-needed"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], input=SOURCE, text=True, check=True)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(WORLD), "LOCAL_SIZE": str(WORLD)}
    return {"LD_PRELOAD": str(library), "DS_ACCELERATOR": "cuda", "OMP_NUM_THREADS": "1", **ranks}


class _Event:
    """Stand-in of `torch.cuda.Event` and `Stream`."""

    device = DEVICE

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: True

    def __enter__(self) -> _Event:
        return self

    def __exit__(self, *_: Any) -> None: ...


def start() -> None:
    """Give this process, which `environment` has prepared, a `torch.cuda` as of a machine with GPUs."""
    os.environ.pop("LD_PRELOAD")  # programs that DeepSpeed starts need none of it
    facts = SimpleNamespace(major=9, minor=0, total_memory=80 << 30, name="fake H100", multi_processor_count=132)
    zeros = "memory_allocated max_memory_allocated memory_reserved max_memory_reserved set_device empty_cache "
    always: dict[str, Any] = {
        **dict.fromkeys(("is_available", "is_bf16_supported"), True),
        **dict.fromkeys(("is_initialized", "is_current_stream_capturing"), False),
        **dict.fromkeys(f"{zeros} reset_peak_memory_stats current_device".split(), 0),
        **{"device_count": WORLD, "memory_stats": {}, "get_device_name": facts.name, "get_device_properties": facts},
        **{"get_device_capability": (9, 0), "current_stream": _Event(), "default_stream": _Event()},
        "stream": nullcontext(),
    }
    for name, value in always.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.Event = torch.cuda.Stream = _Event
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, lambda *_, **__: 0)
    torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.Tensor.record_stream = lambda *_: None
    torch.Tensor.pin_memory = lambda self, *_: _pin(self.clone())
    FakeTensorMode.avoid_device_init = property(lambda self: True)


def _pin(tensor: Tensor) -> Tensor:
    """The tensor, whose memory counts as pinned."""
    storage = tensor.untyped_storage()
    _PINNED[storage._cdata] = storage
    return tensor


def _place(path: str) -> str:
    """A file from the root of the repository or that of DeepSpeed; empty for all others."""
    if path.startswith(f"{ROOT}/visft_ds/"):
        return path.removeprefix(f"{ROOT}/")
    return "deepspeed/" + path.rpartition("/deepspeed/")[2] if "/deepspeed/" in path else ""


def _held(tensor: Tensor) -> Tensor | None:
    """The host's values of a tensor on the GPU that is a copy of them."""
    return getattr(tensor, "held", None)


class Watch(TorchDispatchMode):
    """Counts in `found`, while `on`, what happens; answers what a GPU without values cannot.

    Of DeepSpeed's own lines only what waits is noted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Found] = Counter()
        self.on = False

    def note(self, kind: str, what: str = "") -> None:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not _place(frame.f_code.co_filename):
            frame = frame.f_back  # to the innermost line of this project or of DeepSpeed
        file = "the backward pass" if frame is None else _place(frame.f_code.co_filename)
        code = "" if frame is None else linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if self.on and (kind != MIXED or not file.startswith("deepspeed")):
            self.found[Found(kind, file, code, what)] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        what = f"{name} {' '.join(f'{tuple(t.shape)} {str(t.dtype)[6:]}' for t in tensors[-1:])}"
        if name in ("_to_copy", "copy_"):
            if (answer := self._copied(name, args, kwargs, what)) is not None:
                return answer
        elif "cuda" in devices:
            if name == "_local_scalar_dense":
                self.note("value read on the host", what)
                with unset_fake_temporarily():
                    held = _held(args[0])
                    return (1.0 if args[0].dtype.is_floating_point else 0) if held is None else held.item()
            self._examine(name, args, kwargs, tensors, devices, what)
            if name == "equal":
                return True
        if name == "allreduce_":
            for tensor in tensors:  # all ranks give the same
                if (held := _held(tensor)) is not None:
                    with unset_fake_temporarily():
                        held.mul_(WORLD)
        elif func._schema.is_mutable and tensors and _held(tensors[0]) is not None:
            del tensors[0].held
        out = self._run(func, args, kwargs, tensors)
        if name == "_to_copy" and out.device.type == "cuda" and not isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                out.held = args[0].detach().clone()
        elif func.is_view and (held := _held(args[0])) is not None:
            with unset_fake_temporarily():
                for view, values in zip(tree_leaves(out), tree_leaves(func(held, *args[1:], **kwargs)), strict=True):
                    view.held = values
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        device, pin = torch.device(kwargs.get("device") or "cpu"), kwargs.get("pin_memory")
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}  # there is no allocator for it
        if device.type == "cpu" and not any(isinstance(t, FakeTensor) or t.device.type != "cpu" for t in tensors):
            with unset_fake_temporarily():
                made = func(*args, **kwargs)
                return _pin(made) if pin else made
        return func(*args, **kwargs)

    def _copied(self, name: str, args: Any, kwargs: Any, what: str) -> Any:
        """Note a copy between host and GPU; what arrives on the host is the answer."""
        source = args[1] if name == "copy_" else args[0]
        target = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        if source.device.type == target.type:
            return None
        waits = not kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
        if target.type == "cuda":
            if waits or source.untyped_storage()._cdata not in _PINNED:
                self.note("blocking copy to the GPU", what)
            return None
        if waits:
            self.note("blocking copy to the host", what)
        with unset_fake_temporarily():
            held = _held(source)
            values = torch.zeros(source.shape, dtype=source.dtype) if held is None else held
            if name == "copy_":
                return args[0].copy_(values) if not isinstance(args[0], FakeTensor) else args[0]
            return values.to(kwargs.get("dtype") or source.dtype, copy=True)

    def _examine(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], devices: set[str], what: str) -> None:
        if name in DATA_DEPENDENT and not (name == "repeat_interleave" and kwargs.get("output_size") is not None):
            self.note("data-dependent operator", what)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            for index in args[1]:
                if isinstance(index, Tensor) and (
                    index.dtype in (torch.bool, torch.uint8) or index.device.type == "cpu"
                ):
                    self.note("index by booleans or on the host", what)
        elif "cpu" in devices and any(tensor.ndim for tensor in tensors if tensor.device.type == "cpu"):
            self.note(MIXED, what)


@contextmanager
def watched() -> Iterator[Watch]:
    """Fake tensors and a watch that does not look yet."""
    _PINNED.clear()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.set_multithreading_enabled(False), Watch() as watch:
        torch.cuda.synchronize = lambda *_: watch.note("torch.cuda.synchronize")
        yield watch


def step(watch: Watch, number_of_labels: int) -> None:
    """Two steps of the engine on rank 0 of WORLD; the second one is watched."""
    from tests.parallel import engine_case as case
    from visft_ds.model import counts_of, loss_denominators_of
    from visft_ds.parallel import distributed
    from visft_ds.parallel.engine import Engine

    case.forget_autocast()
    with _disable_current_modes():
        module, groups = case.build(2, storage=torch.bfloat16)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for part in module.modules():
        for name, old in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            fake = torch.empty(old.shape, dtype=old.dtype, device=DEVICE)
            trains = old.requires_grad
            setattr(part, name, nn.Parameter(fake, trains) if isinstance(old, nn.Parameter) else fake)
    given = [
        {
            "params": [module.get_parameter(names[id(p)]) for p in group.parameters],
            **{key: getattr(group, key) for key in ("lr", "weight_decay", "name")},
        }
        for group in groups
    ]
    module.backbone.recompute = "block"
    config = case.engine_config("zero1", "bf16", accumulation=1)
    engine = Engine(module, given, config, build_optimizer=torch.optim.AdamW, schedule=case.factor, seed=0)
    on_host = case.part(number_of_labels, 0, 2)  # as the loader gives it
    for number in range(2):
        watch.on = number == 1
        agreed = distributed.agree_on_step(f"step {number}", counts_of(module, [on_host]), False, engine.device)
        report = engine.train_step(number, [on_host], loss_denominators_of(agreed.counts, WORLD, engine.device))
        assert not report.refused and not report.skipped, report
    watch.on = False
    engine.deepspeed.destroy()


def main() -> None:
    """Rank 0 of a group whose others do and send nothing."""
    start()
    import deepspeed
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.parallel.engine_case import ORDER
    from visft_ds.tasks import matching
    from visft_ds.tasks.segmentation import loss

    warnings.simplefilter("ignore")  # DeepSpeed's, and those of what is not there
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # DeepSpeed's messages are no answers
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
    nn.Module.to = lambda self, *_, **__: self
    solve = matching.solve  # of costs that are 0, and of counts and labels as they are on the host
    matching.solve = loss.solve = lambda cost, counts, *rest: solve(cost, getattr(counts, "held", counts), *rest)
    for number, tasks in enumerate(ORDER[:3]):
        torch.manual_seed(0)
        with watched() as watch:
            step(watch, number)
        print(json.dumps([tasks[0], [*watch.found.items()]]), file=answers, flush=True)


if __name__ == "__main__":
    main()
