"""Equal feature shift: a control at the scale at which it moves features as far as the model that it is a
control of.

Arms that moved features by different amounts cannot be compared: the one that moved further gains and loses
more.

The shift is the root mean square of |u - u0|: u are the features of a model and u0 those of BASE after the
same block, both of length 1. It is 0 for equal directions, 1.41 for unrelated ones and never more than 2;
features that are only longer have not moved, as nearest neighbours by cosine answer the same. It is measured
on the training images of the deciding data set, of more than MOST on every k-th, and always in fp32: in 16
bits rounding counts as movement.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

from visft_ds.evals.judge.benchmark import Benchmark
from visft_ds.evals.judge.dense_sets import every
from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.images import chosen
from visft_ds.evals.judge.layers import read_after
from visft_ds.evals.judge.models import Mixture, ModelSpec, load_encoder
from visft_ds.evals.judge.scoring import Settings, forward, pictures

MOST = 1000  #: images, and texts
ROUNDING = 1e-6  #: a shift below it is none
WITHIN = 0.01  #: share of the wanted shift by which it may be missed
FURTHEST = 64.0  #: scale
_KINDS = ("patches", "pooled", "clip")  # the first that a data set and a model have


class ShiftMeter:
    """Measures how far models move the features of BASE after a block, on the training images of a data
    set.
    """

    def __init__(self, base: ModelSpec, block: str, benchmark: Benchmark, settings: Settings) -> None:
        self._block = block
        self._settings = replace(settings, precision="fp32")
        self._label = benchmark.label
        encoder = load_encoder(base, "fp32")
        images = benchmark.training_images
        self._images = list(pictures(encoder, chosen(images, every(len(images), MOST)), self._settings))
        kinds = [kind for kind in _KINDS if kind in encoder.kinds]
        self._kind = next((kind for kind in kinds if kind in benchmark.kinds), kinds[0])
        self._texts = [benchmark.texts[place] for place in every(len(benchmark.texts), MOST)]
        self._base = self._features(encoder)

    def measure(self, spec: ModelSpec) -> tuple[float, float, bool]:
        """(A, shift, True) of a model. Raises ValueError for features that are not finite."""
        shift = self._shift(load_encoder(spec, "fp32"))
        if not math.isfinite(shift):
            raise ValueError(
                f"{spec.label}: features of {self._label} after {self._block} are NaN or infinite"
            )
        return spec.scale, shift, True

    def match(self, spec: ModelSpec, wanted: float) -> tuple[float, float, bool]:
        """(A, shift, True) of the mixture of a model with BASE that has the wanted shift; False with the
        largest shift if none has."""
        mixture = Mixture(spec, "fp32")
        return scale_for(lambda scale: self._shift(mixture.at(scale)), wanted)

    def _shift(self, encoder: Encoder) -> float:
        features = self._features(encoder)
        squares = sum(float(((new - old) ** 2).sum()) for new, old in zip(features, self._base, strict=True))
        shift = math.sqrt(squares / sum(map(len, self._base)))
        return 0.0 if shift < ROUNDING else shift

    def _features(self, encoder: Encoder) -> list[Tensor]:
        """Features (n, D) of length 1 of places in images, and of texts where images are compared with
        them.
        """
        encoder.module.to(self._settings.device)
        reader = read_after(encoder, self._block)
        found = []
        for batch in self._images:
            features = forward(reader, batch, [self._kind], self._settings)[self._kind].cpu()
            places = features.reshape(*features.shape[:2], -1).transpose(1, 2).flatten(0, 1)
            found.append(F.normalize(places, dim=1))
        if self._kind == "clip" and self._texts and encoder.text is not None:
            found.append(encoder.text.encode(self._texts, self._settings.device))
        return found


def scale_for(shift: Callable[[float], float], wanted: float) -> tuple[float, float, bool]:
    """(A, its shift, True) within WITHIN of the wanted shift; (A, its shift, False) of the largest shift if
    no A up to FURTHEST reaches it."""
    if not wanted:
        return 0.0, 0.0, True
    measured = {0.0: 0.0}

    def beyond(scale: float) -> float:
        """Zero within the tolerance, so that the search ends there."""
        if scale not in measured:
            measured[scale] = shift(scale)
        by = measured[scale] - wanted
        return 0.0 if abs(by) <= WITHIN * wanted else by

    high = 1.0
    while not beyond(high) >= 0:
        if high >= FURTHEST or not math.isfinite(measured[high]):
            finite = [scale for scale, of in measured.items() if math.isfinite(of)]
            furthest = max(finite, key=lambda scale: measured[scale])
            return furthest, measured[furthest], False
        high *= 2
    low = max(scale for scale in measured if beyond(scale) <= 0)
    found = float(brentq(beyond, low, high))
    return found, measured[found], True
