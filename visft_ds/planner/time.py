"""Time of a step on hardware that need not be here: a roofline, the host beside the device, and messages."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from visft_ds.ops import DTYPES
from visft_ds.planner.hardware import LINK_SHARE, Cluster, Gpu
from visft_ds.planner.memory import FP32, PlannedRun, is_offloaded, trace_step
from visft_ds.planner.trace import Work
from visft_ds.settings.task_schema import Stream

#: Of the dense peak, large matrix products reach this much: cuBLAS as commonly reported (H100 790, A100 250,
#: V100 95 TFLOP/s). Fused attention, forward and backward together, reaches about half of that at heads of 88
#: and 112.
PRODUCT_SHARE, ATTENTION_SHARE = 0.80, 0.42
#: Of the memory's bandwidth, kernels that only move bytes reach this much; sampling at scattered places a
#: quarter.
BANDWIDTH_SHARE, SAMPLING_SHARE = 0.85, 0.25
#: Seconds of a kernel, however small; of the host for an operator; and of the host for a block that is
#: recomputed.
CALL_SECONDS, HOST_SECONDS, CHECKPOINT_SECONDS = 5e-6, 19e-6, {"block": 0.4e-3, "mlp": 0.75e-3}
#: Bytes that AdamW moves for a value: reads it, its gradient and both moments, writes three of them; and the
#: norm.
UPDATE_BYTES = 32


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
    return sum(count * what.operations / _rate(gpu, what, tf32) for what, count in work.items())


def work_seconds(work: Counter[Work], gpu: Gpu, checkpoints: float = 0.0, *, tf32: bool = False) -> float:
    """Sum over operators, each as long as its arithmetic, its bytes or its call; or the host's time, if that
    is longer, with its seconds for blocks that are recomputed (`checkpoints`)."""

    def seconds(what: Work) -> float:
        share = SAMPLING_SHARE if what.kind == "sampling" else BANDWIDTH_SHARE
        moved = what.bytes / (share * 1e9 * gpu.bandwidth)
        reached = ATTENTION_SHARE if what.kind == "attention" else PRODUCT_SHARE
        return max(what.operations / (reached * _rate(gpu, what, tf32)), moved, CALL_SECONDS)

    device = sum(count * seconds(what) for what, count in work.items())
    return max(device, HOST_SECONDS * sum(work.values()) + checkpoints)


def _rate(gpu: Gpu, what: Work, tf32: bool) -> float:
    """Operations a second at the peak; attention in float32 takes no TF32."""
    names = {dtype: precision for precision, dtype in DTYPES.items()}
    return gpu.rate(names.get(what.dtype, "fp32"), tf32=tf32 and what.kind == "product") or gpu.fp32 * 1e12


def step_time(run: PlannedRun, stream: Stream, cluster: Cluster) -> PlannedTime:
    """Time of one kind of step."""
    found, batches, gpu = trace_step(run, stream), run.batches, cluster.gpu
    stage, stages = int(run.config.deepspeed["zero_optimization"]["stage"]), batches.stages
    again = (
        CHECKPOINT_SECONDS.get(run.config.visft.model.recompute, 0.0) * found.backbone_trains * found.blocks
    )
    micro = work_seconds(found.work, gpu, again, tf32=run.tf32)
    compute, waiting = batches.accumulation * micro / stages, 0.0
    if run.partition is not None:  # the slowest stage decides, once the pipeline is full
        costs = run.partition.stage_costs()
        waiting = ((batches.accumulation - 1) * max(costs) / sum(costs) + 1) * micro - compute
    divided = batches.dp if stage else 1
    update = UPDATE_BYTES * found.taught / divided / stages / (BANDWIDTH_SHARE * 1e9 * gpu.bandwidth)
    taught, trained = (FP32 * values // stages for values in (found.taught, found.trained))
    # Below ZeRO-2 whole gradients are kept and summed once; above, each micro-batch's are, and weights are
    # gathered beside computation.
    seen, hidden = 2 * taught * (batches.accumulation if stage == 2 else 1) + trained * (stage > 0), 0
    if stage == 3:
        seen = taught * batches.accumulation
        hidden = (found.frozen + FP32 * found.trained) * (1 + found.backbone_trains) * batches.accumulation
    rate, ring = cluster.rate(batches.dp), (batches.dp - 1) / batches.dp
    gathering = ring * hidden / rate
    if is_offloaded(
        run.config.deepspeed["zero_optimization"], "param"
    ):  # each rank brings its share from the host
        gathering += hidden / batches.dp / (LINK_SHARE * 1e9 * gpu.host)
    communication = ring * seen / rate + max(0.0, gathering - compute)
    if stages > 1:  # tokens to the next stage, and their gradients back where something before it trains
        turns = (batches.accumulation + stages - 2) * (1 + found.backbone_trains)
        communication += turns * FP32 * found.tokens / cluster.rate(cluster.count)
    return PlannedTime(compute, update, communication, waiting)
