"""How dense probes are run: as published, or quickly.

| | published | quick |
|---|---|---|
| images | all | at most 1,000 teach, 2,000 judge |
| in-context: memory | two augmented passes at 512 pixels, 10,240,000 patches | features of the images, 102,400 |
| linear segmentation | 40,000 steps on augmented crops of 512 pixels, judged in windows | 2,000 on the features |
| linear depth | 38,400 steps on crops of 416 x 544 pixels | 2,000 on the features |

Published are https://github.com/vpariza/open-hummingbird-eval (in-context) and
https://github.com/facebookresearch/dinov3 (the linear heads). Quick numbers are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visft_ds.evals.judge.heads import Recipe


@dataclass(frozen=True)
class Protocol:
    """Sizes and recipes."""

    name: str
    images: Mapping[str, int]  #: that are read of "train" and "test"; of more every k-th
    memory: int  #: patches
    segmentation: Recipe
    depth: Recipe


def shortened(recipe: Recipe) -> Recipe:
    """A quarter of it, for heads that choose between layers."""
    return replace(recipe, steps=recipe.steps // 4, warm_up=recipe.warm_up // 4)


_EVERYTHING = 10**9
QUICK = Protocol(
    "quick",
    {"train": 1000, "test": 2000},
    102_400,
    Recipe(steps=2000, warm_up=75, rate=1e-3, decay=1e-3, dropout=0.1, stride=4),
    Recipe(steps=2000, warm_up=667, rate=3e-4, decay=1e-4, betas=(0.9, 0.99), clip=35.0, stride=4),
)
PUBLISHED = Protocol(
    "published",
    {"train": _EVERYTHING, "test": _EVERYTHING},
    10_240_000,
    Recipe(steps=40_000, warm_up=1500, rate=1e-3, decay=1e-3, dropout=0.1),
    Recipe(steps=38_400, warm_up=12_800, rate=3e-4, decay=1e-4, betas=(0.9, 0.99), clip=35.0),
)
