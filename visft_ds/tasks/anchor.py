"""Losses of stage 2 that hold features near those of the same images in the tower without its adapters.

Both see directions alone, which do not depend on the scale of a tower. They are sums of squared differences:
exactly 0, as are their gradients, where nothing has moved.
Letters: B images, N cells of a map, K of them that are compared in pairs, D width.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.data.samples import Map
from visft_ds.ops import to_device
from visft_ds.randomness import generator
from visft_ds.tasks.matching import at_least_float32

_MOST = 1024  #: patches of an image that are compared in pairs, of which there are as many as its square
_STREAM = 1 << 20  #: of a sample's random key; masks draw from lower ones


def anchor_losses(
    weights: Mapping[str, float], now: Map, base: Map, keys: Tensor, token: bool
) -> dict[str, Tensor]:
    """The terms that have a weight, means over images, as "anchor/<term>", and their weighted sum as
    "anchor".

    * gram: mean over pairs of patches of the squared change of their cosine.
    * cosine: 1 - cosine of each patch with itself in the base, and of the whole image with itself, half of
      each.

    Args:
        base: features of the same images without adapters, and without a graph.
        keys: (B,) of the samples, on the host. They choose the patches of an image that has more than
        `_MOST`.
        token: the whole image is the first of the prefixes, a class token; else it is the mean patch.
    """
    valid = now.valid.flatten(1)
    (patches, whole), (patches0, whole0) = (_directions(one, valid, token) for one in (now, base))
    terms = {}
    if "gram" in weights:
        terms["gram"] = _gram(patches, patches0, valid, keys)
    if "cosine" in weights:
        turned = _one_minus_cosine(patches, patches0).sum(1) / valid.sum(1)
        terms["cosine"] = ((_one_minus_cosine(whole, whole0) + turned) / 2).mean()
    weighted = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
    return {"anchor": weighted, **{f"anchor/{name}": term for name, term in terms.items()}}


def _directions(one: Map, valid: Tensor, token: bool) -> tuple[Tensor, Tensor]:
    """Patches (B, N, D) and whole images (B, D) of length 1; patches of the padding are 0."""
    patches = at_least_float32(one.features).flatten(2).transpose(1, 2) * valid[..., None]
    whole = one.prefix[:, 0] if token and one.prefix is not None else patches.sum(1)
    return F.normalize(patches, dim=-1), F.normalize(at_least_float32(whole), dim=-1)


def _one_minus_cosine(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).square().sum(-1) / 2


def _gram(patches: Tensor, patches0: Tensor, valid: Tensor, keys: Tensor) -> Tensor:
    if valid.shape[1] > _MOST:
        drawn = np.stack([generator(key, _STREAM).random(valid.shape[1]) for key in keys.tolist()])
        # The number of a patch among those of its image finds its draw, so that padding changes no choice.
        order = to_device(torch.from_numpy(drawn), valid.device).gather(1, (valid.cumsum(1) - 1).clamp(min=0))
        chosen = order.masked_fill(~valid, 1.0).topk(_MOST, dim=1, largest=False, sorted=False).indices
        valid, rows = valid.gather(1, chosen), chosen[..., None].expand(-1, -1, patches.shape[2])
        patches, patches0 = patches.gather(1, rows), patches0.gather(1, rows)
    change = patches @ patches.mT - patches0 @ patches0.mT
    return (change.square().sum((1, 2)) / valid.sum(1).square()).mean()
