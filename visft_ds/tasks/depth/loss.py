"""Losses of depth: SILog (Eigen et al., arXiv 1406.2283), gradients of the error (MegaDepth, arXiv
1804.00607), and the error of relative maps (MiDaS, arXiv 1907.01341).

DINOv2 takes SILog over all pixels of a batch, here it is a mean over images: it depends on no division of
the batch. MiDaS takes a median out where this takes a mean.
Letters: N images of one size, H W pixels.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.tasks import Numbers
from visft_ds.tasks.criterion import Denominators, Losses
from visft_ds.tasks.depth.config import DepthLoss
from visft_ds.tasks.depth.data import DepthTargets
from visft_ds.tasks.depth.head import DepthOutput
from visft_ds.tasks.masks.interpolation import interpolated

_MEAN_SHARE = 0.15  # of the squared mean beside the variance: 1 - 0.85 of DINOv2 and BTS
_STEPS = (1, 2, 4, 8)  # between the pixels of each scale
_TINY = 1e-6


class DepthCriterion:
    """Means over the images of the global batch whose depth is known somewhere."""

    def __init__(self, loss: DepthLoss) -> None:
        self.weights = {"silog": loss.silog, "gradient": loss.gradient, "relative": loss.relative}

    def count(self, batch: Batch) -> Numbers:
        """Images with depth: in metres, relative, and all."""
        targets: DepthTargets = batch.targets["depth"]
        has_depth = targets.known > 0
        relative = int((has_depth & targets.relative).sum())
        images = int(has_depth.sum())
        return {"metric": float(images - relative), "relative": float(relative), "images": float(images)}

    def __call__(
        self,
        output: DepthOutput,
        targets: DepthTargets,
        loss_denominators: Denominators,
        image_ids: Tensor | None = None,
    ) -> Losses:
        zero = output.metres.sum() * 0  # of images without depth, too, each parameter has a gradient
        sums = {"silog": zero, "gradient": zero, "relative": zero}
        known = targets.known.tolist()
        sizes = targets.sizes.tolist()
        extents = output.extents.tolist()
        # Images that are alike go together: one by one their many small operations would keep a GPU waiting.
        alike = defaultdict[tuple[bool, tuple[int, ...], tuple[float, ...]], list[int]](list)
        for image, is_relative in enumerate(targets.relative.tolist()):
            if known[image]:
                alike[is_relative, tuple(sizes[image]), tuple(extents[image])].append(image)
        # By number from tuples: a list as an index would be copied to the GPU, which waits for it.
        predicted = output.metres.unbind()
        actual = targets.depth.unbind()
        for (is_relative, (height, width), extent), images in alike.items():
            truth = torch.stack([actual[image][:height, :width] for image in images])
            maps = torch.stack([predicted[image] for image in images])
            metres = interpolated(maps, extent, (height, width))
            is_known = truth > 0
            if is_relative:
                error = normalised(1 / metres, is_known) - normalised(truth, is_known)
                sums["relative"] = sums["relative"] + mean(error.abs(), is_known).sum()
            else:
                error = metres.log() - truth.where(is_known, 1.0).log()
                sums["silog"] = sums["silog"] + silog(error, is_known).sum()
            sums["gradient"] = sums["gradient"] + gradients(error, is_known).sum()
        return {
            "silog": sums["silog"] / loss_denominators["metric"],
            "gradient": sums["gradient"] / loss_denominators["images"],
            "relative": sums["relative"] / loss_denominators["relative"],
        }


def mean(values: Tensor, is_known: Tensor) -> Tensor:
    """Mean (N,) of the values (N, H, W) that are known."""
    return values.where(is_known, 0.0).sum(dim=(1, 2)) / is_known.sum(dim=(1, 2)).clamp(min=1)


def silog(error: Tensor, is_known: Tensor) -> Tensor:
    """sqrt(variance + 0.15 mean^2) (N,) of the errors (N, H, W) of logarithms."""
    means = mean(error, is_known)
    variances = mean((error - means[:, None, None]) ** 2, is_known)
    return (variances + _MEAN_SHARE * means**2).clamp(min=_TINY**2).sqrt()


def gradients(error: Tensor, is_known: Tensor) -> Tensor:
    """Mean difference (N,) of neighbours in errors (N, H, W), summed over both axes and all scales."""
    total = error.new_zeros(len(error))
    for step in _STEPS:
        coarse = error[:, ::step, ::step]
        inside = is_known[:, ::step, ::step]
        for axis in (1, 2):
            pairs = coarse.shape[axis] - 1
            both = inside.narrow(axis, 0, pairs) & inside.narrow(axis, 1, pairs)
            total = total + mean(coarse.diff(dim=axis).abs(), both)
    return total


def normalised(values: Tensor, is_known: Tensor) -> Tensor:
    """Values (N, H, W) less their mean, over their mean distance from it, image by image."""
    centred = values - mean(values, is_known)[:, None, None]
    return centred / mean(centred.abs(), is_known).clamp(min=_TINY)[:, None, None]
