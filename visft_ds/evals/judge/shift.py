"""Equal feature shift: a control at the scale at which it moves features as far as the model that it is a control of.

Arms that moved features by different amounts cannot be compared: the one that moved further gains and loses more. The
shift is |f - f0| / |f0 - mean of f0|, f0 the features of BASE after the same block, on at most MOST images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.optimize import brentq
from torch import Tensor

from visft_ds.evals.judge.encoders import Encoder
from visft_ds.evals.judge.layers import read_after
from visft_ds.evals.judge.models import Mixture, ModelSpec, load_encoder
from visft_ds.evals.judge.protocol import Benchmark
from visft_ds.evals.judge.scoring import Settings, forward, pictures

MOST = 256  #: images
WITHIN = 0.01  #: share of the wanted shift by which it may be missed
FURTHEST = 8.0  #: scale
_KINDS = ("patches", "pooled", "clip")  # the first that a data set and a model have


class ShiftMeter:
    """Measures how far models move the features of BASE after a block, on the first training images of a data set."""

    def __init__(self, base: ModelSpec, block: str, benchmark: Benchmark, settings: Settings) -> None:
        self._block, self._settings = block, settings
        encoder = load_encoder(base, settings.precision)
        images = benchmark.sets.get("train") or next(iter(benchmark.sets.values()))
        self._images = list(pictures(encoder, images, settings, MOST))
        kinds = [kind for kind in _KINDS if kind in encoder.kinds]
        self._kind = next((kind for kind in kinds if kind in benchmark.kinds), kinds[0])
        self._base = self._features(encoder)

    def measure(self, spec: ModelSpec, wanted: float | None) -> tuple[float, float]:
        """(A, shift) of a model; of its mixture with BASE that has the wanted shift. Raises ValueError if none has."""
        precision = self._settings.precision
        if wanted is None:
            return spec.scale, self._shift(load_encoder(spec, precision))
        mixture = Mixture(spec, precision)
        return scale_for(lambda scale: self._shift(mixture.at(scale)), wanted, spec.label)

    def _shift(self, encoder: Encoder) -> float:
        """|f - f0| / |f0 - mean of f0|, the mean of each channel."""
        mean = self._base.mean(dim=[axis for axis in range(self._base.ndim) if axis != 1], keepdim=True)
        change = self._features(encoder) - self._base
        return float(change.norm() / (self._base - mean).norm().clamp(min=1e-12))

    def _features(self, encoder: Encoder) -> Tensor:
        encoder.module.to(self._settings.device)
        reader = read_after(encoder, self._block)
        parts = [forward(reader, batch, [self._kind], self._settings)[self._kind].cpu() for batch in self._images]
        return torch.cat(parts)


def scale_for(shift: Callable[[float], float], wanted: float, label: str) -> tuple[float, float]:
    """(A, its shift), within WITHIN of what is wanted. Raises ValueError if no A up to FURTHEST reaches it."""
    if not wanted:
        return 0.0, 0.0
    measured = {0.0: 0.0}

    def beyond(scale: float) -> float:
        """Zero within the tolerance, so that the search ends there."""
        if scale not in measured:
            measured[scale] = shift(scale)
        by = measured[scale] - wanted
        return 0.0 if abs(by) <= WITHIN * wanted else by

    high = 1.0
    while beyond(high) < 0:
        high *= 2
        if high > FURTHEST:
            raise ValueError(
                f"{label}: no A up to {FURTHEST:g} moves features by {wanted:.3f}; {FURTHEST:g} moves them by "
                f"{measured[FURTHEST]:.3f}"
            )
    found = float(brentq(beyond, max(scale for scale in measured if beyond(scale) <= 0), high))
    return found, measured[found]
