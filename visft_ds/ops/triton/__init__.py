"""Kernels in Triton, beside the PyTorch version of the same operation, which is their specification.

Importing this package does not import Triton; a kernel's module does, and is imported when the kernel is used.
TRITON_INTERPRET=1 before that runs kernels on a CPU, for tests: slow, and silently wrong in bf16 (Triton 3.9), so
launchers go through float32 there.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

#: Dtypes that kernels read and write; they accumulate in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Return True if kernels run in Triton's interpreter, on a CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(device: torch.device) -> str | None:
    """Why kernels cannot run on this device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted():
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 runs kernels on a CPU, not on {device.type}"
    if device.type != "cuda":
        return f"Triton has no code for {device.type}; TRITON_INTERPRET=1 interprets it on a CPU, slowly"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        # For older ones Triton 3.9 makes no matrix instructions, but loops that spill (seen by compiling for them).
        return f"sm_{major}{minor} is too old; needed: sm_80 or later"
    return None


def readable(tensor: Tensor) -> Tensor:
    """Contiguous rows, in a dtype that the kernel or its interpreter computes with."""
    if tensor.stride(-1) != 1 or 0 in tensor.stride():
        tensor = tensor.contiguous()
    return tensor.float() if interpreted() and tensor.dtype == torch.bfloat16 else tensor
