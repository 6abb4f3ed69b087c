"""Losses of depth: SILog (Eigen et al., arXiv 1406.2283), gradients of the error (MegaDepth, arXiv
1804.00607), and the error of relative maps (MiDaS, arXiv 1907.01341).

DINOv2 takes SILog over all pixels of a batch, here it is a mean over images: it depends on no division of
the batch. MiDaS takes a median out where this takes a mean.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from visft_ds.data.samples import Batch
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

    def count(self, batch: Batch) -> dict[str, float]:
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
        loss_denominators: Mapping[str, Tensor],
        image_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        zero = output.metres.sum() * 0  # of images without depth, too, each parameter has a gradient
        sums = {"silog": zero, "gradient": zero, "relative": zero}
        known = targets.known.tolist()
        relative = targets.relative.tolist()
        extents = targets.extents if output.extents is None else output.extents
        for image, (height, width) in enumerate(targets.sizes.tolist()):
            if not known[image]:
                continue
            truth = targets.depth[image, :height, :width]
            metres = interpolated(output.metres[image], extents[image].tolist(), (height, width))
            is_known = truth > 0
            if relative[image]:
                error = normalised(1 / metres, is_known) - normalised(truth, is_known)
                sums["relative"] = sums["relative"] + _mean(error.abs(), is_known)
            else:
                error = metres.log() - truth.where(is_known, 1.0).log()
                sums["silog"] = sums["silog"] + silog(error, is_known)
            sums["gradient"] = sums["gradient"] + gradients(error, is_known)
        return {
            "silog": sums["silog"] / loss_denominators["metric"],
            "gradient": sums["gradient"] / loss_denominators["images"],
            "relative": sums["relative"] / loss_denominators["relative"],
        }


def _mean(values: Tensor, is_known: Tensor) -> Tensor:
    """Mean of the values (H, W) that are known."""
    return values.where(is_known, 0.0).sum() / is_known.sum().clamp(min=1)


def silog(error: Tensor, is_known: Tensor) -> Tensor:
    """sqrt(variance + 0.15 mean^2) of the error (H, W) of logarithms."""
    mean = _mean(error, is_known)
    variance = _mean((error - mean) ** 2, is_known)
    return (variance + _MEAN_SHARE * mean**2).clamp(min=_TINY**2).sqrt()


def gradients(error: Tensor, is_known: Tensor) -> Tensor:
    """Mean difference of neighbours in an error (H, W), summed over both axes and all scales."""
    total = error.new_zeros(())
    for step in _STEPS:
        coarse = error[::step, ::step]
        inside = is_known[::step, ::step]
        for axis in (0, 1):
            pairs = coarse.shape[axis] - 1
            both = inside.narrow(axis, 0, pairs) & inside.narrow(axis, 1, pairs)
            total = total + _mean(coarse.diff(dim=axis).abs(), both)
    return total


def normalised(values: Tensor, is_known: Tensor) -> Tensor:
    """Values (H, W) less their mean, over their mean distance from it."""
    centred = values - _mean(values, is_known)
    return centred / _mean(centred.abs(), is_known).clamp(min=_TINY)
