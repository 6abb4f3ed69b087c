"""Blocks of a model: read together in one forward, and the best of them for each number.

The last block of a tower often has not the best features, so that a gain over it may be no more than a better
place. BASE and every tuned model are read after the block that is best on a fifth of the *training* images,
by a probe of the other four fifths. Numbers that train nothing are asked for every block; trained heads for
the CANDIDATES best of those, and the last, or for all if none are ranked. The other numbers of a data set
take the block of its first one. Of blocks that reach the same the last one is taken.

As many blocks are read in one forward as fit into `scoring.MOST` bytes of features.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.evals.judge.benchmark import Benchmark, Number
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.scoring import Settings, brought_near, encode_images, forward, groups, kinds_of

#: Name of what the whole model gives, if that is not what its last block gives.
END = "end"
CANDIDATES = 3  #: best blocks of a data set's first number among which heads are trained


class _Enough(Exception):
    """Signal that all blocks to be read have been reached: the rest of the forward is left out."""


class _Reader(nn.Module):
    """A model read after several of its blocks in one forward."""

    def __init__(self, module: nn.Module, blocks: Mapping[str, str]) -> None:
        super().__init__()
        self.module, self.blocks = module, blocks  #: beginning of the names of features -> block

    def forward(self, images: Tensor, kinds: Collection[str]) -> dict[str, Tensor]:
        model: Any = self.module
        given: dict[str, Tensor] = {}
        inner = [name for name in self.blocks.values() if name != END]

        def keep(name: str, output: Tensor) -> None:
            given[name] = output
            if len(given) == len(self.blocks):
                raise _Enough

        hooks = [
            model.backbone.get_submodule(name).register_forward_hook(
                lambda *parts, name=name: keep(name, parts[-1])
            )
            for name in inner
        ]
        try:
            end = model(images, kinds)
        except _Enough:
            end = {}
        finally:
            for hook in hooks:
                hook.remove()
        found: dict[str, Tensor] = {}
        for begin, name in self.blocks.items():
            of = end if name == END else model.of_block(given.pop(name), images, kinds)
            found |= {f"{begin}{kind}": value for kind, value in of.items()}
        return found


def read_after(encoder: Encoder, *blocks: str) -> Encoder:
    """The encoder read after a block; after several, names of features begin with `BLOCK `."""
    if blocks == (END,):
        return encoder
    begins = [f"{name} " for name in blocks] if len(blocks) > 1 else [""]
    return replace(encoder, module=_Reader(encoder.module, dict(zip(begins, blocks, strict=True))))


def blocks_of(encoder: Encoder, settings: Settings) -> dict[str, int]:
    """Bytes of an image's map after each block, in order; the end is left out if it is the last block."""
    model: Any = encoder.module
    if not hasattr(model, "of_block") or not model.backbone.ends():
        return {END: 0}
    encoder.module.to(settings.device)
    image = torch.randn(1, 3, encoder.side, encoder.side, generator=torch.Generator().manual_seed(0))
    reader = read_after(encoder, *model.backbone.ends(), END)
    found = {
        name.partition(" ")[0]: value for name, value in forward(reader, image, ["patches"], settings).items()
    }
    *_, last, end = found.values()
    if last.shape == end.shape and torch.equal(last, end):
        del found[END]
    return {name: 4 * value.numel() for name, value in found.items()}


def levels_of(
    encoder: Encoder,
    benchmark: Benchmark,
    sizes: Mapping[str, int],
    ranked: Sequence[str],
    numbers: Sequence[Number],
    settings: Settings,
    label: str,
) -> dict[str, dict[str, float]]:
    """Number -> block -> the number on held-out training images, more is better.

    Args:
        sizes: the blocks to choose from, and bytes of an image's map of each.
        ranked: blocks by another data set, the best first, for numbers that all need trained heads.
        numbers: of the benchmark, that choose layers.
    """
    choice = benchmark.layer_choice
    assert choice is not None
    images = choice.images
    kinds = kinds_of(encoder, benchmark)
    levels: dict[str, dict[str, float]] = {number.name: {} for number in numbers}

    read_before: dict[str, dict[str, Tensor]] = {}  # block -> its features, where those of all blocks fit

    def measure(name: str, features: dict[str, Tensor], wanted: Sequence[Number]) -> None:
        near = brought_near(features, settings)
        for number in wanted:
            value = choice.held_out(near, number.name)
            levels[number.name][name] = -value if number.lower else value

    def read(blocks: Sequence[str], wanted: Sequence[Number]) -> None:
        for name in blocks:
            if name in read_before:
                measure(name, read_before[name], wanted)
        for group in groups({name: sizes[name] for name in blocks if name not in read_before}, len(images)):
            features = encode_images(read_after(encoder, *group), images, kinds, settings, label)
            for name in group:
                begin = f"{name} " if len(group) > 1 else ""
                own = {kind: features.pop(f"{begin}{kind}") for kind in kinds}
                measure(name, own, wanted)
                if len(group) == len(sizes):
                    read_before[name] = own

    direct = [number for number in numbers if not number.trained]
    if direct:
        read(list(sizes), direct)
        ranked = best_first(levels[direct[0].name])
    heads = [number for number in numbers if number.trained]
    if heads:
        best = [name for name in ranked if name in sizes][:CANDIDATES]
        candidates = {*(best or sizes), list(sizes)[-1]}
        read([name for name in sizes if name in candidates], heads)
    return levels


def best_first(held_out: Mapping[str, float]) -> list[str]:
    """Blocks by what they reach on held-out training images; of equal ones the later comes first."""
    return sorted(reversed(list(held_out)), key=lambda name: -held_out[name])


def chosen(levels: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Number -> {"chosen": block, "held_out": {block: mean over the seeds of an arm}}.

    Args:
        levels: what `levels_of` gives for each seed.
    """
    choices: dict[str, dict[str, Any]] = {}
    for number, of_first in levels[0].items():
        common = [name for name in of_first if all(name in of_seed[number] for of_seed in levels)]
        means = {name: fmean(of_seed[number][name] for of_seed in levels) for name in common}
        choices[number] = {"chosen": best_first(means)[0], "held_out": means}
    return choices
