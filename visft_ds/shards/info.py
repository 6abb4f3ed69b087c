"""What a split holds, for people and for programs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.data.labels import parse_label
from visft_ds.data.manifest import Manifest
from visft_ds.data.shards import ShardReader

_QUANTILES = (0, 0.25, 0.5, 0.75, 1)


def describe(manifest: Manifest, *, categories: bool = False, shards: bool = False) -> dict[str, Any]:
    """Facts of a split as plain data.

    Args:
        categories: with a table of the categories and how often each occurs, for which all labels are read.
        shards: with a table of the shards.
    """
    index = manifest.index
    facts: dict[str, Any] = {
        "split": manifest.split,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "image_bytes": int(index["image_size"].sum()),
        "label_bytes": int(index["label_size"].sum()),
        "counts": dict(manifest.counts),
        "categories": len(manifest.categories),
        "words": len(manifest.vocabulary),
        "trainable_per_image": _spread(index["num_annotations"]),
        "captions_per_image": _spread(index["num_captions"]),
        "width": _quantiles(index["width"]),
        "height": _quantiles(index["height"]),
        "options": dict(manifest.options),
        "sources": {role: file["name"] for role, file in manifest.sources.items()},
        "quarantine_reasons": dict(Counter(bad["reason"] for bad in manifest.quarantine)),
        "quarantine": {bad["file_name"]: bad["reason"] for bad in manifest.quarantine},
        "findings": {finding["kind"]: finding["count"] for finding in manifest.findings},
        "fingerprint": manifest.fingerprint,
    }
    if categories:
        facts["category_table"] = _category_table(manifest)
    if shards:
        facts["shard_table"] = [
            {"name": one.name, "samples": one.count, "bytes": one.bytes, "sha256": one.sha256}
            for one in manifest.shards
        ]
    return facts


def _spread(numbers: npt.NDArray[Any]) -> dict[str, float]:
    return {"mean": round(float(numbers.mean()), 2), "max": int(numbers.max())}


def _quantiles(numbers: npt.NDArray[Any]) -> list[int]:
    return [int(value) for value in np.quantile(numbers, _QUANTILES, method="nearest")]


def _category_table(manifest: Manifest) -> list[dict[str, Any]]:
    annotations: Counter[int] = Counter()
    images: Counter[int] = Counter()
    with ShardReader(manifest) as reader:
        for place in range(len(reader)):
            label = parse_label(reader.read(place, "labels")[1] or b"")
            used = [annotation["category_id"] for annotation in label["annotations"]]
            annotations.update(used)
            images.update(set(used))
    return [
        {
            "id": category.id,
            "coco_id": category.coco_id,
            "name": category.name,
            "annotations": annotations[category.coco_id],
            "images": images[category.coco_id],
        }
        for category in manifest.categories
    ]
