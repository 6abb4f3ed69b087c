"""Pictures of fixed images: which ones, and that each shows its own image for every task, whatever the batches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny import TINY
from visft_ds.config import resolve
from visft_ds.config.task_schema import Stream
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.examples import draw_examples, example_positions
from visft_ds.model import MultiTaskModel
from visft_ds.parallel import distributed
from visft_ds.prepare.model import prepare_model
from visft_ds.prepare.streams import vocabulary_of
from visft_ds.tasks.pictures import Picture, split_panels
from visft_ds.tasks.vocabulary import Vocabulary

TASKS = ("detection", "segmentation", "captioning")


@dataclass(frozen=True)
class Case:
    """A tiny model with random weights, a split of twelve images, and how both modes go through it."""

    reader: ShardReader
    model: MultiTaskModel
    vocabulary: Vocabulary
    streams: Mapping[str, Mapping[str, Stream]]  #: mode -> its streams

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Any]:
        return dict(self.model(batch))

    def draw(self, mode: str, count: int, **options: Any) -> dict[str, dict[int, Picture]]:
        # a threshold of 0, because a head that never learnt is sure of nothing
        settings = {"predict": self.predict, "streams": self.streams[mode], "threshold": 0.0, **options}
        return draw_examples(reader=self.reader, vocabulary=self.vocabulary, count=count, **settings)


@pytest.fixture(scope="module")
def case(split: Manifest) -> Case:
    configs = {mode: resolve(stage=1, model="debug", settings=_settings(mode)) for mode in ("shared", "sampled")}
    config = configs["shared"]
    vocabulary = vocabulary_of(config.visft, split)
    assert vocabulary is not None
    model = prepare_model(config.visft, config.optimizer.params, vocabulary=vocabulary).module.eval()
    with torch.no_grad():  # larger than at the start, so that predictions depend on the image
        for parameter in model.heads.parameters():
            parameter.mul_(2)
    streams = {mode: config.visft.streams() for mode, config in configs.items()}
    return Case(ShardReader(split), model, vocabulary, streams)


def _settings(mode: str) -> list[str]:
    shares = [f"visft.tasks.{task}.updates=1" for task in TASKS]
    return [f"{key}={json.dumps(value)}" for key, value in {**TINY, "visft.mode": mode}.items()] + shares


def test_positions(case: Case) -> None:
    """The first images that show something of every task; crowds and images without objects are passed over."""
    index = case.reader.manifest.index
    assert index["num_annotations"][:6].tolist() == [1, 3, 3, 0, 0, 2]
    assert example_positions(case.reader, TASKS, 4) == [0, 1, 2, 5]
    assert example_positions(case.reader, ["detection"], 4) == [0, 1, 2, 5]
    assert example_positions(case.reader, ["captioning"], 4) == [0, 1, 2, 3]
    assert example_positions(case.reader, TASKS, 4, limit=2) == [0, 1]
    assert example_positions(case.reader, TASKS, 0) == []


def test_every_task_has_its_picture_of_every_image(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = case.draw("shared", 2)
    shown = case.reader.manifest.index["image_id"][:2].tolist()
    assert {task: list(pictures) for task, pictures in drawn.items()} == {task: shown for task in TASKS}
    with torch.no_grad():
        for parameter in case.model.heads.parameters():
            monkeypatch.setattr(parameter, "data", parameter.flip(0))
    again = case.draw("shared", 2)
    for task in TASKS:
        panels = []
        for image_id in shown:
            before, after = split_panels(drawn[task][image_id]), split_panels(again[task][image_id])
            assert before[0].shape == before[1].shape
            height = min(before[0].shape[0], after[0].shape[0])  # a longer caption makes a higher picture
            assert np.array_equal(before[0][:height], after[0][:height]), f"{task}: the truth depends on the model"
            assert not np.array_equal(before[1][:height], after[1][:height]), f"{task}: no prediction is drawn"
            panels.append(before[0])
        assert not np.array_equal(panels[0], panels[1])


def test_other_ranks_predict_as_often_and_draw_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3 every prediction is a collective operation."""
    calls: list[list[int]] = []

    def predict(batch: Batch) -> dict[str, Any]:
        calls.append(batch.image_ids.tolist())
        return case.predict(batch)

    case.draw("sampled", 2, predict=predict)
    main, calls = calls, []
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    drawn = case.draw("sampled", 2, predict=predict)
    assert calls == main and len(main) == 6
    assert drawn == {task: {} for task in TASKS}
