"""Out of memory: which step, of which shapes, what was allocated, and what to try."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch

from visft_ds.data.samples import Batch
from visft_ds.planner.memory import PlannedRun
from visft_ds.resilience.errors import RankError
from visft_ds.resilience.host_memory import peak_memory

#: What allocators say that have no exception of their own: torch's for the CPU, C++, cuBLAS.
_SAID = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(RankError):
    """A step that does not fit. The message says what to try."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an allocator failed, on a GPU or on the host."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(text in str(error) for text in _SAID)


class MemoryWatch:
    """Explains where a step of this process runs out of memory.

    Args:
        run: that trains on the device of this process.
    """

    def __init__(self, run: PlannedRun) -> None:
        self._device = run.device
        self.rehearsed = False  #: the largest shapes were tried and fitted

    @contextmanager
    def watched(self, what: str, stream: str, shape: Callable[[], str]) -> Iterator[None]:
        """Turn the error of an allocator into `OutOfMemory`.

        Args:
            what: is done within.
            stream: that it is done for.
            shape: of its largest micro-batch.

        Raises:
            OutOfMemory: with what was done, its shapes, what was allocated, and settings to try.
        """
        try:
            yield
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error):
                raise
            key = "visft.shared" if stream == "shared" else f"visft.tasks.{stream}"
            note = "\n  The rehearsal before the first step did not foresee this." if self.rehearsed else ""
            raise OutOfMemory(
                f"out of memory in {what}: {shape()}{note}\n"
                f"  {(str(error).splitlines() or [type(error).__name__])[0]}\n  {self._measured()}\n"
                f"  Try --set {key}.micro_batch=N with a smaller number, --set visft.model.recompute=block, or "
                "--engine zero3 on several GPUs; `visft plan` with the same flags predicts what each needs."
            ) from None

    def watched_step(self, what: str, stream: str, batches: Sequence[Batch]) -> AbstractContextManager[None]:
        """`watched` for the micro-batches of a step."""
        return self.watched(what, stream, partial(largest_shape, batches))

    def _measured(self) -> str:
        """The memory that was counted in this process."""
        if self._device.type != "cuda":
            return f"measured: this process took up to {gib(peak_memory(self._device))}, libraries and data included"
        counted = {
            "allocated": torch.cuda.memory_allocated(self._device),
            "at the peak": torch.cuda.max_memory_allocated(self._device),
            "reserved": torch.cuda.memory_reserved(self._device),
            "on the device": torch.cuda.get_device_properties(self._device).total_memory,
        }
        return "measured: " + ", ".join(f"{name} {gib(size)}" for name, size in counted.items())


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
