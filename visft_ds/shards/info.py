"""Facts of a split, and the images of a training step, as plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from visft_ds.data.labels import parse_label
from visft_ds.data.shards import Manifest, ShardReader

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
        "left_out": {name: reason for name, reason in manifest.left_out},
        "findings": {kind: count for kind, (count, _) in manifest.findings.items()},
        "fingerprint": manifest.fingerprint,
    }
    if categories:
        facts["category_table"] = _category_table(manifest)
    if shards:
        facts["shard_table"] = [
            {"name": shard.name, "samples": shard.count, "bytes": shard.bytes, "sha256": shard.sha256}
            for shard in manifest.shards
        ]
    return facts


def _spread(numbers: npt.NDArray[Any]) -> dict[str, float]:
    return {"mean": round(float(numbers.mean()), 2), "max": int(numbers.max())}


def _quantiles(numbers: npt.NDArray[Any]) -> list[int]:
    return [int(value) for value in np.quantile(numbers, _QUANTILES, method="nearest")]


def _category_table(manifest: Manifest) -> list[dict[str, Any]]:
    annotations: Counter[int] = Counter()
    images: Counter[int] = Counter()
    reader = ShardReader(manifest)
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


def describe_step(
    step: int, flags: Sequence[str], run: Path | None, data: str | None, dp_size: int | None, accumulation: int
) -> dict[str, Any]:
    """Task, place in the data and image ids of a training step, without a GPU and without training.

    Args:
        step: counted from 0.
        flags: those of visft train; none with `run`.
        run: a run folder, which says what its command did.
        data: the shards, if they have moved.
        dp_size, accumulation: where given, the part of each data-parallel rank and micro-batch.

    Raises:
        ValueError: what the configuration or the shards do not have; flags beside a run folder.
    """
    # Reading shards must not wait for torch, so what a run consists of is imported here.
    from visft_ds.config import resolve_arguments
    from visft_ds.prepare.datasets import open_training_data
    from visft_ds.prepare.places import DATA, find, paths_of, with_paths
    from visft_ds.prepare.streams import plan_of
    from visft_ds.run.folder import recorded_config

    if run is None:
        config = resolve_arguments([*flags, *(["--data", data] if data else [])])[1].visft
    elif flags:
        raise ValueError(f"{flags[0]}: with --run, the run folder says everything but --data")
    else:
        recorded = recorded_config(run)
        keys = (key for key in paths_of(recorded.visft) if key.startswith("visft.data.") and not (data and key == DATA))
        places = {key: str(find(run, recorded.visft, key)) for key in keys}
        config = with_paths(recorded, places | ({DATA: data} if data else {})).visft
    sets = open_training_data(config)
    plan = plan_of(config, sets)
    step_plan = plan.step(step)
    parts = {"all": step_plan}
    if dp_size is not None:
        plan.check_split(dp_size, accumulation)
        parts = {
            f"rank {rank} micro-batch {micro}": part
            for rank in range(dp_size)
            for micro, part in enumerate(plan.split(step_plan, rank, dp_size, accumulation))
        }
    manifest = sets[step_plan.dataset].manifest
    return {
        **{name: getattr(step_plan, name) for name in ("step", "task", "dataset", "position", "epoch")},
        "split": f"{manifest.root}/{manifest.split}",
        "state": plan.state(step),
        "image_ids": {name: manifest.index["image_id"][part.indices].tolist() for name, part in parts.items()},
    }
