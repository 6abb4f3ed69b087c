"""Pictures of fixed images: which ones, and that each shows its own image for every task, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.evals.conftest import World, load_stage2
from visft_ds.data.samples import Batch
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evals.examples import draw_examples, example_positions
from visft_ds.evals.model import EvaluationModel
from visft_ds.parallel import distributed
from visft_ds.tasks.pictures import Picture, split_panels

TASKS = ("detection", "segmentation", "captioning")
Drawn = dict[str, dict[int, Picture]]


def test_positions(split: Manifest) -> None:
    """The first images that show something of every task; crowds and images without objects are passed over."""
    with ShardReader(split) as reader:
        assert split.index["num_annotations"][:6].tolist() == [1, 3, 3, 0, 0, 2]
        assert example_positions(reader, TASKS, 4) == example_positions(reader, ["detection"], 4) == [0, 1, 2, 5]
        assert example_positions(reader, ["captioning"], 4) == [0, 1, 2, 3]
        assert example_positions(reader, TASKS, 4, limit=2) == [0, 1]


@pytest.fixture
def reader(world: World) -> Iterator[ShardReader]:
    with ShardReader(Manifest.load(world.shards, "val")) as reader:
        yield reader


def _draw(world: World, reader: ShardReader, model: EvaluationModel, predict: Any = None) -> Drawn:
    """Of two images; a threshold of 0, because a head that never learnt is sure of nothing."""
    streams = world.configs[2].visft.streams()
    return draw_examples(predict or model.predict, reader, streams, model.vocabulary, 2, threshold=0.0)


def test_every_task_has_its_picture_of_every_image(world: World, reader: ShardReader) -> None:
    model = load_stage2(world)
    drawn = _draw(world, reader, model)
    shown = list(drawn["detection"])
    assert len(shown) == 2 and all(list(drawn[task]) == shown for task in TASKS)
    with torch.no_grad():
        for parameter in model.module.heads.parameters():
            parameter.copy_(parameter.flip(0))
    again = _draw(world, reader, model)
    for task in TASKS:
        panels = []
        for image_id in shown:
            before, after = split_panels(drawn[task][image_id]), split_panels(again[task][image_id])
            height = min(before[0].shape[0], after[0].shape[0])  # a longer caption makes a higher picture
            assert np.array_equal(before[0][:height], after[0][:height]), f"{task}: the truth depends on the model"
            assert not np.array_equal(before[1][:height], after[1][:height]), f"{task}: no prediction is drawn"
            panels.append(before[0])
        assert not np.array_equal(panels[0], panels[1])


def test_other_ranks_predict_as_often_and_draw_nothing(
    world: World, reader: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 every prediction is a collective operation."""
    calls: list[list[int]] = []
    model = load_stage2(world)

    def predict(batch: Batch) -> dict[str, Any]:
        calls.append(batch.image_ids.tolist())
        return model.predict(batch)

    _draw(world, reader, model, predict)
    main, calls = calls, []
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    drawn = _draw(world, reader, model, predict)
    assert calls == main and main and drawn == {task: {} for task in TASKS}
