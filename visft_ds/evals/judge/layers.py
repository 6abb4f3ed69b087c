"""Blocks of a model: read together in one forward, and the best of them for each number.

The last block of a tower often has not the best features, so that a gain over it may be no more than a better
place. BASE and every tuned model are read after the block that is best on a fifth of the *training* images,
by a probe of the other four fifths. Numbers that train nothing are asked for every block; trained heads for
the CANDIDATES best of those, and the last, or for all if none are ranked. The other numbers of a data set
take the block of its first one. Of blocks that reach the same the last one is taken.

As many blocks are read in one forward as fit into `encoding.MOST` bytes of features.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from visft_ds.evals.judge.benchmark import Benchmark, Number
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import (
    ByBlock,
    ByKind,
    Settings,
    brought_near,
    by_block,
    encode_images,
    forward,
    groups,
    kinds_read,
)

#: Name of what the whole model gives, if that is not what its last block gives.
END = "end"
Levels = dict[str, dict[str, float]]  #: number -> block -> the number on held-out training images
Choice = dict[str, Any]  #: {"chosen": block, "held_out": {block: mean over the seeds of a variant}}
CANDIDATES = 3  #: best blocks of a data set's first number among which heads are trained


class _Enough(Exception):
    """Signal that all blocks to be read have been reached: the rest of the forward is left out."""


class _Reader(nn.Module):
    """A model read after several of its blocks in one forward."""

    def __init__(self, module: nn.Module, blocks: Mapping[str, str]) -> None:
        super().__init__()
        self.module = module
        self.blocks = blocks  #: beginning of the names of features -> block

    def forward(self, images: Tensor, kinds: Collection[str]) -> ByKind:
        model: Any = self.module
        outputs: ByKind = {}

        def keep(name: str, output: Tensor) -> None:
            outputs[name] = output
            if len(outputs) == len(self.blocks):
                raise _Enough

        hooks = []
        for name in self.blocks.values():
            if name != END:
                block = model.backbone.get_submodule(name)
                hooks.append(block.register_forward_hook(lambda *call, name=name: keep(name, call[-1])))
        at_end: ByKind = {}
        try:
            at_end = model(images, kinds)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()

        features: ByKind = {}
        for begin, name in self.blocks.items():
            of_block = at_end if name == END else model.of_block(outputs.pop(name), images, kinds)
            features |= {f"{begin}{kind}": value for kind, value in of_block.items()}
        return features


def read_after(encoder: Encoder, *blocks: str) -> Encoder:
    """The encoder read after a block; after several, names of features begin with `BLOCK `."""
    if blocks == (END,):
        return encoder
    names = {f"{block} ": block for block in blocks}
    if len(blocks) == 1:
        names = {"": blocks[0]}
    return replace(encoder, module=_Reader(encoder.module, names))


def blocks_of(encoder: Encoder, settings: Settings) -> dict[str, int]:
    """Bytes of an image's map after each block, in order; the end is left out if it is the last block."""
    model: Any = encoder.module
    if not hasattr(model, "of_block") or not model.backbone.ends():
        return {END: 0}
    encoder.module.to(settings.device)
    shape = (1, len(encoder.normalisation[0]), encoder.side, encoder.side)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    blocks = [*model.backbone.ends(), END]
    features = forward(read_after(encoder, *blocks), image, ["patches"], settings)
    maps = [features[f"{block} patches"] for block in blocks]
    if maps[-1].shape == maps[-2].shape and torch.equal(maps[-1], maps[-2]):
        blocks.pop()
    return {block: 4 * patches.numel() for block, patches in zip(blocks, maps, strict=False)}


def levels_of(
    encoder: Encoder,
    benchmark: Benchmark,
    sizes: Mapping[str, int],
    ranked: Sequence[str],
    numbers: Sequence[Number],
    settings: Settings,
    label: str,
) -> Levels:
    """Number -> block -> the number on held-out training images, more is better.

    Args:
        sizes: the blocks to choose from, and bytes of an image's map of each.
        ranked: blocks by another data set, the best first, for numbers that all need trained heads.
        numbers: of the benchmark, that choose layers.
    """
    choice = benchmark.layer_choice
    assert choice is not None
    kinds = kinds_read(benchmark, encoder.kinds)
    levels: Levels = {number.name: {} for number in numbers}
    kept: ByBlock = {}  # block -> its features, where those of all blocks fit

    def read(blocks: Sequence[str]) -> Iterator[tuple[str, ByKind]]:
        if kept:
            yield from ((block, kept[block]) for block in blocks)
            return
        for group in groups({block: sizes[block] for block in blocks}, len(choice.images)):
            features = encode_images(read_after(encoder, *group), choice.images, kinds, settings, label)
            of_blocks = by_block(features, group)
            if len(group) == len(sizes):
                kept.update(of_blocks)
            yield from of_blocks.items()

    def measure(blocks: Sequence[str], asked: Sequence[Number]) -> None:
        for block, features in read(blocks):
            near = brought_near(features, settings)
            for number in asked:
                value = choice.held_out(near, number.name)
                levels[number.name][block] = -value if number.lower else value

    direct = [number for number in numbers if not number.trained]
    if direct:
        measure(list(sizes), direct)
        ranked = best_first(levels[direct[0].name])
    trained = [number for number in numbers if number.trained]
    if trained:
        best = [block for block in ranked if block in sizes][:CANDIDATES]
        candidates = {*(best or sizes), list(sizes)[-1]}
        measure([block for block in sizes if block in candidates], trained)
    return levels


def best_first(held_out: Mapping[str, float]) -> list[str]:
    """Blocks by what they reach on held-out training images; of equal ones the later comes first."""
    return sorted(reversed(list(held_out)), key=lambda block: -held_out[block])


def chosen(levels: Sequence[Levels]) -> dict[str, Choice]:
    """Number -> its choice, by what `levels_of` gives for each seed."""
    choices: dict[str, Choice] = {}
    for number, of_first_seed in levels[0].items():
        of_seeds = [of_seed[number] for of_seed in levels]
        shared = [block for block in of_first_seed if all(block in of_seed for of_seed in of_seeds)]
        means = {block: fmean(of_seed[block] for of_seed in of_seeds) for block in shared}
        choices[number] = {"chosen": best_first(means)[0], "held_out": means}
    return choices
