"""Arms of an experiment: the published recipe, its controls and its variants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template

FIRST = "two stages"
PERMUTED = "permuted labels"


@dataclass(frozen=True)
class Arm:
    """Training that departs from the recipe."""

    settings: tuple[str, ...] = ()  #: --set of stage 2
    heads_from_stage1: bool = True  #: otherwise there is no stage 1, and heads start at random
    permuted: bool = False  #: each image has the labels of another one, in both stages
    averaged: bool = False  #: no training: the mean of the first arm's adapters of all seeds


_TRAINED_HEADS = 'visft.param_groups.1={"name": "heads", "params": "heads.*", "lr": $stage1_lr}'
_FROZEN_HEADS = 'visft.param_groups.1={"name": "heads", "params": "heads.*", "lr": 0}'
_RANDOM_HEADS = ("visft.heads.start=random", "visft.mode=$stage1_mode")
#: In settings, $NAME is a value of the recipe: `stage1_lr`, `stage1_mode`, `hundredth_of_stage2_lr`.
ARMS = {
    FIRST: Arm(),
    PERMUTED: Arm(permuted=True),
    "co-trained heads": Arm((_TRAINED_HEADS,)),
    "one stage": Arm((*_RANDOM_HEADS, _TRAINED_HEADS), heads_from_stage1=False),
    "boxes": Arm(("visft.tasks=detection",)),
    "masks": Arm(("visft.tasks=segmentation",)),
    "captions": Arm(("visft.tasks=captioning",)),
    "random heads": Arm(
        (*_RANDOM_HEADS, _FROZEN_HEADS, "optimizer.params.lr=$hundredth_of_stage2_lr"),
        heads_from_stage1=False,
    ),
    "soup": Arm(averaged=True),
}


def chosen_arms(names: str | None, described: Sequence[str], recipe: Mapping[str, object]) -> dict[str, Arm]:
    """The first arm, and all that the command line asks for.

    Args:
        names: of arms in ARMS, joined by commas; None: all of them.
        described: further arms, "NAME: KEY=VALUE ...".
        recipe: values that settings in ARMS name.
    """
    arms = {FIRST: ARMS[FIRST]}
    for name in ARMS if names is None else names.split(","):
        arm = ARMS.get(name.strip())
        if arm is None:
            raise ValueError(f"--arms {name.strip()}: no such arm; there are {', '.join(ARMS)}")
        settings = tuple(Template(setting).substitute(recipe) for setting in arm.settings)
        arms[name.strip()] = replace(arm, settings=settings)
    for text in described:
        name, _, settings_text = text.partition(":")
        settings = tuple(settings_text.split())
        if not settings or name.strip() in {*ARMS, *arms}:
            raise ValueError(f'--arm {text}: give a new name and settings, as in "rank 4: visft.lora.rank=4"')
        arms[name.strip()] = Arm(settings)
    return arms
