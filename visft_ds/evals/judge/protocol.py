"""Sizes and recipes by which frozen features are probed: as published, or quick.

Published are https://github.com/vpariza/open-hummingbird-eval (`in_context`),
https://github.com/facebookresearch/dinov3 (`linear_segmentation`, `depth`) and
https://github.com/facebookresearch/dinov2 (`classification`): random crops of all images teach, and heads
judge windows, or images and their mirror images. Quick probes read the features of whole images, each encoded
once; their numbers are not comparable with published ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from visft_ds.evals.judge import linear_segmentation
from visft_ds.evals.judge.heads import Recipe

_ALL = 10**9
_STRIDE = 8  # between the pixels that the loss of a quick head counts


@dataclass(frozen=True)
class Protocol:
    """Sizes and recipes."""

    name: str
    images: Mapping[str, int]  #: that are read of "train" and "test"; of more every k-th
    classified: Mapping[str, int]  #: the same where an image has one class
    memory: int  #: patches
    segmentation: Recipe
    depth: Recipe
    resampled: bool = True  #: probes are retrained on resamples of the training images

    @property
    def published(self) -> bool:
        """Return True if numbers are to be those of the sources."""
        return self.name == "published"


PUBLISHED = Protocol(
    "published",
    images={"train": _ALL, "test": _ALL},
    classified={"train": _ALL, "test": _ALL},
    memory=10_240_000,
    segmentation=linear_segmentation.RECIPE,
    depth=Recipe(steps=38_400, warm_up=12_800, rate=3e-4, decay=1e-4, betas=(0.9, 0.99), clip=35.0),
)


def _shortened(recipe: Recipe, steps: int) -> Recipe:
    """The same schedule in fewer steps."""
    warm_up = round(recipe.warm_up * steps / recipe.steps)
    return replace(recipe, steps=steps, warm_up=warm_up, stride=_STRIDE)


def _quick(name: str, memory: int, steps: int, *, resampled: bool) -> Protocol:
    """The same heads after so many steps, on fewer images."""
    return Protocol(
        name,
        images={"train": 1000, "test": 2000},
        classified={"train": 10_000, "test": 5000},
        memory=memory,
        segmentation=_shortened(PUBLISHED.segmentation, steps),
        depth=_shortened(PUBLISHED.depth, steps),
        resampled=resampled,
    )


QUICK = _quick("quick", memory=102_400, steps=2000, resampled=True)
#: By which a fifth of the training images chooses a layer.
BRIEF = _quick("brief", memory=6_400, steps=500, resampled=False)

# Sentences that several numbers share.
SIZES = (
    f"At most {QUICK.images['train']:,} images teach and {QUICK.images['test']:,} judge, seen once at the "
    "model's size, without augmentation. Judged at the label's size."
)
CLASSIFIED_SIZES = (
    f"At most {QUICK.classified['train']:,} images teach and {QUICK.classified['test']:,} judge, as the "
    "model takes them."
)
NORMALISED = "pixels are normalised as the model was trained"
