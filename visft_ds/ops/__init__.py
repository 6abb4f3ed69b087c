"""Operations with more than one implementation: one signature each, chosen once, with a printable reason.

The plain PyTorch version of an op is its specification; a faster one is tested against it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype `torch.autocast` computes in on this device right now; None where it is off (always on meta)."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def matmul_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype a matrix product with this weight is computed in: autocast's, else the one the weight is stored in.

    So a model with 16-bit matrices and fp32 norms, biases and adapters computes the same way with and without autocast.
    """
    return autocast_dtype(weight.device) or weight.dtype


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Autocast off inside, for code that casts by hand; nothing on devices without autocast (meta)."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()
