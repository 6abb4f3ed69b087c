"""Numerics of a process on a GPU: TF32, and whether the same step gives the same numbers each time."""

from __future__ import annotations

import os
import re

import torch

#: What torch says of an operator, or of cuBLAS, that it was asked not to use.
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation|it uses (CuBLAS) and")
#: Workspace with which the sums of cuBLAS have one order; read once, before its first product.
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
    torch.backends.cuda.enable_cudnn_sdp(False)  # `ops.attention` turns it on where it takes it
    if deterministic:
        os.environ.setdefault(*_WORKSPACE)
    torch.use_deterministic_algorithms(deterministic)


def describe_numerics(device: torch.device, *, tf32: bool, deterministic: bool) -> str:
    """Describe for a reader the numbers that `use_numerics` leads to on a device."""
    if device.type != "cuda":
        return "float32 in full, the same numbers each time"
    products = "float32 products as TF32 (visft.model.tf32)" if tf32 else "float32 in full"
    order = "deterministic operators only" if deterministic else "the order of some sums varies, and so does rounding"
    return f"{products}; {order} (visft.run.deterministic)"


def without_order(error: BaseException) -> str | None:
    """Remedy for an operator that torch refused because it is not deterministic; None for another error."""
    found = _REFUSED.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    name, value = _WORKSPACE
    if found[2]:
        remedy = f"set {name}={value} in the environment"
    else:
        remedy = "train without the tasks or options that need it (segmentation samples masks)"
    return (
        f"{found[1] or found[2]} has no deterministic version on this device, and visft.run.deterministic allows no "
        f"other: {remedy}, or set visft.run.deterministic=false"
    )
