"""Time of a step on hardware that need not be here: a roofline, the host beside the device, and messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from visft_ds.ops import DTYPES
from visft_ds.planner.hardware import LINK_SHARE, Cluster, Gpu
from visft_ds.planner.memory import FP32, PlannedRun, TracedStep, is_offloaded, trace_step
from visft_ds.planner.trace import Work
from visft_ds.settings.task_schema import Stream

#: Of the dense peak, large matrix products reach this much: cuBLAS as commonly reported (H100 790, A100 250,
#: V100 95 TFLOP/s). Fused attention, forward and backward together, reaches about half of that at heads of 88
#: and 112.
PRODUCT_SHARE = 0.80
ATTENTION_SHARE = 0.42
#: Of the memory's bandwidth, kernels that only move bytes reach this much; sampling at scattered places a
#: quarter.
BANDWIDTH_SHARE = 0.85
SAMPLING_SHARE = 0.25
CALL_SECONDS = 5e-6  #: of a kernel, however small
HOST_SECONDS = 19e-6  #: of the host for an operator
#: Seconds of the host for a block that is recomputed, by policy.
CHECKPOINT_SECONDS = {"block": 0.4e-3, "mlp": 0.75e-3}
#: Bytes that AdamW moves for a value: reads it, its gradient and both moments, writes three of them; and the
#: norm.
UPDATE_BYTES = 32

_PRECISION_OF = {dtype: precision for precision, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PlannedTime:
    """Seconds of one optimiser step."""

    compute: float  #: forward and backward of all micro-batches
    update: float
    communication: float  #: not hidden behind computation
    waiting: float  #: of a pipeline that fills and drains

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.compute + self.update + self.communication + self.waiting


def peak_seconds(work: Counter[Work], gpu: Gpu, *, tf32: bool) -> float:
    """Seconds of the arithmetic alone at the peak."""
    return sum(calls * cost.operations / _peak(gpu, cost, tf32) for cost, calls in work.items())


def work_seconds(work: Counter[Work], gpu: Gpu, checkpoints: float = 0.0, *, tf32: bool = False) -> float:
    """Sum over operators, each as long as its arithmetic, its bytes or its call; or the host's time, if that
    is longer, with its seconds for blocks that are recomputed (`checkpoints`)."""
    on_device = sum(calls * _call_seconds(cost, gpu, tf32) for cost, calls in work.items())
    on_host = HOST_SECONDS * sum(work.values()) + checkpoints
    return max(on_device, on_host)


def _call_seconds(cost: Work, gpu: Gpu, tf32: bool) -> float:
    """Seconds of one call of an operator on the device."""
    peak_share = ATTENTION_SHARE if cost.kind == "attention" else PRODUCT_SHARE
    bandwidth_share = SAMPLING_SHARE if cost.kind == "sampling" else BANDWIDTH_SHARE
    arithmetic = cost.operations / (peak_share * _peak(gpu, cost, tf32))
    moving = cost.bytes / (bandwidth_share * 1e9 * gpu.bandwidth)
    return max(arithmetic, moving, CALL_SECONDS)


def _peak(gpu: Gpu, cost: Work, tf32: bool) -> float:
    """Operations a second at the peak; attention in float32 takes no TF32."""
    precision = _PRECISION_OF.get(cost.dtype, "fp32")
    rate = gpu.rate(precision, tf32=tf32 and cost.kind == "product")
    return gpu.fp32 * 1e12 if rate is None else rate


def step_time(run: PlannedRun, stream: Stream, cluster: Cluster) -> PlannedTime:
    """Time of one kind of step."""
    step = trace_step(run, stream)
    gpu = cluster.gpu
    accumulation = run.batches.accumulation
    stages = run.batches.stages

    checkpoints = 0.0
    if step.backbone_trains:
        checkpoints = step.blocks * CHECKPOINT_SECONDS.get(
            run.config.visft.model.activation_checkpointing, 0.0
        )
    micro_batch = work_seconds(step.work, gpu, checkpoints, tf32=run.tf32)
    compute = accumulation * micro_batch / stages

    waiting = 0.0
    if run.partition is not None:
        # The slowest stage decides, once the pipeline is full.
        costs = run.partition.stage_costs()
        slowest = max(costs) / sum(costs) * micro_batch
        waiting = (accumulation - 1) * slowest + micro_batch - compute

    ranks_of_state = run.batches.dp if run.zero_stage else 1
    updated = UPDATE_BYTES * step.with_gradient / ranks_of_state / stages
    return PlannedTime(
        compute=compute,
        update=updated / (BANDWIDTH_SHARE * 1e9 * gpu.bandwidth),
        communication=_communication(run, step, cluster, compute),
        waiting=waiting,
    )


def _communication(run: PlannedRun, step: TracedStep, cluster: Cluster, compute: float) -> float:
    """Seconds of messages that are not hidden behind `compute` seconds of computation."""
    dp = run.batches.dp
    stages = run.batches.stages
    accumulation = run.batches.accumulation
    gradients = FP32 * step.with_gradient // stages
    trained = FP32 * step.trained // stages
    passes = 2 if step.backbone_trains else 1  # forward, and backward where something before it trains

    # Bytes that are waited for: sums of gradients, there and back, once a step; under ZeRO updated weights.
    summed = 2 * gradients
    gathered = 0  # bytes of weights that travel beside computation
    if run.zero_stage == 1:
        summed += trained
    elif run.zero_stage == 2:  # each micro-batch's gradients are summed
        summed = accumulation * summed + trained
    elif run.zero_stage == 3:  # and each rank keeps its part of the sums
        summed = accumulation * gradients
        gathered = accumulation * passes * (step.frozen + FP32 * step.trained)

    ring = (dp - 1) / dp  # of all parts, those that leave a rank
    rate = cluster.rate(dp)
    gathering = ring * gathered / rate
    if is_offloaded(run.zero, "param"):  # each rank brings its part from the host
        gathering += gathered / dp / (LINK_SHARE * 1e9 * cluster.gpu.host)
    seconds = ring * summed / rate + max(0.0, gathering - compute)
    if stages > 1:  # tokens to the next stage, and their gradients back
        turns = (accumulation + stages - 2) * passes
        seconds += turns * FP32 * step.tokens / cluster.rate(cluster.count)
    return seconds
