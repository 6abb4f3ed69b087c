"""From one global batch per stream to what each process does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from visft_ds.config.resolve import ResolvedConfig


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
    dp, lines = world_size // stages, list[str]()
    for stream in streams.values():
        if stream.batch_size % dp:
            sizes = [size for size in (stream.batch_size // dp * dp, (stream.batch_size // dp + 1) * dp) if size]
            dividing = [n for n in range(1, stream.batch_size + 1) if stream.batch_size % n == 0]
            near = sorted(n * stages for n in sorted(dividing, key=lambda n: abs(n - dp))[:4])
            lines.append(
                f"{stream.key}.batch_size = {stream.batch_size} on {world_size} processes: its shares would not be "
                f"whole. Use batch_size {' or '.join(map(str, sizes))}, or {', '.join(map(str, near))} processes"
            )
    if lines:
        raise ValueError("\n".join(lines))
    shares = {name: stream.batch_size // dp for name, stream in streams.items()}
    common = math.gcd(*shares.values())
    for name, stream in streams.items():
        if (least := shares[name] // common) > stream.micro_batch:
            lines.append(
                f"{stream.key}.micro_batch = {stream.micro_batch} is too small: {stream.batch_size} images = "
                f"micro-batch {least} x accumulation {common} x {dp} processes"
            )
    if lines:
        raise ValueError("\n".join(lines))
    for accumulation in (n for n in range(1, common + 1) if common % n == 0):
        micro = {name: share // accumulation for name, share in shares.items()}
        if all(micro[name] <= stream.micro_batch for name, stream in streams.items()):
            break
    return Batches(dp, accumulation, micro, {name: one.batch_size for name, one in streams.items()}, stages)
