"""Equal feature shift: a control at the scale at which it moves features as far as the model that it is a
control of.

Models that moved features by different amounts cannot be compared: the one that moved further gains and loses
more.

The shift is the root mean square of |u - u0|: u are the features of a model and u0 those of BASE after the
same block, both of length 1. It is 0 for equal directions, 1.41 for unrelated ones and never more than 2;
features that are only longer have not moved, as nearest neighbours by cosine answer the same. It is measured
on all training images of the deciding data set, and always in fp32: in 16 bits rounding counts as movement.
A control's scale is searched on every k-th of more than SEARCHED images, then measured on all of them and,
where it missed, searched again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import Benchmark
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.encoding import Settings, forward, pictures
from visft_ds.evals.judge.images import chosen, every
from visft_ds.evals.judge.layers import read_after
from visft_ds.evals.judge.model_text import ModelSpec
from visft_ds.evals.judge.models import Mixture, load_encoder

SEARCHED = 1000  #: images, and texts, on which a scale is searched
TRIES = 3  #: searches until the shift over all images is the wanted one
ROUNDING = 1e-6  #: a shift below it is none
WITHIN = 0.01  #: share of the wanted shift by which it may be missed
FURTHEST = 64.0  #: scale
_KINDS = ("patches", "pooled", "clip")  # the first that a data set and a model have


class Match(NamedTuple):
    """A scale of what training changed, and the feature shift there."""

    scale: float
    shift: float
    is_near: bool  #: it is the wanted shift


class ShiftMeter:
    """Measures how far models move the features of BASE after a block, on the training images of a data
    set.
    """

    def __init__(self, base: ModelSpec, block: str, benchmark: Benchmark, settings: Settings) -> None:
        self._block = block
        self._settings = replace(settings, precision="fp32")
        self._label = benchmark.label
        self._base = load_encoder(base, "fp32")
        kinds = [kind for kind in _KINDS if kind in self._base.kinds]
        self._kind = next((kind for kind in kinds if kind in benchmark.kinds), kinds[0])
        self._images = benchmark.training_images
        self._texts = benchmark.texts
        images = every(len(self._images), SEARCHED)
        self._sample_texts = [self._texts[number] for number in every(len(self._texts), SEARCHED)]
        self._sample_is_all = max(len(self._images), len(self._texts)) <= SEARCHED
        self._sample = list(pictures(self._base, chosen(self._images, images), self._settings))
        self._base_on_sample = list(self._features(self._base, self._sample, self._sample_texts))

    def measure(self, spec: ModelSpec) -> Match:
        """A model as it is. Raises ValueError for features that are not finite."""
        shift = self._on_all(load_encoder(spec, "fp32"))
        if not math.isfinite(shift):
            raise ValueError(
                f"{spec.label}: features of {self._label} after {self._block} are NaN or infinite"
            )
        return Match(spec.scale, shift, is_near=True)

    def match(self, spec: ModelSpec, goal: float) -> Match:
        """The mixture of a model with BASE that has the wanted shift, or the nearest one if none has."""
        mixture = Mixture(spec, "fp32")

        # The search leaves room for what differs between the sample and all images.
        within = WITHIN if self._sample_is_all else WITHIN / 4
        aim = goal
        for _ in range(TRIES):
            on_sample = scale_for(lambda scale: self._on_sample(mixture.at(scale)), aim, within)
            shift = self._on_all(mixture.at(on_sample.scale))
            is_near = abs(shift - goal) <= WITHIN * goal
            if is_near or not on_sample.is_near or not shift:
                break
            aim = goal * on_sample.shift / shift
        return Match(on_sample.scale, shift, is_near)

    def _on_sample(self, encoder: Encoder) -> float:
        return _shift(self._features(encoder, self._sample, self._sample_texts), self._base_on_sample)

    def _on_all(self, encoder: Encoder) -> float:
        if self._sample_is_all:
            return self._on_sample(encoder)
        # Features of a large data set do not fit into memory: both models see a batch, and it is gone.
        return _shift(self._features_of_all(encoder), self._features_of_all(self._base))

    def _features_of_all(self, encoder: Encoder) -> Iterator[Tensor]:
        return self._features(encoder, pictures(encoder, self._images, self._settings), self._texts)

    def _features(
        self, encoder: Encoder, batches: Iterable[Tensor], texts: Sequence[str]
    ) -> Iterator[Tensor]:
        """Features (n, D) of length 1 of the cells of each batch of images, and of texts where images are
        compared with them.
        """
        encoder.module.to(self._settings.device)
        reader = read_after(encoder, self._block)
        for batch in batches:
            features = forward(reader, batch, [self._kind], self._settings)[self._kind].cpu()
            if features.ndim == 4:  # (B, D, h, w): a row for each cell
                features = features.flatten(2).transpose(1, 2).flatten(0, 1)
            yield F.normalize(features, dim=1)
        if self._kind == "clip" and texts and encoder.text is not None:
            yield encoder.text.encode(texts, self._settings.device)


def _shift(new: Iterable[Tensor], old: Iterable[Tensor]) -> float:
    """Root mean square of the distances of rows, of pairs of tensors (n, D)."""
    squares = 0.0
    rows = 0
    for new_rows, old_rows in zip(new, old, strict=True):
        squares += float(((new_rows - old_rows) ** 2).sum())
        rows += len(old_rows)
    shift = math.sqrt(squares / rows)
    return 0.0 if shift < ROUNDING else shift


def scale_for(shift: Callable[[float], float], goal: float, within: float = WITHIN) -> Match:
    """The scale whose shift is the wanted one but for a share `within` of it; or that of the largest shift
    if no scale up to FURTHEST reaches it.
    """
    if not goal:
        return Match(0.0, 0.0, is_near=True)
    measured = {0.0: 0.0}

    def beyond(scale: float) -> float:
        """Zero within the tolerance, so that the search ends there."""
        if scale not in measured:
            measured[scale] = shift(scale)
        difference = measured[scale] - goal
        return 0.0 if abs(difference) <= within * goal else difference

    high = 1.0
    while not beyond(high) >= 0:  # also of NaN
        if high >= FURTHEST or not math.isfinite(measured[high]):
            finite = [scale for scale in measured if math.isfinite(measured[scale])]
            furthest = max(finite, key=lambda scale: measured[scale])
            return Match(furthest, measured[furthest], is_near=False)
        high *= 2
    low = max(scale for scale in measured if beyond(scale) <= 0)
    scale = float(brentq(beyond, low, high))
    return Match(scale, measured[scale], is_near=True)
