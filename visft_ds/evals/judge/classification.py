"""Classification of images by frozen features: kNN and a linear classifier.

Published, as facebookresearch/dinov2 measures it on ImageNet (dinov2/eval/{knn,linear,utils}.py,
dinov2/data/transforms.py): images are resized to 256 pixels and cut to 224.

* kNN: the 20 class tokens nearest by cosine vote, each with exp(similarity / 0.07).
* linear: classifiers of the class token, and of it beside the mean patch, learn for 12,500 steps of 1,024
  random crops by SGD at 13 rates.

Differs from the source in: pixels are normalised as the model was trained; where a model has no class token
the mean patch stands for it; equal votes count as wrong. Linear: the tokens are those of one block (there
also of the last four together), and a fiftieth of the training images chooses the classifier and teaches none
(there the test images choose).

With --quick, at most 10,000 images teach and 5,000 judge, as the model takes them, and the linear classifier
is logistic regression (`logistic`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import RandomSampler, default_collate
from torchvision.transforms import v2 as transforms

from visft_ds.evals.judge.benchmark import (
    Benchmark,
    Features,
    FloatArray,
    LayerChoice,
    Number,
    Score,
    resamples,
)
from visft_ds.evals.judge.classes import ClassSet
from visft_ds.evals.judge.crops import View
from visft_ds.evals.judge.dense_probes import loaded
from visft_ds.evals.judge.encoders import Encoder, square_preprocess
from visft_ds.evals.judge.encoding import Settings, brought_near, encode_images, forward
from visft_ds.evals.judge.images import every
from visft_ds.evals.judge.logistic import RESAMPLES, STRENGTHS, by_regression, held_out
from visft_ds.evals.judge.neighbours import ROWS, Rows, by_neighbours
from visft_ds.evals.judge.protocol import CLASSIFIED_SIZES, NORMALISED, QUICK, Protocol
from visft_ds.monitor.console import gauge

KINDS = ("pooled", "mean")
RESIZED = 256  #: pixels of the shorter side of a published view
SIDE = 224  #: of its middle square, which is seen
_NTH = 50  # of a class's training images chooses the published classifier
_AREA = (0.08, 1.0)  # of a crop, share of the image
_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Recipe:
    """Settings that published linear classifiers are trained with."""

    steps: int
    batch: int
    rates: tuple[float, ...]  #: each for a classifier of its own, times batch / 256
    momentum: float


RECIPE = Recipe(
    12_500, 1024, (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1), 0.9
)


KNN = Number(
    "kNN",
    how="The 20 class tokens nearest by cosine, weighted by softmax(similarity / 0.07).",
    published="The middle 224 pixels of images of 256.",
    quick=CLASSIFIED_SIZES,
    source="https://github.com/facebookresearch/dinov2, eval/knn.py",
    differs=f"{NORMALISED}; equal votes count as wrong; without a class token, the mean patch",
    chooses_layer=True,
    side=SIDE,
)
LINEAR = Number(
    "linear",
    how="A linear classifier of class token and mean patch.",
    published="Those of the class token, and of it beside the mean patch, each by SGD at 13 rates, learn for 12,500 "
    "steps of 1,024 crops of 224 pixels.",
    quick=f"Logistic regression, its strength chosen on a fifth of the training images. {CLASSIFIED_SIZES}",
    source="https://github.com/facebookresearch/dinov2, eval/linear.py",
    differs=f"{NORMALISED}; tokens of one block (there also of the last four); a fiftieth of the training images "
    "chooses the classifier and teaches none (there the test images choose)",
    chooses_layer=True,
    trained=True,
    side=SIDE,
    crops=RECIPE.steps * RECIPE.batch,
)
NUMBERS = (KNN, LINEAR)


def classification(
    label: str, train: ClassSet, test: ClassSet, protocol: Protocol, recipe: Recipe = RECIPE
) -> Benchmark:
    """kNN and linear accuracy."""
    train, test = _most(train, protocol.classified["train"]), _most(test, protocol.classified["test"])
    few = _most(train, QUICK.classified["train"])
    probes: Mapping[str, Callable[..., Score]] = {KNN.name: by_neighbours, LINEAR.name: by_regression}

    def scores(features: Features, wanted: Collection[str]) -> Iterator[Score]:
        for name in wanted:
            known, asked = _taught(name, features["train"], train), _rows(name, features["test"], test)
            yield probes[name](name, known, asked)

    def held(features: Mapping[str, Tensor], number: str) -> float:
        known = _taught(number, features, few)
        chooses = held_out(known.labels, known.owners)
        if not chooses.any():
            units = "class of five training images" if few.images.groups is None else "five groups of images"
            raise ValueError(
                f"{label} has no {units}, a fifth of which would choose the layer: give --layers last"
            )
        return probes[number](number, known.part(~chooses), known.part(chooses), 0).value

    def published(encoder: Encoder, settings: Settings, wanted: Collection[str]) -> Iterator[Score]:
        viewed = published_view(encoder)
        asked = encode_images(viewed, test.images, KINDS, settings, f"{label} test")
        if "kNN" in wanted:
            known = encode_images(viewed, train.images, ("pooled",), settings, f"{label} train")
            known, near = brought_near(known, settings), brought_near(asked, settings)
            yield by_neighbours("kNN", _taught("kNN", known, train), _rows("kNN", near, test))
        if "linear" in wanted:
            yield by_descent("linear", viewed, train, _rows("linear", asked, test), recipe, settings)

    labels = [train.labels.tolist(), test.labels.tolist()]
    how: Any = asdict(recipe) if protocol.published else STRENGTHS
    return Benchmark(
        label,
        {"train": train.images, "test": test.images},
        KINDS,
        NUMBERS,
        {"benchmark": "classification 3", "protocol": how, "labels": labels, "names": list(test.classes)},
        scores,
        layer_choice=LayerChoice(few.images, held),
        published=published if protocol.published else None,
    )


def _most(data: ClassSet, most: int) -> ClassSet:
    """At most so many of the images: every k-th."""
    return data if len(data.labels) <= most else data.part(np.array(every(len(data.labels), most)))


def _rows(number: str, features: Mapping[str, Tensor], data: ClassSet) -> Rows:
    """Class tokens, for the linear classifier with the mean patches beside them."""
    kinds = [kind for kind in (KINDS[:1] if number == "kNN" else KINDS) if kind in features]
    rows = torch.cat([features[kind] for kind in kinds], dim=1)
    return Rows(rows, torch.from_numpy(data.labels), torch.arange(len(data.labels))).to(rows.device)


def _taught(number: str, features: Mapping[str, Tensor], data: ClassSet) -> Rows:
    """The same of training images, which belong to the groups that they come from: these are drawn
    together.
    """
    rows = _rows(number, features, data)
    groups = data.images.groups
    return rows if groups is None else replace(rows, owners=torch.from_numpy(groups).to(rows.owners))


def published_view(encoder: Encoder) -> Encoder:
    """The encoder of the published size: the middle square of SIDE pixels, of images of RESIZED."""
    squared = square_preprocess(SIDE, *encoder.normalisation, resized=RESIZED)
    return replace(encoder, side=SIDE, preprocess=squared)


def crop(image: Image.Image, view: View) -> Tensor:
    """A random part of an image, stretched to a square, in half of the cases mirrored."""
    bicubic = transforms.InterpolationMode.BICUBIC
    part = transforms.RandomResizedCrop(view.side, scale=_AREA, ratio=_RATIO, interpolation=bicubic)(image)
    return view.normalised(transforms.RandomHorizontalFlip(0.5)(part))


class Classifiers:
    """Linear classifiers of the same inputs (n, D), one for each rate, trained by SGD with momentum."""

    def __init__(self, rates: Tensor, channels: int, classes: int, momentum: float) -> None:
        start = torch.randn(classes, channels + 1, generator=torch.Generator().manual_seed(0)) * 0.01
        start[:, -1] = 0  # the intercept
        self.weights = start.to(rates.device).repeat(len(rates), 1, 1)
        self._moving = torch.zeros_like(self.weights)
        self._rates, self._momentum = rates, momentum

    def learn(self, inputs: Tensor, labels: Tensor, shares: Tensor, fallen: float) -> None:
        """Make a step.

        Args:
            shares: (classifiers, n), how often each input counts.
            fallen: factor of the rates.
        """
        weights = self.weights.requires_grad_()
        logits = self(inputs, weights)
        several = labels.expand(len(logits), -1)
        losses = F.cross_entropy(logits.flatten(0, 1), several.flatten(), reduction="none").view_as(several)
        (gradient,) = torch.autograd.grad((losses * shares).mean(dim=1).sum(), weights)
        self._moving = self._momentum * self._moving + gradient
        self.weights = weights.detach() - fallen * self._rates[:, None, None] * self._moving

    def __call__(self, inputs: Tensor, weights: Tensor | None = None) -> Tensor:
        """(classifiers, n, classes)."""
        weights = self.weights if weights is None else weights
        return inputs @ weights[..., :-1].mT + weights[:, None, :, -1]


def fallen_at(step: int, steps: int) -> float:
    """Factor of the rates: half a cosine from 1 to 0."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def by_descent(
    name: str, encoder: Encoder, train: ClassSet, test: Rows, recipe: Recipe, settings: Settings
) -> Score:
    """1.0 for each row whose class the classifier predicts that is best on held-out training images."""
    groups = train.images.groups
    owners = np.arange(len(train.labels)) if groups is None else groups
    held = held_out(torch.from_numpy(train.labels), torch.from_numpy(owners), _NTH).numpy()
    if not held.any():
        first = train.images.names[0]
        raise ValueError(
            f"no class has five training images ({first}, ...), a fifth of which would choose the rate"
        )
    choosing, taught = train.part(np.flatnonzero(held)), train.part(np.flatnonzero(~held))
    encoded = encode_images(encoder, choosing.images, KINDS, settings, "held-out images")
    seen = _rows("linear", encoded, choosing)
    channels = {
        "class token": encoded["pooled"].shape[1],
        "class token and mean patch": seen.features.shape[1],
    }
    copies = torch.from_numpy(resamples(len(taught.labels), RESAMPLES, taught.images.groups)).float()
    device = settings.device
    rates = torch.tensor(recipe.rates, device=device) * recipe.batch / 256
    classes = len(train.classes)
    learners = {
        kind: Classifiers(rates.repeat(len(copies)), width, classes, recipe.momentum)
        for kind, width in channels.items()
    }
    for step, (drawn, features, labels) in enumerate(_crops(encoder, taught, recipe, settings)):
        shares = copies[:, drawn].to(device).repeat_interleave(len(rates), dim=0)
        for kind, width in channels.items():
            learners[kind].learn(features[:, :width], labels, shares, fallen_at(step, recipe.steps))
    levels = {kind: _right(learners[kind], seen, device)[: len(rates)].mean(axis=1) for kind in channels}
    kind = max(levels, key=lambda kind: levels[kind].max())
    rate = int(np.argmax(levels[kind]))
    each = _right(learners[kind], test, device)[rate :: len(rates)]
    return Score(name, each[0], test.owners.cpu().numpy(), retrained=each[1:].mean(axis=1))


def _crops(
    encoder: Encoder, train: ClassSet, recipe: Recipe, settings: Settings
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of numbers, features and labels of random crops; the n-th crop is the same for every model."""
    view = View(encoder.side, *encoder.normalisation)
    images = range(len(train.labels))
    count = recipe.steps * recipe.batch
    drawing = RandomSampler(images, num_samples=count, generator=torch.Generator().manual_seed(0))
    order = np.fromiter(drawing, dtype=np.int64, count=count)

    def crops(numbers: Sequence[int]) -> Any:
        made = []
        for number in numbers:
            place = int(order[number])
            image = train.images.read(place)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(number)
                made.append((place, crop(image, view), int(train.labels[place])))
        return default_collate(made)

    batches = loaded(count, recipe.batch, crops, settings)
    encoder.module.to(settings.device)
    for drawn, pixels, labels in gauge("linear classifier", recipe.steps, "steps", batches):
        given = forward(encoder, pixels, KINDS, settings)
        features = torch.cat([given[kind] for kind in KINDS if kind in given], dim=1)
        yield drawn, features, labels.to(settings.device)


def _right(learner: Classifiers, rows: Rows, device: torch.device) -> FloatArray:
    """(classifiers, n), 1.0 where the class is predicted; the first channels of rows are what it learnt."""
    width = learner.weights.shape[2] - 1
    right = []
    for features, labels in zip(rows.features.split(ROWS), rows.labels.split(ROWS), strict=True):
        logits = learner(features[:, :width].to(device))
        right.append((logits.argmax(dim=2) == labels.to(device)).double().cpu().numpy())
    return np.concatenate(right, axis=1)
