"""Pictures of the same few images of a split for every task: ground truth next to a model's predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import read_raw
from visft_ds.data.plan import generator
from visft_ds.data.shards import ShardReader
from visft_ds.parallel import distributed
from visft_ds.tasks import TASKS
from visft_ds.tasks.pictures import Picture
from visft_ds.tasks.spec import Example, Predict
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import Vocabulary


def example_positions(reader: ShardReader, tasks: Sequence[str], count: int, limit: int | None = None) -> list[int]:
    """The first images with something to show of every task (objects, captions): the same for all models."""
    index = reader.manifest.index[:limit]
    shown = np.ones(len(index), dtype=bool)
    for task in tasks:
        shown &= index["num_captions" if TASKS[task].config.labels == "captions" else "num_annotations"] > 0
    positions: list[int] = np.flatnonzero(shown)[:count].tolist()
    return positions


def draw_examples(
    predict: Predict,
    reader: ShardReader,
    streams: Mapping[str, Stream],
    vocabulary: Vocabulary | None,
    count: int,
    *,
    threshold: float = 0.5,
    limit: int | None = None,
) -> dict[str, dict[int, Picture]]:
    """Task -> image id -> ground truth beside prediction. Collective: every rank predicts the same, the main one draws.

    Args:
        count: how many images; see `example_positions`.
        threshold: least score that is drawn.
        limit: only of the first so many images.
    """
    tasks = [task for stream in streams.values() for task in stream.tasks]
    positions = example_positions(reader, tasks, count, limit)
    names = {category.coco_id: category.name for category in reader.manifest.categories}
    pictures: dict[str, dict[int, Picture]] = {task: {} for task in tasks}
    for stream in streams.values():
        pipeline = pipeline_of(stream, vocabulary, train=False)
        for start in range(0, len(positions), stream.micro_batch):
            raws = [read_raw(reader, index) for index in positions[start : start + stream.micro_batch]]
            batch = pipeline.collate([pipeline.transform(raw, generator(0)) for raw in raws])
            outputs = TASKS[stream.tasks[0]].outputs(predict, batch, stream.image)
            for task in stream.tasks if distributed.is_main() else ():
                results = TASKS[task].results(outputs[task], batch, vocabulary, stream.classes.get(task))
                for raw in raws:
                    of_image = [result for result in results if result["image_id"] == raw.image_id]
                    example = Example(raw, of_image, names, threshold)
                    pictures[task][raw.image_id] = TASKS[task].picture(example)
    return pictures
