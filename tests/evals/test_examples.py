"""Pictures of fixed images: which ones, and that each shows its own image for every task."""

from __future__ import annotations

import numpy as np
import torch

from tests.evals.conftest import World, load_stage2
from visft_ds.data.shards import Manifest, ShardReader
from visft_ds.evaluation import collect, draw_examples, example_positions
from visft_ds.tasks.pictures import Picture, split_panels

TASKS = ("detection", "segmentation", "captioning")


def test_positions(split: Manifest) -> None:
    """The first images that show something of every task; crowds and images without objects are passed
    over.
    """
    with ShardReader(split) as reader:
        assert split.index["num_annotations"][:6].tolist() == [1, 3, 3, 0, 0, 2]
        assert (
            example_positions(reader, TASKS, 4) == example_positions(reader, ["detection"], 4) == [0, 1, 2, 5]
        )
        assert example_positions(reader, ["captioning"], 4) == [0, 1, 2, 3]
        assert example_positions(reader, TASKS, 4, limit=2) == [0, 1]


def test_every_task_has_its_picture_of_every_image(world: World) -> None:
    model = load_stage2(world)

    def draw() -> dict[str, dict[int, Picture]]:
        """Of two images; a threshold of 0, because a head that never learnt is sure of nothing."""
        with ShardReader(Manifest.load(world.shards, "val")) as reader:
            collected = collect(model.predict, reader, world.configs[2].visft.streams(), model.vocabulary)
            assert collected is not None
            return draw_examples(collected, reader, 2, threshold=0.0)

    drawn = draw()
    shown = list(drawn["detection"])
    assert len(shown) == 2 and all(list(drawn[task]) == shown for task in TASKS)
    with torch.no_grad():
        for parameter in model.module.heads.parameters():
            parameter.copy_(parameter.flip(0))
    again = draw()
    for task in TASKS:
        truths = []
        for image_id in shown:
            (truth, said), (same, other) = (split_panels(of[task][image_id]) for of in (drawn, again))
            height = min(len(truth), len(same))  # a longer caption makes a higher picture
            assert np.array_equal(truth[:height], same[:height]), f"{task}: the truth depends on the model"
            assert not np.array_equal(said[:height], other[:height]), f"{task}: no prediction is drawn"
            truths.append(truth)
        assert not np.array_equal(*truths)
