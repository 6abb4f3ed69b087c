"""Settings of dense probes: as published, or quick ones.

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

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from visft_ds.evals.judge.dense_sets import DenseSet, every
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.heads import Recipe
from visft_ds.evals.judge.protocol import Benchmark, Features, Score, fifth
from visft_ds.evals.judge.scoring import Settings
from visft_ds.evals.judge.sources import Kept, Sight


@dataclass(frozen=True)
class Protocol:
    """Sizes and recipes."""

    name: str
    images: Mapping[str, int]  #: that are read of "train" and "test"; of more every k-th
    memory: int  #: patches
    segmentation: Recipe
    depth: Recipe


_EVERYTHING = 10**9
QUICK = Protocol(
    "quick",
    {"train": 1000, "test": 2000},
    102_400,
    Recipe(steps=2000, warm_up=75, rate=1e-3, decay=1e-3, dropout=0.1, stride=4),
    Recipe(steps=2000, warm_up=667, rate=3e-4, decay=1e-4, betas=(0.9, 0.99), clip=35.0, stride=4),
)
#: By which a layer is chosen, on a fifth of the training images.
BRIEF = replace(
    QUICK,
    memory=6_400,
    segmentation=replace(QUICK.segmentation, steps=500, warm_up=19),
    depth=replace(QUICK.depth, steps=500, warm_up=167),
)
PUBLISHED = Protocol(
    "published",
    {"train": _EVERYTHING, "test": _EVERYTHING},
    10_240_000,
    Recipe(steps=40_000, warm_up=1500, rate=1e-3, decay=1e-3, dropout=0.1),
    Recipe(steps=38_400, warm_up=12_800, rate=3e-4, decay=1e-4, betas=(0.9, 0.99), clip=35.0),
)

#: (what a probe reads, wanted numbers, protocol) -> scores.
Scores = Callable[[Kept | Sight, Collection[str], Protocol], Iterator[Score]]


def probe(
    label: str, version: str, numbers: Sequence[str], train: DenseSet, test: DenseSet, protocol: Protocol, of: Scores
) -> Benchmark:
    """The benchmark of a probe of feature maps."""
    few = train.part(every(len(train.images), QUICK.images["train"]))

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        return of(Kept(train, features["train"]["patches"], test, features["test"]["patches"]), wanted, protocol)

    def held_out(features: Mapping[str, Tensor], number: str) -> float:
        maps, (rest, held) = features["patches"], fifth(len(few.images))
        kept = Kept(few.part(rest), maps[rest], few.part(held), maps[held], resampled=False)
        (score,) = of(kept, [number], BRIEF)
        return -score.value if score.lower else score.value

    def published(encoder: Encoder, settings: Settings, wanted: Collection[str]) -> Iterator[Score]:
        return of(Sight(train, test, encoder, settings), wanted, protocol)

    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        ("patches",),
        numbers,
        {"benchmark": version, "protocol": asdict(protocol), "classes": test.classes},
        scores,
        held_out=held_out,
        choosing=few.images,
        published=published if protocol.name == PUBLISHED.name else None,
    )
