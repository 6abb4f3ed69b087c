"""GPUs that need not be here: memory and peak rates of the makers' data sheets; clusters of them."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from visft_ds.settings.fields import Precision

if TYPE_CHECKING:
    import torch

#: Of the bandwidth in one direction, large collectives reach this much of a link between GPUs, and of a
#: machine's network: nccl-tests as published, see tests/planner/test_published.py.
LINK_SHARE = 0.8
NETWORK_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """Kind of GPU: a row of gpus.csv.

    Rates are dense: data sheets print those "with sparsity" beside, which are twice as high. Links: NVLink 2
    to 5 with 150, 300, 450 and 900 GB/s in each direction; PCIe 3, 4, 5 x16 with 16, 32, 64. Two GPUs of a
    GB200 share 450 GB/s to their host. Networks: a DGX has an adapter of 400 or 200 Gbit/s for each GPU; of
    other machines 200 Gbit/s in all are counted. RTX 6000 Ada: NVIDIA's paper on the Ada architecture. A10G:
    AWS's cards.
    """

    name: str  #: ends with its memory in GiB
    pattern: str  #: regular expression for the name that the driver gives; the first row that fits counts
    bandwidth: float  #: of its memory, GB/s
    link: float  #: to a GPU of the same machine, GB/s in one direction
    host: float  #: to the memory of the machine, GB/s in one direction
    network: float  #: of a machine with 8 of them as they are sold, GB/s in one direction
    half: float  #: products of matrices in 16 bit, TFLOP/s
    fp32: float  #: TFLOP/s
    tf32: float | None = None  #: TFLOP/s; None: the hardware has neither TF32 nor bf16

    @property
    def memory(self) -> int:
        """Bytes."""
        return int(self.name.rpartition("-")[2].removesuffix("GB")) * 2**30

    def rate(self, precision: Precision, *, tf32: bool = False) -> float | None:
        """Operations a second in products of matrices; None: the hardware has no such precision."""
        if precision == "bf16" and self.tf32 is None:
            return None
        teraflops = self.half
        if precision == "fp32":
            teraflops = self.tf32 if tf32 and self.tf32 else self.fp32
        return teraflops * 1e12

    def precision(self) -> Precision:
        """Precision that visft.model.precision "auto" chooses on it."""
        return "fp16" if self.tf32 is None else "bf16"


def _read_gpus() -> dict[str, Gpu]:
    gpus: dict[str, Gpu] = {}
    with Path(__file__).with_name("gpus.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            name = row.pop("name")
            pattern = row.pop("pattern")
            gpus[name] = Gpu(name, pattern, **{key: float(text) for key, text in row.items() if text})
    return gpus


#: By name. A GPU that is missing is a new row of gpus.csv.
GPUS = _read_gpus()


def find_gpu(name: str) -> Gpu | None:
    """The kind of a GPU by its driver's name; None for unknown ones and for slices of one (MIG)."""
    fitting = [gpu for gpu in GPUS.values() if re.search(gpu.pattern, name, re.IGNORECASE)]
    return fitting[0] if fitting and "MIG" not in name else None


def peak_rate(device: torch.device, precision: Precision) -> float | None:
    """The dense peak of this GPU in operations a second; None on a CPU and on GPUs that are not known.

    fp32 means TF32 where the run allows it and the GPU has it.
    """
    if device.type != "cuda":
        return None
    import torch  # `visft plan` reads its cluster before that, which takes seconds

    gpu = find_gpu(torch.cuda.get_device_name(device))
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
        slowest = LINK_SHARE * self.gpu.link
        group_within_a_machine = self.count <= self.per_node or self.per_node % ranks == 0
        if not group_within_a_machine:
            slowest = min(slowest, NETWORK_SHARE * self.network)
        return 1e9 * slowest


def parse_cluster(text: str, network: float | None = None) -> Cluster:
    """`8xA100-80GB` or `2x8xH100` (machines x GPUs; the memory where there are several), with a network of so
    many GB/s in one direction (None: as such machines are sold). Raises ValueError for another form or an
    unknown name.
    """
    if network is not None and not 0 < network < math.inf:
        raise ValueError(f"--network {network}: give GB/s above 0, such as 25 (200 Gbit/s)")
    match = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(.+)", text)
    machines, per_machine, name = match.groups() if match else (None, "0", "")
    count = int(machines or 1) * int(per_machine)
    if count == 0:
        raise ValueError(f"--cluster {text}: write COUNTxNAME, such as 8xA100-80GB, or MACHINESxGPUSxNAME")

    # "RTX 4090", "rtx-4090" and "4090" are the same GPU; its memory may be left out.
    short = re.sub(r"RTX|[ _]", "", name.upper()).strip("-")
    fitting = [known for known in GPUS if short in (known.upper(), known.upper().rpartition("-")[0])]
    if len(fitting) != 1:
        names = ", ".join(fitting or GPUS)
        raise ValueError(f"--cluster {text}: no one GPU is called {name}; known: {names}")
    gpu = GPUS[fitting[0]]
    return Cluster(
        count=count,
        gpu=gpu,
        network=gpu.network if network is None else network,
        per_node=int(per_machine) if machines else Cluster.per_node,
    )
