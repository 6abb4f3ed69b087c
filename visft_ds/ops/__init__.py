"""Operations that models share; the plain PyTorch version of each is the specification that a faster one must equal."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from visft_ds.config.fields import Precision

#: Precision of a run -> dtype.
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class StandIn(Protocol):
    """Torch dispatch mode under which meta tensors behave as tensors of another device, which need not exist here."""

    stands_for: torch.device
    autocast: torch.dtype | None  #: dtype that torch.autocast would compute in there; None: it is off

    def no_autocast(self) -> AbstractContextManager[None]: ...


def _stand_in(device: torch.device) -> StandIn | None:
    """The innermost mode that replaces a meta device by another one; None on every other device."""
    if device.type != "meta":  # torch.compile cannot look any further
        return None
    modes: list[Any] = _get_current_dispatch_mode_stack()
    return next((mode for mode in reversed(modes) if hasattr(mode, "stands_for")), None)


def placed(device: torch.device) -> torch.device:
    """The device itself, or the one that the meta device stands in for."""
    mode = _stand_in(device)
    return mode.stands_for if mode else device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype `torch.autocast` computes in on this device right now; None where it is off, and on meta alone."""
    kind = device.type
    if kind == "meta":
        mode = _stand_in(device)
        return mode.autocast if mode else None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def matmul_dtype(weight: Tensor) -> torch.dtype:
    """The dtype a matrix product with this weight is computed in: autocast's, else the one the weight is stored in.

    So a model with 16-bit matrices and fp32 norms, biases and adapters computes the same way with and without autocast.
    """
    return autocast_dtype(weight.device) or weight.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off inside, for code that casts by hand; nothing on devices without autocast (meta alone)."""
    mode = _stand_in(device)
    if mode:
        return mode.no_autocast()
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_as(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast to this dtype inside, as `autocast_dtype` returned it elsewhere; off for None."""
    if dtype == autocast_dtype(device):
        return nullcontext()
    return no_autocast(device) if dtype is None else torch.autocast(device.type, dtype)


def movable(parameter: Tensor) -> bool:
    """Return True if what is derived from a parameter may not be kept: the storage behind it changes under ZeRO-3."""
    return hasattr(parameter, "ds_id")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From the host to a GPU it goes through pinned memory: the host goes on at once.

    A copy from other memory is made in parts by the host itself, which waits for the copies before.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def use_numerics(device: torch.device, *, tf32: bool = False, deterministic: bool = False) -> None:
    """Choose for the whole process, once at its start. On a CPU nothing is set: there everything is in one order.

    Args:
        tf32: round the factors of float32 products and convolutions to 10 bits, where the GPU has TF32.
        deterministic: an operator that has no version with one order of its sums is an error.
    """
    if device.type != "cuda":
        return
    # By their older names: once the newer ones (`fp32_precision`) are set, torch refuses to read these, and parts of
    # its compiler do.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False  # it would choose anew for each size of image, by the clock
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every number of tokens, a second each time
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # sums of cuBLAS in one order; read once
    torch.use_deterministic_algorithms(deterministic)


#: What adapted layers run on, "library" (cuBLAS and the like) or "triton" (our own), on this kind of device: a model
#: that is checked on the CPU first takes the library.
_chosen = ("library", "cpu")


def use_kernels(name: str, device: torch.device) -> None:
    """Choose for the whole process, once at its start. Raises ValueError: Triton where it cannot run."""
    global _chosen
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("visft.model.kernels=triton: the package triton is not installed; use library")
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        if old or (device.type != "cuda" and not interpreted()):
            raise ValueError("visft.model.kernels=triton cannot run here: it needs a GPU from sm_80 on; use library")
    _chosen = (name, device.type)


def kernels(device: torch.device) -> str:
    """Name of the kernels that `use_kernels` chose for tensors on this device."""
    return _chosen[0] if device.type == _chosen[1] else "library"


def interpreted() -> bool:
    """Return True if Triton kernels run in Triton's interpreter, on a CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"
