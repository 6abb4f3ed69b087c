"""Operations with more than one implementation: one signature each, chosen once, with a printable reason.

The plain PyTorch version of an op is its specification; a faster one is tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from visft_ds.ops.triton import why_not

#: The device that tensors on the meta device stand for, and what autocast computes in there; see `rehearsing_on`.
_REHEARSED: ContextVar[tuple[torch.device, torch.dtype | None] | None] = ContextVar("rehearsed", default=None)


@contextmanager
def rehearsing_on(device: torch.device, autocast: torch.dtype | None) -> Iterator[None]:
    """Inside, the meta device stands for another one: ops choose and autocast computes as they would there.

    Args:
        device: which need not exist on this machine.
        autocast: the dtype of torch.autocast; None: it is off.
    """
    token = _REHEARSED.set((device, autocast))
    try:
        yield
    finally:
        _REHEARSED.reset(token)


def placed(device: torch.device) -> torch.device:
    """The device itself, or what the meta device stands for."""
    rehearsed = _REHEARSED.get() if device.type == "meta" else None  # torch.compile cannot look into it
    return rehearsed[0] if rehearsed else device


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype `torch.autocast` computes in on this device right now; None where it is off, and on meta alone."""
    rehearsed = _REHEARSED.get() if device.type == "meta" else None
    if rehearsed:
        return rehearsed[1]
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product with this weight is computed in: autocast's, else the one the weight is stored in.

    So a model with 16-bit matrices and fp32 norms, biases and adapters computes the same way with and without autocast.
    """
    return autocast_dtype(weight.device) or weight.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off inside, for code that casts by hand; nothing on devices without autocast (meta alone)."""
    rehearsed = _REHEARSED.get() if device.type == "meta" else None
    if rehearsed:
        return rehearsing_on(rehearsed[0], None)
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


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
