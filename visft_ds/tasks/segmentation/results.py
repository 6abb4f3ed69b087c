"""Results of instance segmentation: masks at the size of the stored image, in COCO's format.

Letters: B images, Q queries, C classes, h w patch grid, H W pixels of the stored image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from faster_coco_eval import mask as coco_mask  # pycocotools' decode() warns under NumPy 2
from torch import Tensor

from visft_ds.data.samples import Batch
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Results
from visft_ds.tasks.classes import COCO_CATEGORY_IDS
from visft_ds.tasks.masks.interpolation import interpolation
from visft_ds.tasks.masks.output import SegmentationOutput

#: Values of full-size masks that post-processing holds at a time: 128 MiB of float32.
_MASK_BUDGET = 1 << 25
_RESULTS = 100  #: of an image, as COCO's evaluation counts them


@torch.no_grad()
def postprocess(
    output: SegmentationOutput, batch: Batch, classes: Sequence[int] | None = None, threshold: float = 0.0
) -> Results:
    """Predictions in COCO's results format: image_id, category_id, segmentation, bbox, score.

    segmentation is a run-length code at the size of the stored image, its counts as str; bbox is the (x, y,
    w, h) around it in pixels, category_id the entry of `classes` (by default COCO's) for the class. A mask is
    where its bilinearly interpolated logits are above 0, in one region or several: what stands in front of an
    object divides it. Heads in our labelling give the 100 pairs of a query and a class with the highest
    softmax probability, scored by that times the mean probability inside the mask (as in Mask2Former's code).
    In the published labelling a query gives its best class and the probability of that, as in ViSFT's code. A
    query without a single pixel gives nothing: it would count as a confident mistake. Images without
    `batch.real` are left out. The batch must have been resized without cropping, as evaluation transforms do.
    Masks are made in groups of a bounded size, and of scores from `threshold` on only.
    """
    classes = COCO_CATEGORY_IDS if classes is None else classes
    first = 0 if output.labelling == "contiguous" else 1  # class 0 means nothing in the published labelling
    likely = at_least_float32(output.logits[-1]).softmax(dim=-1)[..., first:-1][
        ..., : len(classes)
    ]  # (B, Q, C)
    if first == 0:
        scores, pairs = likely.flatten(1).topk(min(_RESULTS, likely[0].numel()))
        queries, best = pairs // likely.shape[2], pairs % likely.shape[2]
    else:
        scores, best = likely.max(dim=-1)
        queries = torch.arange(likely.shape[1]).expand(len(likely), -1)
    found = [part.tolist() for part in (queries, best, scores)]
    whole = batch.sizes.double().cpu() / torch.tensor(batch.images.shape[-2:])
    extents, results = whole if output.extents is None else output.extents, Results()
    for image in batch.real.nonzero().flatten().tolist():
        kept = [
            one for one in zip(*(part[image] for part in found), strict=True) if not one[2] < threshold
        ]  # NaN, too
        shown = sorted({query for query, _, _ in kept})
        masks = at_least_float32(output.masks[-1, image, shown])
        shares, stored = extents[image].tolist(), batch.original_sizes[image].tolist()
        codes, qualities = _mask_codes(masks, shares, stored)
        number = {query: place for place, query in enumerate(shown)}
        for query, label, likelihood in kept:
            code = codes[number[query]]
            score = likelihood * qualities[number[query]] if first == 0 else likelihood
            if not coco_mask.area(code) or score < threshold:
                continue
            about = {"image_id": int(batch.image_ids[image]), "category_id": classes[label]}
            shape = {"size": stored, "counts": code["counts"].decode("ascii")}
            results.append(
                {**about, "segmentation": shape, "bbox": coco_mask.toBbox(code).tolist(), "score": score}
            )
    return results


def _mask_codes(
    masks: Tensor, shares: list[float], stored: list[int]
) -> tuple[list[dict[str, Any]], list[float]]:
    """Run-length codes of masks at the stored size, and the mean probability inside each, 0 where it is
    empty.

    `masks` (Q, h, w) are logits, of which `shares` (height, width) are image.
    """
    rows = interpolation(masks.shape[1], shares[0], stored[0], masks)  # (H, h)
    columns = interpolation(masks.shape[2], shares[1], stored[1], masks)  # (W, w)
    step = max(1, _MASK_BUDGET // (stored[0] * stored[1]))
    codes: list[dict[str, Any]] = []
    qualities: list[float] = []
    for part in masks.split(step):
        # bilinear interpolation is one linear map along each axis; transposed, as run-length codes go down
        # columns
        logits = columns @ (rows @ part).transpose(1, 2)  # (q, W, H)
        inside = logits > 0
        codes += coco_mask.encode(inside.to(torch.uint8).cpu().numpy().transpose(2, 1, 0))
        probabilities = logits.sigmoid_().mul_(inside)  # in place: a copy would double what is held
        pixels = inside.sum(dim=(1, 2)).clamp(min=1)
        qualities += (probabilities.sum(dim=(1, 2)) / pixels).tolist()
    return codes, qualities
