"""From one global batch per stream to what each process does, and to the dict `deepspeed.initialize` takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visft_ds.config.fields import Precision
from visft_ds.config.resolve import ResolvedConfig
from visft_ds.config.task_schema import Stream


@dataclass(frozen=True)
class Batches:
    """Division of the global batches: batch_size = dp x accumulation x micro, for every stream.

    A stream is a task, or the one that all tasks share.
    """

    dp: int  #: data-parallel processes, or pipelines side by side
    accumulation: int  #: micro-steps of one optimiser step, the same for all streams
    micro: Mapping[str, int]  #: stream -> images of one process and micro-step
    batch_size: Mapping[str, int]  #: stream -> images of one optimiser step over all processes
    stages: int = 1  #: of each pipeline

    @property
    def processes(self) -> int:
        """Number of all processes."""
        return self.dp * self.stages

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches in a global batch."""
        return self.dp * self.accumulation

    def equations(self) -> list[str]:
        """Equations of the batch sizes, a line for each stream."""
        parts = "processes" if self.stages == 1 else f"pipelines of {self.stages} processes"
        return [
            f"{task}: {total} images = {self.dp} {parts} x {self.accumulation} accumulation x {self.micro[task]}"
            for task, total in self.batch_size.items()
        ]


def derive_batches(config: ResolvedConfig, world_size: int) -> Batches:
    """The smallest accumulation that suits every task: batch_size divides evenly and no micro-batch is too large.

    Raises:
        ValueError: no accumulation does; names the equation and the nearest values that work.
    """
    stages, streams = config.pipeline_stages, config.visft.streams()
    if world_size % stages:
        raise ValueError(
            f"pipeline.stages = {stages} on {world_size} processes: no whole number of pipelines; use a multiple of "
            f"{stages} processes (deepspeed --num_gpus N), or other stages (--set pipeline.stages=N)"
        )
    dp = world_size // stages
    parts = "processes" if stages == 1 else f"pipelines of {stages} processes"
    if uneven := [stream for stream in streams.values() if stream.batch_size % dp]:
        raise ValueError("\n".join(_uneven(stream, dp, stages, parts) for stream in uneven))
    common, micro = math.gcd(*(stream.batch_size // dp for stream in streams.values())), dict[str, int]()
    for accumulation in range(1, common + 1):
        micro = {name: stream.batch_size // dp // accumulation for name, stream in streams.items()}
        fits = all(micro[name] <= stream.micro_batch for name, stream in streams.items())
        if fits and not common % accumulation:
            return Batches(dp, accumulation, micro, {name: one.batch_size for name, one in streams.items()}, stages)
    lines = [f"no accumulation suits every task on {dp} {parts} (batch_size = processes x accumulation x micro):"]
    for name, stream in streams.items():
        verdict = (
            "" if micro[name] <= stream.micro_batch else f"; state {stream.key}.micro_batch = {micro[name]} or more"
        )
        equation = f"{stream.batch_size} = {dp} x {common} x {micro[name]}"
        lines.append(f"{name}: {equation}, at most {stream.micro_batch}{verdict}")
    raise ValueError("\n  ".join(lines))


def _uneven(stream: Stream, dp: int, stages: int, parts: str) -> str:
    total = stream.batch_size
    sizes = [str(size) for size in (total // dp * dp, (total // dp + 1) * dp) if size]
    near = sorted(sorted((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - dp))[:4])
    return (
        f"{stream.key}.batch_size = {total} on {dp} {parts}: its shares would not be whole. Use batch_size "
        f"{' or '.join(sizes)}, or {', '.join(str(n * stages) for n in near)} processes (deepspeed --num_gpus N)"
    )


def deepspeed_dict(config: ResolvedConfig, world_size: int, precision: Precision) -> dict[str, Any]:
    """The plain dict for `deepspeed.initialize`: engine keys plus everything that is derived.

    Args:
        config: the resolved configuration.
        world_size: number of processes.
        precision: what visft.model.precision means on this hardware; never "auto".

    Raises:
        ValueError: as `derive_batches`.
    """
    assert config.visft.model.precision in ("auto", precision), (config.visft.model.precision, precision)
    batches = derive_batches(config, world_size)
    # DeepSpeed knows one batch; where tasks differ it gets the largest. It only checks and reports with it.
    micro = max(batches.micro.values())
    result = {
        **copy.deepcopy(dict(config.deepspeed)),
        "gradient_clipping": config.gradient_clipping,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batches.accumulation,
        "train_batch_size": micro * batches.accumulation * batches.dp,
        "steps_per_print": 10**9,
    }
    if precision != "fp32":
        # No module is listed, so that DeepSpeed reduces gradients in the dtype of their parameter, which is fp32.
        dtype = "bfloat16" if precision == "bf16" else "float16"
        result["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
    return result
