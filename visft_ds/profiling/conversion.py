"""What packing a COCO data set costs: images a second by depth of the check and by workers, and the annotations alone.

Images are real ones where a COCO tree is given, else pictures of smooth noise that compress like photographs. Rates are
per second of processor time, which other programs on the machine do not change much, and per second of wall time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import simplejpeg

from visft_ds.monitor.console import Section
from visft_ds.profiling.record import circumstances
from visft_ds.profiling.timing import Spread
from visft_ds.shards.build import Options, build
from visft_ds.shards.images import CHECK_LEVELS, CheckLevel
from visft_ds.shards.source import SourceSelection, read_source

FORMAT, VERSION = "visft_ds conversion", 1
#: COCO train2017 (https://cocodataset.org): images with instances, instances, captions.
COCO_SIZES = (117_266, 860_001, 591_753)
#: Numbers in the polygons of an instance: their mean in COCO is about 47; crowds are one in a hundred.
_POLYGON_NUMBERS, _CROWD_SHARE = 47, 0.01
_HEIGHT, _WIDTH = 480, 640
_WORDS = ("a", "man", "riding", "horse", "near", "green", "field", "with", "two", "dogs", "and", "some", "people")


@dataclass(frozen=True)
class ConversionOptions:
    """What is measured. Raises ValueError for what is not possible."""

    images: int = 200
    photographs: Path | None = None  #: a folder of JPEG files, repeated up to `images`; None: made-up pictures
    checks: tuple[CheckLevel, ...] = CHECK_LEVELS
    workers: int = 1  #: 1, 2, ... up to so many
    repeats: int = 3
    annotations: int = 0  #: instances of a made-up JSON file of COCO's proportions; 0: that part is left out

    def __post_init__(self) -> None:
        for name in ("images", "workers", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.annotations < 0:
            raise ValueError(f"--annotations {self.annotations} must not be negative")
        if self.photographs is not None and not any(self.photographs.glob("*.jpg")):
            raise ValueError(f"--photographs {self.photographs} holds no *.jpg files")


def measure_conversion(options: ConversionOptions) -> dict[str, Any]:
    """All rates, a record of JSON values; works in a temporary folder."""
    load = os.getloadavg()
    with _folder() as folder:
        size = _make_images(folder, options)
        rates = _rates(folder, options)
    labels = _annotations(options) if options.annotations else None
    return {
        "format": FORMAT,
        "version": VERSION,
        **circumstances(load),
        "options": asdict(options) | {"photographs": options.photographs and options.photographs.name},
        "bytes": size,
        "rates": rates,
        "annotations": labels,
    }


def make_title(record: Mapping[str, Any]) -> str:
    """One line that says what was measured."""
    return f"packing {record['options']['images']} images"


def make_sections(record: Mapping[str, Any]) -> list[Section]:
    """The record as tables."""
    options = record["options"]
    name = f"photographs of {options['photographs']}" if options["photographs"] else "made-up pictures"
    facts = [
        ("of", f"{name}, {record['bytes'] / options['images'] / 1e3:.0f} kB each"),
        ("load", ", ".join(f"{value:.2f}" for value in record["load"]) + f" before, {record['cores']} cores"),
    ]
    rows = []
    for rate in record["rates"]:
        core, wall = rate["per_core"], rate["per_second"]
        rows.append(
            (
                f"check {rate['check']}, {rate['workers']} worker{'s' if rate['workers'] > 1 else ''}",
                f"{core['median']:.0f}",
                f"{core['least']:.0f} .. {core['most']:.0f}",
                f"{wall['median']:.0f}",
            )
        )
    header = ("", "per core", "all", "per second")
    sections = [Section("on", facts), Section(f"images, n {options['repeats']}", rows, header)]
    if record["annotations"] is not None:
        labels = record["annotations"]
        sections.append(
            Section(
                "annotations",
                [
                    ("file", f"{labels['instances']:,} instances, {labels['captions']:,} captions"),
                    ("", f"of {labels['images']:,} images, {labels['bytes'] / 1e6:.0f} MB"),
                    ("to labels", f"{labels['seconds']:.1f} s of processor time"),
                    ("peak memory", f"{labels['peak_bytes'] / 1e9:.2f} GB"),
                ],
            )
        )
    return sections


# ------------------------------------------------------------------------------------------------------- images


def _rates(folder: Path, options: ConversionOptions) -> list[dict[str, Any]]:
    """Rates of each depth and number of workers; the repetitions go round, so that a busy moment meets all alike."""
    cases = [(check, workers) for check in options.checks for workers in range(1, options.workers + 1)]
    per_core: dict[tuple[CheckLevel, int], list[float]] = {case: [] for case in cases}
    per_second: dict[tuple[CheckLevel, int], list[float]] = {case: [] for case in cases}
    out = folder / "out"
    for _ in range(options.repeats):
        for check, workers in cases:
            settings = Options(folder / "images", folder / "instances.json", None, out, "bench", check=check)
            began, processor = time.perf_counter(), time.process_time()
            build(settings, workers=workers)
            per_second[check, workers].append(options.images / (time.perf_counter() - began))
            per_core[check, workers].append(options.images / (time.process_time() - processor))
            shutil.rmtree(out)
    return [
        {
            "check": check,
            "workers": workers,
            "per_core": asdict(Spread.of(per_core[check, workers])),
            "per_second": asdict(Spread.of(per_second[check, workers])),
        }
        for check, workers in cases
    ]


def _make_images(folder: Path, options: ConversionOptions) -> int:
    """Write images and a small JSON file; returns the bytes of all images."""
    (folder / "images").mkdir()
    photographs = sorted(options.photographs.glob("*.jpg")) if options.photographs else []
    entries, size = [], 0
    for number in range(options.images):
        data = photographs[number % len(photographs)].read_bytes() if photographs else _picture(number)
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        (folder / "images" / f"{number:06d}.jpg").write_bytes(data)
        entries.append({"id": number, "file_name": f"{number:06d}.jpg", "height": height, "width": width})
        size += len(data)
    content = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    (folder / "instances.json").write_bytes(orjson.dumps(content))
    return size


def _picture(number: int) -> bytes:
    """A JPEG of about 170 kB, as COCO's photographs have."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (_HEIGHT // 16, _WIDTH // 16, 3)).repeat(16, 0).repeat(16, 1)
    pixels = (coarse + rng.normal(0, 9, (_HEIGHT, _WIDTH, 3))).clip(0, 255).astype(np.uint8)
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="444")
    return encoded


# -------------------------------------------------------------------------------------------------- annotations


def _annotations(options: ConversionOptions) -> dict[str, Any]:
    """Time and memory of the annotations, in a process of its own so that its peak is its own."""
    with _folder() as folder:
        size = write_annotations(folder, options.annotations)
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            measured: dict[str, Any] = pool.apply(read_annotations, (folder,))
    return measured | {"bytes": size}


def read_annotations(folder: Path) -> dict[str, Any]:
    """Read what `write_annotations` wrote; seconds of processor time and the peak memory of this process."""
    before = time.process_time()
    source = read_source(folder / "instances.json", folder / "captions.json", SourceSelection())
    seconds = time.process_time() - before
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return {
        "images": len(source.images),
        "instances": sum(image.annotations for image in source.images),
        "captions": sum(len(image.captions) for image in source.images),
        "label_bytes": sum(len(image.label) for image in source.images),
        "seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def write_annotations(folder: Path, instances: int) -> int:
    """Write `instances.json` and `captions.json` with COCO's proportions; returns their bytes.

    Polygons have as many numbers as COCO's on average, from 6 to hundreds; one instance in a hundred is a crowd with a
    run-length code.
    """
    rng = np.random.default_rng(0)
    images = max(1, instances * COCO_SIZES[0] // COCO_SIZES[1])
    captions = instances * COCO_SIZES[2] // COCO_SIZES[1]
    entries = [
        {
            "license": number % 8 + 1,
            "file_name": f"{number:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{number:012d}.jpg",
            "height": _HEIGHT,
            "width": _WIDTH,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{number:010d}_b2a1e6e2a1_z.jpg",
            "id": number,
        }
        for number in range(images)
    ]
    categories = [{"supercategory": "thing", "id": number, "name": f"thing {number}"} for number in range(1, 81)]
    owners = rng.integers(0, images, instances).tolist()
    with open(folder / "instances.json", "wb") as file:
        file.write(b'{"info": {}, "images": ' + orjson.dumps(entries) + b', "annotations": [')
        for number, owner in enumerate(owners):
            file.write(b", " if number else b"")
            file.write(json.dumps(_instance(number, owner, rng)).encode())
        file.write(b'], "categories": ' + orjson.dumps(categories) + b"}")
    texts = [" ".join(rng.choice(_WORDS, 10).tolist()).capitalize() + "." for _ in range(1000)]
    described = [
        {"image_id": owner % images, "id": number, "caption": texts[number % 1000]}
        for number, owner in enumerate(range(captions))
    ]
    (folder / "captions.json").write_bytes(orjson.dumps({"images": entries, "annotations": described}))
    return sum((folder / name).stat().st_size for name in ("instances.json", "captions.json"))


def _instance(number: int, owner: int, rng: np.random.Generator) -> dict[str, Any]:
    left, top, width, height = (
        round(float(value), 2) for value in rng.uniform((0, 0, 5, 5), (300, 200, _WIDTH - 300, _HEIGHT - 200))
    )
    crowd = rng.random() < _CROWD_SHARE
    if crowd:
        runs = rng.integers(1, 400, 400)
        runs[-1] += _HEIGHT * _WIDTH - runs.sum()
        segmentation: Any = {"size": [_HEIGHT, _WIDTH], "counts": runs.tolist()}
    else:
        points = max(3, int(rng.exponential(_POLYGON_NUMBERS / 2 - 3)) + 3)
        segmentation = [rng.uniform(0, 400, 2 * points).round(2).tolist()]
    return {
        "segmentation": segmentation,
        "area": round(width * height * 0.6, 4),
        "iscrowd": int(crowd),
        "image_id": owner,
        "bbox": [left, top, width, height],
        "category_id": number % 80 + 1,
        "id": number,
    }


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="visft_ds-") as name:
        yield Path(name)
