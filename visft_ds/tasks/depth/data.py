"""Depth maps under the geometry of their images, and their packing into a batch.

Shape letters: B images, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from visft_ds.data.depth import values_of
from visft_ds.data.samples import Arrays, RawSample, Sample, Targets
from visft_ds.data.transforms import Crop, Flip, Op, Resize, ShortSides, Size, final_size, of_options


@dataclass(frozen=True)
class DepthTargets(Targets):
    """Depth maps of a batch."""

    depth: Tensor  #: (B, H, W) float32 metres, or numbers of a relative map; 0 where nothing is known
    sizes: Tensor  #: (B, 2) int64, height and width of each image
    known: Tensor  #: (B,) int64, pixels whose depth is known
    relative: Tensor  #: (B,) bool
    host = ("sizes", "known", "relative")


def depth_targets(
    options: Mapping[str, Any], raw: RawSample, ops: Sequence[Op], generator: np.random.Generator
) -> Arrays:
    """Depth (H, W) of an image after `ops`, the nearest pixel's, and whether it is relative.

    Metres are divided by how much larger the image is than evaluation, by `options`, would show it.
    """
    if raw.depth is None:
        return {"depth": np.zeros(final_size(raw.size, ops), np.float32), "relative": np.array(False)}
    depth = moved(values_of(raw.depth), ops)
    is_relative = raw.depth["metres"] is None
    if not is_relative:
        shown = of_options(ShortSides, options).scale(raw.size, False, generator)
        depth /= np.float32(enlargement(raw.size, ops) / enlargement(raw.size, [shown]))
    return {"depth": depth, "relative": np.array(is_relative)}


def enlargement(size: Size, ops: Sequence[Op]) -> float:
    """Pixels, along a side, for one of an image of this size; the geometric mean of both sides."""
    scale = 1.0
    for op in ops:
        after = final_size(size, [op])
        if isinstance(op, Resize):
            scale *= math.sqrt(math.prod(after) / math.prod(size))
        size = after
    return scale


def moved(values: npt.NDArray[np.float32], ops: Sequence[Op]) -> npt.NDArray[np.float32]:
    """Values (H, W) of an image after `ops`: of the pixel that is nearest, 0 beyond the image."""
    axes = [np.arange(length) for length in values.shape]  # the source of each row and column, -1: none
    for op in ops:
        if isinstance(op, Flip):
            axes[1] = axes[1][::-1]
            continue
        starts = (op.top, op.left) if isinstance(op, Crop) else (0, 0)
        for axis, length in enumerate((op.height, op.width)):
            sources = axes[axis]
            positions = starts[axis] + np.arange(length)
            if isinstance(op, Resize):
                positions = (2 * positions + 1) * len(sources) // (2 * length)
            is_inside = (positions >= 0) & (positions < len(sources))
            axes[axis] = np.where(is_inside, sources[positions.clip(0, len(sources) - 1)], -1)
    rows, columns = axes
    result = values[np.ix_(rows.clip(0), columns.clip(0))]
    result[rows < 0] = 0
    result[:, columns < 0] = 0
    return result


def packed_depth(samples: Sequence[Sample], task: str, frame: Size) -> DepthTargets:
    """Targets of a batch, whose images are padded to `frame`."""
    depth = np.zeros((len(samples), *frame), dtype=np.float32)
    for padded, sample in zip(depth, samples, strict=True):
        of_image = sample.targets[task]["depth"]
        padded[: of_image.shape[0], : of_image.shape[1]] = of_image
    return DepthTargets(
        depth=torch.from_numpy(depth),
        sizes=torch.tensor([sample.size for sample in samples]),
        known=torch.from_numpy(np.count_nonzero(depth, axis=(1, 2))),
        relative=torch.tensor([bool(sample.targets[task]["relative"]) for sample in samples]),
    )
