"""Process-group facts and the few collectives the project needs. Everything is a no-op in one process."""

from __future__ import annotations

import atexit
import math
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from visft_ds.errors import MainError, does_not_answer, retold
from visft_ds.ops import to_device

T = TypeVar("T")

#: Room for the counts in the all-reduce of a step; fixed, so that ranks which disagree still exchange equal
#: sizes.
_COUNT_SLOTS = 64

#: The process may go on with something else after a run (`keep_open`).
kept_open = False


@dataclass(frozen=True)
class PipelinePosition:
    """Position of a rank: its pipeline stage, and its pipeline among the data-parallel ones."""

    stage: int
    stages: int
    dp_rank: int
    dp_size: int
    #: What it reads: the first stage pixels, the last one labels, those between nothing (None).
    role: Literal["both", "images", "labels"] | None

    @classmethod
    def of_rank(cls, rank: int, world_size: int, stages: int) -> PipelinePosition:
        """Position of a rank as DeepSpeed numbers them: all of stage 0 first, then all of stage 1."""
        assert world_size % stages == 0, (world_size, stages)
        dp_size = world_size // stages
        stage, dp_rank = divmod(rank, dp_size)
        role: Literal["both", "images", "labels"] | None = None
        if stages == 1:
            role = "both"
        elif stage == 0:
            role = "images"
        elif stage == stages - 1:
            role = "labels"
        return cls(stage, stages, dp_rank, dp_size, role)

    @classmethod
    def here(cls, stages: int) -> PipelinePosition:
        """Position of this process."""
        return cls.of_rank(rank(), world_size(), stages)


def rank() -> int:
    """Global rank; known from the launcher's environment before the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes; known from the launcher's environment before the process group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """Number of processes on this machine; DeepSpeed's launcher and torchrun name it differently."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1")


def cores() -> int:
    """Number of cores for each process on this machine, at least one."""
    return max(1, len(os.sched_getaffinity(0)) // processes_here())


def is_main() -> bool:
    """True on the one process that prints and writes."""
    return rank() == 0


def local_device() -> torch.device:
    """The device of this process, which is DeepSpeed's: its GPU by `LOCAL_RANK`, else the CPU.

    Raises ValueError if DS_ACCELERATOR asks for another one.
    """
    has_gpu = torch.cuda.is_available()
    accelerator = os.environ.get("DS_ACCELERATOR", "cuda" if has_gpu else "cpu")
    if accelerator not in ("cpu", "cuda") or (accelerator == "cuda" and not has_gpu):
        raise ValueError(
            f"DS_ACCELERATOR={accelerator}: torch sees no such device here; unset it, or set it to cpu"
        )
    if accelerator == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def agree_on_step(
    what: str, counts: Mapping[str, float], stop: bool, device: torch.device
) -> tuple[dict[str, float], bool]:
    """Sum counts and requests to stop by one all-reduce before a step, and check that all ranks do the same.

    Ranks that run different tasks in one step add one head's gradients to another's under ZeRO-1/2, silently.
    So every rank sends a checksum of `what` it is about to do (and its square: equal numbers are the only
    ones whose sums fit).

    Returns:
        The counts, summed over ranks, and if some rank was asked to stop.

    Raises:
        ValueError: on every rank, when the ranks are not about to do the same; more counts than there is room
        for.
    """
    if len(counts) > _COUNT_SLOTS:
        raise ValueError(
            f"the losses of this step need {len(counts)} counts, and at most {_COUNT_SLOTS} are summed over "
            f"ranks: return fewer from `count` of a criterion ({', '.join(sorted(counts)[:3])}, ...)"
        )
    token = float(
        zlib.crc32(what.encode()) % (1 << 20)
    )  # small enough that sums of squares are exact in float64
    keys = sorted(counts)
    values = [counts[key] for key in keys] + [0.0] * (_COUNT_SLOTS - len(keys))
    vector = to_device(torch.tensor([float(stop), token, token**2, *values], dtype=torch.float64), device)
    if dist.is_initialized():
        dist.all_reduce(vector)
    stops, tokens, squares, *sums = vector.cpu().tolist()
    if tokens != token * world_size() or squares != token**2 * world_size():
        assert_same_on_all_ranks({"what the next step is": what})
        raise ValueError(f"the ranks are out of sync; rank {rank()} is at {what}")
    return dict(zip(keys, sums[: len(keys)], strict=True)), stops > 0


def mean_losses(
    losses: Mapping[str, Tensor], slots: int, group: dist.ProcessGroup | None = None
) -> dict[str, float]:
    """Means of the losses of a step, 0-d tensors, over all ranks (of a group): one all-reduce, one copy to
    the host.

    A rank with a fault has "loss", which is NaN then, and not all the others: where the mean of "loss" is not
    finite, it is the only one.

    Args:
        slots: room for losses in the all-reduce, equal on all ranks.
    """
    assert len(losses) <= slots, losses
    keys = ["loss", *sorted(losses.keys() - {"loss"})]
    vector = F.pad(torch.stack([losses[key].detach().float() for key in keys]), (0, slots - len(keys)))
    count = 1
    if dist.is_initialized():
        dist.all_reduce(vector, group=group)
        count = dist.get_world_size(group)
    means = dict(zip(keys, (vector / count).cpu().tolist()[: len(keys)], strict=True))
    return means if math.isfinite(means["loss"]) else {"loss": means["loss"]}


def gather_objects(value: Any) -> list[Any] | None:
    """`value` of every rank in rank order on the main process, None elsewhere. For small, rare messages
    only.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, gathered)
    return gathered


def from_all_ranks(value: Any) -> list[Any]:
    """`value` of every rank in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def by_main_process(action: Callable[[], T]) -> T:
    """Result of an action of the main process. Collective.

    Raises:
        ValueError: on every rank, where the action raises one.
        MainError: on every rank, where the action raises an OSError.
    """
    outcome: list[Any] = [None, None, None]  # result; text of an error; of one of the system, if it may pass
    if is_main():
        try:
            outcome[0] = action()
        except (ValueError, OSError) as error:
            outcome[1] = str(error) or type(error).__name__
            if isinstance(error, OSError):
                outcome[2] = does_not_answer(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    result, problem, away = outcome
    if away is not None:
        raise retold(problem, away=away, kind=MainError)
    if problem is not None:
        raise ValueError(problem)
    return cast(T, result)


def assert_same_on_all_ranks(named: Mapping[str, str]) -> None:
    """Raise ValueError on every rank for what must agree and does not, e.g. {"data set": its fingerprint}."""
    everyone = from_all_ranks(dict(named))
    for name in named:
        if len({other.get(name) for other in everyone}) > 1:
            values = ", ".join(
                f"rank {number} has {other.get(name)}" for number, other in enumerate(everyone)
            )
            raise ValueError(f"the ranks do not agree on {name}: {values}")


def keep_open() -> None:
    """Let `close` leave the group to the end of the process, for a script that trains more than once:
    DeepSpeed keeps groups in globals, so a process that has left one cannot train in another."""
    global kept_open
    kept_open = True
    atexit.register(_leave)


def close() -> None:
    """Leave the process group; without this, a process may die in a destructor at exit (code -6, a flaky
    launch).
    """
    if dist.is_initialized():
        dist.barrier()
        if not kept_open:
            _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
