"""Memory: a step of the largest micro-batches before the first one ("rehearsal"), and a step that does not
fit.

Images differ in size and in numbers of objects, so that a step that needs more memory than all before may
come after days. In the rehearsal it comes first, and its result is discarded. Only pixels and labels are made
up.
"""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch

from visft_ds import distributed
from visft_ds.config import Batches
from visft_ds.data.depth import encoded
from visft_ds.data.panoptic import png_of_numbers, stored_panoptic
from visft_ds.data.samples import Batch, RawSample
from visft_ds.data.shards import Manifest, Role
from visft_ds.distributed import PipelinePosition
from visft_ds.errors import NO_MEMORY, RankError
from visft_ds.monitor.console import Section, print_plan
from visft_ds.parallel.engine import Engine
from visft_ds.parallel.state import unchanged
from visft_ds.prepare.data import RunData
from visft_ds.randomness import generator
from visft_ds.resilience.watchdog import Watchdog
from visft_ds.settings.bands import Bands

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")


def peak_memory(device: torch.device) -> int:
    """Bytes at this process's peak: of the allocator on a GPU, of all its memory (libraries too) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux


def memory_before(device: torch.device) -> int:
    """Bytes that this process has of its own before it has a model."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def library_pages(device: torch.device) -> int:
    """Bytes of files, such as libraries, that `peak_memory` counts: how much of a file a machine holds beside
    what was read of it is not the model's affair.
    """
    if device.type == "cuda":
        return 0
    return int(psutil.Process().memory_info().shared)


def host_memory() -> int:
    """Bytes of memory of this machine, or the limit of its control group (version 2) or one around it.

    In a container the own group is the root; a scheduler such as SLURM limits one in the middle of the path.
    """
    limits = [int(psutil.virtual_memory().total)]
    groups = _OWN_GROUP.read_text(encoding="utf-8") if _OWN_GROUP.is_file() else ""
    own_group = re.search(r"^0::/(.*)$", groups, re.MULTILINE)
    own = Path(own_group[1] if own_group else "")
    for group in (own, *own.parents):
        file = _GROUPS / group / "memory.max"
        limit = file.read_text(encoding="utf-8").strip() if file.is_file() else "max"
        if limit != "max":
            limits.append(int(limit))
    return min(limits)


@contextmanager
def memory_explained(
    what: str, stream: str, batches: Sequence[Batch], device: torch.device
) -> Iterator[None]:
    """Turn the error of an allocator into a `RankError`: what was done, its shapes, what was counted, what to
    try.

    Args:
        what: name of the work inside, for the message.
        stream: its stream.
        batches: its micro-batches.

    Raises:
        RankError: an allocator failed, on a GPU or on the host.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not isinstance(error, MemoryError) and not NO_MEMORY.search(str(error)):
            raise
        key = "visft.shared" if stream == "shared" else f"visft.tasks.{stream}"
        counts = {"at the peak": peak_memory(device)}
        if device.type == "cuda":
            counts["allocated"] = torch.cuda.memory_allocated(device)
            counts["reserved"] = torch.cuda.memory_reserved(device)
            counts["on the device"] = torch.cuda.get_device_properties(device).total_memory
        measured = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in counts.items())
        lines = str(error).splitlines() or [type(error).__name__]
        raise RankError(
            f"out of memory in {what}: {largest_shape(batches)}\n"
            f"  {lines[0]}\n"
            f"  measured: {measured}\n"
            f"  Try --set {key}.micro_batch=N with a smaller number (in fp32 and without dropout the same "
            "losses), --set visft.model.activation_checkpointing=block, or --engine zero3_offload; "
            "`visft plan --cluster 8xA100-80GB`, with your GPUs and the same --stage, --model and --set, "
            "predicts what each needs."
        ) from None


def largest_shape(batches: Sequence[Batch]) -> str:
    """The micro-batch of most pixels for a message, as far as this process has read it."""
    if not batches:
        return "nothing that this rank reads"
    largest = max(batches, key=lambda batch: len(batch.sizes) * int(batch.sizes.amax(dim=0).prod()))
    # Without pixels, as a last pipeline stage has them, a batch still has the sizes.
    height, width = largest.sizes.amax(dim=0).tolist()
    height = max(height, largest.images.shape[2])
    width = max(width, largest.images.shape[3])
    text = f"{len(largest.sizes)} images of {height} x {width}"
    for task, target in largest.targets.items():
        if hasattr(target, "labels"):
            text += f", {len(target.labels)} objects ({task})"
        if hasattr(target, "tokens"):
            text += f", {target.tokens.shape[1]} tokens per caption"
    return text


def largest_batches(data: RunData, micro: Mapping[str, int], role: Role) -> Iterator[tuple[str, Batch]]:
    """For each data set of each stream (stream, micro-batch that needs at least as much memory as any other).

    Its images are squares of the largest side, with the most objects that images have; captions are
    `max_words` times "a".

    Args:
        micro: images of a micro-batch, by stream.
        role: of this process, which makes its part of the batch.
    """
    # The heads know the categories of the first set.
    category = data.categories[0].coco_id if data.categories else 0
    for name, stream in data.streams.items():
        side = stream.largest_side()
        caption = " ".join(["a"] * stream.image.get("max_words", 1))
        whole = {
            "id": 1,
            "area": side * side,
            "bbox": [0, 0, side, side],
            "category_id": category,
            "iscrowd": 0,
            "segmentation": [[0, 0, side, 0, side, side, 0, side]],
        }
        depth = encoded(np.ones((side, side), np.float32)) if "depth" in stream.tasks else None
        for dataset, pipeline in data.pipelines[name].items():
            manifest = data.sets[dataset].manifest
            panoptic = _stripes(manifest, side) if "panoptic" in stream.tasks else None
            image = None if role == "labels" else _black(manifest.bands, side)
            numbers = sorted(manifest.index["num_annotations"].tolist(), reverse=True)
            numbers += [0] * micro[name]  # a set may have fewer images than a micro-batch
            samples = []
            for key, count in enumerate(numbers[: micro[name]]):
                raw = RawSample(
                    key, key, (side, side), image, [whole] * count, [caption], None, depth, panoptic
                )
                sample = pipeline.transform(raw, generator(key), ops=())
                targets = {} if role == "images" else sample.targets
                samples.append(replace(sample, random_key=key, targets=targets))
            yield name, pipeline.collate(samples)


def _stripes(manifest: Manifest, side: int) -> dict[str, Any]:
    """A panoptic map of a square, with as many segments as images of a split have at most."""
    number = max(1, manifest.counts.get("segments_at_most", 1))
    rows = np.arange(side)[:, None] * number // side + 1
    segment = {"category_id": manifest.panoptic[0].coco_id, "iscrowd": 0}
    segments = [{"id": id_, **segment} for id_ in range(1, number + 1)]
    return stored_panoptic(png_of_numbers(np.tile(rows, side)), segments)


def _black(bands: Bands | None, side: int) -> npt.NDArray[np.generic]:
    """A square as it is decoded."""
    if bands is None:
        return np.zeros((side, side, 3), np.uint8)
    return np.zeros((side, side, len(bands.numbers)), np.float32)


def probe_memory(engine: Engine, data: RunData, batches: Batches, watchdog: Watchdog) -> None:
    """Run a step of the largest micro-batches of every stream that changes nothing; print its cost.
    Collective.

    Raises:
        RankError: a step does not fit into memory.
    """
    role = PipelinePosition.here(batches.stages).role
    device = engine.device
    rows = []
    with unchanged(engine):
        for name, batch in largest_batches(data, batches.micro, role or "images"):
            began = time.perf_counter()
            micro = [batch] * batches.accumulation if role else []
            with (
                watchdog.phase(f"rehearsal of {name}"),
                memory_explained(f"the rehearsal of {name}", name, micro, device),
            ):
                what = f"rehearsal of {name}"
                denominators, _ = engine.agree_on_step(what, micro, batches.micro_batches)
                engine.train_step(0, micro, denominators)
            peak = f"{peak_memory(device) / 2**30:.2f} GiB"
            rows.append((name, largest_shape(micro), f"{time.perf_counter() - began:.1f} s", peak))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if distributed.is_main():
        section = Section("steps", rows, ("stream", "largest micro-batch", "took", "peak"))
        print_plan("rehearsal: the largest steps fit into memory; nothing is kept", [section])
