"""From one global batch per stream to what each process does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import count

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
    stages = config.pipeline_stages
    streams = config.visft.streams()
    if world_size % stages:
        raise ValueError(
            f"pipeline.stages = {stages} on {world_size} processes: no whole number of pipelines; use a "
            f"multiple of {stages} processes (deepspeed --num_gpus N), or other stages "
            "(--set pipeline.stages=N)"
        )
    dp = world_size // stages
    if any(stream.batch_size % dp for stream in streams.values()):
        raise ValueError(_cannot_be_divided(config, world_size))
    shares = {name: stream.batch_size // dp for name, stream in streams.items()}
    most = math.gcd(*shares.values())  # with more accumulation than this some share would not be whole
    for accumulation in _divisors(most):
        micro = {name: share // accumulation for name, share in shares.items()}
        too_small = [stream for name, stream in streams.items() if micro[name] > stream.micro_batch]
        if not too_small:
            sizes = {name: stream.batch_size for name, stream in streams.items()}
            return Batches(dp, accumulation, micro, sizes, stages)
    raise ValueError(
        "\n".join(
            f"{stream.key}.micro_batch = {stream.micro_batch} is too small: {stream.batch_size} images = "
            f"micro-batch {micro[stream.name]} x accumulation {most} x {dp} processes"
            for stream in too_small
        )
    )


def _divisors(number: int) -> list[int]:
    """Divisors of a number, the smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


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
    sources = config.sources
    sizes = _raised(streams, processes // config.pipeline_stages)
    settings = list[str]()
    for stream in streams:
        if sizes[stream.key] > stream.batch_size:
            settings.append(f"{stream.key}.batch_size={sizes[stream.key]}")
    flags = [word for setting in settings for word in ("--set", setting)]
    # --batch-size and --lr give way to --set: where the user has set the key, the advice has to as well.
    is_set = any(sources.get(f"{stream.key}.batch_size") == "--set" for stream in streams)
    if len(set(sizes.values())) == 1 and not is_set:
        flags = ["--batch-size", str(sizes[streams[0].key])]

    rate, rule = rate_for(config, sizes)
    if rate is not None:
        settings.append(f"optimizer.params.lr={rate}")
        is_set = sources.get("optimizer.params.lr") == "--set"
        flags += ["--set", settings[-1]] if is_set else ["--lr", rate]
    return LargerBatches(tuple(settings), tuple(flags), rule)


def rate_for(config: ResolvedConfig, sizes: Mapping[str, int]) -> tuple[str | None, str]:
    """(learning rate, where it comes from) of other batches, by the keys of their streams. None: every
    parameter group has a rate of its own.
    """
    streams = config.visft.streams().values()
    # The stream whose batch grows most.
    stream = max(streams, key=lambda stream: sizes[stream.key] / stream.batch_size)
    before = stream.batch_size
    after = sizes[stream.key]
    rule = f"for Adam the learning rate is multiplied by the square root of {after} / {before}"
    apart = _groups_apart(config, [stream for stream in streams if sizes[stream.key] > stream.batch_size])
    rate = None
    if len(apart) < len(config.visft.param_groups):
        rate = _short(config.optimizer.params.lr * math.sqrt(after / before))
    if apart:
        rule += f"; raise that of {' and '.join(apart)} in visft.param_groups by the same factor"
    source = config.sources.get(f"{stream.key}.batch_size", "")
    origin = "published" if source.startswith(f"{CONFIG_ROOT.name}/stage") else "configured"
    return rate, f"{rule}; the {origin} batch is {before}"


def _raised(streams: Sequence[Stream], dp: int) -> dict[str, int]:
    """Key of each stream -> its batch, raised as little as `dp` processes with one accumulation for all
    allow.
    """
    for unit in count(dp, step=dp):  # a batch is a multiple of it
        sizes = {stream.key: math.ceil(stream.batch_size / unit) * unit for stream in streams}
        if all(sizes[stream.key] // unit <= stream.micro_batch for stream in streams):
            break
    return sizes


def _groups_apart(config: ResolvedConfig, raised: Sequence[Stream]) -> list[str]:
    """Names of the parameter groups that learn from raised batches with a learning rate of their own."""
    heads = [f"heads.{task}.weight" for stream in raised for task in stream.tasks]
    names = []
    for group in config.visft.param_groups:
        has_head = any(fnmatch(head, glob) for glob in group.globs() for head in heads)
        has_backbone = not group.params.startswith("heads.")
        if group.lr is not None and (has_head or has_backbone):
            names.append(group.name)
    return names


def _short(rate: float) -> str:
    """A learning rate with two digits, as people write it: 1.4e-4."""
    text = f"{rate:.2g}" if rate >= 1e-3 else f"{rate:.1e}"
    return text.replace(".0e", "e").replace("e-0", "e-")


def _cannot_be_divided(config: ResolvedConfig, processes: int) -> str:
    """Message about batches that so many processes cannot share: what to add, and how many processes can."""
    stages = config.pipeline_stages
    dp = processes // stages
    streams = config.visft.streams().values()
    uneven = [
        f"{stream.key}.batch_size = {stream.batch_size}" for stream in streams if stream.batch_size % dp
    ]
    among = f"{processes} processes"
    if stages > 1:
        among += f" ({dp} pipelines)"
    divisors = _divisors(math.gcd(*(stream.batch_size for stream in streams)))
    divisors.sort(key=lambda divisor: abs(divisor - dp))
    counts = [str(divisor * stages) for divisor in sorted(divisors[:4])]
    larger = larger_batches(config, processes)
    return (
        f"{' and '.join(uneven)} cannot be divided among {among}: add {shlex.join(larger.flags)} "
        f"({larger.rule}), or start {' or '.join(counts)} processes"
    )
