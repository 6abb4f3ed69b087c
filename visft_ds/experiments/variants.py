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
    images: float = 1.0  #: times as many drawings as the first variant has; its own are among them


def _tasks(names: str) -> Variant:
    return Variant((f"visft.tasks={names}",))


def _heads(lr: str) -> str:
    return f'visft.param_groups.1={{"name": "heads", "params": "heads.*", "lr": {lr}}}'


def _without_lora(parameters: str, lr: str) -> Variant:
    """The backbone's own parameters are trained, at a rate of theirs."""
    settings = ("visft.lora=null", f"visft.param_groups={parameters}", f"optimizer.params.lr={lr}")
    return Variant(settings)


_RANDOM_HEADS = ("visft.heads.start=random", "visft.mode=$stage1_mode")
#: In settings, $NAME is a value of the recipe: `stage1_lr` and `stage2_lr`, with `_tenth` and `_hundredth`,
#: `stage1_mode`, and `last_block` and `norms`, globs of the parameters of the last block that is read and of
#: normalisations.
VARIANTS = {
    FIRST: Variant(),
    PERMUTED: Variant(permuted=True),
    "one stage": Variant((*_RANDOM_HEADS, _heads("$stage1_lr")), heads_from_stage1=False),
    "heads at a hundredth": Variant((_heads("$stage1_lr_hundredth"),)),
    "heads at a tenth": Variant((_heads("$stage1_lr_tenth"),)),
    "co-trained heads": Variant((_heads("$stage1_lr"),)),
    "boxes": _tasks("detection"),
    "masks": _tasks("segmentation"),
    "captions": _tasks("captioning"),
    "boxes and masks": _tasks("detection,segmentation"),
    "boxes and captions": _tasks("detection,captioning"),
    "masks and captions": _tasks("segmentation,captioning"),
    "a quarter of the images": Variant(images=0.25),
    "half of the images": Variant(images=0.5),
    "four times the images": Variant(images=4.0),
    "rank 4": Variant(("visft.lora.rank=4",)),
    "rank 64": Variant(("visft.lora.rank=64",)),
    "biases": _without_lora("backbone.*bias", "$stage2_lr"),
    "norms": _without_lora("$norms", "$stage2_lr"),
    "last block": _without_lora("$last_block", "$stage2_lr_tenth"),
    "everything": _without_lora("backbone.*", "$stage2_lr_tenth"),
    "random heads": Variant(
        (*_RANDOM_HEADS, _heads("0"), "optimizer.params.lr=$stage2_lr_hundredth"),
        heads_from_stage1=False,
    ),
    "soup": Variant(averaged=True),
}


def chosen_variants(
    names: str | None, further: Sequence[str], recipe: Mapping[str, object], *, drawn: bool
) -> dict[str, Variant]:
    """The first variant, and all that the command line asks for.

    Args:
        names: of variants in VARIANTS, joined by commas; None: all of them that are possible.
        further: variants of one's own, "NAME: KEY=VALUE ...".
        recipe: values that settings in VARIANTS name.
        drawn: training data are drawings, of which there may be more or fewer.

    Raises:
        ValueError: no such variant, one that is not possible, or one of one's own without settings.
    """
    asked = [name for name, variant in VARIANTS.items() if drawn or variant.images == 1]
    if names is not None:
        asked = [FIRST, *(name.strip() for name in names.split(","))]
    variants = {}
    for name in asked:
        variant = VARIANTS.get(name)
        if variant is None:
            raise ValueError(f"--variants {name}: no such variant; there are {', '.join(VARIANTS)}")
        if variant.images != 1 and not drawn:
            raise ValueError(f"--variants {name}: needs drawings; --data has as many images as it has")
        settings = tuple(Template(setting).substitute(recipe) for setting in variant.settings)
        variants[name] = replace(variant, settings=settings)
    for text in further:
        name, _, settings_text = text.partition(":")
        settings = tuple(settings_text.split())
        if not settings or name.strip() in {*VARIANTS, *variants}:
            raise ValueError(
                f'--variant {text}: give a new name and settings, as in "rank 8: visft.lora.rank=8"'
            )
        variants[name.strip()] = Variant(settings)
    return variants
