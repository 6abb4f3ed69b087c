"""Image classification as a fourth task: which kinds of objects are in an image. All that a task of one's own
takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visft_ds.data.samples import Batch, Map, RawSample, Sample, Targets
from visft_ds.data.transforms import Geometry, Op, Size, Square
from visft_ds.settings.fields import Positive, Rate, StrictModel
from visft_ds.settings.task_schema import TaskConfig
from visft_ds.tasks import Results
from visft_ds.tasks.task import Content, ImageTargets, Task

NAME, MOST = "classification", 91  # COCO's ids are below this


class ClassificationImage(StrictModel):
    size: Positive = 224  #: side of the square


class ClassificationHeadConfig(StrictModel):
    num_classes: Positive = MOST


class ClassificationLoss(StrictModel):
    bce: Rate = 1.0


class ClassificationTask(TaskConfig):
    metrics = ("class/accuracy",)
    main = "class/accuracy"
    image: ClassificationImage = ClassificationImage()
    head: ClassificationHeadConfig = ClassificationHeadConfig()
    loss: ClassificationLoss = ClassificationLoss()


@dataclass(frozen=True)
class ClassificationTargets(Targets):
    present: Tensor  #: (B, C) float32, 1 where an image has an object of the class


def image_targets(
    places: Mapping[int, int], raw: RawSample, ops: Sequence[Op], generator: Any
) -> dict[str, Any]:
    found = np.zeros(len(places) or MOST, dtype=np.float32)
    for annotation in raw.annotations:
        if annotation["area"] < 1:
            continue
        found[places.get(annotation["category_id"], annotation["category_id"])] = 1
    return {"present": found}


@dataclass(frozen=True)
class ClassificationOutput:
    logits: Tensor  #: (B, C)


class ClassificationHead(nn.Module):
    def __init__(self, in_channels: int, options: ClassificationHeadConfig) -> None:
        super().__init__()
        self.classifier = nn.Linear(in_channels, options.num_classes)

    def forward(self, maps: Sequence[Map]) -> ClassificationOutput:
        features, valid = maps[-1].features, maps[-1].valid
        shares = valid / valid.sum(dim=(1, 2), keepdim=True)
        return ClassificationOutput(self.classifier((features * shares[:, None]).sum(dim=(2, 3))))


class ClassificationCriterion:
    def __init__(self, head: ClassificationHeadConfig, loss: ClassificationLoss) -> None:
        self.weights = {"bce": loss.bce}

    def count(self, batch: Batch) -> dict[str, float]:
        return {"images": float(len(batch.images))}

    def __call__(
        self, output: Any, targets: Any, loss_denominators: Any, image_ids: Any = None
    ) -> dict[str, Tensor]:
        total = F.binary_cross_entropy_with_logits(output.logits, targets.present, reduction="sum")
        return {"bce": total / loss_denominators["images"]}


class Classification(Task):
    name = NAME
    config = ClassificationTask
    head = ClassificationHead
    losses = ClassificationCriterion

    def geometry(self, options: Mapping[str, Any]) -> Geometry:
        return Square(options["size"])

    def targets(
        self, train: bool, options: Any, vocabulary: Any, classes: Sequence[int] | None
    ) -> ImageTargets:
        return partial(image_targets, {category: place for place, category in enumerate(classes or ())})

    def pack(self, samples: Sequence[Sample], frame: Size) -> ClassificationTargets:
        present = np.stack([sample.targets[NAME]["present"] for sample in samples])
        return ClassificationTargets(torch.from_numpy(present))

    def blank(self, images: int, size: Size, content: Content, options: Any) -> ClassificationTargets:
        return ClassificationTargets(torch.zeros(images, MOST))

    def results(
        self,
        output: Any,
        batch: Batch,
        vocabulary: Any,
        classes: Sequence[int] | None = None,
        threshold: float = 0.0,
    ) -> Results:
        scores, best = output.logits.sigmoid().max(dim=1)
        rows = zip(batch.image_ids.tolist(), batch.real.tolist(), scores.tolist(), best.tolist(), strict=True)
        ids = range(MOST) if classes is None else classes
        return [
            {"image_id": image, "category_id": ids[place], "score": s}
            for image, real, s, place in rows
            if real
        ]

    def measure(
        self, truth: Mapping[str, Any], results: Results, head: Any, of_record: bool
    ) -> dict[str, float]:
        present = {(annotation["image_id"], annotation["category_id"]) for annotation in truth["annotations"]}
        return {
            "class/accuracy": float(
                np.mean([(result["image_id"], result["category_id"]) in present for result in results])
            )
        }

    def describe(self, results: Results, names: Mapping[int, str]) -> str:
        return ", ".join(
            f"{names.get(result['category_id'], result['category_id'])} {result['score']:.2f}"
            for result in results
        )


SPEC = Classification()
