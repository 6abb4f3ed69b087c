"""Memory: a step of the largest micro-batches before the first one ("rehearsal"), and a step that does not fit.

Images differ in size and in numbers of objects, so that a step that needs more memory than all before may come after
days. In the rehearsal it comes first, and its result is discarded. Only pixels and labels are made up.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from visft_ds.config import Batches
from visft_ds.config.schema import ModelConfig
from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.loader import Place
from visft_ds.data.plan import generator
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import Role
from visft_ds.data.transforms import Size
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import unchanged
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import needs_categories
from visft_ds.prepare.streams import parts_of
from visft_ds.resilience.errors import RankError
from visft_ds.resilience.host_memory import peak_memory
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.tasks import TASKS

#: What allocators say that have no exception of their own: torch's for the CPU, C++, cuBLAS.
_SAID = ("can't allocate memory", "bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(RankError):
    """A step that does not fit. The message says what to try."""


@contextmanager
def memory_explained(what: str, stream: str, shape: Callable[[], str], device: torch.device) -> Iterator[None]:
    """Turn the error of an allocator into `OutOfMemory`: what was done, its shapes, what was counted, what to try.

    Args:
        what: is done within.
        stream: that it is done for.
        shape: of its largest micro-batch.

    Raises:
        OutOfMemory: an allocator failed, on a GPU or on the host.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in _SAID)
        if not known and getattr(error, "errno", None) != errno.ENOMEM:
            raise
        key = "visft.shared" if stream == "shared" else f"visft.tasks.{stream}"
        counted = {"at the peak": peak_memory(device)}
        if device.type == "cuda":
            counted["allocated"] = torch.cuda.memory_allocated(device)
            counted["reserved"] = torch.cuda.memory_reserved(device)
            counted["on the device"] = torch.cuda.get_device_properties(device).total_memory
        raise OutOfMemory(
            f"out of memory in {what}: {shape()}\n  {(str(error).splitlines() or [type(error).__name__])[0]}\n"
            f"  measured: {', '.join(f'{name} {size / 2**30:.2f} GiB' for name, size in counted.items())}\n"
            f"  Try --set {key}.micro_batch=N with a smaller number, --set visft.model.recompute=block, or "
            "--engine zero3 on several GPUs; `visft plan` with the same flags predicts what each needs."
        ) from None


@dataclass(frozen=True)
class Largest:
    """Micro-batch that needs at least as much memory as any of a stream's on one data set.

    Its images are squares of the largest side, with the most objects that images of the data set have. Captions have
    `max_words` words.
    """

    stream: Stream  #: with the tasks only that the data set teaches
    objects: tuple[int, ...]  #: in each image
    category: int  #: of all of them, an id of the first data set, whose ids the heads know

    @property
    def frame(self) -> Size:
        """(height, width) of all images."""
        return (self.stream.largest_side(),) * 2

    def describe(self) -> str:
        """Its shapes for a message."""
        tasks = self.stream.tasks
        objects = sum(self.objects) if needs_categories(tasks) else None
        ids = self.stream.image["max_words"] + 2 if any(TASKS[task].uses_vocabulary for task in tasks) else None
        return shape_text(len(self.objects), self.frame, objects, ids)

    def batch(self, pipeline: SamplePipeline, role: Role) -> Batch:
        """The batch, or the part of it that a process with this role reads."""
        caption = " ".join(["a"] * self.stream.image.get("max_words", 1))
        samples = []
        size, side = self.frame, self.frame[0]
        outline = [0, 0, side, 0, side, side, 0, side]
        whole = {"bbox": [0, 0, *size], "category_id": self.category, "iscrowd": 0, "segmentation": [outline]}
        for number, objects in enumerate(self.objects):
            raw = RawSample(number, number, size, None, [whole] * objects, [caption])
            samples.append(
                Sample(
                    index=number,
                    image_id=number,
                    original_size=size,
                    size=size,
                    image=None if role == "labels" else torch.zeros((3, *size), dtype=torch.uint8),
                    random_key=number,
                    targets={} if role == "images" else pipeline.transform.targets(raw, (), generator(number)),
                )
            )
        return pipeline.collate(samples)


def largest_batches(data: RunData, micro: Mapping[str, int]) -> list[tuple[Largest, SamplePipeline]]:
    """The largest micro-batch of each stream (of `micro[name]` images) on each of its data sets, with its pipeline."""
    found = []
    category = next((category.coco_id for category in data.categories), 0)
    for name, stream in data.streams.items():
        count = micro[name]
        for dataset, part in parts_of(stream, data.sets).items():
            index, pipeline = data.sets[dataset].manifest.index, data.pipelines[name][dataset]
            objects = np.sort(np.concatenate([index["num_annotations"], np.zeros(count, np.int64)]))[::-1][:count]
            found.append((Largest(part, tuple(objects.tolist()), category), pipeline))
    return found


def probe_memory(model: ModelConfig, engine: Engine, data: RunData, batches: Batches, watchdog: Watchdog) -> None:
    """Run a step of the largest micro-batches of every stream that changes nothing; print its cost. Collective.

    Raises:
        OutOfMemory: it does not fit.
    """
    role = Place.of_rank(distributed.rank(), distributed.world_size(), batches.stages).role
    device, rows = engine.device, []
    with unchanged(engine):
        for largest, pipeline in largest_batches(data, batches.micro):
            name, shape, began = largest.stream.name, largest.describe(), time.perf_counter()
            watchdog.begin(f"rehearsal of {name}")
            with memory_explained(f"the rehearsal of {name}", name, largest.describe, device):
                micro = [largest.batch(pipeline, role)] * batches.accumulation if role else []
                counts = counts_of(engine.module, micro)
                agreement = distributed.agree_on_step(f"rehearsal of {name}, {shape}", counts, False, device)
                denominators = loss_denominators_of(agreement.counts, batches.micro_batches, device)
                engine.train_step(0, micro, denominators)
            seconds = f"{time.perf_counter() - began:.1f} s"
            rows.append((name, shape, seconds, f"{peak_memory(device) / 2**30:.2f} GiB"))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if distributed.is_main():
        sections = [Section("steps", rows, ("stream", "largest micro-batch", "took", "peak"))]
        if model.compile != "none":
            graphs, breaks = compilations()
            sections.append(Section("compiled", [("blocks", f"{graphs} graphs, broken up at {breaks} places")]))
        print_plan("rehearsal, of which nothing is kept", sections)


def compilations() -> tuple[int, int]:
    """Graphs that this process has compiled so far, and places where a graph had to be broken up."""
    counters = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())


def shape_text(images: int, frame: Size, objects: int | None, caption_ids: int | None) -> str:
    """A micro-batch for a message.

    Args:
        frame: (height, width) that images are padded to.
        objects: in all of them; None where none are learnt from.
        caption_ids: of the longest caption; None without captions.
    """
    text = f"{images} images of {frame[0]} x {frame[1]}"
    text += "" if objects is None else f", {objects} objects"
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
