"""Labels and images at the edge of what a data set may hold, through transforms, heads and criteria of all
tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.options import options
from tests.parallel.engine_case import VOCABULARY, build, loss_denominators
from visft_ds.data.samples import RawSample
from visft_ds.model import MultiTaskModel
from visft_ds.randomness import generator
from visft_ds.settings.task_schema import SHARED, SharedImage, Stream
from visft_ds.tasks import TASKS
from visft_ds.tasks.transform import pipeline_of
from visft_ds.tasks.vocabulary import Vocabulary

WORDS = Vocabulary(tuple(f"word{number}" for number in range(VOCABULARY - 4)))
SQUARE = [[10.0, 10.0, 40.0, 10.0, 40.0, 30.0, 10.0, 30.0]]


def thing(bbox: Sequence[float] = (10, 10, 30, 20), **fields: Any) -> Mapping[str, Any]:
    """An annotation as shards hold it."""
    entry = {"id": 1, "category_id": 1, "bbox": list(bbox), "iscrowd": 0, "segmentation": SQUARE, "area": 600}
    return {**entry, **fields}


CASES: dict[str, dict[str, Any]] = {
    "no objects": {"annotations": []},
    "300 objects": {"annotations": [thing((n % 60, n % 40, 3 + n % 9, 3)) for n in range(300)]},
    "degenerate boxes": {"annotations": [thing((5, 5, 0, 9)), thing((5, 5, 9, 0)), thing((200, 5, 9, 9))]},
    "a mask of one pixel": {"annotations": [thing((3, 3, 1, 1), segmentation=[[3, 3, 4, 3, 4, 4, 3, 4]])]},
    "a crowd alone": {"annotations": [thing(iscrowd=1)]},
    "no captions": {"captions": []},
    "a caption of signs": {"captions": ["?! ... \N{PILE OF POO}"]},
    "unknown words": {"captions": ["never heard of these"]},
    "one pixel": {"size": (1, 1)},
    "a strip": {"size": (2, 700)},
    "1800 x 1200": {"size": (1200, 1800)},
}


def raw(case: Mapping[str, Any]) -> RawSample:
    size = case.get("size", (50, 70))
    image = np.full((*size, 3), 90, dtype=np.uint8)
    captions = case.get("captions", ["word1 word2 word3"])
    return RawSample(0, 7, size, image, case.get("annotations", [thing()]), captions)


def streams() -> list[Stream]:
    """Each task alone and all together, at sizes a test can pay."""
    detection = {"min_size_train": (42,), "max_size_train": 84, "crop_min_size": (42,), "crop_size": (28, 42)}
    alone: dict[str, dict[str, Any]] = {
        "detection": {**detection, "min_size_test": 42, "max_size_test": 84},
        "segmentation": {"size": 56, "min_size_test": 42, "max_size_test": 84},
        "captioning": {"size": 42},
    }
    shared = {"min_size_train": (42,), "max_size_train": 84, "min_size_test": 42, "max_size_test": 84}
    return [
        Stream(name, (name,), 1.0, 1, 1, options(name, "image", **image)) for name, image in alone.items()
    ] + [Stream(SHARED, tuple(alone), 1.0, 1, 1, SharedImage().model_dump() | shared)]


@pytest.fixture(scope="module")
def model() -> MultiTaskModel:
    return build(1)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stream", streams(), ids=lambda stream: stream.name)
def test_it_trains_and_predicts(case: str, stream: Stream, model: MultiTaskModel) -> None:
    for key in range(2):  # two draws of the geometry
        pipeline = pipeline_of(stream, WORDS, train=True)
        batch = pipeline.collate([pipeline.transform(raw(CASES[case]), generator(key))])
        assert tuple(batch.targets) == stream.tasks
        losses = model.train()(batch, loss_denominators(model, batch, 1))
        assert all(value.isfinite() for value in losses.values()), losses
        losses["loss"].backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)
        model.zero_grad(set_to_none=True)
    pipeline = pipeline_of(stream, WORDS, train=False)
    batch = pipeline.collate([pipeline.transform(raw(CASES[case]), generator(0))])
    with torch.no_grad():
        outputs = model.eval()(batch)
    for task in stream.tasks:
        results = TASKS[task].results(outputs[task], batch, WORDS)
        assert results and {result["image_id"] for result in results} == {7}
        for result in results:
            if "segmentation" in result:
                assert result["segmentation"]["size"] == list(raw(CASES[case]).size)
