"""Regions of an image, none of which overlap: drawn under their colours, and told by their shares."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.data.transforms import Size
from visft_ds.tasks import Annotation, Annotations, Names
from visft_ds.tasks.classes import category_name
from visft_ds.tasks.masks.rasters import decode_mask
from visft_ds.tasks.pictures import SIDE, TEXT, Picture, draw_objects, letters, palette

_TAGGED = 0.003  # share of an image from which on a region has its name in a picture


def by_image(entries: Annotations) -> Mapping[int, list[Annotation]]:
    """Annotations or results by the id of their image; none of an image without any."""
    images = defaultdict[int, list[Annotation]](list)
    for entry in entries:
        images[entry["image_id"]].append(entry)
    return images


def segment_numbers(segments: Annotations, size: Size) -> npt.NDArray[np.int32]:
    """(H, W) `id` of the segment of each pixel; 0 where there is none."""
    numbers = np.zeros(size, dtype=np.int32)
    for segment in segments:
        numbers[coco_mask.decode(dict(segment["segmentation"])).astype(bool)] = segment["id"]
    return numbers


def segment_places(segments: Annotations, size: Size) -> npt.NDArray[np.int32]:
    """(H, W) place of the segment of each pixel, from 1; 0 where there is none."""
    numbered = [{**segment, "id": number} for number, segment in enumerate(segments, 1)]
    return segment_numbers(numbered, size)


def shares_in_words(results: Annotations, names: Names) -> str:
    """Regions by their shares of the image, the largest first."""
    shares = []
    for result in results:
        code = result["segmentation"]
        share = coco_mask.area(code) / math.prod(code["size"])
        shares.append((share, category_name(result["category_id"], names)))
    shares.sort(key=lambda entry: -entry[0])
    return ", ".join(f"{name} {share:.0%}" for share, name in shares)


def draw_regions(
    image: Picture,
    regions: Annotations,
    names: Names,
    side: int = SIDE,
) -> Picture:
    """The image under the colours of its regions, each with its name where it is widest.

    A class has one colour in all pictures; a second region of it in an image gets another one.
    """
    from scipy import ndimage  # a quarter of a second, which other tasks do not need

    scale = side / max(image.shape[:2])
    labels = list[str]()
    masks = []
    tags = []
    corners = []
    for region in regions:
        name = category_name(region["category_id"], names)
        mask = decode_mask(region["segmentation"], image.shape[:2])
        distance = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        left = x - letters(TEXT).getlength(name) / 2 / scale
        top = y - TEXT / 2 / scale
        labels.append(f"{name} {len(labels)}" if name in labels else name)
        masks.append(mask)
        tags.append(name if mask.mean() >= _TAGGED else "")
        corners.append((left, top, 0, 0))
    colours = palette([*names.values(), *labels])
    return draw_objects(image, labels, tags, colours, boxes=corners, masks=masks, side=side)
