"""Copies from the host to a GPU that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. From the host to a GPU it goes through pinned memory: the host goes on at once.

    A copy from other memory is made in parts by the host itself, which waits for the copies before.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
