"""Comparison of the blocks of a model: all of them on the same probes.

As many blocks are read in one forward as fit into MOST bytes of features; if not all do, images are encoded once more
for each further group. Features of one benchmark are in memory at a time.

The best block of a number is chosen on one half of the test images and judged on the other: the best of a dozen numbers
is too good by being chosen. It is compared with the end of the model, which is what is read if nobody chooses.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.models import ModelSpec, load_encoder, readable
from visft_ds.evals.judge.protocol import Benchmark, Score
from visft_ds.evals.judge.scoring import Settings, encode, forward
from visft_ds.evals.judge.table import rows_of
from visft_ds.evals.records import Interval
from visft_ds.parallel import distributed

#: Name of what the whole model gives, if that is not what its last block gives.
END = "end"
MOST = 8 * 2**30  #: bytes of a benchmark's features of all blocks that are read together
_KINDS = ("pooled", "patches", "columns")


@dataclass(frozen=True)
class Choice:
    """Best block for a number, chosen on one half of the test images; all numbers here are of the other half."""

    number: str
    block: str
    value: Interval
    end: Interval
    difference: Interval | None  #: to the end of the model; None if that is the best


class _Reader(nn.Module):
    """A model read after several of its blocks in one forward; names of features are `BLOCK KIND`."""

    def __init__(self, module: nn.Module, blocks: Sequence[str]) -> None:
        super().__init__()
        self.module, self.blocks = module, blocks

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        model: Any = self.module
        given: dict[str, Tensor] = {}
        hooks = [
            model.backbone.get_submodule(name).register_forward_hook(
                lambda *parts, name=name: given.__setitem__(name, parts[-1])
            )
            for name in self.blocks
            if name != END
        ]
        end = model(images, kinds)
        for hook in hooks:
            hook.remove()
        found: dict[str, Tensor] = {}
        for name in self.blocks:
            of = end if name == END else model.of_block(given.pop(name), images, kinds)
            found |= {f"{name} {kind}": value for kind, value in of.items()}
        return found


def judge_blocks(spec: ModelSpec, benchmarks: Sequence[Benchmark], settings: Settings) -> dict[str, dict[str, Score]]:
    """Block -> name -> score, in the order of the model, on the main process. Collective.

    Raises:
        ValueError: a model whose blocks are not known, or a benchmark that needs more than features of images.
    """
    if spec.block is not None:
        raise ValueError(f"{spec.label}: every block is read; give the model without #{spec.block}")
    for benchmark in benchmarks:
        if benchmark.needs_text or not set(benchmark.kinds) & set(_KINDS):
            raise ValueError(f"{benchmark.label} reads the end of a model alone: give dense, probe, objects or ocr")
    encoder = readable(load_encoder(spec, settings.precision), spec)
    encoder.module.to(settings.device)
    sizes = _sizes(encoder, settings)
    results: dict[str, dict[str, Score]] = {name: {} for name in sizes}
    for benchmark in benchmarks:
        for group in _groups(sizes, MOST // sum(map(len, benchmark.sets.values()))):
            read = replace(encoder, module=_Reader(encoder.module, group))
            features = encode(read, benchmark, settings, f"{spec.label}: {benchmark.label}")
            for name in group if distributed.is_main() else ():
                begin = f"{name} "
                own = {
                    part: {key.removeprefix(begin): value for key, value in of.items() if key.startswith(begin)}
                    for part, of in features.items()
                }
                results[name] |= {f"{benchmark.label} {score.name}": score for score in benchmark.scores(own)}
    return results if distributed.is_main() else {}


def _sizes(encoder: Encoder, settings: Settings) -> dict[str, int]:
    """Bytes of an image's map by name of the block; the end is left out if it is the last block."""
    model: Any = encoder.module
    blocks = [*model.backbone.ends(), END]
    image = torch.randn(1, 3, encoder.side, encoder.side, generator=torch.Generator().manual_seed(0))
    found = forward(replace(encoder, module=_Reader(model, blocks)), image, ["patches"], settings)
    *_, last, end = found
    if torch.equal(found[last], found[end]):
        del found[end]
    return {name.removesuffix(" patches"): 4 * patches.numel() for name, patches in found.items()}


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
        (row,) = rows_of({block: {name: judged[block]} for block in dict.fromkeys((end, best))})
        found.append(Choice(name, best, row.values[best], row.values[end], row.differences.get(best)))
    return found


def half_of(score: Score, number: int) -> Score:
    """The items of one half of the images, 0 or 1; an image is in the same half for every number and model."""
    images = np.arange(len(score.values)) if score.groups is None else score.groups
    kept = (np.random.default_rng(0).random(int(images.max()) + 1) < 0.5)[images] == bool(number)
    groups = None if score.groups is None else score.groups[kept]
    return replace(score, values=score.values[kept], groups=groups)
