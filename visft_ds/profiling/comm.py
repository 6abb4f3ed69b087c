"""Benchmark of the collectives of a run's engine: bandwidth, latency, and the share of communication in a step.

Every call of `torch.distributed` that engines use, at sizes of a sweep and at the sizes of the configuration, beside a
copy in memory. All take turns in every round. A call's time is that of the slowest rank.

Bandwidths as nccl-tests define them (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): algbw is S over the time, busbw
what each link has to carry for it: S is all that is reduced, gathered or sent, in bytes, over n ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from visft_ds.config import ResolvedConfig
from visft_ds.monitor.console import Section
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import start_process_group
from visft_ds.planner.cluster import Rates, gpu_here, rates_of, step_time
from visft_ds.planner.messages import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    COLLECTIVES,
    REDUCE_SCATTER,
    SEND,
    Message,
    broadcasts_of,
    bus_factor,
    messages_of,
)
from visft_ds.planner.step import PlannedRun, run_of
from visft_ds.prepare.model import choose_precision
from visft_ds.profiling.harness import Spread, circumstances, in_turn, load_row, synchronize, with_quartiles
from visft_ds.profiling.plan_validation import measured_rates

FORMAT, VERSION = "visft_ds comm profile", 2
COPY = "copy in memory"
#: Bytes of the sweep, if nothing else is asked for.
SIZES = tuple(1 << power for power in range(10, 26, 3))
#: Bytes up to which the messages of a configuration are measured.
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
    """Measure a sweep and the messages of the configuration. Collective; the main process gets the record.

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
    calls = {key: make_call(*key, device) for key in keys}
    seconds = in_turn(keys, lambda key: _seconds(calls[key], key, device), options.repeats)
    slowest = _slowest_rank(list(seconds.values()), device)
    record: dict[str, Any] | None = None
    if distributed.is_main():
        times = {key: Spread.of(row) for key, row in zip(seconds, slowest, strict=True)}
        costs = {name: _costs(found, times, world) for name, found in messages.items()}
        rates, source = _rates(device)
        stages = run.batches.stages
        kind = f"pipeline of {stages} stages, " if stages > 1 else ""
        record = {
            "format": FORMAT,
            "version": VERSION,
            **circumstances(load, device),
            "ranks": world,
            "backend": dist.get_backend(),
            "model": config.visft.model.name,
            "stage": config.visft.stage,
            "engine": f"{kind}ZeRO-{run.zero().stage} over {run.batches.dp}",
            "options": asdict(options),
            "calls": [
                {
                    "call": name,
                    "bytes": size,
                    "seconds": asdict(found),
                    "algbw": size / found.median,
                    "busbw": size / found.median * bus_factor(name, world),
                }
                for (name, size), found in times.items()
            ],
            "messages": costs,
            "at_start": _costs(at_start, times, world) if at_start else [],
            "share": {name: _share(run, name, found, rates) for name, found in costs.items()} if rates else {},
            "rates": source,
        }
    distributed.close()
    return record


def _slowest_rank(seconds: Sequence[Sequence[float]], device: torch.device) -> list[list[float]]:
    """The same table with the seconds of the slowest rank in every round. Collective."""
    table = torch.tensor(seconds, device=device, dtype=torch.float64)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    found: list[list[float]] = table.tolist()
    return found


# ------------------------------------------------------------------------------------------------------- calls


def make_call(name: str, size: int, device: torch.device) -> Callable[[], object]:
    """A call that moves `size` bytes, as nccl-tests count them, in its own tensors. Collective."""
    rank, world = distributed.rank(), distributed.world_size()
    elements = max(world, size // 4 // world * world)
    full = torch.zeros(elements, device=device)
    if name == COPY:
        other = torch.empty_like(full)
        return lambda: other.copy_(full)
    if name == ALL_REDUCE:
        return lambda: dist.all_reduce(full)
    if name == BROADCAST:
        return lambda: dist.broadcast(full, 0)
    part = torch.zeros(elements // world, device=device)
    if name == ALL_GATHER:
        return lambda: dist.all_gather_into_tensor(full, part)
    if name == REDUCE_SCATTER:
        return lambda: dist.reduce_scatter_tensor(part, full)
    assert name == SEND, name
    return lambda: _there_and_back(full, rank, world)


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
    sizes, largest = sorted(known), max(known)
    if size > largest:
        return known[largest] * size / largest
    return float(np.interp(size, sizes, [known[measured] for measured in sizes]))


# ------------------------------------------------------------------------------------------------------- share


def _rates(device: torch.device) -> tuple[Rates | None, str]:
    """(compute rates of a rank, their source): measured on a CPU, planned for a GPU; None for an unknown GPU."""
    if device.type == "cpu":
        return measured_rates(), "measured here, one thread"
    gpu = gpu_here(device)
    if gpu is None:
        return None, f"{torch.cuda.get_device_name(device)} is in no table"
    return rates_of(gpu), f"planned for {gpu.name}"


def _share(run: PlannedRun, name: str, costs: Sequence[Mapping[str, Any]], rates: Rates) -> dict[str, Any]:
    """Share of communication in a step: computed seconds as planned, sent as measured, less those that overlap."""
    planned = step_time(run, run.config.visft.streams()[name], rates)  # without anything sent
    computed = planned.compute + planned.update + planned.waiting
    sent = {hidden: sum(cost["of_step"] for cost in costs if cost["hidden"] is hidden) for hidden in (False, True)}
    seen = sent[False] + max(0.0, sent[True] - planned.compute)
    return {
        "computed_seconds": computed,
        "sent_seconds": sent[False] + sent[True],
        "not_hidden_seconds": seen,
        "share": seen / (computed + seen),
        "share_nothing_hidden": (sent[False] + sent[True]) / (computed + sent[False] + sent[True]),
    }


# ------------------------------------------------------------------------------------------------------- tables


_CALL_HEAD = ("call", "bytes", "µs (quartiles)", "algbw GB/s", "busbw GB/s", "of a copy")
_MESSAGE_HEAD = ("message", "call", "bytes", "calls", "µs a call", "busbw GB/s", "ms of a step", "")
_SHARE_HEAD = ("step", "computed s", "sent s", "of it not hidden", "share of the step", "if nothing were hidden")


def tables(record: Mapping[str, Any]) -> tuple[str, list[Section]]:
    """(title, tables) of a record."""
    hardware = record["hardware"]
    title = (
        f"communication: stage {record['stage']}, {record['model']}, {record['engine']}; {record['backend']}, "
        f"{record['ranks']} processes"
    )
    sections = [
        Section(
            "measured on",
            [
                ("device", f"{hardware['device']}, {hardware['cores']} cores"),
                load_row(record),
                ("rounds", f"{record['options']['repeats']} after 1 to warm up; all calls in turn; the slowest rank"),
            ],
        )
    ]
    copies = {call["bytes"]: call["algbw"] for call in record["calls"] if call["call"] == COPY}
    for name in (*COLLECTIVES, COPY):
        calls = sorted((call for call in record["calls"] if call["call"] == name), key=lambda call: call["bytes"])
        rows = [
            (
                name,
                f"{call['bytes']:,}",
                with_quartiles(call["seconds"], 0, 1e6),
                f"{call['algbw'] / 1e9:.3f}",
                f"{call['busbw'] / 1e9:.3f}",
                f"{100 * call['algbw'] / copies[call['bytes']]:.0f} %"
                if call["bytes"] in copies and name != COPY
                else "",
            )
            for call in calls
        ]
        sections.append(Section(name, rows, _CALL_HEAD))
    for name, messages in record["messages"].items():
        sent = [
            (
                row["what"],
                row["collective"],
                f"{row['bytes']:,}",
                str(row["calls"]),
                f"{1e6 * row['seconds']:.0f}",
                f"{row['busbw'] / 1e9:.3f}",
                f"{1e3 * row['of_step']:.3f}",
                "" if row["measured"] else "from other sizes",
            )
            for row in messages
        ]
        sections.append(Section(f"{name}: sent in a step", sent, _MESSAGE_HEAD))
    if record["at_start"]:
        once = record["at_start"]
        count, size = sum(row["calls"] for row in once), sum(row["calls"] * row["bytes"] for row in once)
        text = f"{count} broadcasts, {size:,} bytes, {sum(row['of_step'] for row in once):.3f} s"
        sections.append(Section("sent once, when the engine is built", [("every parameter", text)]))
    shares = [
        (
            name,
            f"{share['computed_seconds']:.3f}",
            f"{share['sent_seconds']:.4f}",
            f"{share['not_hidden_seconds']:.4f}",
            f"{100 * share['share']:.2f} %",
            f"{100 * share['share_nothing_hidden']:.2f} %",
        )
        for name, share in record["share"].items()
    ]
    share = f"predicted share of communication ({record['rates']})"
    sections.append(Section(share, shares, _SHARE_HEAD) if shares else Section(share, [("unknown", record["rates"])]))
    return title, sections
