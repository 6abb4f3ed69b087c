"""Segments of an image, from masks that overlap: merged as EoMT's and PMT's code merges them.

Letters: B images, Q queries, n of them with a likely class, h w grid, H W pixels of the stored image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visft_ds.data.masks import code_of
from visft_ds.data.samples import Batch
from visft_ds.data.transforms import BoolArray
from visft_ds.ops import at_least_float32
from visft_ds.tasks import Results
from visft_ds.tasks.masks.interpolation import interpolated
from visft_ds.tasks.panoptic.head import PanopticOutput

INSIDE = 0.5  # least probability of a pixel that is in a mask


@torch.no_grad()
def panoptic_results(
    output: PanopticOutput, batch: Batch, categories: Sequence[int], threshold: float = 0.0
) -> Results:
    """Segments: image_id, id (from 1 in each image), category_id, score, segmentation.

    A query gives its best class, if that is one and its probability is above `options.score` and not below
    `threshold`. Each pixel goes to the mask with the highest product of its probability there and that of its
    class. A mask becomes a segment, of the pixels where it also has a probability of one half, if it keeps
    more than the part `options.overlap` of these. Masks of one kind of stuff are one segment. segmentation is
    a run-length code at the size of the stored image; no two of an image overlap. Images without `batch.real`
    are left out.
    """
    options = output.options
    results = Results()
    for image in batch.real_images():
        scores, labels = at_least_float32(output.logits[-1, image]).softmax(dim=-1).max(dim=-1)
        is_likely = (scores > options.score) & (scores >= threshold) & (labels < len(categories))
        likely = is_likely.nonzero().flatten()
        masks = at_least_float32(output.masks[-1, image, likely])
        # In two steps as there: to the image as it was evaluated, and to the stored one.
        masks = interpolated(masks, output.extents[image].tolist(), batch.sizes[image].tolist())
        stored = batch.original_sizes[image].tolist()
        segments: dict[int, dict[str, Any]] = {}
        numbers = np.zeros(stored, dtype=np.int32)
        of_stuff = dict[int, int]()
        scores_of_masks = scores[likely].tolist()
        parts = _parts(masks, scores_of_masks, stored, options.overlap)
        for score, label, part in zip(scores_of_masks, labels[likely].tolist(), parts, strict=True):
            if not part.any():
                continue
            category = categories[label]
            number = of_stuff.get(category, len(segments) + 1)
            if category in options.stuff:
                of_stuff[category] = number
            numbers[part] = number
            segments.setdefault(number, {"category_id": category, "score": score})
        for number, segment in segments.items():
            numbered = {"image_id": int(batch.image_ids[image]), "id": number}
            results.append({**numbered, **segment, "segmentation": code_of(numbers == number)})
    return results


def _parts(masks: Tensor, scores: Sequence[float], size: Sequence[int], overlap: float) -> list[BoolArray]:
    """(H, W) pixels of each mask (n, h, w) with these scores that become part of a segment; none of a mask
    that others cover.

    Masks are brought to the full size one by one: all together may not fit into the memory.
    """
    best = masks.new_zeros(size)
    owners = torch.full(tuple(size), -1, device=masks.device)
    is_inside = torch.zeros(tuple(size), dtype=torch.bool, device=masks.device)
    areas = []
    for number, (mask, score) in enumerate(zip(masks, scores, strict=True)):
        probability = interpolated(mask, (1.0, 1.0), size).sigmoid()
        covers = probability >= INSIDE
        areas.append(int(covers.sum()))
        wins = probability * score > best
        best = torch.where(wins, probability * score, best)
        owners = torch.where(wins, number, owners)
        is_inside = torch.where(wins, covers, is_inside)
    parts = []
    for number, area in enumerate(areas):
        own = owners == number
        part = own & is_inside
        if int(own.sum()) <= overlap * area:
            part = torch.zeros_like(part)
        parts.append(part.cpu().numpy())
    return parts
