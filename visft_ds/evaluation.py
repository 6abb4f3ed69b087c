"""Evaluation on a split: each image once over all ranks (`collect`), then numbers and pictures on the main
process.

They are apart so that no rank has to wait in a collective while the main process computes average precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from visft_ds import distributed
from visft_ds.data.dataset import read_raw
from visft_ds.data.loader import evaluation_batches
from visft_ds.data.shards import ShardReader
from visft_ds.monitor.console import gauge
from visft_ds.settings.task_schema import Stream
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.example import Example
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.task import Predict
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import Vocabulary


def collect(
    predict: Predict,
    reader: ShardReader,
    streams: Mapping[str, Stream],
    vocabulary: Vocabulary | None,
    *,
    limit: int | None = None,
    places: Sequence[int] | None = None,
    num_workers: int = 0,
) -> dict[str, Results] | None:
    """Run every task over the split. Collective: all ranks call it; the main process gets {task: results},
    others None.

    Results are in the order of the data set, however many ranks there were: files of two models can be
    compared.

    Args:
        streams: what to evaluate, with the classes of its heads; `micro_batch` is the evaluation batch size.
        limit: first so many images; None: all.
        places: of the images in the split, instead of a limit.
    """
    gathered: dict[str, Results] = {}
    rank, world = distributed.rank(), distributed.world_size()
    chosen = np.arange(len(reader))[:limit] if places is None else np.array(places)
    for stream in streams.values():
        ours: dict[str, Results] = {task: [] for task in stream.tasks}
        what, pipeline = f"evaluating {', '.join(stream.tasks)}", pipeline_of(stream, vocabulary, train=False)
        given = (reader, pipeline, stream.micro_batch, rank, world, chosen)
        with gauge(what, len(chosen), "images") as bar:
            for batch in evaluation_batches(*given, num_workers=num_workers):
                outputs = TASKS[stream.tasks[0]].outputs(predict, batch, stream.image)
                for task, results in ours.items():
                    results += TASKS[task].results(outputs[task], batch, vocabulary, stream.classes.get(task))
                bar.update(min(world * len(batch.real), len(chosen) - bar.n))
        for task, results in ours.items():
            parts = distributed.gather_objects(results)
            if parts is not None:
                gathered[task] = [result for part in parts for result in part]
    if not distributed.is_main():
        return None
    place = {image_id: number for number, image_id in enumerate(reader.manifest.index["image_id"].tolist())}
    for results in gathered.values():
        results.sort(key=lambda result: place[result["image_id"]])
    return gathered


def measure(
    collected: Mapping[str, Results],
    reader: ShardReader,
    *,
    limit: int | None = None,
    per_category: bool = False,
) -> tuple[dict[str, float], list[str]]:
    """Compare results with the labels of the first `limit` images of the split. No collective: for one
    process.

    Returns the numbers of all tasks, and a line for each task that cannot be judged: it takes nothing from
    the others.
    """
    metrics, problems = dict[str, float](), list[str]()
    for task, results in collected.items():
        try:
            truth = TASKS[task].truth(reader, range(min(limit or len(reader), len(reader))))
            metrics |= TASKS[task].measure(truth, results, per_category)
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
        shown &= index["num_captions" if TASKS[task].config.labels == "captions" else "num_annotations"] > 0
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
    raws = [read_raw(reader, place) for place in example_positions(reader, list(collected), count, limit)]
    names = {category.coco_id: category.name for category in reader.manifest.categories}
    pictures: dict[str, dict[int, Picture]] = {}
    for task, results in collected.items():
        found: dict[int, Results] = {raw.image_id: [] for raw in raws}
        for result in results:
            if result["image_id"] in found:
                found[result["image_id"]].append(result)
        examples = [Example(raw, found[raw.image_id], names, threshold) for raw in raws]
        pictures[task] = {one.raw.image_id: TASKS[task].picture(one) for one in examples}
    return pictures
