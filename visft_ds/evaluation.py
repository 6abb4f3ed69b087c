"""Evaluation on a split: each image once over all ranks (`collect`), then numbers and drawings on the main
process.

They are apart so that no rank has to wait in a collective while the main process computes average precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from visft_ds import distributed
from visft_ds.data.dataset import read_raw
from visft_ds.data.loader import evaluation_batches
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.monitor.console import gauge
from visft_ds.settings.task_schema import Stream
from visft_ds.settings.tiles import Tiles
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.task import Predict
from visft_ds.tasks.tiles import merged
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import Vocabulary


def collect(
    predict: Predict,
    reader: ShardReader,
    streams: Mapping[str, Stream],
    vocabulary: Vocabulary | None,
    *,
    limit: int | None = None,
    positions: Sequence[int] | None = None,
    num_workers: int = 0,
) -> dict[str, Results] | None:
    """Run every task over the split. Collective: all ranks call it; the main process gets {task: results},
    others None.

    Results are in the order of the data set, however many ranks there were: files of two models can be
    compared. Tiles are put together, so that they are always those of whole images.

    Args:
        streams: what to evaluate, with the classes of its heads; `micro_batch` is the evaluation batch size.
        limit: first so many images; None: all.
        positions: of the images in the split, instead of a limit.
    """
    gathered: dict[str, Results] = {}
    rank = distributed.rank()
    world = distributed.world_size()
    indices = np.arange(len(reader))[:limit] if positions is None else np.array(positions)
    for stream in streams.values():
        own_results: dict[str, Results] = {task: [] for task in stream.tasks}
        pipeline = pipeline_of(stream, vocabulary, train=False)
        samples = indices
        if stream.tiles is not None:
            samples = stream.tiles.samples(reader.manifest.index, indices)
        batches = evaluation_batches(
            reader, pipeline, stream.micro_batch, rank, world, samples, num_workers=num_workers
        )
        unit = "images" if stream.tiles is None else "tiles"
        with gauge(f"evaluating {', '.join(stream.tasks)}", len(samples), unit) as bar:
            for batch in batches:
                outputs = TASKS[stream.tasks[0]].outputs(predict, batch, stream.image)
                for task, results in own_results.items():
                    results += TASKS[task].results(outputs[task], batch, vocabulary, stream.classes.get(task))
                bar.update(min(world * len(batch.real), len(samples) - bar.n))
        for task, results in own_results.items():
            of_ranks = distributed.gather_objects(results)
            if of_ranks is not None:
                results = [result for results_of_rank in of_ranks for result in results_of_rank]
                if stream.tiles is not None:
                    results = _of_pictures(results, reader.manifest, stream.tiles)
                gathered[task] = results
    if not distributed.is_main():
        return None
    image_ids = reader.manifest.index["image_id"].tolist()
    order = {image_id: index for index, image_id in enumerate(image_ids)}
    for results in gathered.values():
        results.sort(key=lambda result: order[result["image_id"]])
    return gathered


def _of_pictures(results: Results, manifest: Manifest, tiles: Tiles) -> Results:
    """Results of whole images, from those of tiles, whose `image_id` is the number of the tile."""
    by_picture = defaultdict[int, Results](list)
    for result in results:
        tile, picture = divmod(result["image_id"], len(manifest))
        by_picture[picture].append({**result, "image_id": tile})
    whole = Results()
    for picture, of_tiles in by_picture.items():
        row = manifest.index[picture]
        size = int(row["height"]), int(row["width"])
        image_id = int(row["image_id"])
        for result in merged(of_tiles, tiles.windows(*size), size):
            whole.append({"image_id": image_id, **result})
    return whole


def measure(
    collected: Mapping[str, Results],
    reader: ShardReader,
    heads: Mapping[str, Any],
    *,
    limit: int | None = None,
    of_record: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """Compare results with the labels of the first `limit` images of the split. No collective: for one
    process.

    `heads` are the settings of the heads by task, and `of_record` is that of `Task.measure`. Returns the
    numbers of all tasks, and a line for each task that cannot be judged: it takes nothing from the others.
    """
    metrics = dict[str, float]()
    problems = list[str]()
    indices = range(min(limit or len(reader), len(reader)))
    for task, results in collected.items():
        try:
            truth = TASKS[task].truth(reader, indices)
            metrics |= TASKS[task].measure(truth, results, heads[task], of_record)
        except ValueError as error:
            problems.append(f"{task}: {error}")
    return metrics, problems


def example_positions(
    reader: ShardReader, tasks: Sequence[str], count: int, limit: int | None = None
) -> list[int]:
    """The first images with something to show of every task (objects, captions): the same for all models."""
    index = reader.manifest.index[:limit]
    shown = np.ones(len(index), dtype=bool)
    for task in tasks:
        labels = TASKS[task].config.labels
        if labels == "captions":
            shown &= index["num_captions"] > 0
        elif labels not in ("depth", "panoptic"):
            shown &= index["num_annotations"] > 0
    positions: list[int] = np.flatnonzero(shown)[:count].tolist()
    return positions


def draw_examples(
    collected: Mapping[str, Results],
    reader: ShardReader,
    count: int,
    *,
    threshold: float = 0.5,
    limit: int | None = None,
) -> dict[str, dict[int, Picture]]:
    """Task -> image id -> ground truth beside prediction, of the images of `example_positions`.

    Args:
        threshold: least score that is drawn.
    """
    positions = example_positions(reader, list(collected), count, limit)
    samples = {sample.image_id: sample for sample in (read_raw(reader, position) for position in positions)}
    names = {category.coco_id: category.name for category in reader.manifest.every_category}
    drawings: dict[str, dict[int, Picture]] = {}
    for task, results in collected.items():
        by_image: dict[int, Results] = {image_id: [] for image_id in samples}
        for result in results:
            if result["image_id"] in by_image:
                by_image[result["image_id"]].append(result)
        drawings[task] = {}
        for image_id, sample in samples.items():
            example = Example(sample, by_image[image_id], names, threshold)
            drawings[task][image_id] = TASKS[task].picture(example)
    return drawings
