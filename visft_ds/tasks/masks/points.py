"""Points at which masks are compared: drawn per image and layer, chosen where a prediction is uncertain,
sampled.

Letters: A images with objects, L prediction sets, n objects of an image, m matched pairs of an image and set,
P points, K candidates, U uniform points, R maps, h w patch grid.

A point is (x, y) in [0, 1] of the unpadded image. Comparing masks at points instead of at every pixel, most
of them where the prediction is undecided, is PointRend's idea (Kirillov et al., arXiv 1912.08193, section
3.1), with the numbers of Mask2Former (arXiv 2112.01527, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.ops import to_device
from visft_ds.randomness import generator


def draw_points(
    keys: Sequence[int],
    layers: int,
    counts: Sequence[int],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Random points of A images, a tensor (A, L, count, 2) float32 in [0, 1) for each of `counts`.

    They depend on an image's key and the layer alone, whatever else is in the batch. They are drawn on the
    host, so that they are the same on every device, and moved in one copy that nobody waits for. Layer l
    draws from stream 1 + l of the key; stream 0 belongs to the transforms.
    """
    pinned = device.type == "cuda"
    points = torch.empty(len(keys), layers, sum(counts), 2, pin_memory=pinned)
    for image, key in enumerate(keys):
        for layer in range(layers):
            of_layer = points[image, layer].numpy()
            generator(key, stream=1 + layer).random(out=of_layer, dtype=np.float32)
    points = to_device(points, device)
    return points.split(list(counts), dim=2)


def sample(maps: Tensor, points: Tensor, extent: Tensor) -> Tensor:
    """Bilinear values at points that the channels share: (R, n, h, w), (R, P, 2) -> (R, n, P).

    `extent` (2,): height and width of the image as a share of the map, which covers the padded batch. Beyond
    the map, values count as 0.
    """
    share = extent.flip(0).to(maps.dtype)
    grid = 2 * points.to(maps.dtype) * share - 1
    values = F.grid_sample(maps, grid[:, None], align_corners=False)
    return values.squeeze(2)


@torch.no_grad()
def uncertain_points(
    masks: Tensor,
    candidates: Tensor,
    uniform: Tensor,
    uncertain: int,
    extent: Tensor,
) -> Tensor:
    """Points of each pair: the `uncertain` candidates with the smallest |logit|, then the uniform points.

    Mask logits (L, m, h, w), candidates (L, K, 2), uniform (L, U, 2) -> (L, m, uncertain + U, 2).
    """
    pairs = masks.shape[1]
    certainty = sample(masks, candidates, extent).abs()  # (L, m, K)
    chosen = certainty.topk(uncertain, dim=-1, largest=False, sorted=False).indices
    chosen = chosen[..., None].expand(-1, -1, -1, 2)
    candidates = candidates[:, None].expand(-1, pairs, -1, -1)
    uniform = uniform[:, None].expand(-1, pairs, -1, -1)
    return torch.cat((candidates.gather(2, chosen), uniform), dim=2)
