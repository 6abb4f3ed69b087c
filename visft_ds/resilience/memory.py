"""Memory probe before the first step ("rehearsal"): a step of the largest micro-batches, whose result is discarded.

Images differ in size and in numbers of objects, so that a step that needs more memory than all before may come after
days. Here it comes first. Only pixels and labels are made up; everything else is what training does.
Letters: B images of a micro-batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from visft_ds.config import Batches
from visft_ds.config.schema import ModelConfig
from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import SamplePipeline
from visft_ds.data.labels import whole_image
from visft_ds.data.loader import Place
from visft_ds.data.plan import generator
from visft_ds.data.samples import Batch, RawSample, Sample
from visft_ds.data.shards import Manifest, Role
from visft_ds.data.transforms import Size
from visft_ds.model import counts_of, loss_denominators_of
from visft_ds.monitor.console import Section, gauge, print_plan
from visft_ds.parallel import distributed
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import unchanged
from visft_ds.prepare.data import RunData
from visft_ds.prepare.datasets import needs_categories
from visft_ds.prepare.streams import parts_of
from visft_ds.resilience.host_memory import peak_memory
from visft_ds.resilience.out_of_memory import MemoryWatch, gib, shape_text
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.tasks import TASKS

_WORD = "a"


@dataclass(frozen=True)
class Largest:
    """Micro-batch that needs at least as much memory as any of the run.

    It has the images with the most objects, and where B > 1 the highest image and the widest, since a batch is padded
    to the height of the one and the width of the other. Where images are packed, the heads still see that padding; the
    backbone needs most for the images with the most pixels, which then are another micro-batch. Captions have
    `max_words` words.
    """

    stream: Stream  #: with the tasks only that the data set teaches
    sizes: tuple[Size, ...]  #: (height, width) of each image
    objects: tuple[int, ...]  #: in each image
    category: int  #: of all of them, an id of the first data set, whose ids the heads know
    packed: bool = False  #: the backbone sees no padding

    @property
    def frame(self) -> Size:
        """(height, width) of the padded batch."""
        return max(height for height, _ in self.sizes), max(width for _, width in self.sizes)

    def describe(self) -> str:
        """Its shapes for a message."""
        tasks = self.stream.tasks
        objects = sum(self.objects) if needs_categories(tasks) else None
        ids = self.stream.image["max_words"] + 2 if any(TASKS[task].uses_vocabulary for task in tasks) else None
        return shape_text(len(self.sizes), self.frame, objects, ids)

    def covers(self, other: Largest) -> bool:
        """Return True if it needs no less memory than another one."""
        sides = zip(self._needs(), other._needs(), strict=True)
        return set(other.stream.tasks) <= set(self.stream.tasks) and all(ours >= theirs for ours, theirs in sides)

    def _needs(self) -> tuple[int, ...]:
        """Numbers that memory grows with."""
        return *self.frame, sum(self.objects), self.packed * sum(height * width for height, width in self.sizes)

    def batch(self, pipeline: SamplePipeline, role: Role) -> Batch:
        """The batch, or the part of it that a process with this role reads."""
        caption = " ".join([_WORD] * self.stream.image.get("max_words", 1))
        samples = []
        for number, (size, objects) in enumerate(zip(self.sizes, self.objects, strict=True)):
            raw = RawSample(number, number, size, None, [whole_image(size, self.category)] * objects, [caption])
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


def largest_batches(data: RunData, micro: Mapping[str, int], *, packed: bool) -> list[tuple[Largest, SamplePipeline]]:
    """The largest micro-batches of each stream, with their pipelines. Two for a batch of a single image (a landscape
    and a portrait one), or where images are packed.

    Args:
        micro: images of a micro-batch, by stream.
        packed: images of different sizes go through the backbone without padding.
    """
    found: list[tuple[Largest, SamplePipeline]] = []
    category = next((category.coco_id for category in data.categories), 0)
    for name, stream in data.streams.items():
        kept: list[tuple[Largest, SamplePipeline]] = []
        for dataset, part in parts_of(stream, data.sets).items():
            manifest, pipeline = data.sets[dataset].manifest, data.pipelines[name][dataset]
            objects = _most_objects(manifest, micro[name])
            extremes = {extreme for size in _sizes(manifest) for extreme in pipeline.transform.geometry.extremes(size)}
            for sizes in _gathered(extremes, micro[name], packed=packed):
                largest = Largest(part, sizes, objects, category, packed)
                if not any(other.covers(largest) for other, _ in kept):
                    kept = [(other, made) for other, made in kept if not largest.covers(other)]
                    kept.append((largest, pipeline))
        found += kept
    return found


def probe_memory(
    model: ModelConfig, engine: Engine, data: RunData, batches: Batches, *, watchdog: Watchdog, memory: MemoryWatch
) -> None:
    """Run a step of the largest micro-batches of every stream that changes nothing; print its cost. Collective.

    Raises:
        OutOfMemory: it does not fit.
    """
    role = Place.of_rank(distributed.rank(), distributed.world_size(), batches.stages).role
    compiles = model.compile != "none"
    device, rows, compiling = engine.device, [], 0.0
    found = largest_batches(data, batches.micro, packed=model.packed)
    bar = gauge("rehearsal", len(found), "batches", enabled=distributed.is_main())
    with unchanged(engine), bar:
        for largest, pipeline in found:
            name, shape = largest.stream.name, largest.describe()
            times = []
            for _ in range(1 + compiles):  # the first time minus the second is the time for compiling
                watchdog.begin(f"rehearsal of {name}")
                began = time.perf_counter()
                with memory.watched(f"the rehearsal of {name}", name, largest.describe):
                    micro = [largest.batch(pipeline, role)] * batches.accumulation if role else []
                    counts = counts_of(engine.module, micro)
                    agreement = distributed.agree_on_step(f"rehearsal of {name}, {shape}", counts, False, device)
                    denominators = loss_denominators_of(agreement.counts, batches.micro_batches, device)
                    engine.train_step(0, micro, denominators)
                times.append(time.perf_counter() - began)
            bar.update()
            compiling += times[0] - times[-1]
            rows.append((name, shape, f"{times[-1]:.1f} s", gib(peak_memory(device))))
    memory.rehearsed = True
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if distributed.is_main():
        columns = ("stream", "largest micro-batch", "took", "peak")
        sections = [Section("steps", rows, columns)]
        sections += [_compiled_section(compiling)] if compiles else []
        print_plan("rehearsal, of which nothing is kept", sections)


def compilations() -> tuple[int, int]:
    """Graphs that this process has compiled so far, and places where a graph had to be broken up."""
    counters = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"]), sum(counters["graph_break"].values())


def _compiled_section(seconds: float) -> Section:
    """Blocks compiled before the first step, with the time it took; evaluation compiles what it runs itself."""
    graphs, breaks = compilations()
    text = f"{graphs} graphs{f', broken up at {breaks} places' * bool(breaks)}"
    rows = [("blocks", text), ("start", f"{seconds:.0f} s for compiling, over the same steps without")]
    return Section("compiled", rows)


def _sizes(manifest: Manifest) -> Iterator[Size]:
    """(height, width) of all pictures of a split, each once."""
    sides = manifest.index["height"].astype(np.int64) << 32 | manifest.index["width"]
    return (divmod(number, 1 << 32) for number in np.unique(sides).tolist())


def _most_objects(manifest: Manifest, count: int) -> tuple[int, ...]:
    """Number of objects in the `count` images that have most."""
    objects = np.concatenate([manifest.index["num_annotations"], np.zeros(count, np.int64)])
    return tuple(np.sort(objects)[::-1][:count].tolist())


def _gathered(extremes: Iterable[Size], count: int, *, packed: bool) -> list[tuple[Size, ...]]:
    """Sizes of the images of each largest batch of `count`: for 1 the largest landscape and portrait image; for more
    the highest and the widest with the largest of all, and where images are packed also the largest alone."""
    known = sorted(extremes, key=lambda size: size[0] * size[1], reverse=True)
    if count == 1:
        landscape = [size for size in known if size[0] <= size[1]]
        portrait = [size for size in known if size[0] > size[1]]
        return [tuple(sizes[:1]) for sizes in (landscape, portrait) if sizes]
    highest, widest = (max(known, key=lambda size: size[side]) for side in (0, 1))
    largest = [known[0]] * count
    padded = (highest, widest, *largest[2:])
    return [padded, tuple(largest)] if packed else [padded]
