"""GPUs that need not be here: memory and peak rates of the makers' data sheets; clusters of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from visft_ds.settings.fields import Precision

#: Of the bandwidth in one direction, large collectives reach this much of a link and of a machine's network:
#: nccl-tests as published, see tests/planner/test_published.py.
LINK_SHARE, NETWORK_SHARE = 0.8, 0.9


@dataclass(frozen=True)
class Gpu:
    """Kind of GPU. Rates are dense: data sheets print those "with sparsity" beside, which are twice as
    high.
    """

    name: str  #: ends with its memory in GiB
    pattern: str  #: regular expression for the name that the driver gives; the first one that fits counts
    bandwidth: float  #: of its memory, GB/s
    link: float  #: to a GPU of the same machine, GB/s in one direction
    host: float  #: to the memory of the machine, GB/s in one direction
    network: float  #: of a machine with 8 of them as they are sold, GB/s in one direction
    half: float  #: products of matrices in 16 bit, TFLOP/s
    tf32: float | None  #: None: the hardware has neither TF32 nor bf16
    fp32: float

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.name.rpartition("-")[2].removesuffix("GB")) * 2**30

    def rate(self, precision: Precision, *, tf32: bool = False) -> float | None:
        """Operations a second in products of matrices; None: the hardware has no such precision."""
        half = self.half if precision == "fp16" or self.tf32 else None
        found = half if precision != "fp32" else (tf32 and self.tf32) or self.fp32
        return None if found is None else found * 1e12

    def precision(self) -> Precision:
        """Precision that visft.model.precision "auto" chooses on it."""
        return "bf16" if self.tf32 else "fp16"


#: Links: NVLink 2 to 5 with 150, 300, 450 and 900 GB/s in each direction; PCIe 3, 4, 5 x16 with 16, 32, 64.
#: Two GPUs of a GB200 share 450 GB/s to their host. Networks: a DGX has an adapter of 400 or 200 Gbit/s for
#: each GPU; other machines are counted with 200 Gbit/s in all. RTX 6000 Ada: NVIDIA's paper on the Ada
#: architecture. A10G: AWS's cards.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("GB200-186GB", r"GB200", 8000, 900, 225, 400, 2500, 1250, 80),
        Gpu("B200-180GB", r"B200", 8000, 900, 64, 400, 2250, 1125, 75),
        Gpu("H200-141GB", r"H200(?! NVL)", 4800, 450, 64, 400, 989.4, 494.7, 66.9),
        Gpu("H200NVL-141GB", r"H200 NVL", 4800, 450, 64, 25, 835.5, 417.5, 60.0),
        Gpu("H100NVL-94GB", r"H100 NVL", 3900, 300, 64, 25, 835.5, 417.5, 60.0),
        Gpu("H100PCIe-80GB", r"H100 PCIe", 2000, 64, 64, 25, 756.5, 378.0, 51.2),
        Gpu("H100-80GB", r"G?H100", 3350, 450, 64, 400, 989.4, 494.7, 66.9),
        Gpu("A100-80GB", r"A100.*80GB", 2039, 300, 32, 200, 312.0, 156.0, 19.5),
        Gpu("A100-40GB", r"A100", 1555, 300, 32, 200, 312.0, 156.0, 19.5),
        Gpu("V100S-32GB", r"V100S", 1134, 16, 16, 25, 130.0, None, 16.4),
        Gpu("V100-32GB", r"V100.*SXM\d?.*32", 900, 150, 16, 25, 125.0, None, 15.7),
        Gpu("V100-16GB", r"V100.*SXM", 900, 150, 16, 25, 125.0, None, 15.7),
        Gpu("V100PCIe-16GB", r"V100.*PCIE?", 900, 16, 16, 25, 112.0, None, 14.0),
        Gpu("A6000-48GB", r"RTX A6000", 768, 32, 32, 25, 154.8, 77.4, 38.7),
        Gpu("6000Ada-48GB", r"RTX 6000 Ada", 960, 32, 32, 25, 364.2, 182.1, 91.1),
        Gpu("A40-48GB", r"\bA40\b", 696, 32, 32, 25, 149.7, 74.8, 37.4),
        Gpu("L40S-48GB", r"L40S", 864, 32, 32, 25, 362.0, 183.0, 91.6),
        Gpu("L40-48GB", r"\bL40\b", 864, 32, 32, 25, 181.05, 90.5, 90.5),
        Gpu("L4-24GB", r"\bL4\b", 300, 32, 32, 25, 121.0, 60.0, 30.3),
        Gpu("A10-24GB", r"\bA10\b", 600, 32, 32, 25, 125.0, 62.5, 31.2),
        Gpu("A10G-24GB", r"\bA10G\b", 600, 32, 32, 25, 70.0, 35.0, 35.0),
        Gpu("H20-96GB", r"\bH20\b", 4000, 450, 64, 25, 148.0, 74.0, 44.0),
        Gpu("T4-16GB", r"\bT4\b", 320, 16, 16, 25, 65.0, None, 8.1),
        Gpu("5090-32GB", r"RTX 5090(?! (D|Laptop))", 1792, 64, 64, 25, 209.5, 104.8, 104.8),
        Gpu("4090-24GB", r"RTX 4090(?! (D|Laptop))", 1008, 32, 32, 25, 165.2, 82.6, 82.6),
        Gpu("3090-24GB", r"RTX 3090(?! Ti)", 936, 32, 32, 25, 71.0, 35.6, 35.6),
    )
}


def find_gpu(name: str) -> Gpu | None:
    """The kind of a GPU by its driver's name; None for unknown ones and for slices of one (MIG)."""
    return (
        None
        if "MIG" in name
        else next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, name, re.I)), None)
    )


def peak_rate(device: torch.device, precision: Precision) -> float | None:
    """The dense peak of this GPU in operations a second; None on a CPU and on GPUs that are not known.

    fp32 means TF32 where the run allows it and the GPU has it.
    """
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return None if gpu is None else gpu.rate(precision, tf32=torch.backends.cuda.matmul.allow_tf32)


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind; ranks next to each other share a machine."""

    count: int
    gpu: Gpu
    network: float  #: GB/s into a machine of `per_node` GPUs, and as many out of it
    per_node: int = 8

    def rate(self, ranks: int) -> float:
        """Bytes a second over the slowest connection in groups of `ranks` neighbours.

        A ring enters and leaves each machine once, with all that its links carry.
        """
        link = LINK_SHARE * self.gpu.link
        inside = self.count <= self.per_node or not self.per_node % ranks
        return 1e9 * (link if inside else min(link, NETWORK_SHARE * self.network))


def parse_cluster(text: str, network: float | None = None) -> Cluster:
    """`8xA100-80GB` or `2x8xH100` (machines x GPUs; the memory where there are several), with a network of so
    many GB/s in one direction (None: as such machines are sold). Raises ValueError for another form or an
    unknown name.
    """
    if network is not None and not 0 < network < math.inf:
        raise ValueError(f"--network {network}: give GB/s above 0, such as 25 (200 Gbit/s)")
    found = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(.+)", text)
    if found is None or not int(found[1] or 1) * int(found[2]):
        raise ValueError(f"--cluster {text}: write COUNTxNAME, such as 8xA100-80GB, or MACHINESxGPUSxNAME")
    wanted = re.sub(r"RTX|[ _]", "", found[3].upper()).strip("-")
    close = [name for name in GPUS if wanted in (name.upper(), name.upper().rpartition("-")[0])]
    if len(close) != 1:
        raise ValueError(
            f"--cluster {text}: no one GPU is called {found[3]}; known: {', '.join(close or GPUS)}"
        )
    gpu, per_node = GPUS[close[0]], int(found[2]) if found[1] else Cluster.per_node
    return Cluster(
        int(found[1] or 1) * int(found[2]), gpu, gpu.network if network is None else network, per_node
    )
