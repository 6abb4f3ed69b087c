"""Points at which masks are compared: drawn per image and layer, chosen where a prediction is uncertain, sampled.

Letters: A images with objects, L prediction sets, n objects of an image, m matched pairs of an image and set,
P points, K candidates, U uniform points, R maps, h w patch grid.

A point is (x, y) in [0, 1] of the unpadded image. Comparing masks at points instead of at every pixel, most of them
where the prediction is undecided, is PointRend's idea (Kirillov et al., arXiv 1912.08193, section 3.1), with the
numbers of Mask2Former (arXiv 2112.01527, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.plan import generator
from visft_ds.ops.copies import to_device


@dataclass(frozen=True)
class PointCounts:
    """Numbers of sampled points by kind, per image and layer."""

    matching: int  #: uniform, shared by all queries and objects of the image
    candidates: int  #: uniform, the most uncertain of which each matched pair takes
    uncertain: int  #: number of candidates it takes
    uniform: int  #: uniform, taken in addition by each pair, shared by all pairs of the image

    @classmethod
    def of(cls, num_points: int, oversample: float, importance: float) -> PointCounts:
        """The counts for `num_points` in the matching and in the losses."""
        uncertain = int(importance * num_points)
        return cls(num_points, int(num_points * oversample), uncertain, num_points - uncertain)


@dataclass(frozen=True)
class Points:
    """The points of A images, each (A, L, number, 2) float32 in [0, 1)."""

    matching: Tensor
    candidates: Tensor
    uniform: Tensor


def draw_points(keys: Sequence[int], layers: int, counts: PointCounts, device: torch.device) -> Points:
    """Random points that depend on an image's key and the layer alone, whatever else is in the batch.

    They are drawn on the host, so that they are the same on every device, and moved in one copy that nobody waits for.
    Layer l draws from stream 1 + l of the key; stream 0 belongs to the transforms.
    """
    sizes = [counts.matching, counts.candidates, counts.uniform]
    numbers = torch.empty(len(keys), layers, sum(sizes), 2, pin_memory=device.type == "cuda")
    for image, key in enumerate(keys):
        for layer in range(layers):
            generator(key, stream=1 + layer).random(out=numbers[image, layer].numpy(), dtype=np.float32)
    matching, candidates, uniform = to_device(numbers, device).split(sizes, dim=2)
    return Points(matching, candidates, uniform)


def sample(maps: Tensor, points: Tensor, extent: Tensor) -> Tensor:
    """Bilinear values at points that the channels share: (R, n, h, w), (R, P, 2) -> (R, n, P).

    `extent` (2,): height and width of the image as a share of the map, which covers the padded batch. Beyond the map,
    values count as 0.
    """
    grid = 2 * points.to(maps.dtype) * extent.flip(0).to(maps.dtype) - 1
    return F.grid_sample(maps, grid[:, None], align_corners=False).squeeze(2)


@torch.no_grad()
def uncertain_points(masks: Tensor, candidates: Tensor, uniform: Tensor, uncertain: int, extent: Tensor) -> Tensor:
    """Points of each pair: the `uncertain` candidates with the smallest |logit|, then the uniform points.

    Mask logits (L, m, h, w), candidates (L, K, 2), uniform (L, U, 2) -> (L, m, uncertain + U, 2).
    """
    certainty = sample(masks, candidates, extent).abs()  # (L, m, K)
    chosen = certainty.topk(uncertain, dim=-1, largest=False, sorted=False).indices
    pairs = masks.shape[1]
    picked = candidates[:, None].expand(-1, pairs, -1, -1).gather(2, chosen[..., None].expand(-1, -1, -1, 2))
    return torch.cat((picked, uniform[:, None].expand(-1, pairs, -1, -1)), dim=2)
