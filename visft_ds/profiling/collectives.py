"""Benchmark of the collectives of a run's engine: bandwidth, latency, and the share of communication in a step.

Every call of `torch.distributed` that engines use, at sizes of a sweep and at the sizes of the configuration, beside a
copy in memory; and an engine's own averaging and update beside plain calls for the same bytes. All take turns in every
round. A call's time is that of the slowest rank.

Bandwidths as nccl-tests define them (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): algbw is S over the time, busbw
what each link has to carry for it: S is all that is reduced, gathered or sent, in bytes, over n ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from visft_ds.config import ResolvedConfig, deepspeed_dict
from visft_ds.config.schema import Precision
from visft_ds.model import MultiTaskModel
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import ZeroEngine, start_process_group
from visft_ds.planner.cluster import GPUS, Rates, rates_of, step_time
from visft_ds.planner.messages import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    COLLECTIVES,
    REDUCE_SCATTER,
    SEND,
    Message,
    broadcasts_of,
    messages_of,
)
from visft_ds.planner.step import PlannedRun, run_of
from visft_ds.prepare.model import choose_precision, plan_groups
from visft_ds.profiling.communication import measure_communication
from visft_ds.profiling.plan_validation import measured_rates
from visft_ds.profiling.record import circumstances
from visft_ds.profiling.timing import Spread, synchronize

FORMAT, VERSION = "visft_ds comm profile", 1
COPY = "copy in memory"
#: Bytes of the sweep, if nothing else is asked for; GPUs are asked for larger ones.
SIZES = tuple(1 << power for power in range(10, 26, 3))
LARGEST = {"cpu": 1 << 25, "cuda": 1 << 30}
#: Calls of one measurement: so many that about this many bytes are sent, within bounds.
_ENOUGH, _CALLS = 1 << 21, (2, 20)

Key = tuple[str, int]  #: what, bytes


@dataclass(frozen=True)
class CommOptions:
    """Options of the benchmark. Raises ValueError for numbers below 1."""

    sizes: Sequence[int] | None = None  #: bytes of the sweep; None: SIZES
    largest: int | None = None  #: bytes; larger messages are worked out from the bandwidth; None: LARGEST
    repeats: int = 10  #: rounds after one to warm up

    def __post_init__(self) -> None:
        if self.repeats < 1 or (self.largest or 1) < 1 or min(self.sizes or (1,)) < 1:
            raise ValueError("--repeats, --sizes and --max-bytes must be at least 1")


def measure_comm(config: ResolvedConfig, options: CommOptions) -> dict[str, Any] | None:
    """Measure a sweep, the messages of the configuration, and its engine. Collective; the main process gets the record.

    Raises:
        ValueError: one process alone, batches that do not divide over them.
    """
    world = distributed.world_size()
    if world < 2:
        raise ValueError("comm needs two processes or more: deepspeed --num_gpus 2 --module visft_ds profile comm ...")
    device = distributed.local_device()
    precision, _ = choose_precision(config.visft.model.precision, device)
    run = run_of(config, world, precision, None, device)
    streams = config.visft.streams()
    messages = {name: messages_of(run, stream) for name, stream in streams.items()}
    at_start = broadcasts_of(run)
    start_process_group()
    largest = options.largest or LARGEST[device.type]
    sweep = [size for size in (options.sizes or SIZES) if size <= largest] or [largest]
    load = os.getloadavg()
    keys = [(name, size) for name in (*COLLECTIVES, COPY) for size in sweep]
    wanted = {(m.collective, m.bytes) for found in messages.values() for m in found if m.bytes <= largest}
    keys += sorted(wanted - set(keys))
    times = _measure(keys, options.repeats, device)
    engine = _measure_engine(config, run, precision, options.repeats) if run.batches.stages == 1 else None
    rates = _rates(device) if distributed.is_main() else None
    record: dict[str, Any] | None = None
    if distributed.is_main():
        assert times is not None and rates is not None
        backend = dist.get_backend()
        record = {
            "format": FORMAT,
            "version": VERSION,
            **circumstances(load, device),
            "ranks": world,
            "backend": backend,
            "model": config.visft.model.name,
            "stage": config.visft.stage,
            "engine": _engine_name(run),
            "options": asdict(options),
            "calls": [_entry(key, spread, world) for key, spread in times.items()],
            "messages": {name: _costs(found, times, world) for name, found in messages.items()},
            "at_start": _costs(at_start, times, world) if at_start else [],
            "update": engine,
            "share": {
                name: _share(run, name, _costs(found, times, world), rates[0], rates[1])
                for name, found in messages.items()
            }
            if rates[0] is not None
            else {},
            "rates": rates[1],
        }
    distributed.close()
    return record


def _engine_name(run: PlannedRun) -> str:
    stages = run.batches.stages
    kind = f"pipeline of {stages} stages, " if stages > 1 else ""
    return f"{kind}ZeRO-{run.zero().stage} over {run.batches.dp}"


# ------------------------------------------------------------------------------------------------------- calls


def make_call(name: str, size: int, device: torch.device) -> Callable[[], object]:
    """A call that moves `size` bytes, as nccl-tests count them, in its own tensors. Collective."""
    rank, world = distributed.rank(), distributed.world_size()
    elements = max(world, size // 4 // world * world)
    whole = torch.zeros(elements, device=device)
    if name == COPY:
        other = torch.empty_like(whole)
        return lambda: other.copy_(whole)
    if name == ALL_REDUCE:
        return lambda: dist.all_reduce(whole)
    if name == BROADCAST:
        return lambda: dist.broadcast(whole, 0)
    part = torch.zeros(elements // world, device=device)
    if name == ALL_GATHER:
        return lambda: dist.all_gather_into_tensor(whole, part)
    if name == REDUCE_SCATTER:
        return lambda: dist.reduce_scatter_tensor(part, whole)
    assert name == SEND, name
    return lambda: _there_and_back(whole, rank, world)


def _there_and_back(tensor: Tensor, rank: int, world: int) -> None:
    """Send to the neighbour and receive from it; a last rank without one returns at once."""
    other = rank ^ 1
    if other >= world:
        return
    if rank < other:
        dist.send(tensor, other)
        dist.recv(tensor, other)
    else:
        dist.recv(tensor, other)
        dist.send(tensor, other)


def _measure(keys: Sequence[Key], repeats: int, device: torch.device) -> dict[Key, Spread] | None:
    """Seconds of a call of every kind, round by round, of the slowest rank; on the main process."""
    calls = {key: make_call(*key, device) for key in keys}
    rounds: list[Tensor] = []
    order = list(keys)
    for turn in range(repeats + 1):
        order.append(order.pop(0))  # everyone comes after everyone
        found = {key: _seconds(calls[key], key, device) for key in order}
        slowest = torch.tensor([found[key] for key in keys], device=device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        if turn:  # the first round warms up
            rounds.append(slowest.cpu())
    table = torch.stack(rounds).t().tolist()
    return {key: Spread.of(row) for key, row in zip(keys, table, strict=True)} if distributed.is_main() else None


def _seconds(call: Callable[[], object], key: Key, device: torch.device) -> float:
    name, size = key
    count = min(max(_ENOUGH // size, _CALLS[0]), _CALLS[1])
    synchronize(device)
    distributed.barrier()
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return (time.perf_counter() - began) / count / (2 if name == SEND else 1)


def bus_factor(name: str, ranks: int) -> float:
    """Ratio of busbw to algbw over `ranks` processes."""
    if name == ALL_REDUCE:
        return 2 * (ranks - 1) / ranks
    return (ranks - 1) / ranks if name in (ALL_GATHER, REDUCE_SCATTER) else 1.0


def _entry(key: Key, spread: Spread, ranks: int) -> dict[str, Any]:
    name, size = key
    speed = size / spread.median
    return {
        "call": name,
        "bytes": size,
        "seconds": asdict(spread),
        "algbw": speed,
        "busbw": speed * bus_factor(name, ranks),
    }


def _costs(messages: Sequence[Message], times: Mapping[Key, Spread], ranks: int) -> list[dict[str, Any]]:
    """Messages with the seconds that one call of each takes."""
    found = []
    for message in messages:
        known = {size: spread.median for (name, size), spread in times.items() if name == message.collective}
        seconds = seconds_of(message.bytes, known)
        speed = message.bytes / seconds
        found.append(
            {
                **asdict(message),
                "seconds": seconds,
                "busbw": speed * bus_factor(message.collective, ranks),
                "measured": message.bytes in known,
                "of_step": seconds * message.calls,
            }
        )
    return found


def seconds_of(size: int, known: Mapping[int, float]) -> float:
    """Seconds of a call of `size` bytes from measured ones, {bytes: seconds}.

    Linear between two sizes; above the largest by its bandwidth; below the smallest the seconds of the smallest.
    """
    if size in known:
        return known[size]
    below, above = [s for s in known if s < size], [s for s in known if s > size]
    if not below:
        return known[min(above)]
    low = max(below)
    if not above:
        return known[low] * size / low
    high = min(above)
    return known[low] + (known[high] - known[low]) * (size - low) / (high - low)


# ------------------------------------------------------------------------------------------------------- engine


def _measure_engine(config: ResolvedConfig, run: PlannedRun, precision: Precision, repeats: int) -> dict[str, Any]:
    """Measure averaging and update by the engine itself, of tensors of the trained sizes, without computation.

    In turn with plain calls of the same bytes; both are seen by torch's profiler, and waiting for the other ranks
    counts in both.
    """
    groups = plan_groups(config.visft, config.optimizer.params)
    shapes = [tuple(parameter.shape) for group in groups for parameter in group.parameters]
    module = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
    given = deepspeed_dict(config, distributed.world_size(), precision)
    given.pop("torch_autocast", None)
    given |= {"gradient_accumulation_steps": 1, "train_micro_batch_size_per_gpu": 1}
    given.pop("train_batch_size", None)
    engine = ZeroEngine(
        cast(MultiTaskModel, _Sum(module)),
        [{"name": "all", "params": list(module), "lr": 0.0, "weight_decay": 0.0}],
        given,
        build_optimizer=torch.optim.AdamW,
        schedule=lambda step: 1.0,
        seed=0,
    )

    size, device = 4 * sum(torch.Size(shape).numel() for shape in shapes), engine.device
    zero = run.zero().stage
    names = {0: (ALL_REDUCE,), 3: (REDUCE_SCATTER,)}.get(zero, (ALL_REDUCE, ALL_GATHER))
    calls = [make_call(name, size, device) for name in names]

    def by_engine() -> None:
        engine.deepspeed.backward(engine.deepspeed())
        engine.deepspeed.step()

    def plainly() -> None:
        for call in calls:
            call()

    found: dict[str, list[Any]] = {"engine": [], "plain": []}
    for turn in range(repeats + 1):
        for kind, action in (("engine", by_engine), ("plain", plainly)):
            distributed.barrier()
            one = measure_communication(action, device)
            if turn:  # the first round warms up
                found[kind].append(one)
    table = torch.tensor([[one.seconds for one in kind] for kind in found.values()], dtype=torch.float64, device=device)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    ours, plain = table.tolist()
    return {
        "bytes": size,
        "plain_calls": list(names),
        "calls": dict(found["engine"][0].calls),
        "seconds": asdict(Spread.of(ours)),
        "plain_seconds": asdict(Spread.of(plain)),
        "ratio": asdict(Spread.of([a / b for a, b in zip(ours, plain, strict=True)])),
    }


class _Sum(nn.Module):
    """A model whose gradients cost nothing to compute."""

    def __init__(self, parameters: nn.ParameterList) -> None:
        super().__init__()
        self.values = parameters

    def forward(self) -> Tensor:
        return torch.stack([value.sum() for value in self.values]).sum()


# ------------------------------------------------------------------------------------------------------- share


def _rates(device: torch.device) -> tuple[Rates | None, str]:
    """(compute rates of a rank, their source): measured on a CPU, planned for a GPU; None for a GPU not in `GPUS`."""
    if device.type == "cpu":
        return measured_rates(), "measured here, one thread"
    name, memory = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    close = [gpu for gpu in GPUS.values() if gpu.name.split("-")[0] in name]
    if not close:
        return None, f"{name} is in no table"
    gpu = min(close, key=lambda one: abs(one.memory - memory))
    return rates_of(gpu), f"planned for {gpu.name}"


def _share(run: PlannedRun, name: str, costs: Sequence[Mapping[str, Any]], rates: Rates, source: str) -> dict[str, Any]:
    """Share of communication in a step: computed seconds as planned, sent as measured, less those that overlap."""
    planned = step_time(run, run.config.visft.streams()[name], rates, 1e30)  # without anything sent
    computed = planned.compute + planned.update + planned.waiting
    sent = {hidden: sum(one["of_step"] for one in costs if one["hidden"] is hidden) for hidden in (False, True)}
    seen = sent[False] + max(0.0, sent[True] - planned.compute)
    return {
        "computed_seconds": computed,
        "sent_seconds": sent[False] + sent[True],
        "not_hidden_seconds": seen,
        "share": seen / (computed + seen),
        "share_nothing_hidden": (sent[False] + sent[True]) / (computed + sent[False] + sent[True]),
    }
