"""Hardware that need not be there: its memory, what it does in a second, and so the time of a step by roofline.

Peaks in arithmetic are those of `costs.hardware`. What an ordinary program reaches of them is stated here, once.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import Stream
from visft_ds.costs.hardware import DTYPES, find_peak
from visft_ds.planner.messages import SEND, bus_factor, messages_of
from visft_ds.planner.meta_step import Kind, Total
from visft_ds.planner.step import PlannedRun, trace_step

#: Of the dense peak, large matrix products reach this much: cuBLAS as commonly reported (H100 790, A100 250, V100 95
#: TFLOP/s). Fused attention, forward and backward together, reaches about half of that at heads of 88 and 112.
PRODUCT_SHARE, ATTENTION_SHARE = 0.80, 0.42
#: Of the memory's bandwidth, kernels that only move bytes reach this much; sampling at scattered places a quarter.
BANDWIDTH_SHARE, SAMPLING_SHARE = 0.85, 0.25
#: Of the bandwidth in one direction, large collectives reach this much of a link and of a machine's network: nccl-tests
#: as published, see tests/planner/test_published.py.
LINK_SHARE, NETWORK_SHARE = 0.8, 0.9
#: Seconds of a kernel, however small.
CALL_SECONDS = 5e-6
#: Seconds of the host for an operator (Python, autograd, dispatch), and beside its operators for a block that is
#: computed again; measured.
HOST_SECONDS = 19e-6
CHECKPOINT_SECONDS = {"block": 0.4e-3, "mlp": 0.75e-3}
#: Bytes that AdamW moves for a value: reads it, its gradient and both moments, writes three of them; and the norm.
_UPDATE_BYTES = 32


@dataclass(frozen=True)
class Gpu:
    """Kind of GPU; rates per second, sizes in bytes."""

    name: str
    memory: int
    bandwidth: float  #: of its memory
    link: float  #: to a GPU of the same machine, one direction
    network: float  #: of a machine with 8 of them as they are sold, in one direction
    tflops: Mapping[Precision, float]  #: dense peaks in TFLOP/s; a precision that is not there is not in hardware

    def tflops_of(self, dtype: torch.dtype) -> float:
        """Its peak for products of this dtype."""
        return self.tflops[_PRECISION.get(dtype, "fp32")]

    def precision(self) -> Precision:
        """Precision that visft.model.precision "auto" chooses on it."""
        return "bf16" if "bf16" in self.tflops else "fp16"


def _gpu(name: str, driver: str, gigabytes: int, bandwidth: float, link: float) -> Gpu:
    peak = find_peak(driver)
    assert peak is not None, driver
    rates: dict[Precision, float | None] = {"bf16": peak.bf16, "fp16": peak.fp16, "fp32": peak.fp32}
    found = {precision: rate for precision, rate in rates.items() if rate is not None}
    network = next((speed for kind, speed in _SOLD_WITH.items() if name.startswith(kind)), "200gbit")
    return Gpu(name, gigabytes * 2**30, bandwidth * 1e9, link * 1e9, NETWORKS[network], found)


#: Bytes a second of a machine's network in one direction; a DGX has an adapter of 400 or 200 Gbit/s for each GPU.
NETWORKS = {"dgx-h100": 400e9, "dgx-a100": 200e9, "200gbit": 25e9, "100gbit": 12.5e9}
_SOLD_WITH = {"H100": "dgx-h100", "H200": "dgx-h100", "A100": "dgx-a100"}
#: Memory in GiB and bandwidths in GB/s from the makers' data sheets (see `costs.hardware.PEAKS`). Links: NVLink 2,
#: 3 and 4 with 150, 300 and 450 GB/s in each direction; PCIe 4 x16 with 32.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", "Tesla V100-SXM2-16GB", 16, 900, 150),
        _gpu("V100-32GB", "Tesla V100-SXM2-32GB", 32, 900, 150),
        _gpu("A100-40GB", "NVIDIA A100-SXM4-40GB", 40, 1555, 300),
        _gpu("A100-80GB", "NVIDIA A100-SXM4-80GB", 80, 2039, 300),
        _gpu("H100-80GB", "NVIDIA H100 80GB HBM3", 80, 3350, 450),
        _gpu("H200-141GB", "NVIDIA H200", 141, 4800, 450),
        _gpu("L40S-48GB", "NVIDIA L40S", 48, 864, 32),
        _gpu("4090-24GB", "NVIDIA GeForce RTX 4090", 24, 1008, 32),
        _gpu("3090-24GB", "NVIDIA GeForce RTX 3090", 24, 936, 32),
    )
}
_PRECISION: Mapping[torch.dtype, Precision] = {dtype: precision for precision, dtype in DTYPES.items()}
_PER_NODE = 8


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind; ranks next to each other share a machine."""

    count: int
    gpu: Gpu
    network: float  #: bytes a second into a machine of `per_node` GPUs, and as many out of it
    per_node: int = _PER_NODE

    @property
    def machines(self) -> int:
        """Machines that are needed."""
        return -(-self.count // self.per_node)

    def ring_seconds(self, collective: str, size: int, ranks: int) -> float:
        """Seconds of a collective of `size` bytes over groups of `ranks` neighbours.

        A ring enters and leaves each machine once, with all that its links carry. What a call costs before its first
        byte is not in it.
        """
        rate = LINK_SHARE * self.gpu.link
        if self.machines > 1 and self.per_node % ranks:  # else each group is within a machine
            rate = min(rate, NETWORK_SHARE * self.network)
        return bus_factor(collective, ranks) * size / rate

    def send_seconds(self, size: int, distance: int) -> float:
        """Seconds in which every rank sends `size` bytes to the one `distance` further on.

        Of a machine's ranks the last `distance` send over its network at the same time.
        """
        rate = LINK_SHARE * self.gpu.link
        if self.machines > 1:
            rate = min(rate, NETWORK_SHARE * self.network / min(distance, self.per_node))
        return size / rate


def parse_cluster(text: str, network: float | None = None) -> Cluster:
    """`8xA100-80GB` or `2x8xH100` (machines x GPUs; the memory where there are several).

    Args:
        network: of a machine, GB/s in one direction; None: as such machines are sold.

    Raises:
        ValueError: another form, or an unknown name (with the nearest one).
    """
    if network is not None and not 0 < network < math.inf:
        raise ValueError(f"--network {network}: give GB/s above 0, such as 25 (200 Gbit/s)")
    found = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})x(.+)", text)
    if found is None or not int(found[1] or 1) * int(found[2]):
        raise ValueError(
            f"--cluster {text}: write COUNTxNAME such as 8xA100-80GB, or MACHINESxGPUSxNAME such as 8x8xH100 (each at "
            "least 1)"
        )
    gpu, per_node = _find(found[3], text), int(found[2]) if found[1] else _PER_NODE
    return Cluster(int(found[1] or 1) * int(found[2]), gpu, 1e9 * network if network else gpu.network, per_node)


def _find(name: str, text: str) -> Gpu:
    wanted = name.upper().replace("RTX", "").strip(" -_")
    close = [gpu for key, gpu in GPUS.items() if wanted in (key.upper(), key.upper().rpartition("-")[0])]
    if len(close) == 1:
        return close[0]
    if close:
        raise ValueError(f"--cluster {text}: which one? There are {', '.join(gpu.name for gpu in close)}")
    near = difflib.get_close_matches(wanted, [key.upper() for key in GPUS], n=1, cutoff=0.4)
    hint = f"; did you mean {next(key for key in GPUS if key.upper() == near[0])}" if near else ""
    raise ValueError(f"--cluster {text}: {name} is not known{hint}. There are {', '.join(GPUS)}")


@dataclass(frozen=True)
class Rates:
    """Rates that a device reaches, per second."""

    product: Mapping[Precision, float]  #: operations of matrix products
    attention: Mapping[Precision, float]  #: operations of fused attention
    bandwidth: Mapping[Literal["curve", "sampling", "plain"], float]  #: bytes that an operator reads and writes
    call: float  #: seconds of an operator, at least
    host: float = 0.0  #: seconds of Python and autograd for an operator
    beside: bool = False  #: the host works beside the device, as with a GPU, so that the slower of them decides

    def seconds(self, work: Total, checkpoints: float = 0.0) -> float:
        """Sum over operators, each as long as its arithmetic, its bytes or its call; with or beside the host's time.

        Args:
            checkpoints: seconds of the host for blocks that are computed again.
        """
        device = sum(count * self._of(*what) for what, count in work.items())
        host = self.host * sum(work.values()) + checkpoints
        return max(device, host) if self.beside else device + host

    def _of(self, kind: Kind, dtype: torch.dtype, operations: int, size: int) -> float:
        precision = _PRECISION.get(dtype, "fp32")
        if kind == "product" or kind == "attention":
            rate = (self.product if kind == "product" else self.attention)[precision]
            return max(operations / rate, size / self.bandwidth["plain"], self.call)
        return max(size / self.bandwidth[kind], self.call)


def rates_of(gpu: Gpu) -> Rates:
    """By the shares stated above."""
    plain = BANDWIDTH_SHARE * gpu.bandwidth
    rate = {precision: tflops * 1e12 for precision, tflops in gpu.tflops.items()}
    return Rates(
        product={precision: PRODUCT_SHARE * peak for precision, peak in rate.items()},
        attention={precision: ATTENTION_SHARE * peak for precision, peak in rate.items()},
        bandwidth={"plain": plain, "curve": plain, "sampling": SAMPLING_SHARE * gpu.bandwidth},
        call=CALL_SECONDS,
        host=HOST_SECONDS,
        beside=True,
    )


def gpu_here(device: torch.device) -> Gpu | None:
    """The known kind that this GPU is by its peaks, of several the nearest in memory; None for any other."""
    peak, memory = find_peak(torch.cuda.get_device_name(device)), torch.cuda.get_device_properties(device).total_memory
    alike = [g for g in GPUS.values() if peak and (g.tflops.get("bf16"), g.tflops["fp32"]) == (peak.bf16, peak.fp32)]
    return min(alike, key=lambda gpu: abs(gpu.memory - memory), default=None)


def peak_rate(device: torch.device, precision: Precision) -> float | None:
    """The dense peak of this GPU in operations a second; None on a CPU and on GPUs that are not known.

    fp32 means TF32 where the run allows it and the GPU has it.
    """
    peak = find_peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return None
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest" and peak.tf32
    rate = peak.tf32 if tf32 else {"bf16": peak.bf16, "fp16": peak.fp16, "fp32": peak.fp32}[precision]
    return None if rate is None else rate * 1e12


def rates_here(device: torch.device) -> Rates:
    """Rates of this process's device, by which policies are compared: of a GPU that is known, else operations alone."""
    gpu = gpu_here(device) if device.type == "cuda" else None
    if gpu is not None:
        return rates_of(gpu)
    equal, free = dict.fromkeys(DTYPES, 1.0), math.inf
    return Rates(equal, equal, {"curve": free, "sampling": free, "plain": free}, call=0.0)


# ------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class PlannedTime:
    """Seconds of one optimiser step."""

    compute: float  #: forward and backward of all micro-batches
    update: float
    communication: float  #: not hidden behind computation
    waiting: float  #: of a pipeline that fills and drains

    @property
    def total(self) -> float:
        """All parts."""
        return self.compute + self.update + self.communication + self.waiting


def step_time(run: PlannedRun, stream: Stream, rates: Rates, cluster: Cluster | None = None) -> PlannedTime:
    """Of one kind of step.

    Args:
        cluster: over whose links ranks send their messages; None: sending takes no time.
    """
    found, batches, zero = trace_step(run.alone(), stream), run.batches, run.zero()
    micro = micro_batch_seconds(run.alone(), stream, rates)
    shared = batches.dp if zero.stage else 1
    update = _UPDATE_BYTES * found.trained / shared / batches.stages / rates.bandwidth["plain"]
    compute, waiting = batches.accumulation * micro, 0.0
    if batches.stages > 1:
        compute, total = _of_pipeline(run, micro)
        waiting = total - compute
    seen, hidden = (0.0, 0.0) if cluster is None else _sending_seconds(run, stream, cluster)
    return PlannedTime(compute, update, seen + max(0.0, hidden - compute), waiting)


def _sending_seconds(run: PlannedRun, stream: Stream, cluster: Cluster) -> tuple[float, float]:
    """(seconds that computation waits for messages, seconds of messages that travel beside it)."""
    seconds, batches = {False: 0.0, True: 0.0}, run.batches
    for message in messages_of(run, stream):
        if message.collective == SEND:  # stages wait for what they receive, also while the pipeline fills and drains
            turns = message.calls + batches.stages - 2
            seconds[message.hidden] += turns * cluster.send_seconds(message.bytes, batches.dp)
        else:
            one = cluster.ring_seconds(message.collective, message.bytes, batches.dp)
            seconds[message.hidden] += message.calls * one
    return seconds[False], seconds[True]


def micro_batch_seconds(run: PlannedRun, stream: Stream, rates: Rates) -> float:
    """Of forward and backward pass of a micro-batch, on one process with the whole model."""
    found = trace_step(run, stream)
    again = CHECKPOINT_SECONDS.get(run.config.visft.model.recompute, 0.0) * found.backbone_trains
    return rates.seconds(found.work, again * found.blocks)


def _of_pipeline(run: PlannedRun, micro: float) -> tuple[float, float]:
    """Seconds in which a stage computes, and in all: the slowest stage decides, once the pipeline is full."""
    assert run.partition is not None
    costs, accumulation = run.partition.stage_costs(), run.batches.accumulation
    slowest = max(costs) / sum(costs)
    return accumulation * micro / run.batches.stages, ((accumulation - 1) * slowest + 1) * micro
