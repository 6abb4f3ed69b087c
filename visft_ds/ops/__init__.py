"""Operations that models share, and how numbers are computed: dtypes, autocast, devices, kernels.

* `attention`: softmax attention of packed images; `lora`: a layer with low-rank updates; `triton_lora`: its
  kernel; `deform_attn`: deformable attention. Here: `gelu`, what surrounds torch's autocast, and the numerics
  of a process.

The plain PyTorch version of an operation is the specification: a faster one stands beside it with a test that
holds it to that, and is chosen once for the process (`lora.use_kernels`). Of the package only `settings` may
be imported here. An operation may be rewritten freely as long as its test holds; what it keeps for the
backward pass is part of it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from visft_ds.settings.fields import Precision

#: Precision of a run -> dtype.
DTYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module, class or object another attribute inside; afterwards it has its own again."""
    own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:  # it came from the class
            delattr(owner, name)


#: What first weights are filled by, ours and timm's.
_FILLING = frozenset(
    {
        Tensor.add_,
        Tensor.clamp_,
        Tensor.erfinv_,
        Tensor.fill_,
        Tensor.mul_,
        Tensor.normal_,
        Tensor.uniform_,
        Tensor.zero_,
    }
)


class _Undrawn(TorchFunctionMode):
    """Leaves out the filling of weights: torch finds the shape of each result by its compiler, which takes
    more than a second of imports, and longer than the rest of making a model.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.init.normal_:
            return kwargs["tensor"]
        if func in _FILLING:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules that are made inside are on the meta device."""
    with torch.device("meta"), _Undrawn():
        yield


def stand_in(device: torch.device) -> Any:
    """The innermost torch dispatch mode that replaces a meta device by another one, `stands_for`, which need
    not exist here, and whose autocast to `autocast` (None: it is off) replaces torch's; None on every other
    device.
    """
    if device.type != "meta":
        return None
    modes: list[Any] = _get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if hasattr(mode, "stands_for")), None)


def real_device(device: torch.device) -> torch.device:
    """The device that numbers are computed on, or, in a plan, would be."""
    real: torch.device = getattr(stand_in(device), "stands_for", device)
    return real


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype `torch.autocast` computes in on this device right now; None where it is off, and on meta
    alone.
    """
    if device.type == "meta":
        pretended: torch.dtype | None = getattr(stand_in(device), "autocast", None)
        return pretended
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to what `autocast_dtype` returned elsewhere inside; for None it is off, for code that casts by
    hand.
    """
    if dtype == autocast_dtype(device):
        return nullcontext()
    mode = stand_in(device)
    if mode is not None:
        return replaced(mode, "autocast", dtype)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def at_least_float32(values: Tensor) -> Tensor:
    """Convert to float32, unless the values are float64: costs and losses are never computed in 16 bit."""
    return values if values.dtype == torch.float64 else values.float()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; from the host to a GPU through pinned memory, so that the host goes on at
    once.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def use_numerics(device: torch.device, *, tf32: bool = False, deterministic: bool = False) -> None:
    """Choose for the whole process, once at its start. On a CPU everything is in one order.

    Args:
        tf32: round the factors of float32 products and convolutions to 10 bits, where the GPU has TF32.
        deterministic: an operator that has no version with one order of its sums is an error.
    """
    if device.type != "cuda":
        return
    # By their older names: once the newer ones (`fp32_precision`) are set, torch refuses to read these, and
    # parts of its compiler do.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False  # it would choose anew for each size of image, by the clock
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every number of tokens, a second each time
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums of cuBLAS in one order; read once
    torch.use_deterministic_algorithms(deterministic)


def keep_freed_memory(device: torch.device) -> None:
    """Have a CPU's allocator keep what is freed from now on, which steps need again.

    For a process that has its model: between weights that stay, those that were freed leave gaps.
    """
    if device.type == "cuda":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc, which otherwise gives large tensors back to the system at once
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x * Phi(x), for one layer alone to read: it is written over `x` where no gradient is
    needed, and else the gradient over that of the result, so that no second tensor as wide as the hidden
    layer of an MLP is.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return torch.ops.aten.gelu_(x)
    out: Tensor = _Gelu.apply(x)
    return out


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        into = dy if dy.is_contiguous() and x.is_contiguous() else torch.empty_like(x)
        # It refuses a second derivative by itself.
        return torch.ops.aten.gelu_backward.grad_input(dy, x, grad_input=into)
