"""Set prediction: assignment of objects to queries, and the loss of the queries' classes.

Letters: L decoder layers, B images, Q queries, C classes without "no object", N objects of all images
concatenated, M matched pairs of all layers.

Objects are assigned to queries one to one at the least total cost (Carion et al., arXiv 2005.12872, eq. 1,
2). The host waits for the device once: all costs are copied to it together, and the indices of all pairs go
back in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from visft_ds.ops import to_device
from visft_ds.tasks.criterion import Denominators


@dataclass(frozen=True)
class Matches:
    """Index vectors of the M matched pairs, int64, ordered by layer and then by image.

    Every layer has the same number of pairs, `M / L`: an image with n objects has min(n, Q) of them.
    """

    layers: Tensor  #: (M,)
    images: Tensor  #: (M,)
    queries: Tensor  #: (M,)
    objects: Tensor  #: (M,) rows of the packed targets


def class_losses(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor,
    matches: Matches,
    eos_coef: float,
    loss_denominators: Denominators,
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy (L,) of the classes of all queries, and 100 times the objects that got a wrong
    class.

    A query has the class of its object, or the last one, "no object". A term has the weight of its class: 1,
    or `eos_coef`, as nearly all queries see none. The weighted mean of each image is averaged over images;
    one without objects has the mean over its queries.

    Args:
        logits: (L, B, Q, C + 1).
        labels: (N,) int64 classes of the objects.
        counts: (B,) int64 objects of each image.
        eos_coef: weight of "no object".
        loss_denominators: "images" is used.
    """
    no_object = logits.shape[-1] - 1
    classes = torch.full(logits.shape[:3], no_object, dtype=torch.int64, device=logits.device)
    classes[matches.layers, matches.images, matches.queries] = labels[matches.objects]
    weight = logits.new_ones(no_object + 1)
    # A number in a kernel: unlike `weight[-1] = ...`, nothing is copied to the device.
    weight[no_object:].fill_(eos_coef)
    terms = F.cross_entropy(logits.flatten(end_dim=2), classes.flatten(), weight, reduction="none")
    sums = terms.view_as(classes).sum(dim=2)  # (L, B)
    means = sums / weight[classes].sum(dim=2)
    losses = means.sum(dim=1) / loss_denominators["images"]
    classes_of_last = classes[-1]
    best = logits[-1].detach().argmax(dim=-1)
    right = (best == classes_of_last) & (classes_of_last != no_object)
    wrong = counts.sum() - right.sum()
    return losses, 100 * wrong


def solve(
    cost: Tensor,
    counts: Tensor,
    pairs: int,
    image_ids: Tensor | None,
) -> Matches:
    """Assign objects of each layer and image to queries at the least cost.

    Args:
        cost: (L, N, Q) of each pair of object and query of the same image.
        counts: (B,) objects of each image, on the device of the costs or on the host.
        pairs: pairs of a layer, for costs on the meta device (planner), where there are no values.
        image_ids: (B,) for errors only.

    Raises:
        FloatingPointError: a cost is not finite.
    """
    if cost.is_meta:
        return Matches(*torch.empty(4, len(cost) * pairs, dtype=torch.int64, device=cost.device))
    from scipy.optimize import linear_sum_assignment  # a quarter of a second, which predictions do not need

    costs, objects_of = _on_host(cost, counts)
    _check_finite(costs, objects_of, image_ids)
    ends = np.cumsum(objects_of)
    # Rows: layer, image, query, object.
    matches = [np.empty((4, 0), dtype=np.int64)]
    for layer, cost_of_layer in enumerate(costs):
        for image in np.flatnonzero(objects_of):
            first = ends[image] - objects_of[image]
            objects, queries = linear_sum_assignment(cost_of_layer[first : ends[image]])
            matches.append(np.stack(np.broadcast_arrays(layer, image, queries, objects + first)))
    indices = torch.from_numpy(np.concatenate(matches, axis=1))
    return Matches(*to_device(indices, cost.device))


def _on_host(cost: Tensor, counts: Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Costs and counts as arrays, by one copy from the device."""
    if counts.device != cost.device:
        return cost.cpu().numpy(), counts.numpy()
    # As floats, counts below 2**24 stay exact.
    together = torch.cat([counts.to(cost.dtype), cost.flatten()]).cpu().numpy()
    images = len(counts)
    return together[images:].reshape(cost.shape), together[:images].astype(np.int64)


def _check_finite(
    costs: npt.NDArray[Any], objects_of: npt.NDArray[np.int64], image_ids: Tensor | None
) -> None:
    """Raise FloatingPointError with the images of which a cost is not finite; `objects_of` each image."""
    is_finite = np.isfinite(costs).all(axis=(0, 2))
    if is_finite.all():
        return
    images = np.repeat(np.arange(len(objects_of)), objects_of)[~is_finite]
    ids = images if image_ids is None else image_ids.cpu().numpy()[images]
    raise FloatingPointError(
        f"the matching costs of the images {sorted(set(ids.tolist()))} are not finite: the training has "
        "diverged, or a 16-bit type overflowed"
    )
