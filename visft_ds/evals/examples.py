"""Pictures of the same few images of a split for every task: ground truth beside what a model predicts."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from visft_ds.config.task_schema import Stream
from visft_ds.data.dataset import read_raw
from visft_ds.data.plan import generator
from visft_ds.data.samples import RawSample
from visft_ds.data.shards import ShardReader
from visft_ds.evals.caption_pictures import draw_caption
from visft_ds.evals.mask_pictures import decode_mask, draw_masks
from visft_ds.evals.pictures import Picture, draw_detections, palette
from visft_ds.evals.runner import Predict
from visft_ds.parallel import distributed
from visft_ds.prepare.streams import pipeline_of
from visft_ds.tasks import TASKS, Results
from visft_ds.tasks.captioning.vocabulary import Vocabulary


@dataclass(frozen=True)
class Example:
    """Image and a head's predictions for it."""

    raw: RawSample
    results: Results  #: of this image, in COCO's results format
    output: Any  #: of the head, for the batch the image was in
    place: int  #: of the image in that batch
    names: Mapping[int, str]  #: category names by raw id
    threshold: float  #: least score that is drawn

    def objects(self) -> list[Mapping[str, Any]]:
        """True objects; crowd regions are not drawn."""
        return [annotation for annotation in self.raw.annotations if not annotation.get("iscrowd", 0)]

    def known(self) -> Results:
        """Predicted objects of categories the data set has, with enough score."""
        return [r for r in self.results if r["category_id"] in self.names and r["score"] >= self.threshold]


def _draw_boxes(one: Example) -> Picture:
    true, found = one.objects(), one.known()
    return draw_detections(
        _pixels(one),
        [annotation["bbox"] for annotation in true],
        [one.names[annotation["category_id"]] for annotation in true],
        [result["bbox"] for result in found],
        [one.names[result["category_id"]] for result in found],
        [result["score"] for result in found],
        threshold=one.threshold,
        colours=palette(list(one.names.values())),
    )


def _draw_masks(one: Example) -> Picture:
    true, found = [a for a in one.objects() if a.get("segmentation")], one.known()
    return draw_masks(
        _pixels(one),
        [decode_mask(annotation["segmentation"], *one.raw.size) for annotation in true],
        [one.names[annotation["category_id"]] for annotation in true],
        [decode_mask(result["segmentation"], *one.raw.size) for result in found],
        [one.names[result["category_id"]] for result in found],
        [result["score"] for result in found],
        threshold=one.threshold,
        colours=palette(list(one.names.values())),
    )


def _draw_caption(one: Example) -> Picture:
    caption = one.results[0]["caption"] if one.results else ""
    words = caption.split()
    maps = one.output.attention[one.place, : len(words)].float().cpu().numpy()
    grid = math.isqrt(maps.shape[1])
    return draw_caption(_pixels(one), one.raw.captions, caption, words, maps.reshape(len(words), grid, grid))


#: Task -> ground truth beside prediction.
DRAW: Mapping[str, Callable[[Example], Picture]] = {
    "detection": _draw_boxes,
    "segmentation": _draw_masks,
    "captioning": _draw_caption,
}


def _pixels(one: Example) -> Picture:
    image, (height, width) = one.raw.image, one.raw.size
    assert image is not None
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height)))  # boxes are drawn in pixels of the original


def example_positions(reader: ShardReader, tasks: Sequence[str], count: int, limit: int | None = None) -> list[int]:
    """The first images with something to show of every task (objects, captions): the same for all models."""
    index = reader.manifest.index[:limit]
    shown = np.ones(len(index), dtype=bool)
    for task in tasks:
        shown &= index["num_captions" if TASKS[task].learns_from == "captions" else "num_annotations"] > 0
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

    What cannot be drawn (predictions that are not finite, say) is named in a warning and left out: no rank may leave
    while others go on to predict.

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
            outputs = predict(batch)
            for task in stream.tasks if distributed.is_main() else ():
                results = TASKS[task].results(outputs[task], batch, vocabulary, stream.classes.get(task))
                for place, raw in enumerate(raws):
                    own = [result for result in results if result["image_id"] == raw.image_id]
                    one = Example(raw, own, outputs[task], place, names, threshold)
                    try:
                        pictures[task][raw.image_id] = DRAW[task](one)
                    except ValueError as error:
                        print(f"warning: no {task} picture of image {raw.image_id}: {error}", file=sys.stderr)
    return pictures
