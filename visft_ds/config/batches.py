"""From one global batch per stream to what each process does, and to the dict `deepspeed.initialize` takes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from visft_ds.config.resolve import ResolvedConfig
from visft_ds.config.schema import Precision
from visft_ds.config.task_schema import SHARED, Stream


@dataclass(frozen=True)
class Batches:
    """How the global batches are divided: batch_size = dp x accumulation x micro, for every stream.

    A stream is a task, or the one that all tasks share.
    """

    dp: int  #: data-parallel processes
    accumulation: int  #: micro-steps of one optimiser step, the same for all streams
    micro: Mapping[str, int]  #: stream -> images of one process and micro-step
    batch_size: Mapping[str, int]  #: stream -> images of one optimiser step over all processes

    def equations(self) -> list[str]:
        """One line for each stream."""
        return [
            f"{task}: {total} images = {self.dp} processes x {self.accumulation} accumulation x {self.micro[task]}"
            for task, total in self.batch_size.items()
        ]


def derive_batches(config: ResolvedConfig, world_size: int) -> Batches:
    """The smallest accumulation that suits every task: batch_size divides evenly and no micro-batch is too large.

    Raises:
        ValueError: no accumulation does; names the equation and the nearest values that work.
    """
    if world_size < 1:
        raise ValueError(f"{world_size} processes: must be at least 1")
    streams = config.visft.streams()
    uneven = [_uneven(stream, world_size) for stream in streams.values() if stream.batch_size % world_size]
    if uneven:
        raise ValueError("\n".join(uneven))
    shares = {name: stream.batch_size // world_size for name, stream in streams.items()}
    common = math.gcd(*shares.values())
    for accumulation in (a for a in range(1, common + 1) if common % a == 0):
        if all(share // accumulation <= streams[name].micro_batch for name, share in shares.items()):
            return Batches(
                dp=world_size,
                accumulation=accumulation,
                micro={name: share // accumulation for name, share in shares.items()},
                batch_size={name: stream.batch_size for name, stream in streams.items()},
            )
    # Accumulation is one number for all tasks, so the largest possible one is their common divisor.
    lines = [
        f"no accumulation suits every task on {world_size} processes (batch_size = processes x accumulation x micro):"
    ]
    for name, stream in streams.items():
        smallest = shares[name] // common
        verdict = "" if smallest <= stream.micro_batch else f"; state {_key(stream)}.micro_batch = {smallest} or more"
        lines.append(
            f"  {name}: {stream.batch_size} = {world_size} x {common} x {smallest}, "
            f"micro_batch <= {stream.micro_batch}{verdict}"
        )
    hint = "  or choose batch sizes whose shares have a larger common divisor"
    raise ValueError("\n".join([*lines, hint]))


def _key(stream: Stream) -> str:
    return "visft.shared" if stream.name == SHARED else f"visft.tasks.{stream.name}"


def _uneven(stream: Stream, world_size: int) -> str:
    total = stream.batch_size
    below, above = total // world_size * world_size, (total // world_size + 1) * world_size
    sizes = " or ".join(str(size) for size in (below, above) if size)
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    near = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:4])
    reason = "more processes than images" if world_size > total else "the share of a process would not be whole"
    return (
        f"{_key(stream)}.batch_size = {total} on {world_size} processes: {reason} "
        f"(batch_size = processes x accumulation x micro, micro <= {stream.micro_batch}). "
        f"With {world_size} processes use batch_size {sizes}; with batch_size {total} use "
        f"{', '.join(str(n) for n in near)} processes (deepspeed --num_gpus N)"
    )


_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


def deepspeed_dict(config: ResolvedConfig, world_size: int, precision: Precision) -> dict[str, Any]:
    """The plain dict for `deepspeed.initialize`: engine keys plus everything that is derived.

    Args:
        config: the resolved configuration.
        world_size: number of processes.
        precision: what visft.model.precision means on this hardware; never "auto".
    """
    assert config.visft.model.precision in ("auto", precision), (config.visft.model.precision, precision)
    batches = derive_batches(config, world_size)
    # DeepSpeed knows one batch; where tasks differ it is told the largest. It only checks and reports with it.
    micro = max(batches.micro.values())
    result = {
        **copy.deepcopy(dict(config.deepspeed)),
        "gradient_clipping": config.gradient_clipping,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": batches.accumulation,
        "train_batch_size": micro * batches.accumulation * batches.dp,
        "steps_per_print": 10**9,
    }
    if precision in _AUTOCAST:
        # No module is listed, so that DeepSpeed reduces gradients in the dtype of their parameter, which is fp32.
        result["torch_autocast"] = {
            "enabled": True,
            "dtype": _AUTOCAST[precision],
            "lower_precision_safe_modules": [],
        }
    return result
