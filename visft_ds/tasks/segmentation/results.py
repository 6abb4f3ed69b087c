"""Results of instance segmentation: masks at the size of the stored image, in COCO's format.

Letters: B images, Q queries, C classes, h w patch grid, H W pixels of the stored image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Results
from visft_ds.tasks.masks.interpolation import interpolation
from visft_ds.tasks.masks.output import MaskOutput

#: Values of full-size masks that are held at a time: 128 MiB of float32.
_MASK_BUDGET = 1 << 25


class _Code(NamedTuple):
    """A mask as run-length code of COCO, and the mean probability inside it, 0 if it is empty."""

    code: dict[str, Any]
    quality: float


@torch.no_grad()
def instances(
    output: MaskOutput,
    batch: Batch,
    categories: Sequence[int],
    threshold: float = 0.0,
) -> Results:
    """Predictions in COCO's results format: image_id, category_id, segmentation, bbox, score.

    segmentation is a run-length code at the size of the stored image, its counts as str; bbox is the (x, y,
    w, h) around it in pixels, category_id the entry of `categories` for the class. A mask is where its
    bilinearly interpolated logits are above 0, in one region or several: what stands in front of an object
    divides it. Heads with contiguous classes give the `output.max_detections` pairs of a query and a
    class with the highest softmax probability, scored by that times the mean probability inside the mask (as
    in Mask2Former's code). With published ones a query gives its best class and the probability of that, as
    in ViSFT's code. A query without a single pixel gives nothing: it would count as a confident mistake.
    Images without `batch.real` are left out. The batch must have been resized without cropping, as evaluation
    transforms do. Masks are made in groups of a bounded size, and of scores from `threshold` on only.
    """
    scores, queries, labels = (tensor.cpu() for tensor in _candidates(output, len(categories)))
    results = Results()
    for image in batch.real_images():
        is_likely = ~(scores[image] < threshold)  # NaN is among them
        of_pairs = queries[image, is_likely].tolist()
        distinct = sorted(set(of_pairs))
        stored = batch.original_sizes[image].tolist()
        masks = at_least_float32(output.masks[-1, image, distinct])
        codes = dict(zip(distinct, _mask_codes(masks, output.extents[image].tolist(), stored), strict=True))
        pairs = zip(
            of_pairs, labels[image, is_likely].tolist(), scores[image, is_likely].tolist(), strict=True
        )
        for query, label, score in pairs:
            code, quality = codes[query]
            if output.class_ids == "contiguous":
                score *= quality
            if not coco_mask.area(code) or score < threshold:
                continue
            results.append(
                {
                    "image_id": int(batch.image_ids[image]),
                    "category_id": categories[label],
                    "segmentation": {"size": stored, "counts": code["counts"].decode("ascii")},
                    "bbox": coco_mask.toBbox(code).tolist(),
                    "score": score,
                }
            )
    return results


def _candidates(output: MaskOutput, num_categories: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (B, n), queries and labels of the pairs of a query and a class that can be results."""
    probability = at_least_float32(output.logits[-1]).softmax(dim=-1)  # (B, Q, C + 1)
    if output.class_ids == "contiguous":
        probability = probability[..., :-1][..., :num_categories]
        number = min(output.max_detections, probability[0].numel())
        scores, pairs = probability.flatten(1).topk(number)
        return scores, pairs // probability.shape[2], pairs % probability.shape[2]
    probability = probability[..., 1:-1]  # class 0 means nothing
    scores, labels = probability[..., :num_categories].max(dim=-1)
    return scores, torch.arange(scores.shape[1]).expand_as(scores), labels


def _mask_codes(masks: Tensor, extent: Sequence[float], stored: Sequence[int]) -> list[_Code]:
    """Run-length codes of masks at the stored size.

    `masks` (Q, h, w) are logits, of which the shares `extent` (height, width) are image.
    """
    rows = interpolation(masks.shape[1], extent[0], stored[0], masks)  # (H, h)
    columns = interpolation(masks.shape[2], extent[1], stored[1], masks)  # (W, w)
    number = max(1, _MASK_BUDGET // (stored[0] * stored[1]))
    codes: list[_Code] = []
    for group in masks.split(number):
        # Bilinear interpolation is one linear map along each axis; transposed, as run-length codes go down
        # columns.
        logits = columns @ (rows @ group).transpose(1, 2)  # (q, W, H)
        inside = logits > 0
        pixels = inside.to(torch.uint8).cpu().numpy()
        encoded = coco_mask.encode(pixels.transpose(2, 1, 0))
        probabilities = logits.sigmoid_().mul_(inside)  # in place: a copy would double what is held
        area = inside.sum(dim=(1, 2)).clamp(min=1)
        qualities = probabilities.sum(dim=(1, 2)) / area
        codes += map(_Code, encoded, qualities.tolist())
    return codes
