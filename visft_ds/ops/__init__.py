"""Operations with more than one implementation: one signature each, chosen once, with a printable reason.

The plain PyTorch version of an op is its specification; a faster one is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from visft_ds.ops.triton import why_not


class StandIn(Protocol):
    """Torch dispatch mode under which meta tensors behave as tensors of another device, like fake tensors.

    Whoever computes shapes alone enters such a mode; ops find it on torch's stack of modes and choose as they would
    choose on that device.
    """

    stands_for: torch.device  #: which need not exist on this machine
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


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product with this weight is computed in: autocast's, else the one the weight is stored in.

    So a model with 16-bit matrices and fp32 norms, biases and adapters computes the same way with and without autocast.
    """
    return autocast_dtype(weight.device) or weight.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off inside, for code that casts by hand; nothing on devices without autocast (meta alone)."""
    mode = _stand_in(device)
    if mode:
        return mode.no_autocast()
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return nullcontext() if autocast_dtype(device) is None else _AutocastOff(device.type)


def autocast_as(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    """Autocast to this dtype inside, as `autocast_dtype` returned it elsewhere; off for None."""
    if dtype == autocast_dtype(device):
        return nullcontext()
    return no_autocast(device) if dtype is None else torch.autocast(device.type, dtype)


class _AutocastOff:
    """`torch.autocast(enabled=False)` inside a region where autocast is on, at a tenth of its time.

    It caches nothing while it is off, so there is no cache to clear.
    """

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._device_type, True)


def movable(parameter: Tensor) -> bool:
    """Return True if what is derived from a parameter may not be kept: the storage behind it changes under ZeRO-3."""
    return hasattr(parameter, "ds_id")


class FrozenCasts:
    """Casts of frozen tensors to the dtype of computation, or what else is made of them, kept from pass to pass.

    They are made anew where a tensor was changed in place, replaced or moved. Nothing is kept of tensors that train (an
    optimiser writes past the counter of changes), that ZeRO-3 divides, or while torch.compile looks on. Only for small
    tensors: each exists twice from then on.
    """

    def __init__(self) -> None:
        self._state: list[Any] = []
        self._made: tuple[Tensor, ...] = ()
        self._alias: list[Tensor] = []  # keeps addresses of storages from being used again

    def __deepcopy__(self, memo: object) -> FrozenCasts:
        return FrozenCasts()

    def __reduce__(self) -> tuple[type[FrozenCasts], tuple[()]]:
        return FrozenCasts, ()

    def __call__(
        self, dtype: torch.dtype, *tensors: Tensor, make: Callable[..., tuple[Tensor, ...]] | None = None
    ) -> tuple[Tensor, ...]:
        """Cast each tensor to the dtype, or return `make(dtype, *tensors)`, which computes with a graph what trains."""
        make = make or _cast_all
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return make(dtype, *tensors)
        state = [(dtype, t.requires_grad, t._version, t.untyped_storage()._cdata) for t in tensors]
        if state == self._state:
            return self._made
        if any(tensor.requires_grad or movable(tensor) for tensor in tensors):
            self._state = []
            return make(dtype, *tensors)
        with torch.inference_mode(False), torch.no_grad():  # kept for training, whoever asks first
            self._made, self._alias = make(dtype, *tensors), [tensor.detach() for tensor in tensors]
        self._state = state
        return self._made


def _cast_all(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in tensors)


#: "library": products of cuBLAS and the like, PyTorch for the rest; "triton": our own kernels where they exist.
KERNELS = ("library", "triton")
_chosen = ("library", "cpu")


def use_kernels(name: str, device: torch.device) -> None:
    """Choose for the whole process, once at its start, what operations with kernels of their own run on.

    The choice holds for tensors on this kind of device: a model that is checked on the CPU first takes the library.

    Raises:
        ValueError: an unknown name, or Triton where it cannot run (it says why): nothing falls back in silence.
    """
    global _chosen
    if name not in KERNELS:
        raise ValueError(f"kernels {name!r} are unknown; use {' or '.join(KERNELS)}")
    reason = why_not(device) if name == "triton" else None
    if reason is not None:
        raise ValueError(f"Triton kernels cannot run here: {reason}; use library")
    _chosen = (name, device.type)


def kernels(device: torch.device) -> str:
    """Name of the kernels that `use_kernels` chose for tensors on this device."""
    name, where = _chosen
    return name if device.type == where else "library"
