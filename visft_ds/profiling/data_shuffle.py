"""How well an order is shuffled, and how far its reads lie apart: ours beside webdataset's buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.data.plan import Plan
from visft_ds.monitor.console import Section
from visft_ds.profiling import data_baselines as plain
from visft_ds.profiling.data_source import plan_over

FORMAT, VERSION = "visft_ds data shuffle", 1
BATCH, BLOCK = 100, 256
_PER_SHARD = 1500  #: COCO samples in a shard of 256 MB
_BUFFERS = (1000, 10_000)

Order = npt.NDArray[np.int64]  # (n,) positions in the file, in the order in which they are handed out


@dataclass(frozen=True)
class Quality:
    """Means over the batches of an order."""

    samples: int
    spread: float  #: standard deviation of a batch's positions over that of the whole file; 1 is uniform
    blocks: float  #: different blocks of 256 neighbours that a batch of 100 touches
    correlation: float  #: of the positions of two samples that follow each other; 0 is uniform
    repeated: int  #: samples that came more than once


def quality(order: Order, count: int) -> Quality:
    """Numbers of an order of positions from [0, count); what does not fill a batch at the end is left out."""
    batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    whole = np.arange(count).std()
    return Quality(
        samples=len(order),
        spread=float(batches.std(axis=1).mean() / whole),
        blocks=float(np.mean([len(np.unique(batch // BLOCK)) for batch in batches])),
        correlation=float(np.corrcoef(order[:-1], order[1:])[0, 1]),
        repeated=len(order) - len(np.unique(order)),
    )


def uniform_blocks(count: int) -> float:
    """Blocks that a batch drawn uniformly touches, on average."""
    blocks = -(-count // BLOCK)
    return float(blocks * (1 - (1 - 1 / blocks) ** BATCH))


def order_of(plan: Plan) -> Order:
    """One epoch of a plan with one task."""
    ((task, part),) = plan.tasks.items()
    (dataset,) = part.sets
    return np.concatenate([plan.step(step).indices for step in range(plan.steps_per_epoch(task, dataset))])


def orders(count: int) -> dict[str, Callable[[], Order]]:
    """Everything that is compared, by name."""
    theirs = partial(plain.order, count, _PER_SHARD)
    return {
        "ours, full": partial(order_of, plan_over(count, BATCH)),
        "ours, windowed": partial(order_of, plan_over(count, BATCH, shuffle="windowed")),
        "webdataset, shards in order, buffer 1000": partial(theirs, _BUFFERS[0], shards=False),
        **{f"webdataset, shards shuffled, buffer {size}": partial(theirs, size, shards=True) for size in _BUFFERS},
    }


def measure_shuffle(count: int) -> dict[str, Any]:
    """The quality of every order of `count` samples; a record of JSON values. Raises ValueError for too few."""
    if count < 2 * BATCH:
        raise ValueError(f"--samples {count} must be at least {2 * BATCH}: quality is that of batches of {BATCH}")
    return {
        "format": FORMAT,
        "version": VERSION,
        "samples": count,
        "uniform_blocks": uniform_blocks(count),
        "orders": {name: asdict(quality(make(), count)) for name, make in orders(count).items()},
    }


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return f"how well {record['samples']:,} samples are shuffled"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as one table."""
    rows = [
        (name, f"{one['spread']:.3f}", f"{one['blocks']:.1f}", f"{one['correlation']:+.4f}", str(one["repeated"]))
        for name, one in record["orders"].items()
    ]
    rows.append(("drawn uniformly", "1.000", f"{record['uniform_blocks']:.1f}", "+0.0000", "0"))
    columns = ("", f"spread of {BATCH}", f"blocks of {BLOCK}", "correlation", "repeated")
    return [Section(f"batches of {BATCH}", rows, columns)]
