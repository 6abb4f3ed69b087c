"""Numerics of a process on a GPU: TF32, and whether the same step gives the same numbers each time."""

from __future__ import annotations

import os

import torch


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
