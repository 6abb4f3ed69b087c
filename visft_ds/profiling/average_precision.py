"""Average precision by `evals/coco.py` beside pycocotools: the same made-up ground truth and results, seconds of both.

Both start from dictionaries in memory and end with the numbers. The copies that pycocotools needs, because it writes
into what it is given, are made before its time begins; ours makes its own within its time.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pycocotools.coco
import pycocotools.cocoeval
from faster_coco_eval import mask as coco_mask  # pycocotools' own warns under NumPy 2

from visft_ds.evals.coco import IouType, coco_average_precision
from visft_ds.monitor.console import Section
from visft_ds.monitor.metrics import versions
from visft_ds.profiling.record import circumstances
from visft_ds.profiling.timing import Spread
from visft_ds.tasks.segmentation.data import COCO_CATEGORY_IDS

FORMAT, VERSION = "visft_ds average precision", 1
#: Largest difference that counts as equal: float64 means of some thousand numbers, in another order.
TOLERANCE = 1e-9
_SUMMARY = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR100": 8}
_BOX_IMAGES, _MASK_IMAGES = 5000, 500
_BOX_SIZE, _MASK_SIZE = (480, 640), (120, 160)
#: Categories that a detector names in an image without an object of them.
_FALSE_CATEGORIES = 8
_COMPARED = ("faster-coco-eval", "pycocotools")
_CORNERS = 24  #: of the polygons that stand for ellipses

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class PrecisionOptions:
    """What is measured. Raises ValueError for what is not possible."""

    images: int | None = None  #: None: 5000 for boxes, 500 for masks
    objects: int = 7  #: in every image; COCO has 7.3 on average
    detections: int = 100  #: in every image
    masks: bool = False
    repeats: int = 1

    def __post_init__(self) -> None:
        for name in ("images", "objects", "detections", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be at least 1")

    @property
    def number(self) -> int:
        """Images."""
        return self.images or (_MASK_IMAGES if self.masks else _BOX_IMAGES)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of an image in pixels."""
        return _MASK_SIZE if self.masks else _BOX_SIZE


def measure_average_precision(options: PrecisionOptions) -> dict[str, Any]:
    """Seconds of both in turn, and the largest difference of their numbers; a record of JSON values."""
    load = os.getloadavg()
    truth, results = make_case(options)
    iou_type: IouType = "segm" if options.masks else "bbox"
    seconds: dict[str, list[float]] = {"ours": [], "pycocotools": []}
    for _ in range(options.repeats):
        began = time.perf_counter()
        ours = coco_average_precision(truth, results, iou_type, per_category=True)
        seconds["ours"].append(time.perf_counter() - began)
        theirs, elapsed = _pycocotools(truth, results, iou_type)
        seconds["pycocotools"].append(elapsed)
    assert ours.keys() == theirs.keys(), "both name the same numbers"
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["pycocotools"], strict=True)]
    difference = max(abs(ours[name] - theirs[name]) for name in ours)
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load),
        "versions": versions() | {name: importlib.metadata.version(name) for name in _COMPARED},
        "options": asdict(options),
        "sizes": {
            "images": len(truth["images"]),
            "pixels": list(options.size),
            "annotations": len(truth["annotations"]),
            "results": len(results),
        },
        "seconds": {name: asdict(Spread.of(values)) for name, values in seconds.items()},
        "ratio": asdict(Spread.of(ratios)),
        "values": ours,
        "largest_difference": difference,
        "equal": difference <= TOLERANCE,
    }


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return f"average precision of {'masks' if record['options']['masks'] else 'boxes'}: ours against pycocotools"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    sizes, known = record["sizes"], record["versions"]
    height, width = sizes["pixels"]
    values = record["values"]
    prefix = "mask" if record["options"]["masks"] else "box"
    facts = [
        ("made up", f"{sizes['images']:,} images of {width} x {height}, {sizes['annotations']:,} objects"),
        ("", f"{sizes['results']:,} results, {len(COCO_CATEGORY_IDS)} categories"),
        ("load", ", ".join(f"{value:.2f}" for value in record["load"]) + f" before, {record['cores']} cores"),
    ]
    rows = []
    names = dict(zip(("ours", "pycocotools"), (f"{name} {known[name]}" for name in _COMPARED), strict=True))
    names["ours"] = f"ours ({names['ours']})"
    for key, name in names.items():
        spread = record["seconds"][key]
        rows.append((name, f"{spread['median']:.2f}", f"{spread['least']:.2f} .. {spread['most']:.2f}"))
    ratio = record["ratio"]
    rows.append(("ratio", f"{ratio['median']:.2f}", f"{ratio['least']:.2f} .. {ratio['most']:.2f}"))
    bound = "within" if record["equal"] else "BEYOND"
    agreement = [
        ("AP", f"{values[f'{prefix}/AP']:.4f}, AP50 {values[f'{prefix}/AP50']:.4f}"),
        ("largest difference", f"{record['largest_difference']:.1e} of {len(values)} numbers: {bound} {TOLERANCE:g}"),
    ]
    return [
        Section("on", facts),
        Section(f"seconds, n {ratio['count']}", rows, ("", "median", "all")),
        Section("the numbers", agreement),
    ]


# -------------------------------------------------------------------------------------------------- pycocotools


def _pycocotools(
    truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: IouType
) -> tuple[dict[str, float], float]:
    """Its numbers under our names, and the seconds from dictionaries to numbers."""
    own_truth = {**truth, "annotations": [dict(annotation) for annotation in truth["annotations"]]}
    # Given a box beside a mask, pycocotools takes the box's area to tell small from large, not the mask's.
    left_out = "bbox" if iou_type == "segm" else ""
    own_results = [{name: value for name, value in result.items() if name != left_out} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        coco = pycocotools.coco.COCO()
        coco.dataset = own_truth
        coco.createIndex()
        evaluation = pycocotools.cocoeval.COCOeval(coco, coco.loadRes(own_results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        elapsed = time.perf_counter() - began
    prefix = "box" if iou_type == "bbox" else "mask"
    values = {f"{prefix}/{name}": float(evaluation.stats[place]) for name, place in _SUMMARY.items()}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # all areas, the largest detection limit
    names = {category["id"]: category["name"] for category in truth["categories"]}
    for place, category in enumerate(evaluation.params.catIds):
        known = precision[:, :, place][precision[:, :, place] > -1]
        values[f"{prefix}/AP/{names[category]}"] = float(known.mean()) if known.size else -1.0
    return values, elapsed


# --------------------------------------------------------------------------------------------------------- case


def make_case(options: PrecisionOptions) -> tuple[dict[str, Any], Records]:
    """A ground truth and the results of a middling detector, the same in every run.

    Objects are of all sizes, one in fifty is a crowd. Each object is found once, its box moved by some percent and in
    one case of ten under another name; all other results are false, in a few categories for each image, as a detector
    has them.
    """
    rng = np.random.default_rng(0)
    height, width = options.size
    truth: dict[str, Any] = {
        "images": [{"id": n, "width": width, "height": height} for n in range(1, options.number + 1)],
        "annotations": [],
        "categories": [{"id": n, "name": f"category {n}"} for n in COCO_CATEGORY_IDS],
    }
    results: Records = []
    for image in range(1, options.number + 1):
        boxes = _boxes(rng, options.objects, options.size)
        categories = rng.choice(COCO_CATEGORY_IDS, options.objects)
        crowds = rng.random(options.objects) < 0.02
        for fields in _shaped(image, categories, boxes, options):
            number = len(truth["annotations"])
            area = 0.8 * fields["bbox"][2] * fields["bbox"][3]  # of the mask; decides what counts as small
            crowd = int(crowds[number % options.objects])
            truth["annotations"].append({"id": number + 1, "area": area, "iscrowd": crowd, **fields})
        found = _found(rng, boxes, categories, options)
        scores = rng.uniform(0, 1, options.detections)
        scores[: options.objects] = np.sqrt(scores[: options.objects])  # objects tend to score higher
        for score, fields in zip(scores.tolist(), _shaped(image, *found, options), strict=True):
            results.append({**fields, "score": score})
    return truth, results


def _boxes(rng: np.random.Generator, count: int, size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """(count, 4) x, y, w, h inside the image, sides of 3 to 70 % of its own."""
    extent = np.array([size[1], size[0]])
    sides = 10 ** rng.uniform(-1.5, -0.15, (count, 2)) * extent
    return np.concatenate((rng.uniform(0, 1, (count, 2)) * (extent - sides), sides), axis=1)


def _found(
    rng: np.random.Generator,
    boxes: npt.NDArray[np.float64],
    categories: npt.NDArray[np.int64],
    options: PrecisionOptions,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Categories and boxes of an image's results: the moved objects first, false ones behind."""
    count = options.detections
    true = min(len(boxes), count)
    palette = np.concatenate((categories, rng.choice(COCO_CATEGORY_IDS, _FALSE_CATEGORIES)))
    named = rng.choice(palette, count)
    kept = rng.random(true) < 0.9
    named[:true] = np.where(kept, categories[:true], named[:true])
    found = _boxes(rng, count, options.size)
    sides = boxes[:true, [2, 3, 2, 3]]
    moved = boxes[:true] + rng.normal(0, 0.06, (true, 4)) * sides
    moved[:, 2:] = moved[:, 2:].clip(0.2 * sides[:, 2:])
    found[:true] = moved
    return named, found


def _shaped(
    image: int, categories: npt.NDArray[np.int64], boxes: npt.NDArray[np.float64], options: PrecisionOptions
) -> Iterator[dict[str, Any]]:
    """Fields that annotations and results share; with masks also a run-length code, its counts as text."""
    codes = _ellipses(boxes, options.size) if options.masks else [None] * len(boxes)
    for category, box, code in zip(categories.tolist(), boxes.tolist(), codes, strict=True):
        fields = {"image_id": image, "category_id": category, "bbox": box}
        yield fields if code is None else fields | {"segmentation": code}


def _ellipses(boxes: npt.NDArray[np.float64], size: tuple[int, int]) -> Records:
    """Run-length codes of the ellipses inside boxes (n, 4) x, y, w, h."""
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    circle = 0.5 + 0.5 * np.stack((np.cos(angle), np.sin(angle)), axis=1)  # (corners, 2) in the unit square
    corners = boxes[:, None, :2] + circle * boxes[:, None, 2:]  # (n, corners, 2)
    codes = coco_mask.frPyObjects([polygon.ravel().tolist() for polygon in corners], *size)
    return [{"size": list(size), "counts": code["counts"].decode("ascii")} for code in codes]
