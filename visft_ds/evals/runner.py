"""Evaluation of every enabled task on a split: each image once over all ranks, numbers on the main process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visft_ds.config.schema import TaskConfig
from visft_ds.data.loader import Pipeline, coco_dataset, evaluation_batches, read_raw
from visft_ds.data.samples import Batch
from visft_ds.data.shards import ShardReader
from visft_ds.evals.coco import coco_average_precision, pack_results, unpack_results
from visft_ds.evals.pictures import Picture, draw_detections, palette
from visft_ds.parallel import distributed
from visft_ds.tasks import TASKS

Results = list[dict[str, Any]]  #: COCO results format


@dataclass(frozen=True)
class Evaluator:
    """How a task's results are gathered and judged."""

    pack: Callable[[Results], Any]  #: compact form that travels between ranks
    unpack: Callable[[Any], Results]
    measure: Callable[..., dict[str, float]]  #: (COCO ground truth, results, *, per_category) -> named numbers
    draw: Callable[[Picture, Results, Results, Mapping[int, str], float], Picture]
    #: (image, its annotations, its results, category names by id, least score) -> ground truth beside prediction


def _draw_boxes(
    image: Picture, annotations: Results, results: Results, names: Mapping[int, str], threshold: float
) -> Picture:
    known = [result for result in results if result["category_id"] in names]
    return draw_detections(
        image,
        [annotation["bbox"] for annotation in annotations],
        [names[annotation["category_id"]] for annotation in annotations],
        [result["bbox"] for result in known],
        [names[result["category_id"]] for result in known],
        [result["score"] for result in known],
        threshold=threshold,
        colours=palette(list(names.values())),
    )


EVALUATORS: Mapping[str, Evaluator] = {
    "detection": Evaluator(pack_results, unpack_results, coco_average_precision, _draw_boxes),
}


@dataclass(frozen=True)
class TaskEvaluation:
    """Outcome of one task; on the main process only."""

    task: str
    metrics: Mapping[str, float]
    results: Results
    ground_truth: Mapping[str, Any]  #: a COCO dictionary of the images that were evaluated


def pipeline_of(task: str, config: TaskConfig, *, train: bool) -> Pipeline:
    """Transform and collate of a task, with the sizes of its configuration."""
    spec = TASKS[task]
    return Pipeline(spec.build_transform(train=train, **config.image.model_dump()), spec.collate)


def evaluate(
    predict: Callable[[Batch], Mapping[str, Any]],
    reader: ShardReader,
    tasks: Mapping[str, TaskConfig],
    *,
    limit: int | None = None,
    threads: int = 2,
    per_category: bool = False,
) -> list[TaskEvaluation]:
    """Run every task over the split. Collective: all ranks call it, the main process gets the outcome.

    Args:
        predict: batch -> {task: output of its head}, e.g. `ZeroEngine.predict`.
        tasks: enabled tasks; `micro_batch` is the evaluation batch size.
        limit: first so many images; None: all.
        per_category: measure each category too.
    """
    outcome = []
    for task, config in tasks.items():
        evaluator, spec = EVALUATORS[task], TASKS[task]
        own: Results = []
        for batch in evaluation_batches(
            reader,
            pipeline_of(task, config, train=False),
            config.micro_batch,
            distributed.rank(),
            distributed.world_size(),
            limit,
            threads=threads,
        ):
            own += spec.postprocess(predict(batch)[task], batch)
        parts = distributed.gather_objects(evaluator.pack(own))
        if parts is None:
            continue
        results = [result for part in parts for result in evaluator.unpack(part)]
        count = len(reader) if limit is None else min(limit, len(reader))
        truth = coco_dataset(reader, range(count))
        # In the order of the data set, however many ranks there were: result files of two models can be compared.
        place = {image["id"]: number for number, image in enumerate(truth["images"])}
        results.sort(key=lambda result: place[result["image_id"]])
        metrics = evaluator.measure(truth, results, per_category=per_category)
        outcome.append(TaskEvaluation(task, metrics, results, truth))
    return outcome


def draw_examples(
    evaluation: TaskEvaluation, reader: ShardReader, count: int, *, threshold: float = 0.5
) -> dict[int, Picture]:
    """Ground truth beside prediction for the first `count` evaluated images that have objects, by image id.

    The choice depends on the data set alone, so that pictures of several models show the same images. Crowd regions are
    not drawn.
    """
    names = {category["id"]: category["name"] for category in evaluation.ground_truth["categories"]}
    draw = EVALUATORS[evaluation.task].draw
    pictures: dict[int, Picture] = {}
    for index, image in enumerate(evaluation.ground_truth["images"]):
        if len(pictures) >= count:
            break
        raw = read_raw(reader, index)
        true = [dict(annotation) for annotation in raw.annotations if not annotation.get("iscrowd", 0)]
        if true and raw.image is not None:
            own = [result for result in evaluation.results if result["image_id"] == image["id"]]
            pictures[image["id"]] = draw(raw.image, true, own, names, threshold)
    return pictures


def as_metrics(outcome: Sequence[TaskEvaluation]) -> dict[str, float]:
    """All numbers of an evaluation in one flat dict."""
    return {name: value for part in outcome for name, value in part.metrics.items()}
