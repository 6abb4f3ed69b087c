"""Comparison of the blocks of a model: all of them on the same probes, out of one forward of the whole model.

As many blocks are read at once as take MOST bytes of a chunk; where not all do, images are encoded once more for each
further group. For scoring, features of one block are in memory at a time.

The best block of a number is chosen on one half of the test images and judged on the other: the best of a dozen numbers
is too good by being chosen. It is compared with the end of the model, which is what is read where nobody chooses.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from visft_ds.evals.benchmarks.cache import CHUNK
from visft_ds.evals.benchmarks.encoders import Blocks
from visft_ds.evals.benchmarks.encoding import Worker, forward
from visft_ds.evals.benchmarks.intervals import Interval
from visft_ds.evals.benchmarks.models import ModelSpec, load_encoder, readable
from visft_ds.evals.benchmarks.protocol import Benchmark, Score
from visft_ds.evals.benchmarks.run import Encoded, Settings, encode, worker_of
from visft_ds.evals.benchmarks.table import rows_of

#: Name of what the whole model gives, where that is not what its last block gives.
END = "end"
MOST = 2**29  #: bytes of a chunk's features of all blocks that are read at once
_KINDS = ("pooled", "patches", "columns")


@dataclass(frozen=True)
class Choice:
    """Best block for a number, chosen on one half of the test images; all numbers here are of the other half."""

    number: str
    block: str
    value: Interval
    end: Interval
    difference: Interval | None  #: to the end of the model; None where that is the best


class _BlockReader:
    """Forward of a model, of which the wanted blocks are kept until they are asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.wanted = module, list[str]()
        self._blocks, self._given = cast(Blocks, module), dict[str, Any]()
        for name in self._blocks.ends():
            self._blocks.block(name).register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if name in self.wanted:
                self._given[name] = output

        return hook

    def read(self, name: str, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        """Features of a wanted block; the first of them runs the model, for the images of all."""
        if name == self.wanted[0]:
            whole = self.module(images, kinds if END in self.wanted else ())
            self._given |= {END: whole} if END in self.wanted else {}
        given = self._given.pop(name)
        return given if name == END else self._blocks.of_block(given, images, kinds)


class _View(nn.Module):
    """A model read after one of its blocks."""

    def __init__(self, reader: _BlockReader, name: str) -> None:
        super().__init__()
        self._reader, self._name = reader, name

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        return self._reader.read(self._name, images, kinds)


def encode_blocks(
    spec: ModelSpec,
    benchmarks: Sequence[Benchmark],
    settings: Settings,
    tell: Callable[[Mapping[str, str]], None],
) -> dict[str, list[Encoded]]:
    """Block -> its features for each benchmark, in the order of the model. Collective.

    Args:
        tell: called with facts of the model.

    Raises:
        ValueError: a model whose blocks are not known, a benchmark that needs more than features of images, and
            features for which the disk has no room.
    """
    if spec.block is not None:
        raise ValueError(f"{spec.label}: every block is read; give the model without #{spec.block}")
    for benchmark in benchmarks:
        if benchmark.needs_text or not set(benchmark.kinds) & set(_KINDS):
            raise ValueError(
                f"{benchmark.label} reads what the end of a model alone has (an embedding beside texts, a classifier): "
                f"blocks are compared by dense, probe, objects with a training part, and ocr"
            )
    encoder = readable(load_encoder(spec, settings.load), spec)
    worker = worker_of(encoder, spec.label, settings)
    reader = _BlockReader(worker.encoder.module)
    views = {name: _viewed(worker, reader, name) for name in (*cast(Blocks, encoder.module).ends(), END)}
    sizes = _sizes(views, reader)
    count = sum(len(images) for benchmark in benchmarks for images in benchmark.sets.values())
    _check_room(sum(sizes.values()) * count, settings)
    groups = list(_groups(sizes, MOST // min(CHUNK, count)))
    tell({**encoder.facts, "passes": f"{len(groups)}, of {', '.join(f'{one[0]} to {one[-1]}' for one in groups)}"})
    found: dict[str, list[Encoded]] = {name: [] for name in sizes}
    for group in groups:
        reader.wanted = group
        for benchmark in benchmarks:
            for name, encoded in zip(group, encode([views[name] for name in group], benchmark), strict=True):
                found[name].append(encoded)
    return found


def _viewed(worker: Worker, reader: _BlockReader, name: str) -> Worker:
    settings = {**worker.encoder.settings, **({} if name == END else {"until": name})}
    encoder = replace(worker.encoder, module=_View(reader, name), settings=settings)
    return replace(worker, encoder=encoder, label=f"{worker.label}#{name}")


def _sizes(views: Mapping[str, Worker], reader: _BlockReader) -> dict[str, int]:
    """Bytes of an image's map by name of the block; the end is left out where it is the last block."""
    side = next(iter(views.values())).encoder.side
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    reader.wanted = list(views)
    found = {name: forward(view, image, ["patches"])["patches"] for name, view in views.items()}
    *_, last, end = found
    if torch.equal(found[last], found[end]):
        del found[end]
    return {name: patches.numel() * patches.element_size() for name, patches in found.items()}


def _check_room(needed: int, settings: Settings) -> None:
    place = next(folder for folder in (settings.cache, *settings.cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ValueError(
            f"features of all blocks take {needed / 1e9:,.1f} GB, {place} has {free / 1e9:,.1f} GB free: give --cache "
            f"on a larger disk, or fewer images"
        )


def _groups(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Neighbouring blocks whose features of an image take at most `most` bytes together; at least one."""
    group: list[str] = []
    for name, size in sizes.items():
        if group and sum(sizes[one] for one in group) + size > most:
            yield group
            group = []
        group.append(name)
    yield group


def choose(results: Mapping[str, Mapping[str, Score]]) -> list[Choice]:
    """The best block for each number.

    Args:
        results: block -> name -> score, the end of the model last.

    Raises:
        ValueError: too few images for two halves.
    """
    *_, end = results
    found = []
    for name in results[end]:
        chosen, judged = ({block: half_of(of[name], half) for block, of in results.items()} for half in (0, 1))
        if not (len(chosen[end].values) and len(judged[end].values)):
            raise ValueError(f"{name} has too few test images: one half chooses a block, the other one judges it")
        best = max(results, key=lambda block: chosen[block].value)
        (row,) = rows_of({block: {name: judged[block]} for block in dict.fromkeys((end, best))}, {})
        found.append(Choice(name, best, row.values[best], row.values[end], row.differences.get(best)))
    return found


def half_of(score: Score, number: int) -> Score:
    """The items of one half of the images, 0 or 1; an image is in the same half for every number and model."""
    images = np.arange(len(score.values)) if score.groups is None else score.groups
    kept = (np.random.default_rng(0).random(int(images.max()) + 1) < 0.5)[images] == bool(number)
    groups = None if score.groups is None else score.groups[kept]
    return replace(score, values=score.values[kept], groups=groups, said=())
