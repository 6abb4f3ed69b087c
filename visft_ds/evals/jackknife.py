"""Intervals of what changed between two evaluations on the same images.

A number such as average precision is no mean over images. So it is computed again without each of PARTS parts of the
images, and the spread of these differences tells how much the one on all images is worth (the jackknife with groups:
Wolter, Introduction to Variance Estimation, chapter 4). Measured on a part alone, AP and CIDEr spread by other laws.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import stdtrit

from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.benchmarks.intervals import LEVEL, Interval
from visft_ds.evals.compare import Evaluation
from visft_ds.monitor.console import Gauge
from visft_ds.tasks import TASKS

#: Parts of the images, and images that differences are computed on again and again.
PARTS, MOST_IMAGES = 10, 1000


def changes(first: Evaluation, last: Evaluation, manifest: Manifest) -> dict[str, Interval]:
    """Name of a number -> its difference last - first, with an interval over images.

    Of more than MOST_IMAGES, the first so many tell the spread. Left out are numbers that one of the models, or some of
    the images, do not have.

    Raises:
        ValueError: evaluations of other images, too few images, results that cannot be read.
    """
    images = last.record["data"]["images"]
    for data in (first.record["data"], last.record["data"]):
        same = data.get("fingerprint") == manifest.fingerprint and data["images"] == images
        if not same or images > len(manifest):
            raise ValueError(f"{first.label} and {last.label} were not judged on the same images of {manifest.root}")
    used = min(images, MOST_IMAGES)
    if used < 2 * PARTS:
        raise ValueError(f"{images} images are too few, {2 * PARTS} are needed")
    places = {image_id: place for place, image_id in enumerate(manifest.index["image_id"][:used].tolist())}
    tasks = [task for task in last.tasks if task in first.tasks]
    found = {}
    with ShardReader(manifest) as reader, Gauge("intervals", PARTS * len(tasks), "measurements") as gauge:
        for task in tasks:
            measured = []
            pair = [[r for r in one.results(task) if r["image_id"] in places] for one in (first, last)]
            for part in range(PARTS):
                truth = TASKS[task].truth(reader, [place for place in range(used) if place % PARTS != part])
                kept = [[r for r in results if places[r["image_id"]] % PARTS != part] for results in pair]
                measured.append([TASKS[task].measure(truth, of_one, False) for of_one in kept])
                gauge.show(gauge.done + 1)
            for name in measured[0][0].keys() & first.metrics.keys() & last.metrics.keys():
                values = np.array([[of_one.get(name, -1.0) for of_one in both] for both in measured])
                if values.min() >= 0:
                    error = math.sqrt(
                        (PARTS - 1) ** 2 / PARTS * (values[:, 1] - values[:, 0]).var(ddof=1) * used / images
                    )
                    margin = float(stdtrit(PARTS - 1, (1 + LEVEL) / 2)) * error
                    change = last.metrics[name] - first.metrics[name]
                    found[name] = Interval(change, change - margin, change + margin)
    return found
