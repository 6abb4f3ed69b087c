"""From one global batch per stream to what each process does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

from visft_ds.config.resolve import CONFIG_ROOT, ResolvedConfig
from visft_ds.settings.task_schema import Stream


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
    """The smallest accumulation that suits every task: batch_size divides evenly and no micro-batch is too
    large.

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
    if any(stream.batch_size % dp for stream in streams.values()):
        raise ValueError(_cannot_be_divided(config, world_size))
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


@dataclass(frozen=True)
class LargerBatches:
    """Batches that more processes can share, with the learning rate that goes with them."""

    settings: tuple[str, ...]  #: "dotted.key=value"
    flags: tuple[str, ...]  #: the same as words of visft train
    rule: str  #: where the learning rate comes from


def larger_batches(config: ResolvedConfig, processes: int) -> LargerBatches:
    """Each batch raised to the next one that so many processes can share.

    With Adam the learning rate grows with the square root of the batch (Malladi et al., arXiv 2205.10287).
    DETR's authors call more than that too much (https://github.com/facebookresearch/detr/issues/48).
    """
    streams = list(config.visft.streams().values())
    sizes = _raised(streams, processes // config.pipeline_stages)
    worst = max(streams, key=lambda stream: sizes[stream.key] / stream.batch_size)
    raised = [stream for stream in streams if sizes[stream.key] > stream.batch_size]
    settings = [f"{stream.key}.batch_size={sizes[stream.key]}" for stream in raised]
    flags = [word for setting in settings for word in ("--set", setting)]
    by_set = any(config.sources.get(f"{stream.key}.batch_size") == "--set" for stream in streams)
    if len(set(sizes.values())) == 1 and not by_set:
        flags = ["--batch-size", str(sizes[worst.key])]

    apart = _groups_apart(config, raised)
    if len(apart) < len(config.visft.param_groups):
        growth = math.sqrt(sizes[worst.key] / worst.batch_size)
        rate = _short(config.optimizer.params.lr * growth)
        settings.append(f"optimizer.params.lr={rate}")
        by_set = config.sources.get("optimizer.params.lr") == "--set"
        flags += ["--set", settings[-1]] if by_set else ["--lr", rate]
    growth_in_words = f"the square root of {sizes[worst.key]} / {worst.batch_size}"
    rule = f"for Adam the learning rate is multiplied by {growth_in_words}"
    if apart:
        rule += f"; raise that of {' and '.join(apart)} in visft.param_groups by the same factor"
    source = config.sources.get(f"{worst.key}.batch_size", "")
    origin = "published" if source.startswith(f"{CONFIG_ROOT.name}/stage") else "configured"
    return LargerBatches(tuple(settings), tuple(flags), f"{rule}; the {origin} batch is {worst.batch_size}")


def _raised(streams: Sequence[Stream], dp: int) -> dict[str, int]:
    """Key of each stream -> its batch, raised as little as `dp` processes with one accumulation for all
    allow.
    """
    accumulation = 1
    while True:
        several = dp * accumulation
        sizes = {stream.key: math.ceil(stream.batch_size / several) * several for stream in streams}
        if all(sizes[stream.key] // several <= stream.micro_batch for stream in streams):
            return sizes
        accumulation += 1


def _groups_apart(config: ResolvedConfig, raised: Sequence[Stream]) -> list[str]:
    """Names of the parameter groups that learn from raised batches with a learning rate of their own."""
    tasks = [task for stream in raised for task in stream.tasks]
    found = []
    for group in config.visft.param_groups:
        of_head = any(fnmatch(f"heads.{task}.weight", glob) for glob in group.globs() for task in tasks)
        of_backbone = not group.params.startswith("heads.")
        if group.lr is not None and (of_head or of_backbone):
            found.append(group.name)
    return found


def _short(rate: float) -> str:
    """A learning rate with two digits, as people write it: 1.4e-4."""
    text = f"{rate:.2g}" if rate >= 1e-3 else f"{rate:.1e}"
    return text.replace(".0e", "e").replace("e-0", "e-")


def _cannot_be_divided(config: ResolvedConfig, processes: int) -> str:
    """Message about batches that so many processes cannot share: what to add, and how many processes can."""
    stages, streams = config.pipeline_stages, config.visft.streams().values()
    dp = processes // stages
    uneven = [
        f"{stream.key}.batch_size = {stream.batch_size}" for stream in streams if stream.batch_size % dp
    ]
    among = f"{processes} processes" + (f" ({dp} pipelines)" if stages > 1 else "")
    common = math.gcd(*(stream.batch_size for stream in streams))
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    nearest = sorted(divisors, key=lambda number: abs(number - dp))[:4]
    *fewer, most = [str(number * stages) for number in sorted(nearest)]
    counts = f"{', '.join(fewer)} or {most} processes" if fewer else f"{most} process(es)"
    larger = larger_batches(config, processes)
    return (
        f"{' and '.join(uneven)} cannot be divided among {among}: add {shlex.join(larger.flags)} ({larger.rule}), or "
        f"start {counts}"
    )
