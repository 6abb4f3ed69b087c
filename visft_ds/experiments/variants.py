"""Variants of an experiment: the published recipe, its controls and its variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template

FIRST = "two stages"
PERMUTED = "permuted labels"


@dataclass(frozen=True)
class Variant:
    """Training that departs from the recipe."""

    settings: tuple[str, ...] = ()  #: --set of stage 2
    heads_from_stage1: bool = True  #: otherwise there is no stage 1, and heads start at random
    permuted: bool = False  #: each image has the labels of another one, in both stages
    averaged: bool = False  #: no training: the mean of the first variant's adapters of all seeds


_TRAINED_HEADS = 'visft.param_groups.1={"name": "heads", "params": "heads.*", "lr": $stage1_lr}'
_FROZEN_HEADS = 'visft.param_groups.1={"name": "heads", "params": "heads.*", "lr": 0}'
_RANDOM_HEADS = ("visft.heads.start=random", "visft.mode=$stage1_mode")
#: In settings, $NAME is a value of the recipe: `stage1_lr`, `stage1_mode`, `hundredth_of_stage2_lr`.
VARIANTS = {
    FIRST: Variant(),
    PERMUTED: Variant(permuted=True),
    "co-trained heads": Variant((_TRAINED_HEADS,)),
    "one stage": Variant((*_RANDOM_HEADS, _TRAINED_HEADS), heads_from_stage1=False),
    "boxes": Variant(("visft.tasks=detection",)),
    "masks": Variant(("visft.tasks=segmentation",)),
    "captions": Variant(("visft.tasks=captioning",)),
    "random heads": Variant(
        (*_RANDOM_HEADS, _FROZEN_HEADS, "optimizer.params.lr=$hundredth_of_stage2_lr"),
        heads_from_stage1=False,
    ),
    "soup": Variant(averaged=True),
}


def chosen_variants(
    names: str | None, further: Sequence[str], recipe: Mapping[str, object]
) -> dict[str, Variant]:
    """The first variant, and all that the command line asks for.

    Args:
        names: of variants in VARIANTS, joined by commas; None: all of them.
        further: variants of one's own, "NAME: KEY=VALUE ...".
        recipe: values that settings in VARIANTS name.
    """
    asked = list(VARIANTS)
    if names is not None:
        asked = [FIRST, *(name.strip() for name in names.split(","))]
    variants = {}
    for name in asked:
        variant = VARIANTS.get(name)
        if variant is None:
            raise ValueError(f"--variants {name}: no such variant; there are {', '.join(VARIANTS)}")
        settings = tuple(Template(setting).substitute(recipe) for setting in variant.settings)
        variants[name] = replace(variant, settings=settings)
    for text in further:
        name, _, settings_text = text.partition(":")
        settings = tuple(settings_text.split())
        if not settings or name.strip() in {*VARIANTS, *variants}:
            raise ValueError(
                f'--variant {text}: give a new name and settings, as in "rank 4: visft.lora.rank=4"'
            )
        variants[name.strip()] = Variant(settings)
    return variants
