"""Out of memory: which step, of which shapes, what the memory went into, and which settings would fit."""

from __future__ import annotations

import errno
import gc
import resource
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from visft_ds.data.samples import Batch
from visft_ds.monitor.console import Section
from visft_ds.ops.numerics import without_order
from visft_ds.parallel import distributed
from visft_ds.planner.memory import MemoryPlan, PlannedRun, plan_largest
from visft_ds.planner.search import fitting_settings
from visft_ds.resilience.errors import RankError
from visft_ds.resilience.host_memory import host_memory_available, memory_in_use, peak_memory

#: What allocators say that have no exception of their own: torch's for the CPU, C++, cuBLAS.
_SAID = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
#: Part of the memory that a plan may fill. It is within 10 % of what tensors take; the heap of a CPU has holes, too.
_FILLED = {"cpu": 0.7, "cuda": 0.9}


class OutOfMemory(RankError):
    """A step that does not fit. The message says what would."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocator failed, on a GPU or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in _SAID)


class MemoryWatch:
    """Explains where a step of this process runs out of memory.

    Args:
        run: to plan the memory of, on the device of this process.
    """

    def __init__(self, run: PlannedRun) -> None:
        self._run, self._device = run, run.device
        self._used: dict[int, int] | None = None  # before the first step
        self.rehearsed = False  #: the largest shapes were tried and fitted

    @contextmanager
    def watched(self, what: str, stream: str, shape: Callable[[], str]) -> Iterator[None]:
        """Turn the error of an allocator into `OutOfMemory`.

        Args:
            what: is done within.
            stream: that it is done for.
            shape: of its largest micro-batch.

        Raises:
            OutOfMemory: with what was done, its shapes, the memory by part, and settings that would fit.
            RankError: an operator that `visft.run.deterministic` does not allow.
        """
        if self._used is None and self._device.type == "cpu":
            self._used = memory_in_use()
        try:
            yield
            return
        except (RuntimeError, MemoryError, OSError) as error:
            if (reason := without_order(error)) is not None:
                raise RankError(f"{what}: {reason}") from error
            if not is_out_of_memory(error):
                raise
            message = (str(error).splitlines() or [type(error).__name__])[0]
            measured = self._measured()
            # What the step still holds is what the plan is made with.
            traceback.clear_frames(error.__traceback__)
        gc.collect()
        note = "\n  The rehearsal before the first step did not foresee this." if self.rehearsed else ""
        lines = [f"out of memory in {what}: {shape()}{note}", f"  {message}", measured, *self._explained(stream)]
        raise OutOfMemory("\n".join(lines))

    def watched_step(self, what: str, stream: str, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """`watched` for the micro-batches of a step."""
        return self.watched(what, stream, partial(largest_shape, batches))

    def planned(self) -> Section:
        """The peak of the largest stream by part, as it is computed."""
        return Section("peak of a rank as planned", plan_largest(self._run).rows())

    def _measured(self) -> str:
        """Rows of the memory that was counted in this process."""
        if self._device.type != "cuda":
            return f"  measured: this process took up to {gib(peak_memory(self._device))}, libraries and data included"
        counted = {
            "allocated": torch.cuda.memory_allocated(self._device),
            "at the peak": torch.cuda.max_memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "on the device": torch.cuda.get_device_properties(self._device).total_memory,
        }
        return "  measured: " + ", ".join(f"{name} {gib(size)}" for name, size in counted.items())

    def _explained(self, stream: str) -> list[str]:
        """The peak by part as it is computed, and settings that would fit."""
        plan = plan_largest(self._run, stream)
        # What has failed is too much, whatever the sum says.
        room = int(_FILLED[self._device.type] * min(self._room(plan), plan.total))
        fits = [f"    {' '.join(s.settings)}   ({gib(s.memory.total)})" for s in fitting_settings(self._run, room)]
        what = "what would fit into" if fits else "no setting is known that would fit into"
        return [
            "  peak of a rank as planned:",
            *(f"    {name:<12}{size}" for name, size in plan.rows()),
            f"  {what} {gib(room)}{', each by itself:' if fits else '; more processes or a smaller --model may help'}",
            *fits,
        ]

    def _room(self, plan: MemoryPlan) -> int:
        """Bytes that this process can have for what is planned, by what is free now that the step is given up."""
        if self._device.type == "cuda":
            return torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)
        held = plan.weights + plan.optimizer  # before the first step, too
        rooms = [host_memory_available() // distributed.processes_here() + held]
        for limit, used in (self._used or {}).items():
            bound, _ = resource.getrlimit(limit)
            if bound != resource.RLIM_INFINITY:
                rooms.append(bound - used + held)
        return max(0, min(rooms))


def shape_text(images: int, frame: tuple[int, int], objects: int | None, caption_ids: int | None) -> str:
    """A micro-batch for a message.

    Args:
        frame: (height, width) that images are padded to.
        objects: in all of them; None where none are learnt from.
        caption_ids: of the longest caption; None without captions.
    """
    text = f"{images} image{'s' * (images != 1)} of {frame[0]} x {frame[1]}"
    text += "" if objects is None else f", {objects} object{'s' * (objects != 1)}"
    return text + ("" if caption_ids is None else f", {caption_ids} ids to a caption")


def largest_shape(batches: Sequence[Batch]) -> str:
    """`shape_text` of the micro-batch of most pixels, as far as this process has read it."""
    if not batches:
        return "nothing that this rank reads"
    largest = max(batches, key=lambda batch: len(batch.sizes) * int(batch.sizes.amax(dim=0).prod()))
    height, width = largest.sizes.amax(dim=0).tolist()
    objects = [len(target.labels) for target in largest.targets.values() if hasattr(target, "labels")]
    ids = [target.tokens.shape[1] for target in largest.targets.values() if hasattr(target, "tokens")]
    frame = max(height, largest.images.shape[2]), max(width, largest.images.shape[3])
    return shape_text(len(largest.sizes), frame, max(objects, default=None), max(ids, default=None))


def gib(size: int) -> str:
    """Bytes for a person."""
    return f"{size / 2**30:.2f} GiB"
