"""Matching and criterion of masks, as in Mask2Former (arXiv 2112.01527).

Letters: B images, A of them with objects, h w grid of the masks, Q queries, C classes, L prediction sets, N
objects of all images concatenated, n objects and m matched pairs of an image, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visft_ds.data.samples import Batch
from visft_ds.ops import at_least_float32, real_device, to_device
from visft_ds.tasks import Numbers
from visft_ds.tasks.criterion import Denominators, Losses
from visft_ds.tasks.masks.config import MaskLoss
from visft_ds.tasks.masks.data import MaskTargets, slices_of
from visft_ds.tasks.masks.output import MaskOutput
from visft_ds.tasks.masks.points import draw_points, sample, uncertain_points
from visft_ds.tasks.matching import Matches, class_losses, solve

#: Values of predicted masks at points that are compared at a time: on CPUs 1 MiB of float32, which their
#: caches hold; on GPUs 64 MiB, as smaller steps would take as long as the launches of their kernels.
_VALUES_ON_CPU = 1 << 18
_VALUES_ON_GPU = 1 << 24


class MaskCriterion:
    """Set-prediction loss of every prediction set: class cross-entropy, mask cross-entropy and dice at
    points.

    `ce`, `bce` and `dice` weigh the losses and the costs of the matching alike. The masks of a pair are
    compared at `train_num_points` points: the share `importance_sample_ratio` are those of
    `train_num_points * oversample_ratio` random ones where the prediction is least certain, the others
    uniform (see `points`).

    Calling it gives *unweighted* losses by name: `ce`, `bce`, `dice` of the last layer, and with suffixes
    `_0` (before the first layer), `_1` .. `_{layers - 1}` those of the earlier sets; `weights` holds the
    factor of each. A plain head in evaluation mode gives the last set alone.
    `class_error` (percent of the objects whose matched query names another class) is for the log only.

    The points depend on an image's random key and on the layer alone: how the batch is split changes nothing.
    """

    def __init__(self, head: Any, loss: MaskLoss, task: str) -> None:
        """`head`: options of a head, of which num_queries, decoder_layers and class_ids are read."""
        self.head = head
        self.loss = loss
        self.task = task
        number = loss.train_num_points
        self.uncertain = int(loss.importance_sample_ratio * number)
        candidates = int(number * loss.oversample_ratio)
        #: points of an image and prediction set: for the matching, candidates for the uncertain ones, uniform
        #: ones
        self.points = (number, candidates, number - self.uncertain)
        self._suffixes = [f"_{layer}" for layer in range(head.decoder_layers)] + [""]
        self.weights: Numbers = {}
        for suffix in self._suffixes:
            self.weights[f"ce{suffix}"] = loss.ce
            self.weights[f"bce{suffix}"] = loss.bce
            self.weights[f"dice{suffix}"] = loss.dice

    def count(self, batch: Batch) -> Numbers:
        """Objects, by which the losses of masks are divided, and images, by which those of classes are."""
        counts = batch.targets[self.task].counts
        return {"masks": float(counts.sum()), "images": float(len(counts))}

    def __call__(
        self,
        output: MaskOutput,
        targets: MaskTargets,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        assert output.class_ids == self.head.class_ids, output.class_ids
        labels = targets.labels
        if self.head.class_ids == "published":
            labels = labels + 1
        logits = at_least_float32(output.logits)
        masks = at_least_float32(output.masks)
        keys = targets.keys[targets.counts > 0].tolist()
        matching, candidates, uniform = draw_points(keys, len(masks), self.points, masks.device)
        costs = (self.loss.ce, self.loss.bce, self.loss.dice)
        images = images_with_objects(targets, output.extents)
        matches = match_masks(logits, masks, targets, images, labels, matching, costs, image_ids)
        eos_coef = self.loss.eos_coef
        ce, wrong = class_losses(logits, labels, targets.counts, matches, eos_coef, loss_denominators)
        bce, dice = self.loss_masks(masks, targets, images, matches, candidates, uniform)
        number = loss_denominators["masks"]
        bce = bce / number
        dice = dice / number
        losses = {"class_error": wrong / number}
        # A plain head gives its last set alone in evaluation.
        assert len(logits) in (1, len(self._suffixes)), len(logits)
        for of_set, suffix in enumerate(self._suffixes[-len(logits) :]):
            losses[f"ce{suffix}"] = ce[of_set]
            losses[f"bce{suffix}"] = bce[of_set]
            losses[f"dice{suffix}"] = dice[of_set]
        return losses

    def loss_masks(
        self,
        masks: Tensor,
        targets: MaskTargets,
        images: Sequence[ImageWithObjects],
        matches: Matches,
        candidates: Tensor,
        uniform: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy and dice (L,) of the masks of all matched pairs, summed over the pairs.

        `masks` (L, B, Q, h, w) logits, `candidates` (A, L, K, 2) for the uncertain points and `uniform` ones
        (A, L, U, 2) of each of the `images`.
        """
        # Without any pair the sums are zeros that still carry a (zero) gradient.
        sums = masks.flatten(1)[:, :0].sum(dim=1).expand(2, -1)
        # The pairs are ordered by set and then by image, and every set has the same number of them.
        queries = matches.queries.view(len(masks), -1)
        objects = matches.objects.view(len(masks), -1)
        every_set = torch.arange(len(masks), device=masks.device)[:, None]
        first_pair = 0
        for number, image in enumerate(images):
            rows = image.rows
            last_pair = first_pair + min(rows.stop - rows.start, masks.shape[2])
            pairs = slice(first_pair, last_pair)
            first_pair = last_pair
            predicted = masks[every_set, image.number, queries[:, pairs]]  # (L, m, h, w)
            true_masks = targets.masks[rows, None].to(masks.dtype) / 255  # stored as uint8
            of_pairs = []
            for sets in _steps_of_sets(predicted, self.points[0]):
                compare = partial(
                    self._compare,
                    image=image,
                    true_masks=true_masks,
                    objects=objects[sets, pairs] - rows.start,
                    candidates=candidates[number, sets],
                    uniform=uniform[number, sets],
                )
                of_pairs.append(_WithGradient.apply(compare, predicted[sets]))
            sums = sums + torch.cat(of_pairs, dim=1).sum(dim=2)
        bce, dice = sums
        return bce, dice

    def _compare(
        self,
        predicted: Tensor,
        image: ImageWithObjects,
        true_masks: Tensor,
        objects: Tensor,
        candidates: Tensor,
        uniform: Tensor,
    ) -> Tensor:
        """Cross-entropy and dice (2, L, m) of the pairs of some sets in one image.

        `predicted` (L, m, h, w) logits, `true_masks` (n, 1, hm, wm), of which `objects` (L, m) are rows.
        """
        points = uncertain_points(predicted, candidates, uniform, self.uncertain, image.extent)
        # Set by set, so that there is never a copy of the masks for every pair of every set.
        values = []
        for of_set, at in zip(objects, points, strict=True):
            values.append(sample(true_masks[of_set], at, image.mask_extent).squeeze(1))
        true = torch.stack(values)  # (L, m, P) in [0, 1]
        logits = sample(predicted.flatten(0, 1)[:, None], points.flatten(0, 1), image.extent)
        logits = logits.view_as(true)
        of_points = F.binary_cross_entropy_with_logits(logits, true, reduction="none")
        return torch.stack((of_points.mean(dim=-1), dice_loss(logits, true)))


def _steps_of_sets(masks: Tensor, points: int) -> list[slice]:
    """Slices of the sets of masks (L, m, h, w) that are compared at a time, at `points` points each."""
    on_cpu = real_device(masks.device).type == "cpu"
    values_at_once = _VALUES_ON_CPU if on_cpu else _VALUES_ON_GPU
    sets_at_once = max(1, values_at_once // (masks.shape[1] * points))
    return [slice(first, first + sets_at_once) for first in range(0, len(masks), sets_at_once)]


class _WithGradient(torch.autograd.Function):
    """`losses(masks)`, (2, L, m) for masks (L, m, h, w), each of one mask alone.

    The gradient is computed with them: values at points are many times as large as the masks, and would have
    to be kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, losses: Callable[[Tensor], Tensor], masks: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[1]
        masks = masks.detach().requires_grad_(needs_gradient)
        with torch.set_grad_enabled(needs_gradient):
            values = losses(masks)
            sums = [of_kind.sum() for of_kind in values]
        if needs_gradient:
            gradients = []
            for of_kind in sums:
                (gradient,) = torch.autograd.grad(of_kind, masks, retain_graph=True)
                gradients.append(gradient)
            ctx.save_for_backward(torch.stack(gradients))
        return values.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (gradients,) = ctx.saved_tensors
        return None, (grad[..., None, None] * gradients).sum(dim=0)


class ImageWithObjects(NamedTuple):
    """An image that has objects, and where."""

    number: int  #: in the batch
    rows: slice  #: its objects among those of all images
    extent: Tensor  #: (2,) height and width as a share of the predicted grid, on the device
    mask_extent: Tensor  #: (2,) the same of the grid of the true masks


def images_with_objects(targets: MaskTargets, extents: Tensor) -> list[ImageWithObjects]:
    """Those of a batch; `extents` (B, 2) are the output's."""
    device = targets.masks.device
    shares = targets.grids.double() / torch.tensor(targets.masks.shape[1:])
    extents = to_device(extents, device)
    mask_extents = to_device(shares.float(), device)
    images = []
    for number, rows in enumerate(slices_of(targets.counts.tolist())):
        if rows.stop > rows.start:
            images.append(ImageWithObjects(number, rows, extents[number], mask_extents[number]))
    return images


def dice_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Dice loss over the last axis; with 1 added as in Mask2Former's code it is defined, and 0, for two empty
    masks.
    """
    probability = logits.sigmoid()
    overlap = (probability * true).sum(dim=-1)
    areas = probability.sum(dim=-1) + true.sum(dim=-1)
    return 1 - (2 * overlap + 1) / (areas + 1)


@torch.no_grad()
def match_masks(
    logits: Tensor,
    masks: Tensor,
    targets: MaskTargets,
    images: Sequence[ImageWithObjects],
    labels: Tensor,
    points: Tensor,
    costs: tuple[float, float, float],
    image_ids: Tensor | None = None,
) -> Matches:
    """The cheapest assignment of objects to queries, for each prediction set and image on its own (ibid.,
    3.3).

    `logits` (L, B, Q, C + 1), `masks` (L, B, Q, h, w) logits, `labels` (N,) int64 in the head's numbering,
    `points` (A, L, P, 2) in [0, 1] of each of the `images`, weights `costs` of minus the probability
    of the object's class, the mean cross-entropy and the dice at the points. Where an image has more objects
    than there are queries, the cheapest Q objects are matched. `image_ids` (B,) are for errors only.

    Raises FloatingPointError where a cost is not finite.
    """
    num_queries = logits.shape[2]
    cost = [logits.new_zeros(len(logits), 0, num_queries)]
    for at, image in zip(points, images, strict=True):
        probability = logits[:, image.number].softmax(dim=-1)  # (L, Q, C + 1)
        of_class = -probability[..., labels[image.rows]].mT
        true_masks = targets.masks[image.rows].to(masks.dtype) / 255  # one map of n channels
        predicted = masks[:, image.number]
        bce = []
        dice = []
        # In steps: of all sets together, the values at the points would be the largest tensors of a step.
        for sets in _steps_of_sets(predicted, at.shape[1]):
            logits_at_points = sample(predicted[sets], at[sets], image.extent)  # (L, Q, P) of these sets
            true = sample(true_masks[None], at[sets].reshape(1, -1, 2), image.mask_extent)
            true = true[0].unflatten(1, (-1, at.shape[1])).transpose(0, 1)  # (L, n, P)
            bce.append(_pairwise_cross_entropy(logits_at_points, true))
            dice.append(_pairwise_dice(logits_at_points, true))
        cost.append(costs[0] * of_class + costs[1] * torch.cat(bce) + costs[2] * torch.cat(dice))
    pairs = int(targets.counts.clamp(max=num_queries).sum())
    return solve(torch.cat(cost, dim=1), targets.counts, pairs, image_ids)


def _pairwise_cross_entropy(logits: Tensor, true: Tensor) -> Tensor:
    """Mean cross-entropy (L, n, Q) of every object (L, n, P) and query (L, Q, P).

    It is softplus(-x) t + softplus(x) (1 - t), which is softplus(x) - x t: one product instead of two.
    """
    without_object = F.softplus(logits).sum(-1)[:, None]
    return (without_object - true @ logits.mT) / logits.shape[-1]


def _pairwise_dice(logits: Tensor, true: Tensor) -> Tensor:
    """Dice (L, n, Q) of every object (L, n, P) and query (L, Q, P)."""
    probability = logits.sigmoid()
    overlap = true @ probability.mT
    areas = probability.sum(-1)[:, None] + true.sum(-1)[..., None]
    return 1 - (2 * overlap + 1) / (areas + 1)
