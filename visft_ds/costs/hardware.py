"""Peak rates of devices: the maker's figure for a known GPU, else a measured rate, which is marked as such."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from visft_ds.config.schema import Precision

DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Peak:
    """Dense peak rates of a GPU in TFLOP/s, without sparsity and with fp32 accumulation; None: not in hardware."""

    pattern: str  #: regular expression for the name that the driver gives; the first one that fits counts
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float
    source: str


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
#: Data sheets print rates "with sparsity" beside or instead of the dense ones, which are half of them.
PEAKS = (
    Peak(r"H100 PCIe", 756.5, 756.5, 378.0, 51.2, f"H100 PCIe data sheet, {_NVIDIA}/h100/"),
    Peak(r"H[12]00 NVL", 835.5, 835.5, 417.5, 60.0, f"{_NVIDIA}/h100/ and /h200/, NVL column"),
    Peak(r"G?H[12]00", 989.4, 989.4, 494.7, 66.9, f"{_NVIDIA}/h100/ and /h200/, SXM column"),
    Peak(r"A100", 312.0, 312.0, 156.0, 19.5, f"{_NVIDIA}/a100/"),
    Peak(r"V100S", None, 130.0, None, 16.4, f"{_NVIDIA}/v100/"),
    Peak(r"V100.*SXM", None, 125.0, None, 15.7, f"{_NVIDIA}/v100/, NVLink column"),
    Peak(r"V100.*PCIE?", None, 112.0, None, 14.0, f"{_NVIDIA}/v100/, PCIe column"),
    Peak(r"L40S", 362.0, 362.0, 183.0, 91.6, f"{_NVIDIA}/l40s/"),
    Peak(r"RTX 4090(?! (D|Laptop))", 165.2, 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
    Peak(r"RTX 3090(?! Ti)", 71.0, 71.0, 35.6, 35.6, "NVIDIA GA102 GPU architecture whitepaper, appendix A"),
)


@dataclass(frozen=True)
class Reference:
    """The rate a step is compared with."""

    flops_per_second: float
    measured: bool  #: False: the maker's peak
    text: str  #: what it is and where it comes from


def reference_rate(device: torch.device, precision: Precision) -> Reference:
    """The maker's dense peak of this GPU in this precision; where it is not known, a matrix product is timed.

    fp32 means TF32 where the run allows it (torch.set_float32_matmul_precision) and the GPU has it.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = find_peak(name)
        mode = "tf32" if precision == "fp32" and _tf32_allowed() else precision
        rate = None if peak is None else getattr(peak, mode)
        if peak is not None and rate is not None:
            return Reference(rate * 1e12, False, f"peak of {name}, {mode}, dense: {rate:g} TFLOP/s ({peak.source})")
    size, rate = matmul_rate(device, DTYPES[precision])
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Reference(rate, True, f"measured here: {precision} product of two {size} x {size} matrices{threads}")


def find_peak(name: str) -> Peak | None:
    """The entry of a GPU by its driver's name; None for unknown ones and for slices of one (MIG)."""
    return None if "MIG" in name else next((peak for peak in PEAKS if re.search(peak.pattern, name, re.I)), None)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> tuple[int, float]:
    """(size, operations per second) of a square matrix product, the best of five after one to warm up."""
    size = 8192 if device.type == "cuda" else 1024
    left = torch.full((size, size), 0.5, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        result = left @ left
        float(result[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return size, 2 * size**3 / best


def describe(device: torch.device) -> dict[str, Any]:
    """Facts about this process's machine for the record."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "host_memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "device_memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return facts


def _tf32_allowed() -> bool:
    return torch.get_float32_matmul_precision() != "highest" and torch.cuda.get_device_capability() >= (8, 0)


def _processor() -> str:
    """The CPU's name from /proc/cpuinfo, where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
