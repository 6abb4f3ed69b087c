"""Masks as COCO's run-length codes, with their counts as text."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2


def code_of(mask: npt.NDArray[Any]) -> dict[str, Any]:
    """The code of a mask (H, W), which goes down its columns."""
    code = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}


def object_of(mask: npt.NDArray[Any]) -> dict[str, Any]:
    """Box, area and mask of an object, as COCO's annotations have them, in pixels."""
    code = code_of(mask)
    return {
        "bbox": coco_mask.toBbox(code).tolist(),
        "area": int(coco_mask.area(code)),
        "iscrowd": 0,
        "segmentation": code,
    }
