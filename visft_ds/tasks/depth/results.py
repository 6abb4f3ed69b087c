"""Predicted depth of each pixel, how good it is, and drawings.

Letters: B images, H W pixels of the stored image.
"""

from __future__ import annotations

import numpy as np
import torch

from visft_ds.data.depth import Values, encoded, encoded_relative, values_of
from visft_ds.data.samples import Batch
from visft_ds.data.transforms import BoolArray, FloatArray, Size
from visft_ds.tasks import Numbers, Results, Truth
from visft_ds.tasks.depth.config import DepthRange, DepthTask
from visft_ds.tasks.depth.head import DepthOutput
from visft_ds.tasks.masks.interpolation import interpolated
from visft_ds.tasks.pictures import Picture

#: The part of NYU Depth v2 that Eigen et al. judge (arXiv 1406.2283), in maps of its size.
_NYU = (480, 640)
_EIGEN = slice(45, 471), slice(41, 601)
#: The part of KITTI that Garg et al. judge (arXiv 1603.04992), as shares of height and width.
_KITTI_HEIGHTS = (352, 370, 374, 375, 376)
_KITTI_WIDTHS = (1216, 1224, 1226, 1238, 1241, 1242)
_GARG_ROWS = (0.40810811, 0.99189189)
_GARG_COLUMNS = (0.03594771, 0.96405229)
_DELTA = 1.25
_UNKNOWN = (128, 128, 128)
#: From near to far.
_COLOURS = np.array([(252, 253, 191), (252, 137, 97), (183, 55, 121), (81, 18, 124), (0, 0, 4)])


@torch.no_grad()
def depth_results(output: DepthOutput, batch: Batch) -> Results:
    """Results {"image_id", "depth"}: a PNG of the stored size as labels have it, rounded to millimetres; of a
    head that learnt relative maps a relative one.
    """
    results = Results()
    for image in batch.real_images():
        stored = batch.original_sizes[image].tolist()
        metres = interpolated(output.metres[image], output.extents[image].tolist(), stored)
        values = metres.float().cpu().numpy()
        depth = encoded_relative(np.reciprocal(values)) if output.relative else encoded(values)
        results.append({"image_id": int(batch.image_ids[image]), "depth": depth})
    return results


def measure_depth(truth: Truth, results: Results, head: DepthRange) -> Numbers:
    """AbsRel, RMSE in metres, SILog (times 100) and delta1 to 3 in [0, 1], means over images.

    Depths between the head's `nearest` and `farthest` count, to which predictions are clipped; in maps of
    NYU's and KITTI's sizes those in the published crops. Relative maps are compared with the inverse of the
    prediction, to which the best scale and offset are applied; RMSE is then in the numbers of the maps.
    Relative predictions get the scale and offset that bring them nearest to the inverse of true metres.

    Args:
        truth: images, each with its `depth` as labels have it.

    Raises:
        ValueError: no depth counts.
    """
    predicted = {result["image_id"]: result["depth"] for result in results}
    rows = []
    for image in truth["images"]:
        if image["depth"] is None:
            continue
        actual = values_of(image["depth"]).astype(np.float64)
        depth = predicted[image["id"]]
        values = values_of(depth).astype(np.float64)
        does_count = judged_part(actual.shape) & (actual > 0)
        is_relative = image["depth"]["metres"] is None
        if not is_relative:
            does_count &= (actual > head.nearest) & (actual < head.farthest)
        if does_count.any():
            true = actual[does_count]
            estimate = values[does_count]
            if depth["metres"] is not None:
                estimate = estimate.clip(head.nearest, head.farthest)
                if is_relative:
                    estimate = aligned(1 / estimate, true)
            elif is_relative:
                estimate = aligned(estimate, true)
            else:
                estimate = (1 / aligned(estimate, 1 / true)).clip(head.nearest, head.farthest)
            rows.append(errors(estimate, true))
    if not rows:
        raise ValueError(
            f"the data has no depth between {head.nearest:g} and {head.farthest:g} m, which predictions are "
            "compared with"
        )
    return dict(zip(DepthTask.metrics, np.mean(rows, axis=0).tolist(), strict=True))


def errors(predicted: FloatArray, actual: FloatArray) -> FloatArray:
    """`DepthTask.metrics` of the pixels (n,) of an image."""
    difference = predicted - actual
    logarithm = np.log(predicted) - np.log(actual)
    ratio = np.maximum(predicted / actual, actual / predicted)
    return np.array(
        [
            (np.abs(difference) / actual).mean(),
            np.sqrt((difference**2).mean()),
            100 * logarithm.std(),
            (ratio < _DELTA).mean(),
            (ratio < _DELTA**2).mean(),
            (ratio < _DELTA**3).mean(),
        ]
    )


def aligned(predicted: FloatArray, actual: FloatArray) -> FloatArray:
    """Predictions (n,) times the scale and plus the offset that bring them nearest to the truth; above 0."""
    columns = np.stack([predicted, np.ones_like(predicted)], axis=1)
    scale, offset = np.linalg.lstsq(columns, actual, rcond=None)[0]
    fitted: FloatArray = (scale * predicted + offset).clip(min=actual.min() / 1000)
    return fitted


def judged_part(size: Size) -> BoolArray:
    """(H, W) True for pixels that count in a map of this size."""
    height, width = size
    rows = slice(None)
    columns = slice(None)
    if size == _NYU:
        rows, columns = _EIGEN
    elif height in _KITTI_HEIGHTS and width in _KITTI_WIDTHS:
        rows = slice(*(int(share * height) for share in _GARG_ROWS))
        columns = slice(*(int(share * width) for share in _GARG_COLUMNS))
    does_count = np.zeros(size, dtype=bool)
    does_count[rows, columns] = True
    return does_count


def coloured(values: Values, nearest: float, farthest: float) -> Picture:
    """Values (H, W) as colours (H, W, 3) from near, bright, to far, dark; grey where they are 0.

    Of relative maps `nearest` is the largest value.
    """
    span = farthest - nearest
    if span == 0:
        span = 1.0
    shares = (values - nearest) / span
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(shares, stops, _COLOURS[:, channel]) for channel in range(3)]
    picture: Picture = np.stack(channels, axis=-1).round().astype(np.uint8)
    picture[values == 0] = _UNKNOWN
    return picture


def colour_range(values: Values, *, relative: bool = False) -> tuple[float, float]:
    """Values of the nearest and the farthest of the pixels that are known, but for the last 2 % of both."""
    known = values[values > 0]
    if not known.size:
        return 0.0, 1.0
    low, high = np.percentile(known, (2, 98)).tolist()
    return (high, low) if relative else (low, high)
